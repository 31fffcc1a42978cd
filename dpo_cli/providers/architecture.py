"""A model without its weights: which of its layers an adapter changes, and what PEFT refuses, before anything is loaded.

The model is built on the meta device, where tensors have a shape and no values. PEFT adds the adapter by its own rules, and
the result is read. Three kinds of layers that PEFT would adapt are skipped here, and reported:

- the router of a mixture of experts under "all-linear": it would be trained without the loss that balances it
- weights that a state-space block passes to its kernels itself: an adapter would be ignored
- layers that no text reaches (an image encoder): an adapter there would learn nothing
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from dpo_cli.config.options import Config
from dpo_cli.errors import InvalidInput, Problem, RunFailed, invalid
from dpo_cli.models import target_layers
from dpo_cli.models.checks import not_causal
from dpo_cli.models.target_layers import ALL_LINEAR, KEY
from dpo_cli.plan.feasibility import BITSANDBYTES_FIX
from dpo_cli.plan.plan import Adapted, Plan
from dpo_cli.providers.classifier import HEAD, head_of, on_meta
from dpo_cli.strategies.strategies import STRATEGIES

LINEAR = (torch.nn.Linear, Conv1D)  # what PEFT takes for "all-linear"; includes bitsandbytes' layers
CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
# Tokens without values. A few are fast in a block that goes through them one by one; other blocks first group many.
FEW_TOKENS, MANY_TOKENS = 8, 512
Refusal = (ValueError, TypeError, NotImplementedError, RuntimeError, KeyError, AttributeError)  # the errors of PEFT and torch


def adapted(plan: Plan, config: PretrainedConfig) -> tuple[Adapted | None, LoraConfig | None]:
    """What a plan trains of a model with this configuration; None if it cannot be built without weights.

    Also its adapter, if that is a fresh one.
    """
    try:
        architecture = Architecture(config, plan.model_label, plan.strategy.gives_rewards)
    except Refusal:  # loading reports it, if the model is at fault
        return None, None
    if plan.config.lora_r == 0:
        return architecture.whole(), None
    start = plan.model.adapter if plan.goes_on else None
    if start is None:
        adapter, found = architecture.fresh(plan.config)
        return found, adapter
    return architecture.going_on(LoraConfig.from_pretrained(str(start.directory)), plan.config.lora_dropout), None


class Architecture:
    """A model by its configuration, with its LM head or a score head. `label` is its name in messages."""

    def __init__(self, config: PretrainedConfig, label: str, has_score: bool = False) -> None:
        self.config, self.label, self.has_score = config, label, has_score
        self.model = self.build()
        self.modules: dict[str, torch.nn.Module] = dict(self.model.named_modules())
        head = head_of(self.model) if has_score else self.model.get_output_embeddings()
        self.head = next((name for name, module in self.modules.items() if module is head), "")
        table = self.model.get_input_embeddings()  # PEFT adapts it if it is named
        self.table = next((name for name, module in self.modules.items() if module is table), "")
        self.linear = {name for name, module in self.modules.items() if isinstance(module, LINEAR)} - {self.head}
        self.experts = dict(_experts(self.modules))
        self.routers = set(_routers(self.modules, self.experts))

    def build(self) -> PreTrainedModel:
        """The model on the meta device."""
        if self.has_score:
            return on_meta(self.config, self.label)
        try:
            with no_init_weights(), torch.device("meta"):
                model = AutoModelForCausalLM.from_config(copy.deepcopy(self.config), attn_implementation="eager")
        except ImportError as error:
            raise RunFailed(f"cannot load {self.label}: {' '.join(str(error).split())}", "install what it names") from error
        except ValueError as error:
            if type(self.config) in AutoModelForCausalLM._model_mapping:
                raise
            raise InvalidInput([not_causal(self.label, self.config.model_type)]) from error
        model.tie_weights()  # else a tied head is counted as separate weights
        return cast(PreTrainedModel, model.eval())

    @property
    def weights(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())

    def whole(self) -> Adapted:
        """What a training without an adapter changes."""
        notes = (
            [f"the router ({_counted(self._kinds(self.routers))}) is trained, without load balancing"] if self.routers else []
        )
        return Adapted({}, self.weights, self.weights, tuple(notes))

    def going_on(self, adapter: LoraConfig, dropout: float) -> Adapted | None:
        """What an existing adapter changes when it is trained with this dropout; None if loading reports the error."""
        plain = replace(adapter, inference_mode=False, lora_dropout=0.0)
        try:
            touched = self._read_off(self._with(plain))
        except Refusal:
            return None
        if dropout and self.experts and not self._takes(replace(plain, lora_dropout=dropout)):
            raise InvalidInput([target_layers.on_experts(self.label, "lora_dropout")])
        return touched

    def fresh(self, config: Config) -> tuple[LoraConfig, Adapted]:
        """The adapter of a config, and what it changes; `InvalidInput` if PEFT refuses it."""
        wanted = lora_config(config)
        self._require_names(config)
        idle = {name: why for name, why in self._left_out(config).items() if target_layers.names(config.target_modules, name)}
        if idle and all(name in idle for name in self._known() if target_layers.names(config.target_modules, name)):
            message = f"no text reaches the layers of {self.label} that target_modules names: an adapter would learn nothing"
            fix = f"name others: its linear layers are {self._linear_kinds()}"
            raise invalid("target-unreached", message, fix, KEY)
        put_on = self._tried(config, replace(wanted, exclude_modules=sorted(idle)) if idle else wanted)
        touched, parameters = (set(names) for names in _targeted(put_on))
        if config.target_modules == ALL_LINEAR:
            routers = {name for name in parameters if name.removesuffix(".weight") in self.routers}
            idle |= {name.removesuffix(".weight"): "router" for name in routers}
            parameters -= routers
        if idle:
            wanted = self._narrowed(wanted, put_on.peft_config["default"], touched, parameters)
            put_on = self._tried(config, wanted)
        notes = self._notes(config, idle, touched, parameters)
        return wanted, replace(self._read_off(put_on), notes=tuple(notes))

    def _narrowed(self, wanted: LoraConfig, resolved: LoraConfig, touched: set[str], parameters: set[str]) -> LoraConfig:
        """The adapter on these layers only, by names for other programs: the last name of a layer if that is enough."""
        others = self.modules.keys() - touched
        ends = {name.rpartition(".")[2] for name in touched}
        clear = {end for end in ends if not any(target_layers.names([end], name) for name in others)}
        modules = clear | {name for name in touched if name.rpartition(".")[2] not in clear}
        experts = resolved.target_parameters or ()
        kept = {short for short in experts if any(target_layers.names([short], one) for one in parameters)}
        return replace(
            wanted,
            target_modules=sorted(modules) or None,
            target_parameters=sorted(kept) or None,
            rank_pattern=resolved.rank_pattern,
            alpha_pattern=resolved.alpha_pattern,
        )

    def _with(self, adapter: LoraConfig) -> PeftModel:
        """A separate model with the adapter; PEFT changes both."""
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the trainer's model gives them again
            try:
                return cast(PeftModel, get_peft_model(self.build(), copy.deepcopy(adapter)))
            except ImportError as error:  # PEFT imports bitsandbytes if it is installed
                raise RunFailed(f"bitsandbytes cannot be used: {error}", BITSANDBYTES_FIX) from error

    def _tried(self, config: Config, adapter: LoraConfig) -> PeftModel:
        """The model with the adapter; if PEFT refuses it, `InvalidInput` about the option that is the reason."""
        try:
            return self._with(adapter)
        except Refusal as error:
            reason = " ".join(str(error).split())[:300]
        keys = [key for key in ("lora_dropout", "use_dora") if getattr(config, key)]
        plain = replace(adapter, lora_dropout=0.0, use_dora=False)
        if keys and self.experts and self._takes(plain):
            one = [key for key in keys if not self._takes(replace(plain, **{key: getattr(adapter, key)}))]
            raise InvalidInput([target_layers.on_experts(self.label, key) for key in one or keys])
        key = next((key for key in keys if self._takes(replace(adapter, **{key: type(getattr(adapter, key))()}))), KEY)
        message = f"PEFT cannot put this adapter on {self.label}: {reason}"
        fix = f"change {key}; the linear layers are {self._linear_kinds()}"
        raise invalid("adapter-refused", message, fix, key)

    def _takes(self, adapter: LoraConfig) -> bool:
        try:
            self._with(adapter)
        except Refusal:  # another option is at fault, or this one too
            return False
        return True

    def _known(self) -> set[str]:
        """The names for target_modules: linear layers, routers, and PEFT's names of the weights of fused experts."""
        old = target_layers.expert_names(self.config.model_type)
        held = {name for name, weights in self.experts.items() if set(old.values()) & set(weights)}
        virtual = {f"{name}.{short}" for name in held for short, weight in old.items() if weight in self.experts[name]}
        return self.linear | virtual | (self.routers if "gate" in old else set())

    def _require_names(self, config: Config) -> None:
        """`InvalidInput` if the config names a missing layer, or one that is not linear: PEFT ignores such a name."""
        wanted, known = config.target_modules, self._known() | {self.table}
        fix = f"its linear layers are {self._linear_kinds()}, in names like {next(iter(sorted(self.linear)), 'none')}"
        problems: list[Problem] = []
        idle = target_layers.idle_parts(wanted, known)
        matched = [name for name in self.modules if isinstance(wanted, str) and target_layers.names(wanted, name) and name]
        other = [] if wanted == ALL_LINEAR else [name for name in matched if name not in known]
        if self.head in other or (isinstance(wanted, list) and target_layers.names(wanted, self.head)):
            problems.append(target_layers.head_adapter(self.head))
        elif other:
            kinds = [(name, type(self.modules[name]).__name__) for name in other]
            problems.append(target_layers.not_linear(self.label, kinds, fix))
        elif isinstance(wanted, list) and idle:
            message = f"{self.label} has no linear layer named {', '.join(sorted(idle))}"
            problems.append(Problem("error", "no-such-module", message, fix, KEY))
        elif wanted != ALL_LINEAR and not any(target_layers.names(wanted, name) for name in known):
            message = f"{self.label} has no layer whose whole name matches {wanted!r}"
            problems.append(Problem("error", "no-such-module", message, fix, KEY))
        if unknown := [
            one for one in config.modules_to_save or () if not any(target_layers.names([one], name) for name in self.modules)
        ]:
            message = f"{self.label} has no module named {', '.join(sorted(unknown))}"
            problems.append(Problem("error", "no-such-module", message, fix, "modules_to_save"))
        if wanted != ALL_LINEAR and (named := [name for name in self.state_space if target_layers.names(wanted, name)]):
            problems.append(target_layers.state_space(self.label, sorted({name.rpartition(".")[2] for name in named})))
        if problems:
            raise InvalidInput(problems)

    @functools.cached_property
    def state_space(self) -> set[str]:
        """Linear layers of state-space blocks that read weights without the adapter: PEFT refuses some of them."""
        blocks = {type(module) for module in self.modules.values() if hasattr(module, "A_log")}  # the decay of a state
        read = {block: set(re.findall(r"self\.(\w+)\.weight\b", inspect.getsource(block))) for block in blocks}
        places = {name: name.rpartition(".") for name in self.linear}
        bypassed = {name for name, (parent, _, leaf) in places.items() if leaf in read.get(type(self.modules[parent]), ())}
        refused = set()
        for end in {leaf for _, _, leaf in places.values()}:
            try:
                LoraModel._check_target_module_compatiblity(
                    cast(Any, None), LoraConfig(target_modules=ALL_LINEAR), self.model, end
                )
            except ValueError:
                refused.add(end)
        return bypassed | {name for name, (_, _, leaf) in places.items() if leaf in refused}

    @functools.cached_property
    def unreached(self) -> set[str]:
        """The other linear layers that no text reaches."""
        uncalled = self._uncalled(FEW_TOKENS) - self.state_space
        return uncalled & self._uncalled(MANY_TOKENS) if uncalled else uncalled

    def _left_out(self, config: Config) -> dict[str, str]:
        """Linear layers without an adapter although PEFT, or the config, would add one; and the reason."""
        left = dict.fromkeys(self.unreached, "unreached")
        if config.target_modules == ALL_LINEAR:
            left |= dict.fromkeys(self.state_space, "state-space")
            left |= dict.fromkeys(self.routers & self.linear, "router")
        return left

    def _uncalled(self, tokens: int) -> set[str]:
        """Linear layers that a pass of this many tokens does not call; empty if a pass without values is not possible."""
        model, called, uncalled = self.model, set[str](), set[str]()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")  # the only one with shapes that do not depend on the tokens
        hooks = [
            self.modules[name].register_forward_pre_hook(lambda _module, _inputs, name=name: called.add(name))
            for name in self.linear
        ]
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None) or tokens
        ids = torch.ones(1, min(tokens, longest), dtype=torch.long, device="meta")
        masked = {"attention_mask": torch.ones_like(ids), "use_cache": False}
        # Some models read the values of a mask, others those of positions if there is neither a mask nor a cache.
        for options in (masked, {"use_cache": False}, {"use_cache": True}):
            called.clear()
            try:
                with torch.no_grad():
                    model(input_ids=ids, **options)
            except Exception:  # code of a model may fail in any way on tensors without values: then it is unknown
                continue
            uncalled = self.linear - called
            break
        for hook in hooks:
            hook.remove()
        return uncalled

    def _read_off(self, put_on: PeftModel) -> Adapted:
        trained = sum(weight.numel() for weight in put_on.parameters() if weight.requires_grad)
        modules, parameters = _targeted(put_on)
        saved = [name for name, module in put_on.get_base_model().named_modules() if isinstance(module, ModulesToSaveWrapper)]
        whole = Counter(f"{_ends(name)[1]} whole" for name in saved)
        return Adapted({**self._kinds([*modules, *parameters]), **whole}, trained, self.weights)

    def _kinds(self, names: Iterable[str]) -> dict[str, int]:
        """The number of layers of each kind: their last name, with the one before if other blocks have such a layer."""
        parents: dict[str, set[str]] = {}
        for name in self.linear:
            parent, leaf = _ends(name)
            parents.setdefault(leaf, set()).add(parent)
        kinds: Counter[str] = Counter()
        for name in names:
            parent, leaf = _ends(name.removesuffix(".weight"))
            is_clear = name in self.linear and len(parents[leaf]) == 1
            kinds[leaf if is_clear or not parent else f"{parent}.{leaf}"] += 1
        return dict(kinds)

    def _linear_kinds(self) -> str:
        kinds = ", ".join(sorted(self._kinds(self.linear)))
        experts = sorted({name.rpartition(".")[2] for name in self._known() - self.linear - self.routers})
        return f"{kinds}, and of its fused experts {', '.join(experts)}" if experts else kinds

    def _notes(self, config: Config, idle: Mapping[str, str], touched: set[str], parameters: set[str]) -> Iterator[str]:
        """What is skipped, and what is trained differently than expected."""
        why = {
            "router": "it would be trained without load balancing, whose loss is off",
            "state-space": "the kernels of state-space blocks read these weights past an adapter",
            "unreached": "no text reaches them",
        }
        for reason, words in why.items():
            if names := [name for name, one in idle.items() if one == reason]:
                listed = self._roots(names) if reason == "unreached" else _counted(self._kinds(names))
                yield f"no adapter on {listed}: {words}"
        if named := self.routers & (touched | {name.removesuffix(".weight") for name in parameters}):
            yield f"the router ({_counted(self._kinds(named))}) is trained, as target_modules says, without load balancing"
        wanted, whole = config.target_modules, set(config.modules_to_save or ())
        if isinstance(wanted, str) and (parts := target_layers.idle_parts(wanted, self._known() | {self.table})):
            yield target_layers.half_idle(self.label, parts)
        passed = [name for name in self.linear - touched - idle.keys() if target_layers.names(wanted, name)]
        if passed := [name for name in passed if not whole & set(name.split("."))]:
            yield f"no adapter on {_counted(self._kinds(passed))}: PEFT takes these names for those of the fused experts"
        held = {f"{name}.{weight}" for name, weights in self.experts.items() for weight in weights}
        if left := held - parameters:
            shapes = dict(self.model.named_parameters())
            share = sum(shapes[name].numel() for name in left) / self.weights
            has_names = target_layers.expert_names(self.config.model_type)
            reach = "they are not named" if has_names else "PEFT cannot name them"
            yield f"no adapter on the fused experts ({_counted(self._kinds(left))}), {share:.0%} of the weights: {reach}"

    def _roots(self, names: Iterable[str]) -> str:
        """The largest parts of the model that no text reaches, with the number of these layers in each; else their kinds."""
        roots, single = Counter[str](), []
        reached = self.linear - self.unreached
        for name in names:
            parts = name.split(".")
            above = [".".join(parts[:depth]) for depth in range(1, len(parts))]
            root = next((part for part in above if not any(one.startswith(f"{part}.") for one in reached)), name)
            if root == name or any(part.isdigit() for part in root.split(".")):
                single.append(name)
            else:
                roots[root] += 1
        whole = [f"{root} ({count} layers)" for root, count in sorted(roots.items())]
        return ", ".join([*whole, *([_counted(self._kinds(single))] if single else [])])


