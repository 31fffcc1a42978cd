"""What a config file holds: one config, that of a plan.json, or one for each of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from dpo_cli.config import jsonc
from dpo_cli.config.schema import defaults, options
from dpo_cli.errors import UsageError
from dpo_cli.strategies.strategies import STRATEGIES

PLAN_VERSION = 1  # of plan.json, which is read as a config too


@dataclass(frozen=True)
class Written:
    """A config as it is written: its values, their positions, and in a plan their sources."""

    path: str
    values: Mapping[str, object]
    positions: Mapping[jsonc.Path, tuple[int, int]]
    damaged: frozenset[str]  # keys whose values could not be read
    origin: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, object] = field(default_factory=dict)  # from the command line
    stage: int | None = None
    foundation: str | None = None
    day: date | None = None  # the day of a plan's run


def written(path: str, values: Mapping[str, object], document: jsonc.Document, changes: Mapping[str, object]) -> list[Written]:
    """The configs of a document with the object `values`; values of the command line replace those of the file.

    With stages, a model from there is that of the first stage, and an output_dir is the folder of all stages. A value that
    belongs only to the strategy of other stages is theirs.
    """
    whole = Written(path, values, document.positions, _damaged(document, ()), changes=changes)
    config, origin = values.get("config"), values.get("sources")
    if values.get("plan_version") == PLAN_VERSION and isinstance(config, dict):  # repeats its run
        origin = origin if isinstance(origin, dict) else {}
        positions = {key[1:]: where for key, where in document.positions.items() if key[:1] == ("config",)}
        day = day_of(values)
        return [Written(path, config, positions, _damaged(document, ("config",)), origin, changes, day=day)]
    named = values.get("stages")
    if not isinstance(named, list) or not named or not all(isinstance(stage, dict) for stage in named):
        return [whole]  # an invalid "stages" is reported by the schema
    if "strategy" in changes:
        raise UsageError("a strategy on the command line would apply to every stage", "write the strategy into each stage")
    kinds = {_strategy(whole, own) for own in named}
    configs: list[Written] = []
    for number, own in enumerate(named):
        foreign = {
            key for key in changes if not _belongs(key, _strategy(whole, own)) and any(_belongs(key, kind) for kind in kinds)
        }
        for_stage = replace(whole, changes={key: value for key, value in changes.items() if key not in foreign})
        configs.append(_stage(for_stage, document, own, number, configs[-1] if configs else None))
    return configs


def _strategy(whole: Written, own: Mapping[str, object]) -> str:
    """The strategy of a stage, as it is read."""
    strategy = str(own.get("strategy", whole.values.get("strategy", defaults()["strategy"])))
    return "sft" if strategy == "qlora" else strategy


def _belongs(key: str, strategy: str) -> bool:
    """Whether a key has an effect with a strategy; an unknown key is reported by the schema."""
    return key not in options() or strategy in options()[key].strategies or strategy not in STRATEGIES


def day_of(plan: Mapping[str, object]) -> date | None:
    """The day of the run of a plan.json, if its chat template writes the date."""
    try:
        return date.fromisoformat(str(plan["day"]))
    except (KeyError, TypeError, ValueError):  # a plan without a day
        return None


def _stage(whole: Written, document: jsonc.Document, own: Mapping[str, object], number: int, before: Written | None) -> Written:
    """A stage as a config: its own values, and those values of the file that belong to its strategy.

    It starts from the run of the stage before, unless it names a model. Its run directory is inside that of the file.
    """
    path, changes, place = whole.path, whole.changes, ("stages", number)
    strategy = str(own.get("strategy", whole.values.get("strategy", defaults()["strategy"])))
    shared = {key: value for key, value in whole.values.items() if key != "stages" and _belongs(key, _strategy(whole, own))}
    values = {**shared, **own}
    root = Path(str(changes.get("output_dir") or shared.get("output_dir") or default_folder(path)))
    values["output_dir"] = own.get("output_dir") or str(root / f"{number + 1}-{strategy}")
    foundation = None
    if before is not None and "model_name" not in own:
        named = {**before.values, **before.changes}.get("model_name", defaults()["model_name"])
        foundation = before.foundation or str(named)
        values["model_name"] = _last_run({**before.values, **before.changes})
    positions = {key: where for key, where in document.positions.items() if key[:1] != ("stages",) and not own.keys() & key[:1]}
    positions |= {key[2:]: where for key, where in document.positions.items() if key[:2] == place and len(key) > 2}
    damaged = _damaged(document, ()) - {"stages"} - own.keys() | _damaged(document, place)
    first = () if before is None else ("model_name",)
    own_changes = {key: value for key, value in changes.items() if key not in ("output_dir", *first)}
    return Written(path, values, positions, damaged, {}, own_changes, number + 1, foundation)


def default_folder(path: str) -> Path:
    """The run directory of a config file that names none."""
    return Path("runs") / (Path(path).stem if path != "-" else "stdin")


def run_of_round(folder: str, number: int) -> str:
    """The run directory of a round, from 1, in the output_dir of its config."""
    return str(Path(folder) / f"round-{number}")


def _last_run(values: Mapping[str, object]) -> str:
    """The run directory with the result of a stage."""
    folder, rounds = str(values["output_dir"]), values.get("rounds")
    has_rounds = _belongs("rounds", str(values.get("strategy", defaults()["strategy"])))
    return run_of_round(folder, rounds) if isinstance(rounds, int) and has_rounds else folder


def _damaged(document: jsonc.Document, within: jsonc.Path) -> frozenset[str]:
    depth = len(within)
    return frozenset(str(place[depth]) for place in document.damaged if len(place) > depth and place[:depth] == within)
