"""What a config file holds: one config, that of a plan.json, or one for each of its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from dpo_cli.config import jsonc
from dpo_cli.config.schema import defaults, options
from dpo_cli.errors import UsageError
from dpo_cli.strategies.strategies import STRATEGIES

REWARDING = ("reward_model", "reward_functions")  # options that say what gives the rewards
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
    starts_on: int | None = None  # the place of the stage whose run it starts from
    rewarded_by: int | None = None  # the place of the stage whose run is its reward model

    @property
    def is_of_rewards(self) -> bool:
        """Whether it trains a reward model, from which no policy can start."""
        strategy = STRATEGIES.get(strategy_of(self.values, {}))
        return strategy is not None and strategy.gives_rewards


def written(path: str, values: Mapping[str, object], document: jsonc.Document, changes: Mapping[str, object]) -> list[Written]:
    """The configs of a document with the object `values`; values of the command line replace those of the file.

    With stages, a model from there is that of the first stage, and an output_dir is the folder of all stages. A value that
    belongs only to the strategy of other stages is theirs. A config that needs a reward model, and names none, is
    two stages: the first trains one.
    """
    whole = Written(path, values, document.positions, _damaged(document, ()), changes=changes)
    config, origin = values.get("config"), values.get("sources")
    if values.get("plan_version") == PLAN_VERSION and isinstance(config, dict):  # repeats its run
        origin = origin if isinstance(origin, dict) else {}
        positions = {key[1:]: where for key, where in document.positions.items() if key[:1] == ("config",)}
        day = day_of(values)
        return [Written(path, config, positions, _damaged(document, ("config",)), origin, changes, day=day)]
    if (implied := _implied(whole)) is not None:
        named: object = implied
        changes = {key: value for key, value in changes.items() if key != "strategy"}
    else:
        named = values.get("stages")
    if not isinstance(named, list) or not named or not all(isinstance(stage, dict) for stage in named):
        return [whole]  # an invalid "stages" is reported by the schema
    if "strategy" in changes:
        raise UsageError("a strategy on the command line would apply to every stage", "write the strategy into each stage")
    kinds = {strategy_of(whole.values, own) for own in named}
    configs: list[Written] = []
    for own in named:
        foreign = {
            key
            for key in changes
            if not belongs(key, strategy_of(whole.values, own)) and any(belongs(key, kind) for kind in kinds)
        }
        for_stage = replace(whole, changes={key: value for key, value in changes.items() if key not in foreign})
        configs.append(_stage(for_stage, document, own, configs))
    return configs


def _implied(whole: Written) -> list[dict[str, object]] | None:
    """The stages of a config without any whose strategy needs a reward model that it does not name; else None."""
    values = {**whole.values, **whole.changes}
    strategy = STRATEGIES.get(str(values.get("strategy")))
    if values.get("stages") is not None or strategy is None or strategy.rewarded_by is None or _names_rewards(values, whole):
        return None
    own: dict[str, object] = (
        {"strategy": strategy.name} if "strategy" in whole.changes else {}
    )  # else it has its place in the file
    return [{"strategy": strategy.rewarded_by}, own]


def _names_rewards(values: Mapping[str, object], whole: Written) -> bool:
    return any(values.get(name) or name in whole.damaged for name in REWARDING)


def strategy_of(values: Mapping[str, object], own: Mapping[str, object]) -> str:
    """The strategy of a stage with its own values in a file with `values`, as it is read."""
    strategy = str(own.get("strategy", values.get("strategy", defaults()["strategy"])))
    return "sft" if strategy == "qlora" else strategy


def belongs(key: str, strategy: str) -> bool:
    """Whether a key has an effect with a strategy; an unknown key is reported by the schema."""
    return key not in options() or strategy in options()[key].strategies or strategy not in STRATEGIES


def day_of(plan: Mapping[str, object]) -> date | None:
    """The day of the run of a plan.json, if its chat template writes the date."""
    try:
        return date.fromisoformat(str(plan["day"]))
    except (KeyError, TypeError, ValueError):  # a plan without a day
        return None


def _stage(whole: Written, document: jsonc.Document, own: Mapping[str, object], earlier: Sequence[Written]) -> Written:
    """A stage as a config: its own values, and those values of the file that belong to its strategy.

    It starts from the run of the last stage before it that is not a reward model, unless it names a model; without such a stage
    from the model of the first. A reward model before it gives its rewards, unless it names others. Its run directory is inside
    that of the file.
    """
    number = len(earlier)
    path, changes, place = whole.path, whole.changes, ("stages", number)
    start = _last(earlier, is_of_rewards=False)
    before = earlier[start] if start is not None else None
    strategy = str(own.get("strategy", whole.values.get("strategy", defaults()["strategy"])))
    shared = {
        key: value for key, value in whole.values.items() if key != "stages" and belongs(key, strategy_of(whole.values, own))
    }
    values = {**shared, **own}
    root = Path(str(changes.get("output_dir") or shared.get("output_dir") or default_folder(path)))
    values["output_dir"] = own.get("output_dir") or str(root / f"{number + 1}-{strategy}")
    foundation = None
    if before is not None and "model_name" not in own:
        named = {**before.values, **before.changes}.get("model_name", defaults()["model_name"])
        foundation = before.foundation or str(named)
        values["model_name"] = _last_run({**before.values, **before.changes})
    elif earlier and "model_name" not in own and "model_name" in earlier[0].values:
        values["model_name"] = earlier[0].values["model_name"]
    method, rewarded_by = STRATEGIES.get(strategy_of(whole.values, own)), None
    if method is not None and method.rewarded_by is not None and not _names_rewards({**values, **changes}, whole):
        rewarded_by = _last(earlier, is_of_rewards=True)
    if rewarded_by is not None:
        values["reward_model"] = earlier[rewarded_by].values["output_dir"]
    positions = {key: where for key, where in document.positions.items() if key[:1] != ("stages",) and not own.keys() & key[:1]}
    positions |= {key[2:]: where for key, where in document.positions.items() if key[:2] == place and len(key) > 2}
    damaged = _damaged(document, ()) - {"stages"} - own.keys() | _damaged(document, place)
    first = () if before is None else ("model_name",)
    own_changes = {key: value for key, value in changes.items() if key not in ("output_dir", *first)}
    starts_on = start if foundation is not None else None
    return Written(path, values, positions, damaged, {}, own_changes, number + 1, foundation, None, starts_on, rewarded_by)


def _last(stages: Sequence[Written], is_of_rewards: bool) -> int | None:
    """The place of the last of these stages that trains a reward model, or of the last that trains a policy."""
    return next((place for place in reversed(range(len(stages))) if stages[place].is_of_rewards == is_of_rewards), None)


def default_folder(path: str) -> Path:
    """The run directory of a config file that names none."""
    return Path("runs") / (Path(path).stem if path != "-" else "stdin")


def run_of_round(folder: str, number: int) -> str:
    """The run directory of a round, from 1, in the output_dir of its config."""
    return str(Path(folder) / f"round-{number}")


def _last_run(values: Mapping[str, object]) -> str:
    """The run directory with the result of a stage."""
    folder, rounds = str(values["output_dir"]), values.get("rounds")
    has_rounds = belongs("rounds", str(values.get("strategy", defaults()["strategy"])))
    return run_of_round(folder, rounds) if isinstance(rounds, int) and has_rounds else folder


def _damaged(document: jsonc.Document, within: jsonc.Path) -> frozenset[str]:
    depth = len(within)
    return frozenset(str(place[depth]) for place in document.damaged if len(place) > depth and place[:depth] == within)
