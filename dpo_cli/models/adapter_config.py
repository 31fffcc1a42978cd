"""A PEFT adapter in a folder: what its adapter_config.json says, and why it may not be taken. No torch."""

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
# The options that an adapter was made with and that cannot change under it, by PEFT's names.
SHAPE = {name: option.adapter_name for name, option in options().items() if option.adapter_name is not None}

# The parts of an adapter_config.json that are supported: where an adapter is and how large, and what only its training needs.
# Anything else that is set is refused by its name.
HELD = frozenset(SHAPE.values()) | {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "fan_in_fan_out", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_bias"),
    *("rank_pattern", "alpha_pattern", "target_parameters", "megatron_core", "qalora_group_size", "runtime_config"),
    # how it began, which the first of these decides
    *("init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config"),
}
BECAUSE = {
    "bias": "it changes biases of the base itself, so the base without it is not there to compare with",
    "trainable_token_indices": "single rows of the embedding are trained, which are not scored here",
    "layer_replication": "it repeats layers of the base: it is another model",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "ensure_weight_tying": "embedding and head share what is trained",
}
DEFAULTS = {"r": 8, "lora_alpha": 8, "use_dora": False, "use_rslora": False}  # of PEFT, where a key is left out


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


# What the keys of an adapter_config.json that are computed with have to be.
KINDS: tuple[tuple[str, Callable[[object], bool], tuple[str, ...]], ...] = (
    ("a whole number above 0", _is_size, ("r",)),
    ("a number", _is_number, ("lora_alpha", "lora_dropout")),
    ("true or false", _is_switch, ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out")),
    ("a name or a list of names", lambda value: value is None or _is_names(value), ("target_modules", "exclude_modules")),
    ("a list of names", _is_list, ("modules_to_save", "target_parameters")),
    ("an object", lambda value: value is None or isinstance(value, dict), ("rank_pattern", "alpha_pattern")),
    ("a name", lambda value: value is None or isinstance(value, str), ("base_model_name_or_path",)),
)
UNSUPPORTED_FIX = "merge it with PEFT into its base, and name the merged model"
HEADS = ("lm_head", "embed_out")  # what families of models call their output head
CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # ways to begin that take a part out of the base's weights


@dataclass(frozen=True)
class Adapter:
    """The adapter of these files, of any type that PEFT has."""

    files: ModelFiles

    @classmethod
    def in_folder(cls, folder: Path) -> Adapter | None:
        """The adapter in a folder; None where there is none."""
        files = ModelFiles(folder)
        return cls(files) if files.has(ADAPTER_CONFIG) else None

    @property
    def directory(self) -> Path:
        return self.files.path

    @property
    def config(self) -> Mapping[str, object]:
        """Its adapter_config.json; `ValueError` where that cannot be read."""
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
        """The shapes of its tensors; ValueError or OSError for a file that is not whole."""
        return self.files.tensors.header(WEIGHTS).shapes

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside it, which is taken then."""
        return self.files.has(TOKENIZER_CONFIG)

    @property
    def is_on_head(self) -> bool:
        return is_on_head(self.config)

    @property
    def fault(self) -> Fault | None:
        """Why it is not taken, whatever it is for, in words that follow "the adapter"; None where it is.

        Raises `ValueError` for an adapter_config.json that cannot be read. No weights are read.
        """
        if fault := self.danger:
            return fault
        if wrong := _of_another_type(self.config):
            return Fault(f"has {wrong}", f"write what it was trained with into {ADAPTER_CONFIG}, or save it again with PEFT")
        why = unsupported(self.config)
        return Fault(why, UNSUPPORTED_FIX) if why else None

    @property
    def danger(self) -> Fault | None:
        """The same where PEFT would unpickle it, or import a module for it that it names."""
        if not self.files.has(WEIGHTS):
            message = f"has no {WEIGHTS}, and other files of weights are not read, since they may run code"
            return Fault(message, "save it again with PEFT, which writes safetensors")
        if code := in_adapter(self.config):
            message = f"has an {ADAPTER_CONFIG} that names a module to import ({code}), and no code of an adapter is run"
            return Fault(message, "remove that from the file, if you know where the adapter comes from")
        return None


def _of_another_type(config: Mapping[str, object]) -> str:
    """The first value that PEFT cannot compute with, in words; empty where there is none."""
    found = (
        f"{name} {_short(config[name])} in its {ADAPTER_CONFIG}, which is not {kind}"
        for kind, fits, names in KINDS
        for name in names
        if name in config and not fits(config[name])
    )
    return next(found, "")


def unsupported(config: Mapping[str, object]) -> str | None:
    """Why the base of an adapter cannot be its reference, by its adapter_config.json, in words that follow "the adapter".

    None where it can. Of other types than LoRA only what all types share is looked at.
    """
    is_lora = config.get("peft_type") == "LORA"
    began = str(config.get("init_lora_weights", "")).lower()
    if is_lora and began.startswith(CHANGES_BASE):
        fix = "PEFT can write it as a plain one (path_initial_model_for_weight_conversion)"
        return f"has init_lora_weights {began}: it belongs to a base whose weights were changed when it began; {fix}"
    if config.get("peft_type") == "TRAINABLE_TOKENS":
        return f"is of the type TRAINABLE_TOKENS: {BECAUSE['trainable_token_indices']}"
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM"):
        return f"is for another task (task_type {task}), and puts a head of its own on the model"
    for name, value in config.items():
        if _is_set(value) and (name in BECAUSE or (is_lora and name not in HELD)):
            return f"has {name} {_short(value)}: {BECAUSE.get(name, 'this is not known here')}"
    return None


def _is_set(value: object) -> bool:
    """Whether a value asks for something: a table of nothing but nulls does not."""
    if isinstance(value, dict):
        return any(map(_is_set, value.values()))
    return value not in (None, False, "", "none") and value != []


def is_on_head(config: Mapping[str, object]) -> bool:
    """Whether an adapter is on the output head too, whose plain weight the log-probs are computed from."""
    weights = [str(name).removesuffix(".weight") for name in _listed(config.get("target_parameters"))]
    heads = [head for head in HEADS if not _matches(config.get("exclude_modules"), head)]
    return any(_matches(targets, head) for targets in (config.get("target_modules"), weights) for head in heads)


def _matches(pattern: object, name: str) -> bool:
    """Whether PEFT finds a module of the model by this pattern: a regular expression, or the ends of names."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(str(end).rpartition(".")[2] == name for end in _listed(pattern))


def _listed(value: object) -> Iterable[object]:
    return value if isinstance(value, list | tuple | set) else ()


def without_bias(adapter: Iterable[str], base: Iterable[str]) -> list[str]:
    """The layers whose bias an adapter changes (lora_bias) and which have none, so that PEFT cannot merge it.

    `adapter` and `base` are the names of tensors in their files.
    """
    ending, there = ".lora_B.bias", set(base)
    layers = [name.removeprefix("base_model.model.").removesuffix(ending) for name in adapter if name.endswith(ending)]
    return [layer for layer in layers if f"{layer}.weight" in there and f"{layer}.bias" not in there]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
