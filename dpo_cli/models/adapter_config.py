"""A PEFT adapter in a folder: its adapter_config.json, and whether it is supported. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.config.schema import options
from dpo_cli.models.model_files import TOKENIZER_CONFIG, ModelFiles
from dpo_cli.models.remote_code import in_adapter
from dpo_cli.models.tensor_files import Fault, Shape
from dpo_cli.storage.run_directory import WEIGHTS

ADAPTER_CONFIG = "adapter_config.json"
# The options that a trained adapter fixes, by PEFT's names.
SHAPE = {name: option.adapter_name for name, option in options().items() if option.adapter_name is not None}

# The supported keys of an adapter_config.json: layers and size of the adapter, and what only its training needs. Any other
# key that is set is rejected by name.
HELD = frozenset(SHAPE.values()) | {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "fan_in_fan_out", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_bias"),
    *("rank_pattern", "alpha_pattern", "target_parameters", "megatron_core", "qalora_group_size", "runtime_config"),
    # the initialisation, which the first of these decides
    *("init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config"),
}
BECAUSE = {
    "bias": "it changes biases of the base itself, so the original base is not available as the reference",
    "trainable_token_indices": "it trains single rows of the embedding, which is not supported",
    "layer_replication": "it repeats layers of the base, which makes it another model",
    "alora_invocation_tokens": "it is active only after certain tokens",
    "ensure_weight_tying": "embedding and head share trained weights",
}
CAUSAL, CLASSIFIER = "CAUSAL_LM", "SEQ_CLS"  # PEFT's names of tasks
DEFAULTS = {"r": 8, "lora_alpha": 8, "use_dora": False, "use_rslora": False}  # PEFT's values for missing keys


def _is_names(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _is_list(value: object) -> bool:
    return value is None or (isinstance(value, list) and _is_names(value))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_switch(value: object) -> bool:
    return value is None or isinstance(value, bool)


# The types of keys of an adapter_config.json that are used in computations.
KINDS: tuple[tuple[str, Callable[[object], bool], tuple[str, ...]], ...] = (
    ("a whole number above 0", _is_size, ("r",)),
    ("a number", _is_number, ("lora_alpha", "lora_dropout")),
    ("true or false", _is_switch, ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out")),
    ("a name or a list of names", lambda value: value is None or _is_names(value), ("target_modules", "exclude_modules")),
    ("a list of names", _is_list, ("modules_to_save", "target_parameters")),
    ("an object", lambda value: value is None or isinstance(value, dict), ("rank_pattern", "alpha_pattern")),
    ("a name", lambda value: value is None or isinstance(value, str), ("base_model_name_or_path",)),
)
UNSUPPORTED_FIX = "merge it into its base with PEFT, and name the merged model"
CLASSIFIER_FIX = "name the model below it; a reward model is named as the reward_model of a training or of augment"
HEADS = ("lm_head", "embed_out")  # names of the output head in families of models
CHANGES_BASE = (
    "pissa",
    "corda",
    "olora",
    "loftq",
    "lora_ga",
)  # initialisations that move a part of the base's weights into the adapter


@dataclass(frozen=True)
class Adapter:
    """The adapter of these files, of any type that PEFT has."""

    files: ModelFiles

    @classmethod
    def in_folder(cls, folder: Path) -> Adapter | None:
        """The adapter in a folder; None if there is none."""
        files = ModelFiles(folder)
        return cls(files) if files.has(ADAPTER_CONFIG) else None

    @property
    def directory(self) -> Path:
        return self.files.path

    @property
    def config(self) -> Mapping[str, object]:
        """Its adapter_config.json; `ValueError` if that cannot be read."""
        return self.files.json(ADAPTER_CONFIG)

    @property
    def shape(self) -> dict[str, object]:
        """The options of `SHAPE`."""
        shape = {name: self.config.get(theirs, DEFAULTS.get(theirs)) for name, theirs in SHAPE.items()}
        if isinstance(shape["target_modules"], list):
            shape["target_modules"] = sorted(shape["target_modules"])
        return shape

    @property
    def tensors(self) -> dict[str, Shape]:
        """The shapes of its tensors; ValueError or OSError for a damaged file."""
        return self.files.tensors.header(WEIGHTS).shapes

    @property
    def has_tokenizer(self) -> bool:
        """Whether its folder has a tokenizer, which is then used."""
        return self.files.has(TOKENIZER_CONFIG)

    @property
    def is_on_head(self) -> bool:
        return is_on_head(self.config)

    @property
    def fault(self) -> Fault | None:
        """Why it cannot be used on a language model, in words that follow "the adapter"; None if it can.

        Raises `ValueError` if adapter_config.json cannot be read. Reads no weights.
        """
        return self.fault_for(CAUSAL)

    @property
    def is_of_classifier(self) -> bool:
        """Whether it is for a classifier, such as a reward model, and has its head."""
        return self.config.get("task_type") == CLASSIFIER

    def fault_for(self, task: str) -> Fault | None:
        """As `fault`, for a model of this task, by PEFT's names."""
        if fault := self.danger:
            return fault
        if wrong := _of_another_type(self.config):
            return Fault(
                f"has {wrong}", f"write the value that it was trained with into {ADAPTER_CONFIG}, or save it again with PEFT"
            )
        why = unsupported(self.config, task)
        return Fault(why, CLASSIFIER_FIX if self.is_of_classifier and task == CAUSAL else UNSUPPORTED_FIX) if why else None

    @property
    def danger(self) -> Fault | None:
        """A fault if PEFT would unpickle its weights, or import a module that it names."""
        if not self.files.has(WEIGHTS):
            message = f"has no {WEIGHTS}, and other weight files are not read, because they may run code"
            return Fault(message, "save it again with PEFT, which writes safetensors")
        if code := in_adapter(self.config):
            message = f"has an {ADAPTER_CONFIG} that names a module to import ({code}), but code of an adapter is never run"
            return Fault(message, "remove that key from the file, if you trust the adapter")
        return None


