"""Files of prompts to `Question`s: rows with a prompt, preference rows, or text with one prompt per line."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dpo_cli.data import files, folders, unreadable_files
from dpo_cli.data.dataset import FIXES
from dpo_cli.data.files import about_rows
from dpo_cli.data.messages import BadRow
from dpo_cli.data.rows import Question, to_question
from dpo_cli.errors import Problem, Severity

TEXT = ".txt"


@dataclass(frozen=True)
class Prompts:
    """The questions of a file, each once, in file order; the number of repeated rows and of bad rows."""

    sha256: str  # of the file
    questions: tuple[Question, ...]
    repeated: int
    bad_rows: int
    problems: tuple[Problem, ...]


def read_prompts(path: str, columns: Mapping[str, str] | None = None, skip: bool = False) -> Prompts:
    """Read a whole file. Problems are returned, never raised; bad rows are warnings with `skip`."""
    fault = _fault(path)
    if fault is not None:
        return Prompts("", (), 0, 0, (fault,))
    bad: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    questions: dict[str, Question] = {}
    rows = 0
    reader = _lines if folders.kind(path) == TEXT else None
    for line, row in files.read_rows(path, partial(to_question, file=path, columns=columns), reader):
        rows += 1
        if isinstance(row, BadRow):  # collected, so that one pass reports them all
            bad[row.code, f"{row.reason} ({row.detail})" if row.detail else row.reason, row.fix].append(line)
        else:
            questions.setdefault(row.prompt_key, row)
    severity: Severity = "warning" if skip else "error"
    fix = "these rows are skipped" if skip else 'correct or delete these rows, or write "on_bad_rows": "skip"'
    problems = [
        about_rows(severity, code, reason, own or FIXES.get(code, fix), None, path, lines)
        for (code, reason, own), lines in bad.items()
    ]
    bad_rows = sum(map(len, bad.values()))
    if not questions and (skip or not bad):
        problems.append(Problem("error", "no-prompts", "there is no prompt", "write one prompt per line", None, path))
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Prompts(digest, tuple(questions.values()), rows - bad_rows - len(questions), bad_rows, tuple(problems))


def without_reference(prompts: Prompts, path: str) -> list[Problem]:
    """The problem of the questions without an answer to compare with, if there are any."""
    lines = [question.line for question in prompts.questions if question.reference is None]
    fix = 'give each row a "reference" (or "chosen"), or write another "rank" in "augment"'
    return [about_rows("error", "row-no-reference", "no reference to compare with", fix, None, path, lines)] if lines else []


def _fault(path: str) -> Problem | None:
    """Why the file cannot be read at all."""
    suffixes = (TEXT, *files.READERS)
    if not os.path.exists(path):
        return Problem("error", "prompts-missing", f"file not found: {path}", "check the path of the prompts")
    if not Path(path).is_file():
        return Problem("error", "prompts-unreadable", f"cannot read {path}", "name a readable file")
    problem = unreadable_files.fault(Path(path), "prompts", suffixes)
    if problem is not None and problem.code == "dataset-format":
        fix = "use a .txt file with one prompt per line, or a .jsonl file"
        return Problem("error", "prompts-format", problem.message, fix)
    return problem


def _lines(path: str) -> files.Rows:
    """Each non-blank line as a row with that prompt."""
    return files.lines_of(path, _prompt_of)


def _prompt_of(line: bytes) -> dict[str, str]:
    try:
        return {"prompt": line.decode("utf-8").strip()}
    except UnicodeDecodeError as error:
        raise BadRow("row-not-utf8", "not valid UTF-8") from error
