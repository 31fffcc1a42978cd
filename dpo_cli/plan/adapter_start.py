"""From an adapter there are two ways on: to train it further, or to merge it and train a fresh one on top. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_cli.config.config import Loaded
from dpo_cli.config.options import Config
from dpo_cli.errors import Problem
from dpo_cli.models.adapter_config import SHAPE, Adapter, without_bias
from dpo_cli.models.model_files import ModelFiles
from dpo_cli.models.source import ModelSource
from dpo_cli.models.tensor_files import some
from dpo_cli.strategies.strategies import STRATEGIES


def started(loaded: Loaded, config: Config, source: ModelSource) -> tuple[dict[str, Any], list[str]]:
    """What an adapter that model_name names decides, and why in words.

    It is trained on, and has its shape already. Where the config asks for another shape, or for a "base" as the reference, it
    is merged into its base, and a fresh adapter is trained on the merged model, or with "lora_r" 0 all its weights. Either way
    the reference is what the policy is at step 0: the frozen adapter, or the merged model as it was.
    """
    if (adapter := source.adapter) is None:
        return {"reference": "base"}, []
    label = Path(config.model_name).name
    why = '"reference" is "base"' if config.reference == "base" else other_shape(loaded, source)
    if why and config.reference != "adapter":
        then = "a fresh one trained on that" if config.lora_r else "every weight of that is trained"
        note = f"the adapter of {label} is merged into its base model and {then}, since {why}"
        return {"reference": "base"}, [f"{note}; the reference is the merged model"]
    shape = adapter.shape
    note = f"training goes on from the adapter of {label} (rank {shape['lora_r']}), since the config asks for no other shape"
    note += "; the reference is a frozen copy of it" if STRATEGIES[config.strategy].refers else ""
    return {"reference": "adapter", **shape}, [note]


def problems(loaded: Loaded, source: ModelSource, run_dir: Path) -> Iterator[Problem]:
    """Where "reference" asks for what model_name does not give, and where the run would overwrite what it stands on."""
    config, place = loaded.require(), Path(os.path.realpath(run_dir))
    below = [Path(os.path.realpath(folder)) for folder in source.folders]
    if any(folder.is_relative_to(place) for folder in below):
        message = f"output_dir {run_dir} holds what the run stands on"
        yield Problem("error", "output-is-input", message, "name a folder of its own, for example runs/my-run", "output_dir")
    if loaded.foundation is not None:  # a stage, whose adapter is not there yet
        return
    yield from _adapter_problems(loaded, config, source)
    if config.reference != "adapter" or loaded.sources.get("reference") not in ("config", "override"):
        return
    if source.adapter is None:
        message = f'"reference" is "adapter", but {config.model_name} is a model without one'
        yield Problem("error", "reference-adapter", message, 'name a run or an adapter in "model_name"', "reference")
    elif why := other_shape(loaded, source):
        fix = 'leave these out, or write "reference": "base" to train a fresh adapter on the merged model'
        yield Problem("error", "reference-adapter", f'"reference" is "adapter", but {why}', fix, "reference")


def _adapter_problems(loaded: Loaded, config: Config, source: ModelSource) -> Iterator[Problem]:
    """An adapter that is trained on and is on the output head, and those that are to be merged and cannot be."""
    adapters = source.adapters
    goes_on = started(loaded, config, source)[0]["reference"] == "adapter"
    if goes_on and adapters[0].is_on_head:
        message = f"the adapter of {config.model_name} is also on lm_head, and log-probs are computed from its plain weight"
        fix = 'write "reference": "base": it is merged into its base, and a fresh adapter is trained on that'
        yield Problem("error", "adapter-on-head", message, fix, "model_name")
    for adapter in adapters[1:] if goes_on else adapters:
        if layers := _without_bias(adapter, source.files):
            message = f"the adapter in {adapter.directory} has lora_bias, and cannot be merged into layers without a bias"
            fix = 'train on it (leave out "reference" and what gives it another shape), or train another one without lora_bias'
            yield Problem("error", "adapter-unmergeable", f"{message}: {some(layers)}", fix, "model_name")


def _without_bias(adapter: Adapter, base: ModelFiles) -> list[str]:
    """Layers of the model below that lack a bias which the adapter changes, where both can be told from files."""
    if not adapter.config.get("lora_bias") or not base.path.is_dir():
        return []
    try:
        return without_bias(adapter.tensors, base.tensors.shapes)
    except (OSError, ValueError):  # told of as a fault of model_name
        return []


def other_shape(loaded: Loaded, source: ModelSource) -> str:
    """Which options the config names otherwise than the adapter of `source` has them, in words; empty where there is none."""
    asked = [name for name in SHAPE if loaded.sources.get(name) in ("config", "override")]
    linears = [linear.name for linear in facts.linears] if (facts := source.facts) else []
    shape = source.adapter.shape if source.adapter is not None else {}

    def comparable(value: Any) -> Any:
        value = linears if value == "all-linear" else value
        return sorted(value) if isinstance(value, list) else value

    other = [name for name in asked if comparable(loaded.values[name]) != comparable(shape[name])]
    return ", ".join(f"{name} {loaded.values[name]} is not its {shape[name]}" for name in other)
