"""Many rows in one array: the same rows, sizes and lists as one by one, in a tenth of the memory."""

from __future__ import annotations

import sys

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.data.encoded import Encoded, EncodedRows
from dpo_cli.data.rows import Pair
from dpo_cli.training.trainer import token_column

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6)
ROWS = st.lists(
    st.builds(Encoded, st.just(Pair("", "", "", 1)), IDS, st.tuples(IDS, IDS), st.booleans(), st.booleans()), max_size=6
)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS)
def test_rows_come_back(rows: list[Encoded]) -> None:
    held = EncodedRows.of(rows)
    assert list(held) == rows and len(held) == len(rows) and held[:2] == rows[:2]
    assert [size.length for size in held.sizes()] == [row.length for row in rows]
    assert [size.shared_length for size in held.sizes()] == [row.shared_length for row in rows]
    assert (held.cut, held.parted) == (sum(row.is_cut for row in rows), sum(row.parts_early for row in rows))
    short = held.where(lambda size: size.length <= 5)
    assert list(short) == [row for row in rows if row.length <= 5]
    with pytest.raises(IndexError):
        held[len(rows)]
    if rows:
        assert held[-1] == rows[-1]


def test_they_are_small() -> None:
    ids = list(range(1000, 1500))
    held = EncodedRows.of(Encoded(Pair("", "", "", 1), ids, (ids, ids)) for _ in range(100))
    bytes_held = sys.getsizeof(held._ids) + sys.getsizeof(held._ends)
    assert bytes_held < 100 * 1500 * 4 * 1.2  # an array grows by an eighth


@settings(max_examples=50, deadline=None)
@given(lists=st.lists(st.lists(st.integers(-100, 2**31 - 1), max_size=5), max_size=6))
def test_a_column_of_token_ids(lists: list[list[int]]) -> None:
    column = token_column(iter(lists))
    assert column.to_pylist() == lists and column.type == pa.list_(pa.int32())
