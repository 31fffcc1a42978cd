"""Pairs of a file of rated answers: an answer that is rated good, and one to the same prompt that is rated bad."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from dpo_cli.data import files
from dpo_cli.data.columns import Columns
from dpo_cli.data.messages import BadRow, looks
from dpo_cli.data.row_shapes import as_object
from dpo_cli.data.rows import Pair, Rating, Read, read_rating

UNPAIRED = "row-unpaired"
SAYS = "ratings: an answer that is rated good and one to the same prompt that is rated bad make a pair"
FIX = 'these rows are skipped; "strategy": "kto" trains on answers that are rated alone'


@dataclass
class _Rated:
    """The answers to a prompt, in their order in the file."""

    good: list[Read] = field(default_factory=list)
    bad: list[Read] = field(default_factory=list)


def rates(path: str, columns: Columns) -> bool:
    """Whether the first row of a file that can be read is a rated answer."""
    rows = files.read_rows(path, lambda row, line: read_rating(as_object(row), line, path, columns))
    return next((row is not None for _, row in rows if not isinstance(row, BadRow)), False)


def paired(path: str, columns: Columns, only: Container[int] | None) -> Iterator[tuple[int, Read | BadRow]]:
    """The pairs of a file of ratings, with the line of the answer that is rated good, and the rows that are in none.

    The first good answer to a prompt makes a pair with the first bad one, the second with the second, and so on, so that no
    answer counts twice. The rows of the file are in memory. With `only`, the pairs on these lines.
    """
    rated: dict[str, _Rated] = {}

    def read_one(row: object, line: int) -> Read:
        read = read_rating(as_object(row), line, path, columns)
        if read is None:
            raise BadRow("row-missing-key", "prompt, completion and label are missing, which other rows of the file have")
        return read

    for line, read in files.read_rows(path, read_one):
        if isinstance(read, BadRow):
            if only is None or line in only:
                yield line, read
            continue
        (rating,) = read.rows
        assert isinstance(rating, Rating)
        of_prompt = rated.setdefault(rating.prompt_key, _Rated())
        (of_prompt.good if rating.is_good else of_prompt.bad).append(read)
    for of_prompt in rated.values():
        for good, bad in zip_longest(of_prompt.good, of_prompt.bad):
            line, made = _pair(good, bad)
            if only is None or line in only:
                yield line, made


def _pair(good: Read | None, bad: Read | None) -> tuple[int, Read | BadRow]:
    """The line and the pair of a good and a bad answer, or the line and the reason of one that has no other."""
    one = good or bad
    assert one is not None
    if good is None or bad is None:
        missing = "good" if good is None else "bad"
        return one.rows[0].line, BadRow(UNPAIRED, f"no answer to the same prompt is rated {missing}", fix=FIX)
    (chosen,), (rejected,) = good.rows, bad.rows
    if looks(chosen.responses[0]) == looks(rejected.responses[0]):
        return chosen.line, BadRow("row-identical", "the same answer is rated good and bad")
    pair = Pair(
        chosen.prompt, chosen.responses[0], rejected.responses[0], chosen.line, chosen.file, chosen.tools, chosen.category
    )
    return pair.line, replace(good, rows=(pair,), says=SAYS, of_rows=2)
