"""Answers that are rated alone, good or bad, as most products collect feedback: their labels, and pairs made of them.

prompt  completion  label     TRL's unpaired preference: true is good, false is bad
messages  kto_tag             LLaMA-Factory; also label, thumbs_up, liked, feedback, ...

The column of the label is found by its name, or named by `columns`: {"label": "stars", "labels": [[4, 5], [1, 2], 3]} gives the
values of good answers, of bad ones, and of answers that are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from dpo_cli.data.columns import LABEL, NO, UNWANTED, WANTED, YES, Columns, Row
from dpo_cli.data.comparisons import TIES, plain_value
from dpo_cli.data.messages import BadRow

GOOD, BAD = "good", "bad"  # the ratings in words
GOOD_WORDS = frozenset("good accepted wanted desirable positive thumbs_up thumbs-up up like liked upvote upvoted 👍".split())  # noqa: SIM905
FALSE = frozenset(["false", "0", "no"])
UNRATED = "row-unrated"
OPEN = TIES | {"", "neutral", "nan", "null"}


def label_column(row: Row) -> str | None:
    """The column that rates the answer of a row: "label", or one with a usual name and a single value."""
    if LABEL in row:
        return LABEL
    names = (name for name in row if name.lower() in WANTED or name.lower() in UNWANTED)
    return next((name for name in names if not isinstance(row[name], list | Mapping)), None)


def is_good(row: Row, name: str, columns: Columns) -> bool:
    """Whether the column `name` rates the answer of a row good; `BadRow` if it says neither."""
    said = plain_value(row[name])
    if "labels" in columns:
        values = [value if isinstance(value, list) else [value] for value in columns["labels"]]
        meant = [frozenset(map(plain_value, own)) for own in values]
    elif name.lower() in UNWANTED:  # "thumbs_down": true
        meant = [FALSE, YES, OPEN]
    else:
        meant = [YES | GOOD_WORDS, NO, OPEN]
    place = next((place for place, words in enumerate(meant) if said in words), None)
    if place is None:
        example = f'"columns": {{"label": {json.dumps(name)}, "labels": [[4, 5], [1, 2], 3]}}'
        fix = f"name the values of good answers, of bad ones, and of those to skip, for example {example}"
        raise BadRow("row-label", f'"{name}" has a value that says neither good nor bad', repr(row[name])[:60], fix)
    if place > 1:
        raise unrated(name)
    return place == 0


def unrated(name: str) -> BadRow:
    """The reason to skip an answer that nobody has rated."""
    return BadRow(UNRATED, f'"{name}" is empty or neutral: nobody has rated the answer')
