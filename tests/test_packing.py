"""The pairs of a step, packed into rows: which ones, how wide, and that nothing is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_cli.scoring.packing import packed, row_tokens, units_in


def micro_batch(pairs: list[tuple[int, int, int]]) -> dict[str, Tensor]:
    """TRL's micro-batch of pairs with so many tokens of prompt, chosen and rejected; each token is the number of its pair."""
    sequences = [(i, prompt, responses[kind]) for kind in range(2) for i, (prompt, *responses) in enumerate(pairs)]
    width = max(prompt + response for _, prompt, response in sequences) + 1  # a column of padding only
    columns = {
        name: torch.zeros(len(sequences), width, dtype=torch.long) for name in ("ids", "attention_mask", "completion_mask")
    }
    for row, (i, prompt, response) in enumerate(sequences):
        columns["ids"][row, : prompt + response] = i + 1
        columns["attention_mask"][row, : prompt + response] = 1
        columns["completion_mask"][row, prompt : prompt + response] = 1
    return columns


def test_rows_by_hand() -> None:
    """Pairs of 3 + 2 + 1 = 6, 1 + 1 + 1 = 3, 5 + 2 + 3 = 10 and 2 + 1 + 1 = 4 tokens, at most 10 in a row: 10 | 6 + 4 | 3.

    Padded, a pair has twice its longest sequence: 10, 4, 16 and 6. Two pairs of 5 and 3 would be 2 * 10 wide: 16 | 10 | 6 | 4.
    """
    batch = micro_batch([(3, 2, 1), (1, 1, 1), (5, 2, 3), (2, 1, 1)])
    rows = packed(batch, 10, 2, shared=True)
    assert [row["ids"][:, 0].tolist() for row in rows] == [[3, 3], [1, 4, 1, 4], [2, 2]]
    assert [row["ids"].shape[1] for row in rows] == [8, 5, 2]
    assert [row_tokens(row, 2, shared=True) for row in rows] == [10, 10, 3]
    rows = packed(batch, 12, 2, shared=False)
    assert [row["ids"][:, 0].tolist() for row in rows] == [[3, 3], [1, 1], [4, 2, 4, 2]]
    assert [row_tokens(row, 2, shared=False) for row in rows] == [16, 10, 12]


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=9),
    budget=st.integers(1, 60),
    shared=st.booleans(),
)
def test_each_pair_is_in_one_row_whole(pairs: list[tuple[int, int, int]], budget: int, shared: bool) -> None:
    batch = micro_batch(pairs)
    rows = packed(batch, budget, 2, shared)
    seen = sorted(row["ids"][unit, 0].item() for row in rows for unit in range(units_in(row, 2)))
    assert seen == list(range(1, len(pairs) + 1))
    for name, column in batch.items():
        assert sum(int(row[name].sum()) for row in rows) == int(column.sum())
    for row in rows:
        assert units_in(row, 2) == 1 or row_tokens(row, 2, shared) <= budget
        assert torch.equal(*row["ids"][:, 0].chunk(2))  # chosen and rejected of the same pairs, in the same order
        assert row["attention_mask"][:, -1].any()  # no column of padding only


def test_demonstrations_have_one_sequence_each() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
    rows = packed({"input_ids": mask * 7, "attention_mask": mask}, 4, 1, shared=False)
    assert [row["attention_mask"].tolist() for row in rows] == [[[1, 1, 1]], [[1, 1], [1, 0]]]


@pytest.mark.parametrize("shared", [True, False])
def test_a_pair_beyond_the_budget_has_a_row_of_its_own(shared: bool) -> None:
    rows = packed(micro_batch([(3, 1, 1), (3, 1, 1)]), 1, 2, shared)
    assert [units_in(row, 2) for row in rows] == [1, 1]
