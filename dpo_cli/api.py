"""The commands as functions, for notebooks and scripts: what `dpo` calls, with typed results.

>>> import dpo_cli
>>> dpo_cli.validate("my-config.json").ok
>>> run = dpo_cli.train({"model_name": "models/m", "dataset": "pairs.jsonl", "output_dir": "runs/m"}, learning_rate=2e-4)
>>> dpo_cli.evaluate(run.run_dir).sides.gain["logp_accuracy"]

A config is the path of a JSON file, or its values. What a command prints goes to standard error. An error is a `DpoError`, with
`message`, `fix` and `exit_code`; an `InvalidInput` has all `problems`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.commands import train_stages
from dpo_cli.commands import validate as validation
from dpo_cli.commands.recommendation import request_of
from dpo_cli.commands.session import composer_for
from dpo_cli.errors import Exit
from dpo_cli.hardware import recommend as recommendation
from dpo_cli.hardware.machine import probe
from dpo_cli.results.judgement import Evaluation
from dpo_cli.results.summary import RunSummary
from dpo_cli.results.validation import Validation
from dpo_cli.storage.hub import ask_nobody
from dpo_cli.ui.console import Console

ConfigLike = str | Path | Mapping[str, object]


@dataclass(frozen=True)
class TrainedRun:
    """A training that has ended: completed, interrupted or unhealthy."""

    run_dir: Path
    summary: RunSummary
    exit_code: Exit


def validate(config: ConfigLike, *, vram: float | None = None, data: bool = True, strict: bool = False) -> Validation:
    """Every problem of a config, its data and its memory. `vram`, GB, plans for another card than this machine's."""
    with _file_of(config) as path:
        return validation.validated_file(_console(), path, [], probe(), vram, data, strict)


def recommend(
    *, vram: float | None = None, model: str | None = None, dataset: str | None = None, strategy: str = "dpo"
) -> recommendation.Recommendation:
    """A config for a card with `vram` GB, or for this machine's, with its memory bill."""
    return recommendation.recommend(request_of(_console(), vram, model, dataset, strategy))


def train(config: ConfigLike, *, overwrite: bool = False, resume: bool = False, **values: object) -> TrainedRun:
    """Train an adapter; a config with stages returns its last one. `values` replace those of the config."""
    with _file_of(config) as path:
        overrides = [f"{name}={json.dumps(value)}" for name, value in values.items()]
        result, code = train_stages.train_stages(path, overrides, _console(), overwrite=overwrite, resume=resume)
    return TrainedRun(Path(str(result["run_dir"])), RunSummary.of_json(result), code)


def evaluate(run_dir: str | Path, *, dataset: str | None = None, adapter: str | Path | None = None) -> Evaluation:
    """Evaluate a run on its held-out rows, or on `dataset`; with `adapter`, that one on the model of the config `run_dir`."""
    composer_for()
    from dpo_cli.commands.eval import evaluate as evaluated
    from dpo_cli.commands.requests import Request

    evaluation, _ = evaluated(Request(str(run_dir), Path(adapter) if adapter else None, dataset), _console())
    return evaluation


def _console() -> Console:
    ask_nobody()
    return Console(as_json=True)


@contextmanager
def _file_of(config: ConfigLike) -> Iterator[str]:
    """The path of a config; values are written to a temporary file."""
    if not isinstance(config, Mapping):
        yield str(config)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config, indent=2), encoding="utf-8")
        yield str(file)