def _of_another_type(config: Mapping[str, object]) -> str:
    """The first value with a wrong type, in words; empty if there is none."""
    faults = (
        f"{name} {_short(config[name])} in its {ADAPTER_CONFIG}, which is not {kind}"
        for kind, fits, names in KINDS
        for name in names
        if name in config and not fits(config[name])
    )
    return next(faults, "")


def unsupported(config: Mapping[str, object], wanted: str = CAUSAL) -> str | None:
    """Why the base of an adapter cannot be its reference, in words that follow "the adapter".

    None if it can. For types other than LoRA only the common keys are checked.
    """
    is_lora = config.get("peft_type") == "LORA"
    initialisation = str(config.get("init_lora_weights", "")).lower()
    if is_lora and initialisation.startswith(CHANGES_BASE):
        fix = "PEFT can save it as a plain adapter (path_initial_model_for_weight_conversion)"
        return f"has init_lora_weights {initialisation}, which changed the weights of its base at the start; {fix}"
    if config.get("peft_type") == "TRAINABLE_TOKENS":
        return f"is of the type TRAINABLE_TOKENS: {BECAUSE['trainable_token_indices']}"
    if (task := config.get("task_type")) not in (None, wanted):
        return f"is for another task (task_type {task}), with its own head on the model"
    for name, value in config.items():
        if _is_set(value) and (name in BECAUSE or (is_lora and name not in HELD)):
            return f"has {name} {_short(value)}: {BECAUSE.get(name, 'this is not supported')}"
    return None


def _is_set(value: object) -> bool:
    """Whether a value is set: an object with only nulls is not."""
    if isinstance(value, dict):
        return any(map(_is_set, value.values()))
    return value not in (None, False, "", "none") and value != []


def is_on_head(config: Mapping[str, object]) -> bool:
    """Whether an adapter is also on the output head; the log-probs use only the plain weight of the head."""
    weights = [str(name).removesuffix(".weight") for name in _listed(config.get("target_parameters"))]
    heads = [head for head in HEADS if not _matches(config.get("exclude_modules"), head)]
    return any(_matches(targets, head) for targets in (config.get("target_modules"), weights) for head in heads)


def _matches(pattern: object, name: str) -> bool:
    """Whether PEFT matches a module by this pattern: a regular expression, or the last parts of names."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(str(end).rpartition(".")[2] == name for end in _listed(pattern))


def _listed(value: object) -> Iterable[object]:
    return value if isinstance(value, list | tuple | set) else ()


def without_bias(adapter: Iterable[str], base: Iterable[str]) -> list[str]:
    """The layers without a bias where an adapter has one (lora_bias), so that PEFT cannot merge it.

    `adapter` and `base` are the names of tensors in their files.
    """
    ending, there = ".lora_B.bias", set(base)
    layers = [name.removeprefix("base_model.model.").removesuffix(ending) for name in adapter if name.endswith(ending)]
    return [layer for layer in layers if f"{layer}.weight" in there and f"{layer}.bias" not in there]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
