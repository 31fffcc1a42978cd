"""Preference pairs from votes: the rows of a votes file, and the file that a chat appends to. No torch.

A row is a pair as a training reads it, with its provenance in the form of `dpo augment`:

{"prompt": [messages], "chosen": [...], "rejected": [...], "provenance": {"source": "dpo chat", "chosen": "adapter", ...}}

A tie is not a pair. Those of a chat are in FILE.ties, whose name no dataset reads.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import dpo_cli
from dpo_cli.data.messages import Text
from dpo_cli.data.rows import Question
from dpo_cli.errors import UsageError
from dpo_cli.preferences.votes import Document
from dpo_cli.results.codec import JsonObject
from dpo_cli.storage.atomic import write_whole
from dpo_cli.storage.jsonio import json_text
from dpo_cli.storage.redaction import redacted

SUFFIX, TIES = ".jsonl", ".ties"
Outcome = Literal["pair", "tie"]


def pair_row(prompt: Text, chosen: str, rejected: str, provenance: Mapping[str, object]) -> JsonObject:
    """A pair as a row; after a prompt of messages its answers are messages too."""
    pair = Question(prompt, None, 0).with_answers(chosen, rejected)
    return {
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "provenance": {**provenance, "dpo": dpo_cli.__version__},
    }


def require_free(path: Path, may_exist: bool) -> None:
    """`UsageError` unless pairs can be written to this path: a new file, or one to append to."""
    if path.suffix != SUFFIX:
        raise UsageError(f"{path} does not end in {SUFFIX}", f"name a {SUFFIX} file: it gets one pair per line")
    if not path.parent.is_dir():
        message = f"cannot write {path}: the folder {path.parent} does not exist"
        raise UsageError(message, "name a file in a folder that exists")
    if path.is_dir() or (path.exists() and not may_exist):
        raise UsageError(f"{path} exists already", "name a new file, or delete it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: this user may not", "name a file that can be written")


def write_pairs(document: Document, out: Path) -> Counter[str]:
    """Write the pairs of a votes file: the number of pairs, and of the votes that give none, by the reason.

    A file has one vote on a prompt. Votes of several people are several files, and each gives rows of its own.
    """
    counts: Counter[str] = Counter(pairs=0, ties=0, missing=0, empty=0)
    judge = document["judge"]
    rows = []
    for vote in document["votes"]:
        if vote["winner"] is None or vote["winner"] == "tie":
            counts["missing" if vote["winner"] is None else "ties"] += 1
            continue
        chosen, rejected = ("adapter", "base") if vote["winner"] == "adapter" else ("base", "adapter")
        texts = {"adapter": vote["adapter"], "base": vote["base"]}
        if not all(text.strip() for text in texts.values()):  # a training rejects such a row
            counts["empty"] += 1
            continue
        counts["pairs"] += 1
        rule = {"rank": "vote", "by": vote["by"], "criterion": document["criterion"], "judge": judge}
        origin = {"source": "dpo vote", "run": document["run"], "adapter_sha256": document["adapter_sha256"], "rule": rule}
        rows.append(pair_row(vote["prompt"], texts[chosen], texts[rejected], {**origin, "chosen": chosen}))
    lines = "".join(f"{json_text(redacted(row))}\n" for row in rows)
    if rows:
        write_whole(out, lambda part: part.write_text(lines, encoding="utf-8"))
    return counts


@dataclass
class VotedPairs:
    """A file of pairs that grows by one synced line a vote, and the ties next to it."""

    path: Path
    counts: Counter[Outcome] = field(default_factory=Counter)  # of this chat

    def add(self, row: JsonObject) -> None:
        _append(self.path, row)
        self.counts["pair"] += 1

    def add_tie(self, row: JsonObject) -> None:
        _append(self.path.with_name(self.path.name + TIES), row)
        self.counts["tie"] += 1


def _append(path: Path, row: JsonObject) -> None:
    """Add a line and sync it. A last line without its end (a crash, an editor) is ended first, so that it stays alone."""
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
        is_open = size > 0 and file.read(1) != b"\n"
        file.write((b"\n" if is_open else b"") + f"{json_text(redacted(row))}\n".encode())
        file.flush()
        os.fsync(file.fileno())
