"""The commands as functions, for notebooks and scripts: what `dpo` calls, with typed results.

>>> import dpo_cli
>>> dpo_cli.validate("my-config.json").ok
>>> run = dpo_cli.train({"model_name": "models/m", "dataset": "pairs.jsonl", "output_dir": "runs/m"}, learning_rate=2e-4)
>>> dpo_cli.evaluate(run.run_dir).sides.gain["logp_accuracy"]

A config is the path of a JSON file, or its values; values name an `output_dir`. What a command prints goes to standard error.
What a user can mend is raised as a `DpoError` with `message`, `fix` and `exit_code`; an `InvalidInput` has all `problems`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.commands import train_stages
from dpo_cli.commands import validate as validation
from dpo_cli.commands.launch import processes_of
from dpo_cli.commands.own_process import dpo
from dpo_cli.commands.recommendation import request_of
from dpo_cli.commands.session import composer_for, console_of
from dpo_cli.config.config import ConfigLike
from dpo_cli.errors import DpoError, Exit, InvalidInput, UsageError, problem_of_json
from dpo_cli.hardware import recommend as recommendation
from dpo_cli.hardware.machine import probe
from dpo_cli.results.codec import JsonObject
from dpo_cli.results.judgement import Evaluation
from dpo_cli.results.methods_compared import MethodsCompared
from dpo_cli.results.settings_swept import SettingsSwept
from dpo_cli.results.summary import RunSummary
from dpo_cli.results.validation import Validation

Name = str | Path
Config = Name | Mapping[str, object]


@dataclass(frozen=True)
class TrainedRun:
    """A training that has ended: completed, interrupted or unhealthy."""

    run_dir: Path
    summary: RunSummary
    exit_code: Exit


def validate(config: Config, *, vram: float | None = None, data: bool = True, strict: bool = False) -> Validation:
    """All that is wrong with a config, its data and its memory. `vram`, GB, plans for another card than this machine's."""
    with console_of(as_json=True) as console:
        return validation.validated_file(console, _given(config), [], probe(), vram, data, strict)


def recommend(
    *, vram: float | None = None, model: Name | None = None, dataset: Name | None = None, strategy: str = "dpo", gpus: int = 1
) -> recommendation.Recommendation:
    """A config for a card with `vram` GB, or for this machine's, with its memory bill."""
    with console_of(as_json=True) as console:
        return recommendation.recommend(request_of(console, vram, _text(model), _text(dataset), strategy, gpus))


def train(config: Config, *, overwrite: bool = False, resume: bool = False, **values: object) -> TrainedRun:
    """Train an adapter; of a config with stages the last one is returned. `values` go over those of the config."""
    given, overrides = _placed(config, values), _overrides(values)
    if processes_of(given, overrides) > 1:
        result, code = _trained_in_processes(given, overrides, overwrite, resume)
    else:
        with console_of(as_json=True) as console:
            result, code = train_stages.train_stages(given, overrides, console, overwrite=overwrite, resume=resume)
    return TrainedRun(Path(str(result["run_dir"])), RunSummary.of_json(result), code)


def compare(config: Config, *, overwrite: bool = False, **values: object) -> MethodsCompared:
    """Train the methods that `compare` in a config names with several seeds, and compare them on one held-out set.

    Runs that have ended are not trained again, unless with `overwrite`. `values` go over those of the config.
    """
    with console_of(as_json=True) as console:
        from dpo_cli.commands.compare import compare as compared

        return compared(_placed(config, values), _overrides(values), console, overwrite=overwrite)[0]


def sweep(
    config: Config,
    space: Mapping[str, str | Sequence[object]],
    *,
    trials: int | None = None,
    processes: int = 1,
    overwrite: bool = False,
    **values: object,
) -> SettingsSwept:
    """Train a config with several settings, and choose the best on held-out rows.

    `space` has the values of each key: a list, or a range as text, "1e-5..1e-3@4". `trials` settings are drawn with Optuna
    instead of a whole grid; `processes` train at once. `values` go over those of the config.
    """
    words = [f"{key}={own if isinstance(own, str) else _listed(own)}" for key, own in space.items()]
    with console_of(as_json=True) as console:
        from dpo_cli.commands.sweep import sweep as swept

        given, words = _placed(config, values), [*words, *_overrides(values)]
        return swept(given, words, console, trials=trials, processes=processes, overwrite=overwrite)[0]


def _listed(values: Sequence[object]) -> str:
    """A list of values as the command line has it; with one value it is a list too."""
    return ",".join(json.dumps(value) for value in values) + ","


def evaluate(run: Name, *, dataset: Name | None = None, adapter: Name | None = None) -> Evaluation:
    """Judge a run on what it held out, or on `dataset`; with an `adapter`, that one on the model of the config file `run`."""
    with console_of(as_json=True) as console:
        composer_for()
        from dpo_cli.commands.eval import evaluate as evaluated
        from dpo_cli.commands.requests import Request

        evaluation, _ = evaluated(Request(str(run), Path(adapter) if adapter else None, _text(dataset)), console)
    return evaluation


def _placed(config: Config, values: Mapping[str, object]) -> ConfigLike:
    """The config; values of one have no name to make an output_dir of."""
    given = _given(config)
    if isinstance(given, Mapping) and "output_dir" not in {**given, **values}:
        raise UsageError("values of a config name no output_dir", 'add one, for example output_dir="runs/mine"')
    return given


def _trained_in_processes(
    config: ConfigLike, overrides: Sequence[str], overwrite: bool, resume: bool
) -> tuple[JsonObject, Exit]:
    """What `dpo train` prints, whose processes this one is not; what ends it is raised."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "config.json"
        if not isinstance(config, str):
            file.write_text(json.dumps(config, default=os.fspath), encoding="utf-8")
        named = {"--overwrite": overwrite, "--resume": resume}
        words = [config if isinstance(config, str) else str(file), *overrides]
        words += [name for name, is_given in named.items() if is_given]
        code, document = dpo(["train", *words])
    if problems := document.get("problems"):
        raise InvalidInput([problem_of_json(problem) for problem in problems])
    if "run_dir" not in document:
        failure = DpoError(document.get("error", f"the processes ended with {code}"), document.get("fix"))
        failure.exit_code = Exit(code) if code in list(Exit) else Exit.FAILED
        raise failure
    return document, Exit(code)


def _overrides(values: Mapping[str, object]) -> list[str]:
    return [f"{name}={json.dumps(value, default=os.fspath)}" for name, value in values.items()]


def _given(config: Config) -> ConfigLike:
    return config if isinstance(config, Mapping) else str(config)


def _text(name: Name | None) -> str | None:
    return None if name is None else str(name)
