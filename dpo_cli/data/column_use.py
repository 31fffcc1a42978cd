"""What each column of a dataset is read as, and findings about columns that are not read."""

from __future__ import annotations

import functools
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from dpo_cli.data.columns import (
    COMPLETIONS,
    MARKERS,
    OURS,
    RANKS,
    SCORES,
    Columns,
    is_media,
    is_prompt_like,
    is_shown,
    says_no,
    says_nothing,
    texts_in,
)
from dpo_cli.data.files import about_rows
from dpo_cli.data.messages import flat, has_null_arguments
from dpo_cli.data.rows import Read
from dpo_cli.errors import Problem, Severity
from dpo_cli.strategies.row_kinds import DEMONSTRATIONS, Rows

WHOLE = (
    "prompt",
    "messages",
    "prompt and chosen",
    "earlier turns",
    "tools",
)  # meanings of columns that are read completely
MARKS = ("weight", "train", "loss", "trainable")  # keys of a message
# By code: the problem of the column, and what to do.
FINDINGS = {
    "column-unread": (
        'column "{}" is not read, but may be part of the prompt or of the response',
        'put its text into the prompt or the response, name it in "columns" (as prompt, system or tools), or delete the column',
    ),
    "media-unread": (
        'column "{}" holds images, audio or video, which a text model cannot see, and is not read',
        "delete the rows that need them, or describe them in the prompt",
    ),
    "media-marker": (
        "the text holds the marker {}, but a text model gets no images, audio or video",
        "delete the rows that need it, or describe its content in the prompt",
    ),
    "scores-contradict": (
        "{} rate the rejected response higher than the chosen one",
        "swap the two responses, or delete the row",
    ),
    "scores-tie": ("{} rate chosen and rejected the same", "delete the row, unless you know that the order is right"),
    "label-suggested": (
        "no person answered {} is used as the answer",
        "answer it in the annotation tool, or delete the row, unless you want to train on the machine's answer",
    ),
    "null-arguments": (
        "a tool call has null arguments, which are omitted like every null key",
        "delete them, or write a text if the model must learn that value",
    ),
    "label-unwanted": (
        '"{}" marks the response as unwanted, but sft trains on it like on any other',
        "delete the row, or train on pairs with strategy dpo",
    ),
}

HINTS = ("null-arguments",)


