"""The Hugging Face provider: transformers for the model, PEFT for the adapter, bitsandbytes for 4-bit and 8-bit weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from dpo_cli import hub
from dpo_cli.demands import BITSANDBYTES_FIX
from dpo_cli.errors import InvalidInput, Problem, RunFailed
from dpo_cli.hardware import foreign, gguf
from dpo_cli.hardware.adapters import ADAPTER_CONFIG, adapter_at, chain_of, foundation
from dpo_cli.hardware.models import TOKENIZER_CONFIG
from dpo_cli.plan import Plan
from dpo_cli.providers.hub import answers
from dpo_cli.providers.made import dequantised, made_once
from dpo_cli.providers.policy import FROZEN, TRAINED, Policy
from dpo_cli.runs.directory import WEIGHTS

OTHER_BASE = "name the model that it was made on as model_name"


class HuggingFace:
    """Loads `model_name`: a hub id, a model directory, a GGUF file, or a run or PEFT adapter on one of them."""

    no_sharing: str | None = None  # each model decides (training/sharing.py)

    def __init__(self, model_name: str) -> None:
        self.name = model_name
        self.foundation = foundation(model_name)
        path = Path(self.foundation)
        self.source = str(dequantised(path)) if gguf.is_gguf(path) else self.foundation
        self.only_local = path.exists() or not answers(self.foundation)

    @property
    def local_dir(self) -> Path | None:
        """The model's directory, None when it is on the hub."""
        return Path(self.source) if Path(self.source).is_dir() else None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        adapter = adapter_at(self.name)
        has_own = adapter is not None and (adapter.directory / "tokenizer_config.json").is_file()
        source = str(adapter.directory) if adapter and has_own else self.source
        tokenizer = cast(PreTrainedTokenizerBase, self._load(AutoTokenizer, source))
        tokenizer.init_kwargs.pop("auto_map", None)  # names of code that is not run, and would be written with the adapter
        if tokenizer.eos_token is None:
            raise RunFailed(f"the tokenizer of {self.name} names no EOS token", "use an instruct model")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def base_model(self, plan: Plan) -> PreTrainedModel:
        name = plan.config.model_name
        if plan.goes_on and (adapter := adapter_at(name)) is not None:
            name = adapter.model_name
        return _settled(self._merged(plan, name))

    def adapter_config(self, plan: Plan, base: PreTrainedModel) -> LoraConfig | None:
        config = plan.config
        if plan.goes_on or config.lora_r == 0:
            return None
        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            target_modules=config.target_modules,
            modules_to_save=config.modules_to_save,
        )
        _require_modules(plan, base, adapter)
        return adapter

    def start(self, plan: Plan, base: PreTrainedModel) -> PreTrainedModel | PeftModel:
        if not plan.goes_on or (adapter := adapter_at(plan.config.model_name)) is None:
            return base
        config = LoraConfig.from_pretrained(str(adapter.directory))
        config.lora_dropout = plan.config.lora_dropout
        model = PeftModel.from_pretrained(base, str(adapter.directory), is_trainable=True, config=config)
        if plan.config.strategy != "dpo":  # whose trainer makes the frozen copy itself
            model.load_adapter(str(adapter.directory), FROZEN)
        return cast(PeftModel, model)

    def trained(self, plan: Plan, folder: Path) -> Policy:
        base = self.base_model(plan)
        if not (folder / ADAPTER_CONFIG).is_file():
            return Policy(_settled(self._model(plan, str(folder))).eval(), base.eval())
        _require_plain(folder)
        try:
            model = PeftModel.from_pretrained(base, str(folder), adapter_name=TRAINED)
        except torch.OutOfMemoryError:  # no fault of the adapter
            raise
        except (RuntimeError, ValueError) as error:  # tensors of another shape; modules that are not there
            reason = " ".join(str(error).split())[:300]
            raise RunFailed(f"{folder} is no adapter of {plan.model_label}: {reason}", OTHER_BASE) from error
        _require_whole(model, folder, plan)
        if plan.goes_on and (start := adapter_at(plan.config.model_name)) is not None:
            model.load_adapter(str(start.directory), FROZEN)
        return Policy(model.eval())

    def ready(self, model: PreTrainedModel | PeftModel, plan: Plan) -> None:
        """Nothing: PEFT runs what the trainer has put on."""

    def _merged(self, plan: Plan, name: str) -> PreTrainedModel:
        """The model of this name; where that is an adapter, merged into what it stands on.

        Never into quantised weights, whose steps are larger than what an adapter adds: it would be gone. The merged model is
        made in the precision of the run, kept in the cache, and then quantised as any other model is.
        """
        if adapter_at(name) is None:
            return self._model(plan, self.source)
        if not (plan.config.use_4bit or plan.config.use_8bit):
            return self._unquantised(plan, name)
        whole = replace(plan, config=replace(plan.config, use_4bit=False, use_8bit=False, device="cpu"))
        content = "\n".join([plan.dtype, self.source, *chain_of(name).values()])
        place = made_once("merged", content, lambda work: self._unquantised(whole, name).save_pretrained(work))
        return self._model(plan, str(place))

    def _unquantised(self, plan: Plan, name: str) -> PreTrainedModel:
        adapter = adapter_at(name)
        if adapter is None:
            return self._model(plan, self.source)
        below = self._unquantised(plan, adapter.model_name)
        return cast(PreTrainedModel, PeftModel.from_pretrained(below, str(adapter.directory)).merge_and_unload())

    def _model(self, plan: Plan, source: str) -> PreTrainedModel:
        """The model in `source` on the plan's device, quantised when the plan says so."""
        config, device = plan.config, require_device(plan)
        # Trained weights are float32 whatever is computed in: updates are smaller than bf16 can add.
        options: dict[str, Any] = {"dtype": getattr(torch, plan.dtype) if config.lora_r else torch.float32}
        if config.use_4bit or config.use_8bit:
            options["quantization_config"] = quantisation(plan)
            options["device_map"] = {"": device}
        model = cast(PreTrainedModel, self._load(AutoModelForCausalLM, source, use_safetensors=True, **options))
        vars(model.config).pop("auto_map", None)  # likewise
        if "quantization_config" not in options:
            return cast(PreTrainedModel, model.to(device))
        if not any(type(module).__module__.startswith("bitsandbytes") for module in model.modules()):
            raise RunFailed(f"bitsandbytes quantised no layer of {plan.model_label}", "leave use_4bit and use_8bit out")
        return model

    def reward_model(self, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model as a classifier whose one label is the reward, in evaluation mode, and its tokenizer."""
        options = {"use_safetensors": True, "dtype": dtype, "output_loading_info": True}
        model, info = self._load(AutoModelForSequenceClassification, self.source, **options)
        if model.config.num_labels != 1 or info["missing_keys"]:  # transformers would make up a head that is not there
            raise RunFailed(f"{self.name} is no reward model: it has no head with one score", "name a trained reward model")
        return cast(PreTrainedModel, model.to(device).eval()), cast(
            PreTrainedTokenizerBase, self._load(AutoTokenizer, self.source)
        )

    def _load(self, auto: Any, source: str, **options: Any) -> Any:
        """`from_pretrained`, with the library's many ways to fail told as one: the model cannot be had."""
        try:
            self._require_no_code(source)
            return auto.from_pretrained(source, trust_remote_code=False, local_files_only=self.only_local, **options)
        except ImportError as error:  # transformers asks for the package only now
            raise RunFailed(f"cannot load {self.name}: {error}", BITSANDBYTES_FIX) from error
        except (OSError, ValueError) as error:
            if isinstance(error.__cause__, GatedRepoError):  # its description is public, its files are not
                raise hub.gated("model", self.foundation) from error
            if self.only_local and self.local_dir is None:
                raise hub.unreachable("model", self.foundation) from error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RunFailed(f"cannot load {self.name}: {reason}", "check that it is a complete model directory") from error

    def _require_no_code(self, source: str) -> None:
        """`RunFailed` where the model or its tokenizer cannot do without code of its own."""
        there = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}

        def read(name: str) -> dict[str, Any]:
            found = cached_file(source, name, local_files_only=self.only_local, **there)
            return dict(json.loads(Path(found).read_text(encoding="utf-8"))) if found else {}

        for problem in foreign.problems(read("config.json"), read(TOKENIZER_CONFIG), self.name):
            if problem.severity == "error":
                raise RunFailed(problem.message, problem.fix)


