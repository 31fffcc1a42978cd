"""The result of `dpo compare`: the runs of each method, their figures over seeds and prompts, and the tests between methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dpo_cli.results.codec import JsonObject, to_json
from dpo_cli.results.intervals import Figures, Interval
from dpo_cli.results.judgement import Answers

LEVEL = 0.05  # of the corrected p-values


@dataclass(frozen=True)
class ScoredRun:
    """What a run does on the held-out pairs of a comparison, row by row, and the same of the base."""

    digest: str  # of what it was computed from
    prompts: Sequence[str]  # a digest of the prompt of each pair
    policy: Sequence[Sequence[float]]  # log-probs of chosen and rejected, nats
    reference: Sequence[Sequence[float]]
    tokens: Sequence[Sequence[float]]
    kl: Sequence[Sequence[float]]  # summed over the tokens of a response, nats
    kl_sequence: Sequence[float]  # of an answer sampled to each prompt, nats
    answer_tokens: Sequence[float]  # of a greedy answer to each prompt
    base_answer_tokens: Sequence[float]
    wins: Sequence[float]  # by the reward model: 1, 0, and a half for a tie; empty without one
    samples: Sequence[Answers]


@dataclass(frozen=True)
class MethodRun:
    """One run of a method: how it ended and what it took."""

    seed: int
    run_dir: str
    status: str  # completed, unhealthy or failed
    exit_code: int
    message: str | None = None  # why it is not completed
    steps: int | None = None  # of a run that has ended, as what follows
    tokens: int | None = None  # trained on, of all sequences
    seconds: float | None = None  # of the training
    peak_memory_gb: float | None = None


@dataclass(frozen=True)
class MethodRow:
    """A method: its runs, and the figures of the completed ones over seeds and prompts."""

    name: str
    strategies: Sequence[str]  # of its stages
    config: Mapping[str, object]  # the keys that are not those of all methods
    max_steps: Sequence[int | None]  # of its stages, by the budget; None for a budget of epochs
    runs: Sequence[MethodRun]
    figures: Figures = field(default_factory=dict)

    @property
    def completed(self) -> list[MethodRun]:
        return [run for run in self.runs if run.status == "completed"]

    @property
    def healthy(self) -> float:
        """The share of the seeds that ended healthy."""
        return len(self.completed) / len(self.runs)

    def mean(self, name: str) -> float | None:
        """The mean of what the completed runs took."""
        values = [value for run in self.completed if (value := getattr(run, name)) is not None]
        return sum(values) / len(values) if values else None

    def to_json(self) -> JsonObject:
        return {
            **{name: getattr(self, name) for name in ("name", "strategies", "config", "max_steps")},
            "healthy": self.healthy,
            **{name: self.mean(name) for name in ("steps", "tokens", "seconds", "peak_memory_gb")},
            "figures": {name: to_json(figure) if figure else None for name, figure in self.figures.items()},
            "runs": [to_json(run) for run in self.runs],
        }


@dataclass(frozen=True)
class PairTest:
    """Two methods on the same prompts: the difference of a figure, first minus second, and whether it is clear of zero."""

    figure: str
    first: str
    second: str
    difference: Interval
    p: float
    p_corrected: float
    sentence: str = ""

    @property
    def result(self) -> str:
        """Of the first method: better, worse, or no clear difference."""
        if not self.p_corrected < LEVEL:
            return "no clear difference"
        return "better" if self.difference.value > 0 else "worse"

    def to_json(self) -> JsonObject:
        figures = {**vars(self), "difference": to_json(self.difference)}
        return {**figures, "result": self.result}


@dataclass(frozen=True)
class MethodsCompared:
    """The content of compare.json."""

    run_dir: str
    budget: str
    budget_value: float | None  # None if a method could not be tried
    seeds: Sequence[int]
    pairs: int
    prompts: int
    base: Figures
    methods: Sequence[MethodRow]
    tests: Sequence[PairTest]
    notes: Sequence[str]
    report: str

    @property
    def failed(self) -> list[MethodRun]:
        return [run for method in self.methods for run in method.runs if run.status != "completed"]

    def to_json(self) -> JsonObject:
        plain = ("run_dir", "budget", "budget_value", "seeds", "pairs", "prompts", "notes", "report")
        return {
            **{name: getattr(self, name) for name in plain},
            "base": {name: to_json(figure) if figure else None for name, figure in self.base.items()},
            "methods": [method.to_json() for method in self.methods],
            "tests": [test.to_json() for test in self.tests],
        }
