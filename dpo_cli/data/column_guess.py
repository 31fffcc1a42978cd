"""The likely option "columns" of a file whose rows cannot be read, by the words of the names of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from dpo_cli.data import files, folders
from dpo_cli.data.columns import Columns, asked, is_prompt_like
from dpo_cli.data.comparisons import has_word, says_better, says_worse
from dpo_cli.data.messages import BadRow
from dpo_cli.data.row_shapes import as_object

ROWS = 100  # rows at the start of the file that are looked at
NAME_WORDS = 5  # at most, in the name of a column
# Words of responses that are not in the names of labels.
GOOD, BAD = r"good|positive|accept\w*|approved|liked|desir\w*", r"negative|poor"


def guessed_columns(path: str) -> Columns | None:
    """The columns of the prompt, the better and the worse response; None if the names leave a choice.

    A response is a text of several words: a label is not.
    """
    rows = _first_rows(path)
    names = _names(rows)
    texts = [name for name in names if any(_is_text(row.get(name)) for row in rows)]
    worse = [name for name in texts if says_worse(name) or has_word(name, BAD)]
    better = [name for name in texts if name not in worse and (says_better(name) or has_word(name, GOOD))]
    others = [name for name in texts if name not in (*better, *worse)]
    known = asked({name: "" for name in others})
    prompts = [known[1][0]] if known is not None else [name for name in others if is_prompt_like(name)] or others
    if not len(better) == len(worse) == len(prompts) == 1:
        return None
    return {"prompt": prompts[0], "chosen": better[0], "rejected": worse[0]}


def names_of(path: str) -> list[str]:
    """The names of the columns of a file."""
    return _names(_first_rows(path))


def has_header(path: str) -> bool:
    """Whether the first line of a table has names of columns. Sentences are data."""
    is_table = folders.kind(path) in (".csv", ".tsv")
    return not is_table or not any(name.endswith((".", "?", "!")) or len(name.split()) > NAME_WORDS for name in names_of(path))


def _first_rows(path: str) -> list[Mapping[str, object]]:
    read = files.read_rows(path, lambda row, _: as_object(row))
    return [row for _, row in islice(read, ROWS) if not isinstance(row, BadRow)]


def _names(rows: list[Mapping[str, object]]) -> list[str]:
    return [*dict.fromkeys(str(name) for row in rows for name in row)]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value.split()) > 1
