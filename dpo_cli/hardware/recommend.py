"""A config for a card: the documented settings of its profile (config/schema.json has them), with the memory bill."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from dpo_cli.config.schema import profile_defaults
from dpo_cli.errors import DoesNotFit, InvalidInput, Problem
from dpo_cli.hardware.memory import Bill, Settings, fit
from dpo_cli.hardware.models import known_models, model_facts


@dataclass(frozen=True)
class Recommendation:
    profile: str
    vram_gb: float
    config: dict[str, Any]
    memory: Bill
    reasons: list[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "profile": self.profile,
            "vram_gb": self.vram_gb,
            "config": self.config,
            "memory": self.memory.to_json(),
            "reasons": self.reasons,
        }


def profiles() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = json.loads(
        files("dpo_cli.hardware").joinpath("profiles.json").read_text(encoding="utf-8")
    )
    return loaded


def recommend(
    vram_gb: float, model: str | None = None, dataset: str | None = None, free_gb: float | None = None
) -> Recommendation:
    """The preset of the profile that `vram_gb` belongs to, for `model` or the profile's largest model that fits.

    What must fit is `free_gb`, where less than all of the card's memory is free.
    """
    name, profile = [(name, entry) for name, entry in profiles().items() if entry["from_gb"] <= vram_gb][-1]
    preset = {"strategy": "dpo", **profile_defaults(name)}
    models = [model] if model else profile["models"]
    ways = {candidate: _fit(candidate, preset, free_gb or vram_gb) for candidate in models}
    chosen = next((candidate for candidate in models if ways[candidate][1].fits), None)
    if chosen is None:
        memory = ways[models[-1]][1]
        message = f"{models[-1]} needs {memory.total_gb:.1f} GB with the {name} preset; there are {free_gb or vram_gb:g}"
        raise DoesNotFit([Problem("error", "does-not-fit", message, memory.largest_change)])
    settings, memory = ways[chosen]
    reasons = [f"{vram_gb:g} GB is the profile {name}: {profile['advice']}"]
    reasons += [f"{other} does not fit: {ways[other][1].total_gb:.1f} GB" for other in models[: models.index(chosen)]]
    if settings.batch < preset["per_device_train_batch_size"]:
        reasons.append(f"training will run it in micro-batches of {settings.batch}, so that it fits; the steps stay the same")
    reasons.append("learning_rate keeps its documented default; the README has a table of what an adapter needs")
    config = {"strategy": preset["strategy"], "model_name": chosen, **({"dataset": dataset} if dataset else {}), **preset}
    return Recommendation(name, vram_gb, config, memory, reasons)


def _fit(model: str, preset: dict[str, Any], vram_gb: float) -> tuple[Settings, Bill]:
    facts = model_facts(model)
    if facts is None:
        message = f"the shape of {model} is not known here"
        fix = "name a local model directory, a GGUF file, or one of: " + ", ".join(known_models())
        raise InvalidInput([Problem("error", "model-unknown", message, fix, "model_name")])
    settings = Settings(
        batch=preset["per_device_train_batch_size"],
        length=preset["max_seq_length"],
        rank=preset["lora_r"],
        four_bit=preset["use_4bit"],
        bytes_per_value=2,
        checkpointing=False,
    )
    return fit(facts, settings, vram_gb, "auto")
