"""All findings about the quality of a set of pairs, from one pass over it."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_cli.data import findings
from dpo_cli.data.dataset import Dataset
from dpo_cli.data.findings import Finding, Limits, LongerWins, Seen
from dpo_cli.data.near_duplicates import NearDuplicates
from dpo_cli.data.rows import Pair
from dpo_cli.errors import Problem

FINDINGS: Sequence[type[Finding]] = (
    findings.FewPairs,
    findings.FewPrompts,
    findings.SeenBefore,
    NearDuplicates,
    findings.TooSimilar,
    LongerWins,
    findings.OneSideRefuses,
    findings.ChatMarkers,
    findings.OtherScript,
)


class Quality:
    """All findings, as an observer of a pass (data/dataset.py)."""

    def __init__(self, limits: Limits) -> None:
        self.findings = [finding(limits) for finding in FINDINGS]
        self._looking = [finding.see for finding in self.findings if type(finding).see is not Finding.see]

    def see(self, pair: Pair, prompt_key: str) -> None:
        seen = Seen.of(pair, prompt_key)
        for see in self._looking:
            see(seen)

    def problems(self, data: Dataset) -> list[Problem]:
        return [problem for finding in self.findings for problem in finding.problems(data)]

    def length_bias(self) -> dict[str, float]:
        longer = next(finding for finding in self.findings if isinstance(finding, LongerWins))
        return {"longer_chosen": round(longer.share, 4), "length_auc": round(longer.auc, 4)}
