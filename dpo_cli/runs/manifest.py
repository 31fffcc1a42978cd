"""The environment of a run: versions, hardware, hashes, git commit."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from dpo_cli.data.dataset import sources_of
from dpo_cli.hardware.machine import Machine, installed_versions
from dpo_cli.models.hub_models import revision
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.plan import Plan
from dpo_cli.storage.digests import sha256
from dpo_cli.storage.run_directory import ADAPTER, config_of_run, run_of

RECALLED = "reference_from_cache"  # pairs whose reference log-probs the run took from the user's cache


def manifest(plan: Plan, machine: Machine, model_dir: Path | None) -> dict[str, Any]:
    """The content of manifest.json. `model_dir` holds the safetensors of a local model."""
    # The weights, and config.json, which decides how they are used.
    weights = (
        [file for file in sorted(model_dir.iterdir()) if file.suffix == ".safetensors" or file.name == "config.json"]
        if model_dir
        else []
    )
    return {
        "versions": installed_versions(plan.config.provider),
        "hardware": machine.to_json(),
        "dataset": hashes(plan.config.dataset),
        "eval_dataset": hashes(plan.config.eval_dataset or []),
        "model": {
            "name": plan.config.model_name,
            "sha256": {file.name: sha256(file) for file in weights},
            "revision": revision(plan.model.foundation),
            "below": plan.model.weights_sha256,
            "settings": plan.model.settings_sha256,
        },
        "prompts_file": {plan.config.prompts_file: sha256(Path(plan.config.prompts_file))} if plan.config.prompts_file else {},
        "reward_model": identity(plan.config.reward_model),
        "seed": plan.config.seed,
        "day": plan.day.isoformat() if plan.writes_date else None,
        "git_commit": _git_commit(),
        RECALLED: 0,
    }


def identity(name: str | None) -> dict[str, Any] | None:
    """What identifies the weights of a reward model: of a local one its files, and those of the adapters below it."""
    if name is None:
        return None
    run = config_of_run(name)
    place, model = (
        (run_of(name) / ADAPTER, ModelSource.of(str(run["model_name"]))) if run else (Path(name), ModelSource.of(name))
    )
    own = {path.name: sha256(path) for path in sorted(place.glob("*.safetensors"))} if place.is_dir() else {}
    if Path(name).is_absolute() and not Path(name).exists():  # moved or removed since
        return {"name": name, "sha256": own, "revision": None, "below": {}}
    return {"name": name, "sha256": own, "revision": revision(model.foundation), "below": model.weights_sha256}


def hashes(dataset: str | list[Any]) -> dict[str, str]:
    """The SHA-256 of each data file in the value of a config."""
    return {source.path: sha256(Path(source.path)) for source in sources_of(dataset)}


def _git_commit() -> str | None:
    """The git commit of the current folder, None outside a repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:  # git is not installed: the manifest then has null
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