def lora_config(config: Config) -> LoraConfig:
    """The adapter of the config; that of a reward model includes its score head."""
    is_reward = STRATEGIES[config.strategy].gives_rewards
    return LoraConfig(
        task_type="SEQ_CLS" if is_reward else "CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=config.target_modules,
        modules_to_save=[HEAD, *(config.modules_to_save or ())] if is_reward else config.modules_to_save,
    )


def _ends(name: str) -> tuple[str, str]:
    """The last two names of a layer that are not numbers."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-2] if len(parts) > 1 else "", parts[-1] if parts else name


def _counted(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(kinds.items()))


def _targeted(put_on: PeftModel) -> tuple[list[str], list[str]]:
    """Full names of the modules, and of the parameters, with an adapter."""
    return put_on.base_model.targeted_module_names, put_on.base_model.targeted_parameter_names


def _experts(modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, list[str]]]:
    """Modules with the weights of all experts in tensors of three dimensions, and the names of these tensors."""
    for name, module in modules.items():
        if isinstance(module, CONVOLUTIONS) or "expert" not in f"{name} {type(module).__name__}".lower():
            continue
        if weights := [short for short, weight in module.named_parameters(recurse=False) if weight.dim() == 3]:
            yield name, weights


def _routers(modules: Mapping[str, torch.nn.Module], experts: Mapping[str, list[str]]) -> Iterator[str]:
    """Routers: modules next to the experts with a weight row for each expert."""
    for name, weights in experts.items():
        count = cast(torch.Tensor, getattr(modules[name], weights[0])).shape[0]
        for depth in (1, 2):
            block = name.rsplit(".", depth)[0]
            found = [
                one
                for one, module in modules.items()
                if one.startswith(f"{block}.") and "expert" not in one.removeprefix(block)
                if (weight := getattr(module, "weight", None)) is not None and weight.dim() == 2 and weight.shape[0] == count
            ]
            if found:
                yield from found
                break
