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
from dpo_cli.runs.digests import sha256_of_all
from dpo_cli.runs.directory import ADAPTER, MODEL, PLAN, SUMMARY, WEIGHTS

ADAPTER_CONFIG = "adapter_config.json"
# The options that an adapter was made with and that cannot change under it, by PEFT's names.
SHAPE = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_dora": "use_dora", "use_rslora": "use_rslora"} | {
    "target_modules": "target_modules",
    "modules_to_save": "modules_to_save",
}


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