def require_device(plan: Plan) -> torch.device:
    """The plan's device; `RunFailed` where this torch cannot use it."""
    device = torch.device(plan.config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RunFailed("this torch cannot use CUDA", 'install a CUDA build of torch, or set "device": "cpu"')
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RunFailed("this torch cannot use Metal", 'install torch for macOS on Apple silicon, or set "device": "cpu"')
    return device


def quantisation(plan: Plan) -> transformers.BitsAndBytesConfig:
    """The 8-bit or 4-bit weights that the plan asks for."""
    config = plan.config
    if config.use_8bit:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_nested_quant,
        bnb_4bit_compute_dtype=getattr(torch, config.bnb_4bit_compute_dtype or plan.dtype),
    )


def _settled(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it may be trained: with its whole attention, no dropout, and 4-bit layers that keep their gradients."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        # transformers 5.17 loads Gemma 2 with SDPA, which leaves the attention's soft-cap out without a word.
        model.set_attn_implementation("eager")
    for module in model.modules():
        # bitsandbytes 0.50.2 repacks such a layer at its first evaluation on a CPU, and it loses its gradients for good.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        # The reference is computed in training mode too, so only the adapter may have dropout.
        for name, value in vars(module).items():
            if isinstance(value, float) and (isinstance(module, torch.nn.Dropout) or "dropout" in name):
                setattr(module, name, 0.0)
    return model


def _require_plain(folder: Path) -> None:
    """`RunFailed` for an adapter that PEFT would unpickle, or import a module for that it names."""
    if not (folder / WEIGHTS).is_file():
        raise RunFailed(f"{folder} has no {WEIGHTS}; other files of weights are not read", "save it again with PEFT")
    if code := foreign.in_adapter(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))):
        message = f"{folder / ADAPTER_CONFIG} names a module to import ({code}), and no code of an adapter is run"
        raise RunFailed(message, "remove that from the file, if you know where the adapter comes from")


