"""The result of `dpo vote`: the page, the votes file, and the count."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.results.intervals import Interval


@dataclass(frozen=True)
class JudgeModel:
    """The model that judges, and its endpoint."""

    url: str
    model: str


@dataclass(frozen=True)
class Tally:
    """The count of a votes file."""

    run: str
    adapter_sha256: str
    criterion: str
    judge: JudgeModel | None  # None if people vote
    prompts: int
    missing: int  # prompts without a vote
    same_text: int  # ties without a vote
    wins: int  # of the adapter
    losses: int
    ties: int
    win_rate: Interval  # over the votes; a tie counts one half
    sign_test: float  # p-value, two-sided


@dataclass(frozen=True)
class SideBySide:
    """Answers shown to people or a judge."""

    page: str  # the path of the page
    prompts: int
    votes: str | None = None  # the path of the judge's votes
    tally: Tally | None = None  # their count
