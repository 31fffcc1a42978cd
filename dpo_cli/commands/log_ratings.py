"""The story of `dpo augment --from-logs`: a log of requests -> rated answers with their provenance. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import dpo_cli
from dpo_cli.config.config import load
from dpo_cli.data.files import about_rows
from dpo_cli.data.messages import BadRow
from dpo_cli.data.ratings import BAD, GOOD, UNRATED
from dpo_cli.data.request_logs import CUT, FAILED, SEVERAL, rated_requests
from dpo_cli.data.unreadable_files import fault
from dpo_cli.errors import InvalidInput, Problem, Severity, UsageError
from dpo_cli.results.codec import JsonObject
from dpo_cli.storage.atomic import write_whole
from dpo_cli.storage.jsonio import json_text
from dpo_cli.storage.progress import working
from dpo_cli.ui.console import Console

FORM = "each request of a log has a prompt, an answer and a feedback: docs/guides/ratings.md shows the forms"
SILENT = (UNRATED, FAILED, CUT, SEVERAL)  # requests that say nothing about which answer is good: counted, and no problems


def ratings_of_log(log: Path, out: Path, overrides: Sequence[str], console: Console) -> JsonObject:
    """Write the rated answers of a log to `out`: what `augment --from-logs --json` prints.

    `InvalidInput` where no request has a rated answer, with what was found in its place.
    """
    if out.exists():
        raise UsageError(f"{out} already exists", "name another file, or delete it")
    if (problem := fault(log, "prompts")) is not None:
        raise InvalidInput([problem])
    if others := [change for change in overrides if not change.startswith("columns=")]:
        raise UsageError(
            f"{others[0]} has no effect with --from-logs", "only columns=... has, to name the feedback: see --help"
        )
    columns = load({"dataset": str(log)}, overrides).require().columns or {}
    counts, lines = Counter[str](), dict[tuple[str, str, str], list[int]]()
    texts: list[str] = []
    with working(f"reading {log}", None, "requests") as work:
        for line, row in rated_requests(str(log), columns):
            work.add()
            counts["requests"] += 1
            if isinstance(row, BadRow):
                counts[row.code if row.code in SILENT else "unusable"] += 1
                reason = f"{row.reason} ({row.detail})" if row.detail else row.reason
                lines.setdefault((row.code, reason, row.fix), []).append(line)
                continue
            counts[GOOD if row["label"] else BAD] += 1
            row["provenance"] = {**row["provenance"], "source": f"{log.name}:{line}", "dpo": dpo_cli.__version__}
            texts.append(json_text(row) + "\n")
    problems = _problems(log, lines, is_empty=not texts)
    if not texts:
        raise InvalidInput(
            problems or [Problem("error", "no-prompts", "the log has no requests", "name another file", file=str(log))]
        )
    console.problems(problems)
    write_whole(out, lambda part: part.write_text("".join(texts), encoding="utf-8"))
    told = {"out": str(out), "requests": counts["requests"], GOOD: counts[GOOD], BAD: counts[BAD]}
    told |= {"unrated": counts[UNRATED], "failed": counts[FAILED], "cut": counts[CUT], "several": counts[SEVERAL]}
    told["unusable"] = counts["unusable"]
    _tell(told, console)
    return told


def _problems(log: Path, lines: dict[tuple[str, str, str], list[int]], is_empty: bool) -> list[Problem]:
    """What is wrong with requests that cannot be used; where no request can be, also with those that say nothing."""
    shown = {about: own for about, own in lines.items() if is_empty or about[0] not in SILENT}
    severity: Severity = "error" if is_empty else "warning"
    return [
        about_rows(severity, code, reason, fix or (FORM if is_empty else "these requests are skipped"), None, str(log), own)
        for (code, reason, fix), own in shown.items()
    ]


def _tell(told: JsonObject, console: Console) -> None:
    words = {
        "unrated": "have no feedback, skipped",
        "failed": "failed, skipped",
        "cut": "were cut at the limit of tokens and are rated good, skipped",
        "several": "have several answers and one feedback, skipped",
        "unusable": "cannot be used, skipped",
    }
    for name, text in words.items():
        if told[name]:
            console.line(f"{told[name]} requests {text}")
    console.line(f"{told['out']}: {told[GOOD]} answers rated good, {told[BAD]} bad, of {told['requests']} requests")
    console.line('train on them with "strategy": "kto"; with dpo, answers to one prompt make pairs')
