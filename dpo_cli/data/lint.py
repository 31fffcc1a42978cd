"""All findings about the quality of a set of rows, from one pass over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from dpo_cli.data import findings
from dpo_cli.data.dataset import Dataset
from dpo_cli.data.findings import Finding, Limits, LongerWins, Seen
from dpo_cli.data.near_duplicates import NearDuplicates
from dpo_cli.data.rows import Row
from dpo_cli.errors import Problem
from dpo_cli.storage.processes import Apart
from dpo_cli.storage.progress import working
from dpo_cli.strategies.row_kinds import PAIRS, RATINGS, Rows

AT_ONCE = 64  # rows that are sent together
FEW = 4000  # rows that are looked at in this process

# By kind of row, in groups of about the same cost: each is a process of its own. Those of pairs compare two responses.
FINDINGS: Mapping[str, Sequence[Sequence[type[Finding]]]] = {
    PAIRS.noun: (
        (
            findings.FewPairs,
            findings.FewPrompts,
            findings.SeenBefore,
            findings.TooSimilar,
            LongerWins,
            findings.OneSideRefuses,
            findings.ChatMarkers,
            findings.OtherScript,
        ),
        (NearDuplicates,),
    ),
    RATINGS.noun: ((findings.FewPairs, findings.FewPrompts, findings.RatedBefore, findings.ChatMarkers, findings.OtherScript),),
}


class Quality:
    """All findings, as an observer of a pass (data/dataset.py). Those of many pairs are made in processes of their own."""

    def __init__(self, limits: Limits, kind: Rows = PAIRS) -> None:
        self._groups = [Apart[Row](partial(Group, kinds, limits), AT_ONCE, FEW) for kinds in FINDINGS.get(kind.noun, ())]

    def see(self, row: Row, prompt_key: str) -> None:
        for group in self._groups:
            group.see(row)

    def problems(self, data: Dataset) -> list[Problem]:
        with working("comparing pairs"):
            return [problem for group in self._groups for problem in group.ask("problems", data)]

    def length_bias(self) -> dict[str, float]:
        """Empty where the rows are not pairs."""
        return next((bias for group in self._groups if (bias := group.ask("length_bias"))), {})


class Group:
    """Some findings, on every row."""

    def __init__(self, kinds: Sequence[type[Finding]], limits: Limits) -> None:
        self.findings = [finding(limits) for finding in kinds]
        self._looking = [finding.see for finding in self.findings if type(finding).see is not Finding.see]

    def see(self, row: Row) -> None:
        seen = Seen.of(row)
        for see in self._looking:
            see(seen)

    def problems(self, data: Dataset) -> list[Problem]:
        return [problem for finding in self.findings for problem in finding.problems(data)]

    def length_bias(self) -> dict[str, float]:
        """Empty for a group without that finding."""
        longer = next((finding for finding in self.findings if isinstance(finding, LongerWins)), None)
        return {} if longer is None else {"longer_chosen": round(longer.share, 4), "length_auc": round(longer.auc, 4)}
