"""A training from an adapter: continue to train it, or merge it and train a fresh one. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_cli.config.config import Loaded
from dpo_cli.config.options import Config
from dpo_cli.config.rounds import FIRST
from dpo_cli.errors import Problem
from dpo_cli.models.adapter_config import SHAPE, Adapter, without_bias
from dpo_cli.models.model_files import ModelFiles
from dpo_cli.models.source import CONTINUED, ModelSource
from dpo_cli.models.tensor_files import some
from dpo_cli.storage.jsonio import read_object
from dpo_cli.storage.run_directory import PLAN
from dpo_cli.strategies.strategies import STRATEGIES

Shape = Mapping[str, Any]  # the options of SHAPE


def start_of(model: ModelSource, reference: str) -> str | None:
    """The adapter that a training starts from, if its figures are compared with it; None for a model with the adapter off."""
    return Path(model.name).name if model.adapter is not None and reference != FIRST else None


def started(loaded: Loaded, config: Config, source: ModelSource) -> tuple[dict[str, Any], list[str]]:
    """The values that an adapter in model_name decides, and the reason in words.

    Its training continues with its shape. If the config gives another shape, or "base" as the reference, it is merged into its
    base, and a fresh adapter is trained on the merged model, or with "lora_r" 0 every weight. In both cases the reference is
    the policy at step 0: the frozen adapter, or the merged model. For a stage on one that has not run yet, the words say what
    will be so, and the values are those of the model of the first stage.
    """
    shape: Shape | None = source.adapter.shape if source.adapter is not None else None
    label = Path(config.model_name).name
    why = _why_merged(loaded, config, shape, source)
    continued = FIRST if config.reference == FIRST else "adapter"
    values = {"reference": "base"} if shape is None or why else {"reference": continued, **shape}
    if loaded.is_ahead and loaded.before is not None:
        shape, label = _shape_after(loaded.before, source), loaded.before.part
        why = _why_merged(loaded, config, shape, source)
    elif shape is None:
        return values, []
    refers = STRATEGIES[config.strategy].refers
    if not shape or not shape["lora_r"]:
        return values, [f"the training starts from the model of {label}" + ("; it is also the reference" if refers else "")]
    if why:
        then = "a fresh adapter is trained on the result" if config.lora_r else "every weight of the result is trained"
        note = f"the adapter of {label} is merged into its base model, and {then}, because {why}"
        return values, [note if STRATEGIES[config.strategy].gives_rewards else f"{note}; the reference is the merged model"]
    note = f"the training of the adapter of {label} (rank {shape['lora_r']}) continues: the config gives no other shape"
    if config.reference == FIRST:
        return values, [f"{note}; the reference is its model with the adapter off, as in the run before"]
    return values, [note + ("; the reference is a frozen copy of it" if refers else "")]


def _why_merged(loaded: Loaded, config: Config, shape: Shape | None, source: ModelSource) -> str:
    """Why an adapter of this shape is merged before the training; empty if its training continues."""
    if shape is None:
        return ""
    if STRATEGIES[config.strategy].gives_rewards:
        return "a reward model has another head"
    if config.rounds and config.reference == FIRST:
        return "every round is compared with the model before round 1"
    if config.reference in CONTINUED:
        return ""
    return '"reference" is "base"' if config.reference == "base" else other_shape(loaded, shape, source)


def _shape_after(loaded: Loaded, source: ModelSource) -> Shape:
    """The shape of the adapter that a stage will leave; `source` is the model of the first stage."""
    config = loaded.require()
    before: Shape | None = source.adapter.shape if source.adapter is not None else None
    if loaded.before is not None:
        before = _shape_after(loaded.before, source)
    if before and before["lora_r"] and not _why_merged(loaded, config, before, source):
        return before
    own = {name: getattr(config, name) for name in SHAPE}
    return {**own, "lora_alpha": config.lora_alpha or 2 * config.lora_r}


def problems(loaded: Loaded, source: ModelSource, run_dir: Path) -> Iterator[Problem]:
    """Problems of a "reference" that model_name does not allow, and of a run that would overwrite its own model."""
    config, place = loaded.require(), Path(os.path.realpath(run_dir))
    below = [Path(os.path.realpath(folder)) for folder in source.folders]
    if any(folder.is_relative_to(place) for folder in below):
        message = f"output_dir {run_dir} holds the model or adapter that the run starts from"
        yield Problem("error", "output-is-input", message, "name a new folder, for example runs/my-run", "output_dir")
    if loaded.foundation is not None:  # a stage whose adapter does not exist yet
        return
    yield from _adapter_problems(loaded, config, source)
    if config.reference == FIRST and not _has_first(source) and not config.rounds:
        message = (
            f'"reference" is "first", but {config.model_name} is not a run with its model, the adapter off, as the reference'
        )
        fix = 'remove "reference", or name such a dpo run in "model_name"'
        yield Problem("error", "reference-first", message, fix, "reference")
    if config.reference != "adapter" or loaded.sources.get("reference") not in ("config", "override"):
        return
    if source.adapter is None:
        message = f'"reference" is "adapter", but {config.model_name} is a model without an adapter'
        yield Problem("error", "reference-adapter", message, 'name a run or an adapter in "model_name"', "reference")
    elif why := other_shape(loaded, source.adapter.shape, source):
        fix = 'remove these keys, or write "reference": "base" to train a fresh adapter on the merged model'
        yield Problem("error", "reference-adapter", f'"reference" is "adapter", but {why}', fix, "reference")


def _has_first(source: ModelSource) -> bool:
    """Whether the model is a run with an adapter that was compared with its model, the adapter off."""
    plan = Path(source.name) / PLAN
    if source.adapter is None or not plan.is_file():
        return False
    config = read_object(plan).get("config")
    named = config if isinstance(config, dict) else {}
    strategy = STRATEGIES.get(str(named.get("strategy")))
    return strategy is not None and strategy.refers and named.get("reference") in ("base", FIRST)


def _adapter_problems(loaded: Loaded, config: Config, source: ModelSource) -> Iterator[Problem]:
    """Problems of an adapter on the output head that would be trained, and of adapters that cannot be merged."""
    adapters = source.adapters
    continues = started(loaded, config, source)[0]["reference"] in CONTINUED
    if continues and adapters[0].is_on_head:
        message = (
            f"the adapter of {config.model_name} also changes lm_head, which is not supported: log-probs need its plain weight"
        )
        fix = 'write "reference": "base": the adapter is merged into its base, and a fresh one is trained on the result'
        yield Problem("error", "adapter-on-head", message, fix, "model_name")
    for adapter in adapters[1:] if continues else adapters:
        if layers := _without_bias(adapter, source.files):
            message = f"the adapter in {adapter.directory} has lora_bias, so it cannot be merged into layers without a bias"
            fix = (
                'continue its training (remove "reference" and keys that change its shape), or use an adapter without lora_bias'
            )
            yield Problem("error", "adapter-unmergeable", f"{message}: {some(layers)}", fix, "model_name")


def _without_bias(adapter: Adapter, base: ModelFiles) -> list[str]:
    """Layers of the base model without the bias that the adapter changes, if the files show both."""
    if not adapter.config.get("lora_bias") or not base.path.is_dir():
        return []
    try:
        return without_bias(adapter.tensors, base.tensors.shapes)
    except (OSError, ValueError):  # reported as a problem of model_name
        return []


def other_shape(loaded: Loaded, shape: Shape, source: ModelSource) -> str:
    """The options of the config that differ from the shape of an adapter, in words; empty if there are none."""
    given = [name for name in SHAPE if loaded.sources.get(name) in ("config", "override")]
    linears = [linear.name for linear in facts.linears] if (facts := source.facts) else []

    def comparable(value: Any) -> Any:
        value = linears if value == "all-linear" else value
        return sorted(value) if isinstance(value, list) else value

    other = [name for name in given if comparable(loaded.values[name]) != comparable(shape[name])]
    return ", ".join(f"{name} {loaded.values[name]} differs from its {shape[name]}" for name in other)
