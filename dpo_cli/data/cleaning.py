"""A dataset without its bad and doubtful rows: which rows are removed, each with its reasons. No torch."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.data import files
from dpo_cli.data.messages import BadRow
from dpo_cli.errors import Problem

# Findings about rows that can be read and are removed: one of several that say the same, or rows that teach nothing or the
# opposite. Other findings are about all rows together, or are often right, so that somebody has to look.
DOUBTFUL = frozenset(
    {
        *("too-similar", "repeated-pairs", "near-duplicates", "reversed-preference", "scores-contradict", "scores-tie"),
        *("repeated-ratings", "contradicting-ratings", "label-unwanted", "prompt-in-both"),
    }
)
Reasons = Mapping[tuple[str, int], Sequence[Problem]]  # by file and line


def reasons_of(problems: Sequence[Problem]) -> Reasons:
    """The rows to remove from a dataset with these problems, and why."""
    reasons: dict[tuple[str, int], list[Problem]] = defaultdict(list)
    for problem in problems:
        is_removed = problem.code in DOUBTFUL or (problem.code.startswith("row-") and problem.severity != "hint")
        lines = problem.lines or ([problem.line] if problem.line is not None else [])
        for line in lines if is_removed and problem.file else ():
            reasons[str(problem.file), line].append(problem)
    return reasons


def divided(paths: Sequence[str], reasons: Reasons) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Each row of these files, in their order: whether it is kept, and the row, or what is written about a removed one.

    A row that cannot be parsed has no content; its place says where it is in the file.
    """
    for path in dict.fromkeys(paths):
        for line, row in files.read_rows(path, lambda row, _: row):
            own = reasons.get((path, line), ())
            if not own and isinstance(row, Mapping):
                yield True, dict(row)
                continue
            about = {"file": Path(path).name, "line": line}
            why = [{"code": problem.code, "message": _without_rows(problem)} for problem in own]
            if isinstance(row, BadRow):
                why = why or [{"code": row.code, "message": row.reason}]
            yield False, {**about, "reasons": why, "row": None if isinstance(row, BadRow) else row}


def _without_rows(problem: Problem) -> str:
    """The message without the lines of other rows: "119 rows (lines 2, 3, ...): no answer" becomes "no answer"."""
    start, colon, rest = problem.message.partition("): ")
    return rest if colon and "(lines " in start else problem.message


def line_of(row: Mapping[str, Any]) -> str:
    """A row as a line of a .jsonl file; dates and the like of a table become text."""
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"
