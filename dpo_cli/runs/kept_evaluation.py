"""The evaluation of a run that is already computed: evaluation.json, as long as nothing has changed that decides it. No torch.

A seal in the file has the digest of what its figures were computed from, and that of the figures. Whoever reads the file
computes both again: if one of them differs, the figures are not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dpo_cli.hardware.machine import installed_versions, probe
from dpo_cli.models.hub_models import revision
from dpo_cli.models.source import ModelSource
from dpo_cli.results.codec import JsonObject, to_json
from dpo_cli.results.judgement import Evaluation
from dpo_cli.runs.manifest import hashes, identity
from dpo_cli.storage.digests import sha256, sha256_of_package, sha256_of_settings
from dpo_cli.storage.jsonio import json_text
from dpo_cli.storage.redaction import redacted
from dpo_cli.storage.run_directory import EVALUATION, PLAN, SUMMARY, RunDirectory
from dpo_cli.strategies.strategies import STRATEGIES

SEAL = "seal"


def keep(run: RunDirectory, evaluation: Evaluation, basis: JsonObject) -> None:
    """Write evaluation.json, with its seal; `basis` is from before the model was loaded."""
    document: JsonObject = json.loads(json_text(redacted(to_json(evaluation))))
    run.write_json(EVALUATION, {**document, SEAL: f"{_of_inputs(run, basis)}-{digest_of(document)}"})


def kept(run: RunDirectory) -> Evaluation | None:
    """The evaluation of a finished run, if the file is whole and nothing has changed since; else None."""
    try:
        document, config = run.read_json(EVALUATION), run.read_json(PLAN)["config"]
        if document.pop(SEAL) != f"{_of_inputs(run, basis_of(config))}-{digest_of(document)}":
            return None
        return Evaluation.of_json(document, STRATEGIES[config["strategy"]].rows.noun)
    except (AttributeError, KeyError, OSError, TypeError, ValueError):  # damaged, older, or without its data: computed again
        return None


def is_whole(run: RunDirectory) -> bool:
    """Whether evaluation.json holds what was written, whatever it was computed from."""
    try:
        document, config = run.read_json(EVALUATION), run.read_json(PLAN)["config"]
        seal = document.pop(SEAL, "-")  # older files have none
        Evaluation.of_json(document, STRATEGIES[config["strategy"]].rows.noun)
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        return False
    return seal == "-" or str(seal).endswith(f"-{digest_of(document)}")


def _of_inputs(run: RunDirectory, basis: JsonObject) -> str:
    trained = [run.read_json(SUMMARY)["adapter_sha256"], sha256_of_settings(run.trained)]
    return digest_of({"plan": sha256(run.path / PLAN), "trained": trained, **basis})


def digest_of(value: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def basis_of(config: Mapping[str, Any]) -> JsonObject:
    """What a training and an evaluation read besides the run: data, model, code, versions of packages, processor."""
    machine, model = probe(), ModelSource.of(config["model_name"])
    rewards = {"reward_model": identity(config["reward_model"])} if config.get("reward_model") else {}
    return {
        "data": [hashes(config["dataset"]), hashes(config["eval_dataset"] or [])],
        "model": model.state,
        **rewards,
        "revision": revision(model.foundation),
        "versions": installed_versions(config["provider"]),
        "hardware": [machine.processor, *(gpu.name for gpu in machine.gpus)],
        "code": sha256_of_package(),
    }
