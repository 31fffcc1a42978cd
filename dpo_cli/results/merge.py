"""The result of `dpo export`: the figures of a run and of the merged model, and its GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_cli.results.codec import JsonObject, to_json
from dpo_cli.results.intervals import Figures

# Of fewer values, even the smallest and the largest do not enclose the median with 95 % confidence: 2 * 0.5^5 is above 5 %.
# With 6 the limit of a share that is 1 is 0.5, which is chance; with fewer it could not be missed.
LEAST_PROMPTS = 6
# What helps where 16 bits round most of a change of the weights away.
LARGER_CHANGE = 'train longer or at a higher rate, or train and export in float32 ("bf16": false, "fp16": false)'


@dataclass(frozen=True)
class MergeLimit:
    """A figure of the merged model and its limit; both `limit` and `ok` are None if there are too few prompts to decide."""

    metric: str
    before: float
    limit: float | None
    value: float
    ok: bool | None


@dataclass(frozen=True)
class Difference:
    """Between the log-probs of a response before and after the merge, nats."""

    mean: float
    max: float
    trained: float  # the mean difference that training made
    limit: float | None  # of `mean`, if there are too few prompts for limits of figures

    @property
    def ok(self) -> bool:
        return self.limit is None or self.mean <= self.limit


@dataclass(frozen=True)
class GgufCheck:
    """The comparison of a GGUF file with its model, both computed in float32."""

    file: str
    type: str
    positions: int
    same_argmax: float  # share of positions
    max_difference: float  # between two logits
    least_same: float  # that is allowed
    ok: bool
    modelfile_template: bool = False  # whether the Modelfile has the chat template


@dataclass(frozen=True)
class Merge:
    """The figures in export.json."""

    run: str
    model: str
    dtype: str
    trained_on: str  # 4-bit, 8-bit or a dtype
    noun: str  # pairs, demonstrations: the key of their number in JSON
    count: int
    prompts: int
    before: Figures
    after: Figures
    difference: Difference
    limits: Sequence[MergeLimit]

    @property
    def is_rounded_away(self) -> bool:
        """Whether much of what training changed is lost because its weights have 16 bits."""
        apart = self.difference
        return self.dtype != "float32" and self.trained_on == self.dtype and apart.mean > apart.trained / 2

    @property
    def undecided(self) -> str | None:
        """Why the figures have no limits; None if they have."""
        if self.prompts >= LEAST_PROMPTS:
            return None
        return (
            f"too few prompts to compare the figures: {self.prompts}; at least {LEAST_PROMPTS} are needed for a 95 % interval"
        )

    def to_json(self) -> JsonObject:
        return {
            "run": self.run,
            "model": self.model,
            "dtype": self.dtype,
            "trained_on": self.trained_on,
            self.noun: self.count,
            "prompts": self.prompts,
            "before": to_json(self.before),
            "after": to_json(self.after),
            "difference": to_json(self.difference),
            "limits": [to_json(limit) for limit in self.limits],
        }
