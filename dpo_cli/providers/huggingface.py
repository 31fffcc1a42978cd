"""The Hugging Face provider: transformers for the model, PEFT for the adapter, bitsandbytes for 4-bit and 8-bit weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dpo_cli.config.division_rules import divides_weights
from dpo_cli.errors import InvalidInput, RunFailed
from dpo_cli.models import generation_config, remote_code
from dpo_cli.models.adapter_config import ADAPTER_CONFIG, Adapter
from dpo_cli.models.checks import no_eos
from dpo_cli.models.hub_models import HubFiles, answers, revision
from dpo_cli.models.model_files import GENERATION, TOKENIZER_CONFIG, ModelFiles
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.feasibility import BITSANDBYTES_FIX
from dpo_cli.plan.plan import Adapted, Plan
from dpo_cli.providers import liger_kernels
from dpo_cli.providers.architecture import Architecture, adapted, lora_config
from dpo_cli.providers.classifier import as_classifier
from dpo_cli.providers.eight_bit import use_exact_product
from dpo_cli.providers.loaded_tensors import all_tensors, folder_of, merged, require_finite, require_whole_files, with_adapter
from dpo_cli.providers.model_cache import dequantised, made_once
from dpo_cli.providers.policy import FROZEN, TRAINED, Policy
from dpo_cli.providers.sharding import is_sharded, place_adapters, shard
from dpo_cli.storage import hub
from dpo_cli.storage.digests import sha256_of_all, sha256_of_settings
from dpo_cli.storage.progress import working
from dpo_cli.storage.world import ALONE, World

PROBE = "  two blanks\n\na line\tand é, ж, 中 and 1234"  # texts that tokenizers are known to treat in different ways


class HuggingFace:
    """Loads a model: from the hub, a directory or a GGUF file, or a run or PEFT adapter on one of them."""

    no_sharing: str | None = None  # each model decides (scoring/shared_prompts.py)

    def __init__(self, model: ModelSource) -> None:
        self.model = model
        self.name = model.name
        self.notes: list[str] = []
        # The last adapter of `adapted`, as in the config and as for the model: it takes seconds to find.
        self._fresh: tuple[LoraConfig, LoraConfig] | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None  # the last one that was loaded
        self.foundation = model.foundation
        is_here = Path(self.foundation).exists()
        self.only_local = is_here or not answers(self.foundation)
        self.files: ModelFiles = model.files if is_here else HubFiles(Path(self.foundation), only_cached=self.only_local)
        if self.files.is_gguf:
            self.files = ModelFiles(dequantised(self.files))
        self.source = str(self.files.path) if is_here else self.foundation

    @property
    def local_dir(self) -> Path | None:
        """The model's directory, None for a model on the hub."""
        return Path(self.source) if Path(self.source).is_dir() else None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        adapter = self.model.adapter
        source = str(adapter.directory) if adapter is not None and adapter.has_tokenizer else self.source
        tokenizer = self._as_in_its_file(cast(PreTrainedTokenizerBase, self._load(AutoTokenizer, source)), source)
        tokenizer.init_kwargs.pop("auto_map", None)  # names of code: it is not run, and must not be saved with the adapter
        if tokenizer.eos_token is None:
            raise InvalidInput([no_eos(self.name)])
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._tokenizer = tokenizer
        return tokenizer

    def _as_in_its_file(self, tokenizer: PreTrainedTokenizerBase, source: str) -> PreTrainedTokenizerBase:
        """The tokenizer, or that of its tokenizer.json if the class in tokenizer_config.json gives other ids.

        transformers 5.17 builds a LlamaTokenizerFast with its own normaliser, which drops blanks of a byte-level vocabulary.
        """
        fast = self._files(source).fast_tokenizer

        def agrees(made: PreTrainedTokenizerBase) -> bool:
            return (
                fast is None
                or list(made(PROBE, add_special_tokens=False)["input_ids"]) == fast.encode(PROBE, add_special_tokens=False).ids
            )

        if agrees(tokenizer):
            return tokenizer
        plain = cast(PreTrainedTokenizerBase, self._load(PreTrainedTokenizerFast, source))
        if not agrees(plain):
            return tokenizer
        self.notes.append(f"the tokenizer is read from tokenizer.json: {type(tokenizer).__name__} gives different tokens")
        return plain

    def token_rows(self) -> int | None:
        return self.files.token_rows

    def base_model(self, plan: Plan, world: World = ALONE) -> PreTrainedModel:
        below = self.model.below if plan.goes_on else None
        is_divided = divides_weights(plan.config.to_json())
        # A card may be too small for the whole model.
        placed = replace(plan, config=replace(plan.config, device="cpu")) if is_divided else plan
        model = _settled(self._merged(placed, below or self.model))
        if plan.strategy.gives_rewards:
            padding = int((self._tokenizer or self.tokenizer()).pad_token_id)
            model = as_classifier(model, plan.config.seed, padding, plan.model_label)
        if is_divided:
            shard(model, require_device(plan), world, plan.config.cpu_offload)
            if plan.config.device == "cuda" and liger_kernels.is_installed():
                self.notes.append("liger-kernel is not used where weights are divided")
        return model

    def adapted(self, plan: Plan) -> Adapted | None:
        found, adapter = adapted(plan, self._load(AutoConfig, self.source))
        self._fresh = (lora_config(plan.config), adapter) if adapter else None
        return found

    def adapter_config(self, plan: Plan, base: PreTrainedModel) -> LoraConfig | None:
        if plan.goes_on or plan.config.lora_r == 0:
            return None
        if self._fresh is not None and self._fresh[0] == lora_config(plan.config):
            return copy.deepcopy(self._fresh[1])
        return Architecture(base.config, plan.model_label, plan.strategy.gives_rewards).fresh(plan.config)[0]

    def start(self, plan: Plan, base: PreTrainedModel) -> PreTrainedModel | PeftModel:
        if not plan.goes_on or (adapter := self.model.adapter) is None:
            return base
        label, dropout = plan.model_label, plan.config.lora_dropout
        model = with_adapter(base, adapter.directory, TRAINED, label, is_trainable=True, dropout=dropout)
        if not plan.strategy.refers:  # else TRL makes the frozen copy itself
            model = with_adapter(model, adapter.directory, FROZEN, label)
        if is_sharded(base):
            place_adapters(model, require_device(plan))
        return model

    def trained(self, plan: Plan, folder: Path) -> Policy:
        base = self.base_model(plan)
        if (adapter := Adapter.in_folder(folder)) is None:
            return Policy(_settled(self._model(plan, str(folder))).eval(), base.eval())
        if fault := adapter.danger:
            raise RunFailed(f"the adapter in {folder} {fault.message}", fault.fix)
        model = with_adapter(base, folder, TRAINED, plan.model_label)
        if plan.goes_on and plan.starts_at_reference and (start := self.model.adapter) is not None:
            model = with_adapter(model, start.directory, FROZEN, plan.model_label)
        if is_sharded(base):
            place_adapters(model, require_device(plan))
        return Policy(model.eval())

    def ready(self, model: PreTrainedModel | PeftModel, plan: Plan) -> None:
        """Nothing: PEFT runs the adapter that the trainer has added."""

    def _merged(self, plan: Plan, model: ModelSource) -> PreTrainedModel:
        """The model; an adapter is merged into its base.

        Never into quantised weights, whose steps are larger than the changes of an adapter: they would be lost. The merged
        model has the precision of the run, is kept in the cache, and is then quantised as any other model.
        """
        if model.adapter is None:
            return self._model(plan, self.source)
        if not (plan.config.use_4bit or plan.config.use_8bit):
            return self._unquantised(plan, model)
        whole = replace(plan, config=replace(plan.config, use_4bit=False, use_8bit=False, device="cpu"))
        content = "\n".join([plan.dtype, self._content(), *model.weights_sha256.values(), *model.settings_sha256.values()])
        place = made_once("merged", self.name, content, lambda work: self._unquantised(whole, model).save_pretrained(work))
        return self._model(plan, str(place))

    def _content(self) -> str:
        """The identity of the foundation: a hash of its weights and settings, or the commit of the hub."""
        if self.local_dir is not None:
            return f"{sha256_of_all(self.local_dir)} {sha256_of_settings(self.local_dir)}"
        self.files.config  # noqa: B018 - fetches the commit that is loaded afterwards
        return f"{self.source} {revision(self.source)}"

    def _unquantised(self, plan: Plan, model: ModelSource) -> PreTrainedModel:
        if model.below is None:
            return self._model(plan, self.source)
        below = _settled(self._unquantised(plan, model.below))
        adapted = with_adapter(below, model.own.path, TRAINED, plan.model_label)
        return merged(adapted, TRAINED, plan.model_label, getattr(torch, plan.dtype))

    def _model(self, plan: Plan, source: str) -> PreTrainedModel:
        """The model in `source` on the plan's device, quantised if the plan says so.

        A model with quantised files is loaded unchanged, and its weights are made float if the plan needs that.
        """
        config, device = plan.config, require_device(plan)
        # Trained weights are float32 for any compute dtype: updates are smaller than bf16 can add.
        dtype = getattr(torch, plan.dtype) if config.lora_r else torch.float32
        options: dict[str, Any] = {"dtype": dtype}
        is_quantised, wants = self._stored_bits(source) is not None, config.use_4bit or config.use_8bit
        if wants or is_quantised or device.type == "cuda":  # else the whole model would be in the RAM first
            options["device_map"] = {"": device}
        if wants and not is_quantised:
            options["quantization_config"] = quantisation(plan)
        model = cast(PreTrainedModel, self._load(AutoModelForCausalLM, source, use_safetensors=True, **options))
        self._require_sound(model, source)
        if not wants:
            return self._faster(_plain(model).to(device, dtype) if is_quantised else cast(PreTrainedModel, model.to(device)))
        if not any(type(module).__module__.startswith("bitsandbytes") for module in model.modules()):
            raise RunFailed(f"bitsandbytes quantised no layer of {plan.model_label}", "remove use_4bit and use_8bit")
        for module in model.modules():
            if is_quantised and hasattr(module, "compute_dtype"):  # quantised in its files
                setattr(module, "compute_dtype", dtype)  # noqa: B010 - mypy does not know bitsandbytes' attribute
        return self._faster(model)

    def _faster(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, with the kernels of liger-kernel on a GPU, if it is installed."""
        if model.device.type == "cuda" and liger_kernels.is_installed() and (parts := liger_kernels.use_kernels(model)):
            note = f"liger-kernel runs {', '.join(parts)}"
            self.notes += [note] if note not in self.notes else []
        return model

    def _require_sound(self, model: PreTrainedModel, source: str) -> None:
        """Checks of every loaded model: it names no code, can be saved, and its weights are finite."""
        vars(model.config).pop("auto_map", None)  # as for the tokenizer
        self.notes += [note for note in _mend_generation(model) if note not in self.notes]
        require_finite(model, self.name, folder_of(source))

    def reward_model(self, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model as a classifier with one label, the reward, with its adapter, in evaluation mode, and its tokenizer."""
        below = self.model.below
        if below is not None and below.adapter is not None:
            message = f"{self.name} is an adapter on another adapter, which is not supported for a reward model"
            raise RunFailed(message, "merge them with PEFT, and name the merged model")
        try:
            model = self._load(AutoModelForSequenceClassification, self.source, use_safetensors=True, dtype=dtype)
        except InvalidInput as error:
            why = error.problems[0].message  # a missing head, which transformers would initialise randomly
            raise RunFailed(f"{self.name} is not a reward model: {why}", "name a trained reward model") from error
        if model.config.num_labels != 1:
            raise RunFailed(f"{self.name} is not a reward model: it has no head with one score", "name a trained reward model")
        require_finite(model, self.name, folder_of(self.source))
        if below is not None:
            model = with_adapter(model, self.model.own.path, TRAINED, below.name)
        tokenizer = cast(PreTrainedTokenizerBase, self._load(AutoTokenizer, self.source))
        return cast(PreTrainedModel, model.to(device).eval()), tokenizer

    def _load(self, auto: Any, source: str, **options: Any) -> Any:
        """`from_pretrained`; the library's many errors become one: the model cannot be loaded."""
        try:
            self._require_no_adapter(source)
            self._require_no_code(source)
            options |= {"trust_remote_code": False, "local_files_only": self.only_local}
            if auto in (AutoTokenizer, AutoConfig, PreTrainedTokenizerFast):
                return auto.from_pretrained(source, **options)
            return self._load_whole(auto, source, **options)
        except ImportError as error:  # transformers imports the package only now
            raise RunFailed(f"cannot load {self.name}: {error}", BITSANDBYTES_FIX) from error
        except (OSError, ValueError) as error:
            if isinstance(error.__cause__, GatedRepoError):  # its config is public, its files are not
                raise hub.gated("model", self.foundation) from error
            if fault := hub.cache_fault(error):
                raise fault from error
            if self.only_local and self.local_dir is None:
                raise hub.unreachable("model", self.foundation) from error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RunFailed(f"cannot load {self.name}: {reason}", "check that it is a complete model directory") from error
        except SafetensorError as error:
            message = f"cannot load {self.name}: a file of its weights is cut off or damaged ({error})"
            raise RunFailed(message, "download it again") from error

    def _require_no_adapter(self, source: str) -> None:
        """`RunFailed` for an adapter of the hub: transformers would add it to its base, and a fresh one would replace it.

        Only a folder can be an adapter here, and then `source` is the model below it.
        """
        if not Path(source).is_dir() and self._files(source).json(ADAPTER_CONFIG):
            fix = f"run `hf download {source} --local-dir FOLDER`, and name FOLDER"
            raise RunFailed(f"{source} is an adapter, and adapters are only read from a folder", fix)

    def _load_whole(self, auto: Any, source: str, **options: Any) -> Any:
        """A model; its files and tensors are checked."""
        is_here = Path(source).is_dir()
        if is_here:
            require_whole_files(self._files(source))
        if auto is AutoModelForCausalLM:
            options |= self._generation(source)
        with working(f"loading {self.name}"), all_tensors(self.name) as notes:
            model = auto.from_pretrained(source, **options)
        if not is_here:  # it was fetched only now
            require_whole_files(ModelFiles(folder_of(source)))
        self.notes += [note for note in notes if note not in self.notes]
        return model

    def _require_no_code(self, source: str) -> None:
        """`RunFailed` if the model or its tokenizer needs its own code."""
        files = self._files(source)
        for problem in remote_code.problems(files.config, files.json(TOKENIZER_CONFIG), self.name):
            if problem.severity == "error":
                raise RunFailed(problem.message, problem.fix)

    def _generation(self, source: str) -> dict[str, GenerationConfig]:
        """The generation config for `from_pretrained`, if that of the model would fail to load."""
        sound, notes = _sound_generation(self._files(source).json(GENERATION), self.token_rows())
        self.notes += [note for note in notes if note not in self.notes]
        return {"generation_config": sound} if notes else {}

    def _stored_bits(self, source: str) -> int | None:
        """The bits of the weights in the model's files; None if they are not quantised.

        `InvalidInput` for an unsupported quantisation.
        """
        stored = self._files(source).quantisation
        if stored is not None and (problem := stored.problem(self.name)) is not None:
            raise InvalidInput([problem])
        return stored.bits if stored else None

    def _files(self, source: str) -> ModelFiles:
        """The files of `source`: of the model itself, or of another folder."""
        return self.files if source == self.source else ModelFiles(Path(source))


def require_device(plan: Plan) -> torch.device:
    """The plan's device; `RunFailed` if this torch cannot use it."""
    device = torch.device(plan.config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RunFailed("this torch cannot use CUDA", 'install a CUDA build of torch, or set "device": "cpu"')
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RunFailed("this torch cannot use Metal", 'install torch for macOS on Apple silicon, or set "device": "cpu"')
    return device


def quantisation(plan: Plan) -> transformers.BitsAndBytesConfig:
    """The 8-bit or 4-bit quantisation of the plan."""
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
    """The model, ready for training: complete attention, no dropout, 4-bit layers with gradients, exact 8-bit layers."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        # transformers 5.17 loads Gemma 2 with SDPA, which silently omits the soft-cap of the attention.
        model.set_attn_implementation("eager")
    use_exact_product(model)
    for module in model.modules():
        # bitsandbytes 0.50.2 repacks such a layer at its first evaluation on a CPU, and then it has no gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        # The reference is also computed in training mode, so only the adapter may have dropout.
        for name, value in vars(module).items():
            if isinstance(value, float) and (isinstance(module, torch.nn.Dropout) or "dropout" in name):
                setattr(module, name, 0.0)
    return model


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """A model with quantised files, with plain weights."""
    plain: PreTrainedModel = model.dequantize()
    # To save the model, transformers 5.17 would reverse its 4-bit reading, and fails.
    vars(plain).pop("_weight_conversions", None)
    return plain


def _mend_generation(model: PreTrainedModel) -> list[str]:
    """Remove invalid settings from the generation_config of a model, and report them: they would prevent saving."""
    rows = getattr(model.config.get_text_config(), "vocab_size", None)
    sound, notes = _sound_generation(model.generation_config.to_diff_dict(), rows)
    if notes:
        model.generation_config = sound
    return notes


def _sound_generation(settings: dict[str, object], rows: int | None) -> tuple[GenerationConfig, list[str]]:
    """The valid settings of a generation_config, and a note for each that would prevent loading or saving.

    `rows` is the number of tokens of the model.
    """
    wrong, kept = generation_config.invalid(settings, rows), dict[str, object]()
    for name in sorted(settings, key=lambda name: (name not in generation_config.DECIDING, name)):
        if name in wrong:
            continue
        try:
            GenerationConfig(**kept, **{name: settings[name]}).validate(strict=True)
            kept[name] = settings[name]
        except (AttributeError, TypeError, ValueError):  # a rule that only transformers has: the setting is omitted too
            wrong[name] = "conflicts with the rest"
    notes = [f"{GENERATION}: {name} {settings[name]} {why}, and is omitted" for name, why in wrong.items()]
    return GenerationConfig(**kept), notes
