"""The result of `dpo eval`: the figures of held-out rows, each row, answers side by side, and limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, TypedDict

from dpo_cli.results.codec import JsonObject, from_json, list_of, object_of, to_json
from dpo_cli.results.intervals import Interval, Sides

ROW_BY_ROW = ("rows", "best", "worst")  # in evaluation.json, and not in the output of `eval --json`
SIDES = ("policy", "base", "gain")
PRINTED = 3  # of the samples


@dataclass(frozen=True)
class RowScores:
    """What the figures of a row are computed from, one value for each of its responses."""

    prompt: str  # a digest of it: rows of one prompt are not independent
    policy: Sequence[float]  # log-probs, nats; the scores of a reward model
    reference: Sequence[float] = ()  # log-probs; empty for a reward model, as `tokens`
    tokens: Sequence[float] = ()
    is_good: float | None = None  # 1 or 0, of a rated answer


@dataclass(frozen=True)
class JudgedRow:
    """A held-out row: its place, its figures, its scores, and its texts if it is among the best or the worst."""

    file: str
    line: int | None
    category: str | None
    # Of a pair: margin, reward_chosen, reward_rejected; of a rating: margin, reward; of a demonstration: loss, base_loss.
    figures: Mapping[str, float]
    texts: Mapping[str, str] = field(default_factory=dict)  # prompt, and its responses by name
    scores: RowScores | None = None  # None in older files

    @property
    def gain(self) -> float:
        """The gain from training: the margin of a pair, or the fall of a demonstration's loss, nats; NaN if not finite."""
        if "margin" in self.figures:
            return self.figures["margin"]
        return self.figures["base_loss"] - self.figures["loss"]

    def to_json(self) -> JsonObject:
        scores = {"scores": to_json(self.scores)} if self.scores is not None else {}
        return {"file": self.file, "line": self.line, "category": self.category, **self.figures, **self.texts, **scores}


class Answers(TypedDict):
    """Both answers to the last message of a prompt."""

    prompt: str
    base: str
    adapter: str


@dataclass(frozen=True)
class Limit:
    """An entry of `thresholds`: a limit on a figure, and whether it is kept."""

    metric: str
    limit: float
    value: float | None  # None without such a figure
    ok: bool


@dataclass(frozen=True)
class Judged:
    """The figures of `count` rows of one kind; `sides` is None without held-out rows."""

    noun: str  # pairs, demonstrations: the key of their number in JSON
    count: int
    prompts: int
    sides: Sides | None

    def to_json(self) -> JsonObject:
        sides = to_json(self.sides) if self.sides else dict.fromkeys(SIDES)
        return {self.noun: self.count, "prompts": self.prompts, **sides}

    @classmethod
    def of_json(cls, value: object, noun: str) -> Self:
        """The figures in a JSON value about rows of the kind `noun`; `ValueError` with the keys that are missing."""
        return from_json(cls, _nested(value, noun))


@dataclass(frozen=True)
class Evaluation(Judged):
    """The content of evaluation.json."""

    answer_tokens: Mapping[str, Interval] | None = None  # of both sides and the difference
    unanswered: int = 0  # prompts without room for an answer
    categories: Mapping[str, Judged] = field(default_factory=dict)
    samples: Sequence[Answers] = ()
    rows: Sequence[JudgedRow] = ()
    best: Sequence[JudgedRow] = ()
    worst: Sequence[JudgedRow] = ()
    dtype: str | None = None  # in which the rows are scored; None in older files

    def to_json(self) -> JsonObject:
        return {
            **super().to_json(),
            "answer_tokens": to_json(self.answer_tokens) if self.answer_tokens else None,
            "unanswered": self.unanswered,
            "categories": {name: part.to_json() for name, part in self.categories.items()},
            "dtype": self.dtype,
            "samples": list(self.samples),
            **{name: [row.to_json() for row in getattr(self, name)] for name in ROW_BY_ROW},
        }

    @classmethod
    def of_json(cls, value: object, noun: str) -> Self:
        return super().of_json(object_of(value, "samples", *ROW_BY_ROW), noun)

    @property
    def shown_samples(self) -> Sequence[Answers]:
        """The samples that `eval` prints."""
        return self.samples[:PRINTED]

    @property
    def shown(self) -> JsonObject:
        """The part that `eval --json` prints."""
        return {name: value for name, value in self.to_json().items() if name not in ROW_BY_ROW}


def _nested(value: object, noun: str) -> JsonObject:
    """JSON of an evaluation, or of one of its categories, in the shape of its fields."""
    given = object_of(value, noun, *SIDES)
    sides = {side: given[side] for side in SIDES} if given["policy"] is not None else None
    categories = {name: _nested(part, noun) for name, part in object_of(given.get("categories") or {}).items()}
    rows = {name: [_nested_row(row) for row in list_of(given[name], name)] for name in ROW_BY_ROW if name in given}
    return {**given, "noun": noun, "count": given[noun], "sides": sides, "categories": categories, **rows}


def _nested_row(value: object) -> JsonObject:
    """JSON of a row in the shape of its fields: besides its place and scores, it has texts and numbers."""
    row = object_of(value)
    place = {name: row.get(name) for name in ("file", "line", "category", "scores")}
    rest = {name: value for name, value in row.items() if name not in place}
    texts = {name: value for name, value in rest.items() if isinstance(value, str)}
    figures = {name: value for name, value in rest.items() if name not in texts}
    if "margin" not in figures:
        object_of(figures, "loss", "base_loss")
    return {**place, "texts": texts, "figures": figures}
