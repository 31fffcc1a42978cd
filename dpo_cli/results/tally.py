"""What `dpo vote` comes to: the page and the file of votes, and their count."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.results.intervals import Interval


@dataclass(frozen=True)
class JudgeModel:
    """The model that judges, and where it is asked."""

    url: str
    model: str


@dataclass(frozen=True)
class Tally:
    """The count of a file of votes."""

    run: str
    adapter_sha256: str
    criterion: str
    judge: JudgeModel | None  # None where people vote
    prompts: int
    missing: int  # prompts without a vote
    same_text: int  # ties that nobody is asked about
    wins: int  # of the adapter
    losses: int
    ties: int
    win_rate: Interval  # of what is voted, a tie counts one half
    sign_test: float  # p-value, two-sided


@dataclass(frozen=True)
class SideBySide:
    """Answers put before people, or a judge."""

    page: str  # the path of the page
    prompts: int
    votes: str | None = None  # the path of the judge's votes
    tally: Tally | None = None  # their count
