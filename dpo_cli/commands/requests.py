"""The requests of `dpo eval`, `dpo vote` and `dpo chat`, and which of their options can be combined. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dpo_cli.config.schema import names_where
from dpo_cli.errors import UsageError
from dpo_cli.evaluation.thresholds import METRICS, OF_VOTES, Threshold, parse

# The options that change an evaluation, and not the training.
JUDGING = frozenset(names_where(lambda option: option.is_judging))


@dataclass(frozen=True)
class VoteRequest:
    """A run to compare with its base, by people or by a judge; or a votes file to count.

    Raises `UsageError` for options that cannot be combined.
    """

    run: str = ""
    prompts: int = 0  # number of prompts to compare; 0 with a tally
    by_judge: bool = False
    dataset: str | None = None
    overrides: tuple[str, ...] = ()
    tally: Path | None = None
    fail_under: str | None = None
    pairs: Path | None = None  # a file for the pairs of a tally
    thresholds: list[Threshold] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", _limits(self.fail_under, OF_VOTES))
        if self.tally is not None:
            if self.run or self.dataset or self.by_judge or self.overrides or self.prompts:
                raise UsageError("--tally only counts the votes in a file", f"dpo vote --tally {self.tally}")
            return
        if self.pairs is not None:
            raise UsageError("--pairs needs votes", f"dpo vote --tally votes.json --pairs {self.pairs}")
        if not self.run:
            raise UsageError("no run is given", "dpo vote RUN_DIR, or dpo vote --tally votes.json")
        if self.thresholds and not self.by_judge:
            raise UsageError(
                "there are no votes yet to compare with a limit", "dpo vote --tally votes.json --fail-under win_rate=0.5"
            )
        _require_run("dpo vote", self.run, self.overrides)


@dataclass(frozen=True)
class Request:
    """A run to evaluate; with `adapter`, a config that names its base. With `vote`, the answers are compared too.

    Raises `UsageError` for options that cannot be combined.
    """

    target: str = ""
    adapter: Path | None = None
    dataset: str | None = None
    overrides: tuple[str, ...] = ()
    fail_under: str | None = None
    vote: VoteRequest | None = None
    again: bool = False  # compute also what is known
    thresholds: list[Threshold] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", _limits(self.fail_under, METRICS))
        if not self.target:
            raise UsageError("no run is given", "dpo eval RUN_DIR, or dpo vote --tally votes.json")
        if self.adapter is None:
            _require_run("dpo eval", self.target, self.overrides, f"dpo eval {self.target} --adapter DIR, or ")
        elif self.vote is not None:
            raise UsageError("--side-by-side needs a run directory", "dpo vote RUN_DIR")

    @property
    def is_as_trained(self) -> bool:
        """Whether it asks for the figures that belong to a run."""
        return self.adapter is None and self.dataset is None and not self.overrides


@dataclass(frozen=True)
class ChatRequest:
    """A run to chat with; with `adapter`, a config that names its base. With `prompt`, it answers once.

    Raises `UsageError` for options that cannot be combined.
    """

    target: str = ""
    adapter: Path | None = None
    overrides: tuple[str, ...] = ()
    side_by_side: bool = False
    prompt: str | None = None
    system: str | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    out: Path | None = None  # for pairs; None: in the run

    def __post_init__(self) -> None:
        if not self.target:
            raise UsageError("no run is given", "dpo chat RUN_DIR")
        if self.out is not None and not self.side_by_side:
            raise UsageError("--out keeps votes on two answers", f"dpo chat {self.target} --side-by-side --out {self.out}")
        if self.out is not None and self.prompt is not None:
            raise UsageError("--prompt asks for no vote, so there is nothing to write to --out", "remove one of them")
        if named := [word for word in self.overrides if word.partition("=")[0] == "max_new_tokens"]:
            value = named[-1].partition("=")[2]
            raise UsageError("max_new_tokens is that of an evaluation", f"dpo chat {self.target} --max-new-tokens {value}")
        if self.adapter is None:
            _require_run("dpo chat", self.target, self.overrides, f"dpo chat {self.target} --adapter DIR, or ")


def _limits(text: str | None, known: Iterable[str]) -> list[Threshold]:
    return parse(text, tuple(known)) if text is not None else []


def _require_run(command: str, name: str, overrides: Iterable[str], or_else: str = "") -> None:
    """`UsageError` if a run is a file, or if an override changes its training."""
    if Path(name).is_file():
        raise UsageError(f"{name} is a file, not a run directory", f"{or_else}{command} RUN_DIR")
    for key in (word.partition("=")[0] for word in overrides):
        if key not in JUDGING:
            rows = "" if command == "dpo chat" else f"; {command} --dataset names other rows"
            fix = f"only {', '.join(sorted(JUDGING))} may differ{rows}"
            raise UsageError(f"{command} does not accept {key}=...: a run is loaded with the options of its training", fix)
