"""The result of `dpo sweep`: the run of each setting, the figure of the choice, and the best setting. No numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dpo_cli.results.codec import JsonObject, to_json
from dpo_cli.results.intervals import Figures, Interval
from dpo_cli.results.methods_compared import MethodRun


@dataclass(frozen=True)
class SettingRow:
    """A setting: the values that it gives to the keys of the sweep, its run, and its figures on the held-out rows."""

    name: str
    setting: Mapping[str, object]
    run: MethodRun  # its status is also "pruned" for one that was stopped early because others were better
    figures: Figures = field(
        default_factory=dict
    )  # `chosen_by` of the result, kl_token and kl_sequence; empty if not evaluated
    excluded: str | None = None  # why it cannot win

    @property
    def can_win(self) -> bool:
        return self.excluded is None

    def to_json(self) -> JsonObject:
        return {
            "name": self.name,
            "setting": dict(self.setting),
            "figures": {name: to_json(figure) if figure else None for name, figure in self.figures.items()},
            "excluded": self.excluded,
            "run": to_json(self.run),
        }


@dataclass(frozen=True)
class Best:
    """The best of n settings on one held-out set.

    The best of several looks better than it is, because the choice and the figure are of the same prompts: `value` has this
    bias, `corrected` does not. evaluation/selection.py computes both.
    """

    name: str
    of: int  # settings that could win
    value: Interval
    corrected: Interval | None  # None for one setting, or one prompt
    not_clearly_worse: Sequence[str]  # other settings whose difference has an interval that includes zero

    @property
    def optimism(self) -> float | None:
        """How much better than it is the best setting looks: the difference of `value` and `corrected`, 0 or more."""
        return None if self.corrected is None else abs(self.value.value - self.corrected.value)

    def to_json(self) -> JsonObject:
        return {
            "name": self.name,
            "of": self.of,
            "value": to_json(self.value),
            "corrected": to_json(self.corrected) if self.corrected is not None else None,
            "optimism": self.optimism,
            "not_clearly_worse": list(self.not_clearly_worse),
        }


@dataclass(frozen=True)
class SettingsSwept:
    """The content of sweep.json."""

    run_dir: str
    space: Mapping[str, object]  # the values of each key, or the ends of a range
    trials: int | None  # how many settings a sampler draws; None for a grid
    chosen_by: str  # a figure
    is_gain: bool  # the figure is a difference: after minus before the training
    max_kl: float | None  # the limit of kl_sequence
    rows: int  # held out
    prompts: int
    settings: Sequence[SettingRow]
    best: Best | None  # None if no setting can win
    best_config: str | None
    notes: Sequence[str]
    report: str

    def to_json(self) -> JsonObject:
        own = {name: value for name, value in vars(self).items() if name not in ("settings", "best", "space", "notes")}
        return {
            **own,
            "space": dict(self.space),
            "settings": [row.to_json() for row in self.settings],
            "best": self.best.to_json() if self.best is not None else None,
            "notes": list(self.notes),
        }
