"""What a `model_name` stands for when it is no model: a run of this program, or a PEFT adapter of any. No torch.

run directory        plan.json + adapter/      the adapter on the model that the plan names, which may be a run again
                     plan.json + model/        the whole model, where every weight was trained
adapter directory    adapter_config.json       the adapter on the model that the file names
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.hardware.foreign import in_adapter
from dpo_cli.runs.digests import sha256_of_all, sha256_of_settings
from dpo_cli.runs.directory import ADAPTER, MODEL, PLAN, SUMMARY, WEIGHTS

ADAPTER_CONFIG = "adapter_config.json"
# The options that an adapter was made with and that cannot change under it, by PEFT's names.
SHAPE = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_dora": "use_dora", "use_rslora": "use_rslora"} | {
    "target_modules": "target_modules",
    "modules_to_save": "modules_to_save",
}

# The parts of an adapter_config.json that are supported: where an adapter is and how large, and what only its training needs.
# Anything else that is set is refused by its name.
HELD = frozenset(SHAPE.values()) | {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "fan_in_fan_out", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_bias"),
    *("rank_pattern", "alpha_pattern", "target_parameters", "megatron_core", "qalora_group_size", "init_lora_weights"),
}
BECAUSE = {
    "bias": "it changes biases of the base itself, so the base without it is not there to compare with",
    "trainable_token_indices": "single rows of the embedding are trained, which are not scored here",
    "layer_replication": "it repeats layers of the base: it is another model",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "ensure_weight_tying": "embedding and head share what is trained",
}
CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # ways to begin that take a part out of the base's weights


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in `directory`, and the model that it stands on, by a name that `model_name` can have."""

    directory: Path
    model_name: str
    shape: Mapping[str, Any]  # the options of `SHAPE`


def adapter_at(model_name: str) -> Adapter | None:
    """The adapter that `model_name` names, None when it names a model. Raises `ValueError` for one that cannot be used."""
    path = Path(model_name)
    if (path / PLAN).is_file() and not (path / SUMMARY).is_file():
        raise ValueError("the run in it is not finished")
    if (path / PLAN).is_file() and not (path / MODEL).is_dir():
        directory = path / ADAPTER
        if not (directory / ADAPTER_CONFIG).is_file():
            raise ValueError("the run in it has no adapter")
    elif (path / ADAPTER_CONFIG).is_file():
        directory = path
    else:
        return None
    config = _object(directory / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"its adapter is of the type {config.get('peft_type')}, and only LORA can be trained on")
    if not (directory / WEIGHTS).is_file():
        raise ValueError(f"its adapter has no {WEIGHTS}")
    if code := in_adapter(config):
        raise ValueError(f"its {ADAPTER_CONFIG} names a module to import ({code}), and no code of an adapter is run")
    if why := unsupported(config):
        raise ValueError(f"its adapter {why}")
    shape = {name: config.get(theirs) for name, theirs in SHAPE.items()}
    if isinstance(shape["target_modules"], list):
        shape["target_modules"] = sorted(shape["target_modules"])
    if (plan := directory.parent / PLAN).is_file():
        model_name = _stands_on(_object(plan))
    else:
        model_name = config.get("base_model_name_or_path") or ""
    if not model_name:
        raise ValueError(f"its {ADAPTER_CONFIG} names no base model")
    return Adapter(directory, model_name, shape)


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Why the base of an adapter cannot be its reference, by its adapter_config.json, in words that follow "the adapter".

    None where it can. Of other types than LoRA only what all types share is looked at.
    """
    is_lora = config.get("peft_type") == "LORA"
    if config.get("peft_type") == "TRAINABLE_TOKENS":
        return f"is of the type TRAINABLE_TOKENS: {BECAUSE['trainable_token_indices']}"
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM"):
        return f"is for another task (task_type {task}), and puts a head of its own on the model"
    for name, value in config.items():
        is_set = value not in (None, False, "", "none") and value != [] and value != {}
        if is_set and (name in BECAUSE or (is_lora and name not in HELD)):
            return f"has {name} {_short(value)}: {BECAUSE.get(name, 'this is not known here')}"
    began = str(config.get("init_lora_weights", "")).lower()
    if is_lora and began.startswith(CHANGES_BASE):
        fix = "PEFT can write it as a plain one (path_initial_model_for_weight_conversion)"
        return f"has init_lora_weights {began}: it belongs to a base whose weights were changed when it began; {fix}"
    return None


def is_on_head(config: Mapping[str, Any]) -> bool:
    """Whether an adapter is on the output head too, whose plain weight the log-probs are computed from."""
    targets = config.get("target_modules")
    names = targets if isinstance(targets, list | tuple | set) else ()
    return any(str(name).rpartition(".")[2] == "lm_head" for name in names)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def model_of(model_name: str) -> str:
    """The directory of a run's whole model, where `model_name` is such a run; else the name itself."""
    place = Path(model_name) / MODEL
    return str(place) if place.is_dir() and (place.parent / PLAN).is_file() else model_name


def folders_below(model_name: str) -> list[str]:
    """The folders of all runs and adapters that a model stands on, itself first. No weights are read."""
    folders: list[str] = []
    adapter = adapter_at(model_name)
    while adapter is not None:
        if str(adapter.directory) in folders:
            raise ValueError("it stands on itself")
        folders.append(str(adapter.directory))
        model_name = adapter.model_name
        adapter = adapter_at(model_name)
    whole = model_of(model_name)
    return folders if whole == model_name else [*folders, whole]


def chain_of(model_name: str) -> dict[str, str]:
    """The same folders, each with the SHA-256 of its weights, which reads them all."""
    return {folder: sha256_of_all(Path(folder)) for folder in folders_below(model_name)}


def settings_of(model_name: str) -> dict[str, str]:
    """The same folders, each with the SHA-256 of what its weights are computed with."""
    return {folder: sha256_of_settings(Path(folder)) for folder in folders_below(model_name)}


def foundation(model_name: str) -> str:
    """The model below all adapters: whose shape and tokenizer count. The name itself where its adapter cannot be used."""
    try:
        adapter = adapter_at(model_name)
    except (OSError, ValueError):  # told of as a fault of model_name (models.py)
        return model_name
    return foundation(adapter.model_name) if adapter else model_of(model_name)


def _stands_on(plan: Mapping[str, Any]) -> str:
    """The model of a run's adapter: one that went on from another adapter stands where that one does."""
    config = plan.get("config")
    name = config.get("model_name") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(name, str):
        raise ValueError(f"its {PLAN} names no model")
    start = adapter_at(name) if config.get("reference") == "adapter" else None
    return start.model_name if start else name


def _object(file: Path) -> dict[str, Any]:
    loaded = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(loaded, dict):
        raise ValueError(f"{file.name} is not an object")
    return loaded
