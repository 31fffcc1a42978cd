"""Many rows in columns: the same rows, sizes and lists as one by one, in memory and on the disk, in a few bytes a token."""

from __future__ import annotations

from array import array
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_cli.data.encoded import Chunk, Encoded, EncodedRows, Growing, check_columns, read_columns
from dpo_cli.data.rows import Demonstration, Pair, Row
from dpo_cli.training.trainer import token_column

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6)
TEXTS = st.text(max_size=4) | st.just("half a surrogate: \ud83d")
PAIRS = st.builds(
    Pair, TEXTS, TEXTS, TEXTS, st.integers(1, 9), st.just("a.jsonl"), st.just(({"name": "f"},)), st.text(max_size=2)
)
ROWS = st.lists(st.builds(Encoded, PAIRS, IDS, st.tuples(IDS, IDS), st.booleans(), st.booleans()), max_size=6)


def grown(rows: list[Encoded], folder: Path | None) -> EncodedRows:
    """In chunks of two, each between rows that cannot be used."""
    growing = Growing(folder)
    for begin in range(0, len(rows), 2):
        some = rows[begin : begin + 2]
        given: list[Row] = [Pair("bad", "", "", 0), *(row.row for row in some), Pair("bad", "", "", 0)]
        growing.add(Chunk.of([None, *some, None]), given)
    return growing.done()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_rows_come_back(rows: list[Encoded], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("columns")
    on_disk, in_memory = grown(rows, folder), grown(rows, None)
    check_columns(folder, on_disk.digests)
    assert on_disk.token_digests == in_memory.token_digests == EncodedRows.of(rows).token_digests
    for held in (in_memory, on_disk, read_columns(folder, on_disk.digests)):
        assert list(held) == rows and len(held) == len(rows) and held[:2] == rows[:2]
        assert [size.length for size in held.sizes()] == [row.length for row in rows]
        assert [size.shared_length for size in held.sizes()] == [row.shared_length for row in rows]
        assert (held.cut, held.parted) == (sum(row.is_cut for row in rows), sum(row.parts_early for row in rows))
        assert held.prompts == len({row.row.prompt_key for row in rows})
        with pytest.raises(IndexError):
            held[len(rows)]
        if rows:
            assert held[-1] == rows[-1]


def test_other_kinds_of_rows_and_messages_come_back_from_the_disk(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "q", "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]}]
    rows = [Encoded(Demonstration(said, said, 2, "b.jsonl", ({"name": "f"},), "c"), [1], ([2, 3],))]
    assert list(grown(rows, tmp_path)) == rows


@pytest.mark.parametrize("change", [lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"), Path.unlink])
def test_a_damaged_column_is_seen(change: object, tmp_path: Path) -> None:
    held = grown([Encoded(Pair("p", "a", "b", 1), [1, 2], ([3], [4]))], tmp_path)
    change(tmp_path / "1.ids")  # type: ignore[operator]
    with pytest.raises((ValueError, FileNotFoundError)):
        check_columns(tmp_path, held.digests)


@settings(max_examples=50, deadline=None)
@given(rows=ROWS, wanted=st.sets(st.integers(0, 5)))
def test_some_rows_of_a_chunk(rows: list[Encoded], wanted: set[int]) -> None:
    places = [place for place in sorted(wanted) if place < len(rows)]
    growing, chunk = Growing(), Chunk.of(rows)
    assert chunk.row_sizes() == [row.size for row in rows]
    growing.add(chunk.taken(places), [row.row for row in rows])
    assert list(growing.done()) == [rows[place] for place in places]


def test_they_are_small(tmp_path: Path) -> None:
    ids = list(range(1000, 1500))
    grown([Encoded(Pair("", "", "", 1), ids, (ids, ids)) for _ in range(100)], tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 100 * (1500 * 4 + 100)


@settings(max_examples=50, deadline=None)
@given(lists=st.lists(st.lists(st.integers(-100, 2**31 - 1), max_size=5), max_size=6))
def test_a_column_of_token_ids(lists: list[list[int]]) -> None:
    ids, ends = array("i", [each for one in lists for each in one]), array("q", accumulate(map(len, lists), initial=0))
    column = token_column(ids, ends)
    assert column.to_pylist() == lists and column.type == pa.large_list(pa.int32())
    assert column.values.buffers()[1].address == ids.buffer_info()[0] or not ids  # nothing is copied
