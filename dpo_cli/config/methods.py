"""The methods of a comparison: the option `compare` names them, and each is a config of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cli.config import jsonc
from dpo_cli.config.compare_rules import name_of, parts_of
from dpo_cli.config.stages import belongs, strategy_of
from dpo_cli.strategies.strategies import STRATEGIES

NOT_SHARED = ("compare", "stages")  # of the file: a method has its own stages, if any
LENGTH = ("num_train_epochs", "max_steps")  # which the budget replaces


@dataclass(frozen=True)
class Method:
    """A method: its name, and its config as if it were the whole file; `own` are the keys that the list of methods gives it."""

    name: str
    values: Mapping[str, Any]
    positions: Mapping[jsonc.Path, tuple[int, int]]
    own: frozenset[str]

    def as_run(self, seed: int, split_seed: int, folder: str, ends: Sequence[Mapping[str, object]]) -> dict[str, Any]:
        """The config of one run of it; `ends` say how long each of its stages trains."""
        rest = {key: value for key, value in self.values.items() if key not in LENGTH}
        run = {**rest, "seed": seed, "split_seed": split_seed, "output_dir": folder}
        stages: Sequence[Mapping[str, Any]] = run.pop("stages", ({},))
        if len(ends) > len(stages):  # a reward model is trained first, although the config does not name that stage
            own = STRATEGIES[str(run.pop("strategy"))]
            stages = [{"strategy": own.rewarded_by}, {"strategy": own.name}]
        if len(stages) == 1 and "stages" not in self.values:
            return {**run, **ends[0]}
        return {**run, "stages": [{**stage, **end} for stage, end in zip(stages, ends, strict=True)]}


def methods_of(values: Mapping[str, Any], document: jsonc.Document, changes: Mapping[str, object]) -> list[Method]:
    """The methods of a config with a valid `compare`. Values of the command line replace the file's, not a method's own."""
    values = {**values, **changes}
    return [_method(values, document, changes, place, named) for place, named in enumerate(parts_of(values)["methods"])]


def _method(
    values: Mapping[str, Any],
    document: jsonc.Document,
    changes: Mapping[str, object],
    place: int,
    named: str | Mapping[str, Any],
) -> Method:
    where: jsonc.Path = ("compare", "methods", place)
    own = {"strategy": named} if isinstance(named, str) else {key: value for key, value in named.items() if key != "name"}
    strategy = None if "stages" in own else strategy_of(values, own)  # stages take what belongs to them
    shared = {
        key: value
        for key, value in values.items()
        if key not in (*NOT_SHARED, *own) and (strategy is None or belongs(key, strategy))
    }
    positions = {key: at for key, at in document.positions.items() if key and key[0] in shared and key[0] not in changes}
    if isinstance(named, str) and where in document.positions:
        positions["strategy",] = document.positions[where]
    else:
        positions |= {key[3:]: at for key, at in document.positions.items() if key[:3] == where and len(key) > 3}
    return Method(name_of(named), {**shared, **own}, positions, frozenset(own))