def _require_whole(model: PeftModel, folder: Path, plan: Plan) -> None:
    """`RunFailed` unless each tensor of the file has its place in the model: PEFT passes over one that has none."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        written = {key for key in file.keys() if ".base_layer." not in key}  # noqa: SIM118 - a base's embedding may lie beside it
    if lost := sorted(written ^ set(get_peft_model_state_dict(model, adapter_name=TRAINED, save_embedding_layers=False))):
        what = f"{len(lost)} of its tensors and of the model's places for them have no counterpart, {lost[0]} the first"
        raise RunFailed(f"{folder} is no adapter of {plan.model_label}: {what}", OTHER_BASE)


def _require_modules(plan: Plan, base: PreTrainedModel, adapter: LoraConfig) -> None:
    """`InvalidInput` where the adapter names what is not in the model: PEFT would pass over a name, and keep silent."""
    modules = dict(base.named_modules())
    linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    wanted = plan.config.target_modules
    if isinstance(wanted, list) and (unknown := set(wanted) - linear):
        key, message = "target_modules", f"no linear layer named {', '.join(sorted(unknown))}"
    elif isinstance(wanted, str) and wanted != "all-linear" and not any(re.fullmatch(wanted, name) for name in modules):
        key, message = "target_modules", f"no layer whose whole name matches {wanted!r}"
    elif unknown := set(adapter.modules_to_save or ()) - {name.rpartition(".")[2] for name in modules}:
        key, message = "modules_to_save", f"no module named {', '.join(sorted(unknown))}"
    else:
        return
    fix = f"its linear layers are {', '.join(sorted(linear - {'lm_head'}))}, in names like {_example(modules)}"
    raise InvalidInput([Problem("error", "no-such-module", f"{plan.model_label} has {message}", fix, key)])


def _example(modules: Mapping[str, Any]) -> str:
    return next((name for name, module in modules.items() if isinstance(module, torch.nn.Linear)), "none")