class Account:
    """Sees every row of a pass over a dataset."""

    def __init__(self, columns: Columns, kind: Rows) -> None:
        self.columns, self.demonstrations = columns, kind is DEMONSTRATIONS
        self.shapes: Counter[str] = Counter()  # the shapes that differ from the documented one, with their rows
        self.read: dict[str, str] = {}  # by column, its meaning
        self.seen: dict[str, None] = {}  # every column, in order of appearance
        self._kinds: dict[
            tuple[str | None, tuple[str, ...], tuple[str, ...]], tuple[str, ...]
        ] = {}  # columns to look at, by kind of row
        self._labels: dict[str, set[str]] = defaultdict(set)
        self.rows: dict[tuple[str, str, str], array[int]] = defaultdict(lambda: array("q"))  # by code, column and file

    def see(self, row: Read) -> None:
        """Look at one row and what became of it."""
        if row.says:
            self.shapes[row.says] += 1
        kind = (row.says, tuple(row.written), tuple(row.origin.values()))
        watched = self._kinds.get(kind)
        if watched is None:
            watched = self._kinds[kind] = self._meet(row)
        for name in watched:
            self._look(name, row)
        if row.suggested:
            self._look_at_suggestions(row)
        first = row.rows[0]
        for text in (first.prompt, *first.responses):
            said = flat(text)
            if "<" in said and (marker := MARKERS.search(said)):
                self._note("media-marker", marker[0], row)
                break
        if any(turn.get("tool_calls") for text in (first.prompt, *first.responses) if isinstance(text, list) for turn in text):
            self._look_at_calls(row)
        if self.demonstrations:
            self._look_at_marks(row)
        self._compare_scores(row)

    def _meet(self, row: Read) -> tuple[str, ...]:
        """Remember the columns of a kind of row, and return those whose values must be checked."""
        reads = row.reads()
        for name in row.written:
            theirs = self._theirs(row.origin.get(name, name))
            self.seen[theirs] = None
            if name in reads and theirs not in self.read:
                self.read[theirs] = reads[name]
            elif name in row.origin and reads.get(name, "") not in self.read.get(
                theirs, ""
            ):  # a column of an export may hold several
                self.read[theirs] += f", {reads[name]}"
        looked = [name for name in row.written if is_media(name) or (is_prompt_like(name) and reads.get(name) not in WHOLE)]
        if self.demonstrations:
            looked += [name for name in row.written if name in COMPLETIONS or _may_be_label(name)]
        return tuple(dict.fromkeys(looked))

    def _theirs(self, name: str) -> str:
        """The name in the data of a column that "columns" renames."""
        theirs = self.columns.get(name) if name not in OURS else None
        return theirs if isinstance(theirs, str) else name

    def _look(self, name: str, row: Read) -> None:
        value = row.written[name]
        if value in ("", [], {}) or says_nothing(value):
            return
        if is_media(name):
            if is_shown(value):
                self._note("media-unread", name, row)
        elif self.demonstrations and _may_be_label(name) and isinstance(value, str | int | float):
            self._labels[name].add(str(value).strip().lower()[:20])
            if says_no(name, value):
                self._note("label-unwanted", name, row)
        elif texts := texts_in(value):
            known = "\n".join(flat(text) for one in row.rows for text in (one.prompt, *one.responses))
            if any(text not in known for text in texts):
                self._note("column-unread", name, row)

    def _look_at_suggestions(self, row: Read) -> None:
        """Note a machine's answers to which response is better."""
        reads = row.reads()
        for name, by in row.suggested.items():
            if name in reads or name not in row.written:  # a ranking has become responses
                self._note("label-suggested", f'"{name}": {by}', row)

    def _look_at_calls(self, row: Read) -> None:
        """Note null arguments of a tool call; those of a table are padding, which is removed when it is read."""
        reads = row.reads()
        if any(has_null_arguments(value) for name, value in row.written.items() if reads.get(name, "tools") != "tools"):
            self._note("null-arguments", "", row)

    def _look_at_marks(self, row: Read) -> None:
        """Note keys of a message that exclude it from the loss in other tools."""
        for text in row.rows[0].responses:
            for turn in text if isinstance(text, list) else []:
                for mark in MARKS:
                    if str(turn.get(mark)).lower() in ("0", "0.0", "false"):
                        self._note("label-unwanted", f"{mark} of a message", row)

    def _compare_scores(self, row: Read) -> None:
        """Compare the scores of both responses with their order."""
        if self.demonstrations or len(row.rows) != 1 or len(row.first) == 3:
            return
        for chosen, rejected in _score_pairs(tuple(row.first)):
            one, other = row.first[chosen], row.first[rejected]
            if not (_is_score(one) and _is_score(other)):
                continue
            above = float(one) - float(other)
            above = -above if any(word in RANKS for word in _words(chosen)) else above
            if above <= 0:
                names = [chosen, rejected]
                if chosen not in row.written:  # the file has other names for the responses
                    names = [name for name, meaning in row.reads().items() if meaning == "score"] or ["their scores"]
                self._note("scores-contradict" if above < 0 else "scores-tie", " and ".join(names), row)

    def _note(self, code: str, name: str, row: Read) -> None:
        first = row.rows[0]
        self.rows[code, self._theirs(row.origin.get(name, name)), first.file].append(first.line)

    def problems(self, key: str) -> Iterator[Problem]:
        """The problems, at the end of the pass."""
        for (code, name, file), lines in self.rows.items():
            if code == "label-unwanted" and len(self._labels[name]) > 2:  # classes of something else
                continue
            reason, fix = FINDINGS[code]
            severity: Severity = "hint" if code in HINTS else "warning"
            yield about_rows(severity, code, reason.format(name), fix, key, file, lines)
        for name, stated in self.columns.items():
            for column in stated if isinstance(stated, list) else [stated]:
                if name != "labels" and isinstance(column, str) and column not in self.seen:
                    message = f'"columns" names "{column}" for {name}, but no row has such a column'
                    yield Problem("warning", "column-missing", message, "correct the name, or remove it", "columns")

    def to_json(self) -> dict[str, object]:
        """The columns with their meanings, and the columns that are not read."""
        return {"read": self.read, "unread": [name for name in self.seen if name not in self.read]}


def _may_be_label(name: str) -> bool:
    return says_no(name, 0) or says_no(name, 1)


def _is_score(value: Any) -> TypeGuard[str | float]:
    try:
        return not isinstance(value, bool | Mapping | list) and float(value) == float(value)
    except (TypeError, ValueError):  # a text or null is not a score
        return False


def _words(name: str) -> list[str]:
    return name.lower().replace("-", "_").replace(".", "_").replace(" ", "_").split("_")


@functools.cache
def _score_pairs(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The columns that score the chosen and the rejected response: score_chosen and score_rejected, chosen-rating and ..."""
    by_words = {tuple(_words(name)): name for name in names}
    pairs = []
    for words, name in by_words.items():
        other = tuple("rejected" if word == "chosen" else word for word in words)
        if "chosen" in words and other in by_words and any(word in SCORES for word in words):
            pairs.append((name, by_words[other]))
    return tuple(pairs)
