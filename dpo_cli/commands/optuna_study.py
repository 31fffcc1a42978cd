"""The settings of a sweep that Optuna's sampler draws, kept in its SQLite file; without a sampler, those of a grid.

Both give settings one by one, and are told how each ended, so that the next one can depend on it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dpo_cli.config.search_space import Axis, Setting, Space
from dpo_cli.errors import RunFailed, invalid

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

INSTALL = "pip install 'dpo-cli[sweep]'"
STARTUP = 10  # random settings before the sampler learns from results; at most half of all


@dataclass(frozen=True)
class Asked:
    """A setting to train, or one that was pruned by an earlier call; `number` is that of its trial."""

    setting: Setting
    number: int = -1
    is_pruned: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a setting ended: its figure, or None without one, and how far it is above the limit of KL (0 or less: within)."""

    value: float | None
    above_limit: float = 0.0
    is_pruned: bool = False
    is_failed: bool = False  # it has no result at all, and is tried again by the next call


class Source(Protocol):
    """Where the settings of a sweep come from."""

    prunes: bool

    def next(self) -> Asked | None:
        """The next setting; None where all are asked for."""

    def see(self, asked: Asked, step: int, value: float) -> bool:
        """A held-out figure of a setting that trains; True where it should be stopped."""

    def tell(self, asked: Asked, outcome: Outcome) -> None:
        """A setting has ended."""


class Grid:
    """Every setting of a space, in order."""

    prunes = False

    def __init__(self, settings: Iterator[Setting]) -> None:
        self._settings = settings

    def next(self) -> Asked | None:
        setting = next(self._settings, None)
        return None if setting is None else Asked(setting)

    def see(self, asked: Asked, step: int, value: float) -> bool:
        return False

    def tell(self, asked: Asked, outcome: Outcome) -> None:
        pass


def require_optuna() -> None:
    """`InvalidInput` where Optuna is not installed."""
    if find_spec("optuna") is None:
        message = "a sweep with --trials draws its settings with Optuna, which is not installed"
        raise invalid("optuna-missing", message, f"{INSTALL}; without --trials, a grid needs no package")


class OptunaStudy:
    """`trials` settings by the TPE sampler of Optuna, with its median pruner where runs are evaluated while they train.

    Bergstra et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011. Each setting is drawn by a sampler of its own
    seed, the seed of the config plus the number of the trial: so a sweep that was stopped draws what it would have drawn. A
    setting above the limit of KL is an infeasible one for the sampler, and an unhealthy one is worse than all others.
    """

    def __init__(self, study: Study, space: Space, trials: int, seed: int, prunes: bool) -> None:
        from optuna.trial import TrialState

        self.prunes, self._study, self._seed, self._startup = prunes, study, seed, min(STARTUP, max(1, trials // 2))
        self._choices = {axis.key: [json.dumps(value) for value in axis.values] for axis in space.axes if axis.ends is None}
        self._axes = space.axes
        known = study.get_trials(deepcopy=False)
        settled = [trial for trial in known if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        running = [trial for trial in known if trial.state == TrialState.RUNNING]
        self._known = deque([*settled, *running])
        waiting = [trial for trial in known if trial.state == TrialState.WAITING]
        self._again(known, [*settled, *running, *waiting])
        self._left = trials - len(settled) - len(running)

    def _again(self, known: Sequence[FrozenTrial], counted: Sequence[FrozenTrial]) -> None:
        """Put each setting that failed, and was not tried again, before those that are drawn."""
        from optuna.trial import TrialState

        done = [self._params_of(trial) for trial in counted]
        for trial in (trial for trial in known if trial.state == TrialState.FAIL and trial.params):
            if trial.params not in done:
                self._study.enqueue_trial(trial.params)
                done.append(trial.params)

    @staticmethod
    def _params_of(trial: FrozenTrial) -> Mapping[str, Any]:
        fixed: Mapping[str, Any] = trial.system_attrs.get("fixed_params", {})
        return trial.params or fixed

    def next(self) -> Asked | None:
        from optuna.trial import TrialState

        if self._known:
            trial = self._known.popleft()
            return Asked(self._setting(trial.params), trial.number, trial.state == TrialState.PRUNED)
        if self._left <= 0:
            return None
        self._left -= 1
        number = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = sampler(self._seed + number, self._startup)
        drawn = self._study.ask({axis.key: self._distribution(axis) for axis in self._axes})
        return Asked(self._setting(drawn.params), drawn.number)

    def see(self, asked: Asked, step: int, value: float) -> bool:
        trial = self._trial(asked)
        if step not in self._frozen(asked).intermediate_values:  # of an earlier call, for a run that was stopped
            trial.report(value, step)
        return bool(trial.should_prune())

    def tell(self, asked: Asked, outcome: Outcome) -> None:
        from optuna.trial import TrialState

        if outcome.is_failed:
            self._study.tell(asked.number, state=TrialState.FAIL, skip_if_finished=True)
        elif outcome.is_pruned or outcome.value is None:
            self._study.tell(asked.number, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            if not self._frozen(asked).state.is_finished():
                self._trial(asked).set_constraint("kl", outcome.above_limit)
            self._study.tell(asked.number, outcome.value, skip_if_finished=True)

    def _frozen(self, asked: Asked) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[asked.number]

    def _trial(self, asked: Asked) -> Any:
        """A trial of this call, or of an earlier one that was stopped."""
        from optuna.trial import Trial

        return Trial(self._study, self._frozen(asked)._trial_id)

    def _distribution(self, axis: Axis) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if axis.ends is None:
            return CategoricalDistribution(self._choices[axis.key])
        low, high = axis.ends
        if axis.is_whole:
            return IntDistribution(int(low), int(high), log=axis.is_wide)
        return FloatDistribution(low, high, log=axis.is_wide)

    def _setting(self, params: Mapping[str, Any]) -> Setting:
        return {
            axis.key: axis.value(params[axis.key]) if axis.ends is not None else json.loads(params[axis.key])
            for axis in self._axes
        }


def sampler(seed: int, startup: int) -> Any:
    from optuna.samplers import TPESampler

    return TPESampler(n_startup_trials=startup, seed=seed)


@contextmanager
def opened(
    file: Path, name: str, space: Space, trials: int, seed: int, is_better_large: bool, prunes_from: int | None
) -> Iterator[Source]:
    """The study `name` in a SQLite file, new or continued; it prunes from this step on, if given.

    `RunFailed` where the file cannot be used.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{file.absolute()}")
        study = optuna.create_study(
            storage=storage,
            pruner=optuna.pruners.NopPruner() if prunes_from is None else optuna.pruners.MedianPruner(5, prunes_from),
            study_name=name,
            direction="maximize" if is_better_large else "minimize",
            load_if_exists=True,
        )
        yield OptunaStudy(study, space, trials, seed, prunes_from is not None)
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise RunFailed(f"{file} cannot be used: {error}", "start again with --overwrite") from error
