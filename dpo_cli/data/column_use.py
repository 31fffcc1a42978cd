"""What becomes of every column of a dataset: what it is read as, that it is not read, and what an unread one may have meant."""

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

WHOLE = (
    "prompt",
    "messages",
    "prompt and chosen",
    "earlier turns",
    "tools",
)  # meanings of columns of which nothing is left out
MARKS = ("weight", "train", "loss", "trainable")  # keys of a message
# By code: what is wrong with the column, and what to do.
FINDINGS = {
    "column-unread": (
        'column "{}" may be a part of the prompt or of the response, and is not read',
        'put its text into the prompt or the response, name it in "columns" (as prompt, system or tools), or delete the column',
    ),
    "media-unread": (
        'column "{}" holds images, audio or video, and is not read: a text model learns to speak of what it cannot see',
        "leave out the rows that need them, or put what they show into the prompt as text",
    ),
    "media-marker": (
        "the text holds the marker {} of what a text model is not given",
        "leave out the rows that need it, or put what it shows into the prompt as text",
    ),
    "scores-contradict": (
        "by {} the rejected response is better than the chosen one",
        "exchange the two responses, or delete the row",
    ),
    "scores-tie": ("by {} chosen and rejected are equally good", "delete the row, unless the order is known to be right"),
    "label-suggested": (
        "no person answered {} is taken as the answer",
        "answer it in the tool that wrote the file, or delete the row, unless the machine is to be learned from",
    ),
    "null-arguments": (
        "a tool call has arguments that are null: they are left out, as every key that is null",
        "delete them, or write a text where the model is to learn that value",
    ),
    "label-unwanted": (
        '"{}" says that the response is not wanted, and sft learns it like any other',
        "delete the row, or train on pairs with strategy dpo",
    ),
}

HINTS = ("null-arguments",)


class Account:
    """Sees every row of a pass over a dataset."""

    def __init__(self, columns: Columns, demonstrations: bool) -> None:
        self.columns, self.demonstrations = columns, demonstrations
        self.shapes: Counter[str] = Counter()  # those that are not written as documented
        self.read: dict[str, str] = {}  # by column what it is read as
        self.seen: dict[str, None] = {}  # every column, in the order in which they come
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
        """Remember the columns of a kind of row; those whose values are to be looked at."""
        reads = row.reads()
        for name in row.written:
            theirs = self._theirs(row.origin.get(name, name))
            self.seen[theirs] = None
            if name in reads and theirs not in self.read:
                self.read[theirs] = reads[name]
            elif name in row.origin and reads.get(name, "") not in self.read.get(
                theirs, ""
            ):  # a column of an export holds several
                self.read[theirs] += f", {reads[name]}"
        looked = [name for name in row.written if is_media(name) or (is_prompt_like(name) and reads.get(name) not in WHOLE)]
        if self.demonstrations:
            looked += [name for name in row.written if name in COMPLETIONS or _may_be_label(name)]
        return tuple(dict.fromkeys(looked))

    def _theirs(self, name: str) -> str:
        """What the data calls a column that "columns" gives one of our names."""
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
        """Answers of a machine that say which response is better."""
        reads = row.reads()
        for name, by in row.suggested.items():
            if name in reads or name not in row.written:  # a ranking is no column any more
                self._note("label-suggested", f'"{name}": {by}', row)

    def _look_at_calls(self, row: Read) -> None:
        """Arguments of a tool call that are null in the file; those of a table are its padding, and gone when it is read."""
        reads = row.reads()
        if any(has_null_arguments(value) for name, value in row.written.items() if reads.get(name, "tools") != "tools"):
            self._note("null-arguments", "", row)

    def _look_at_marks(self, row: Read) -> None:
        """Keys of a message by which other tools leave it out of the loss."""
        for text in row.rows[0].responses:
            for turn in text if isinstance(text, list) else []:
                for mark in MARKS:
                    if str(turn.get(mark)).lower() in ("0", "0.0", "false"):
                        self._note("label-unwanted", f"{mark} of a message", row)

    def _compare_scores(self, row: Read) -> None:
        """Scores of both responses against their order."""
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
                if chosen not in row.written:  # of responses that are not called so in the file
                    names = [name for name, meaning in row.reads().items() if meaning == "score"] or ["their scores"]
                self._note("scores-contradict" if above < 0 else "scores-tie", " and ".join(names), row)

    def _note(self, code: str, name: str, row: Read) -> None:
        first = row.rows[0]
        self.rows[code, self._theirs(row.origin.get(name, name)), first.file].append(first.line)

    def problems(self, key: str) -> Iterator[Problem]:
        """What was found, at the end of the pass."""
        for (code, name, file), lines in self.rows.items():
            if code == "label-unwanted" and len(self._labels[name]) > 2:  # the classes of something else
                continue
            reason, fix = FINDINGS[code]
            severity: Severity = "hint" if code in HINTS else "warning"
            yield about_rows(severity, code, reason.format(name), fix, key, file, lines)
        for name, stated in self.columns.items():
            for column in stated if isinstance(stated, list) else [stated]:
                if name != "labels" and isinstance(column, str) and column not in self.seen:
                    message = f'no row has a column "{column}", which "columns" names for {name}'
                    yield Problem("warning", "column-missing", message, "correct its name, or leave it out", "columns")

    def to_json(self) -> dict[str, object]:
        """Which columns are read as what, and which are not read."""
        return {"read": self.read, "unread": [name for name in self.seen if name not in self.read]}


def _may_be_label(name: str) -> bool:
    return says_no(name, 0) or says_no(name, 1)


def _is_score(value: Any) -> TypeGuard[str | float]:
    try:
        return not isinstance(value, bool | Mapping | list) and float(value) == float(value)
    except (TypeError, ValueError):  # a text or nothing: no score
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
