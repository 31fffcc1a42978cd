"""The pairs (or demonstrations) of a step, packed into rows: a row is what goes through the model at once.

A micro-batch of TRL holds all first responses, then all second ones. A unit is a pair, with two of these sequences, or a
demonstration, with one. With shared prompts a row has no padding and each prompt once; else it is as wide as its longest
sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]
Item = TypeVar("Item")


def units_in(batch: Batch, sequences: int) -> int:
    """Units of a micro-batch, with so many sequences per unit."""
    return len(next(iter(batch.values()))) // sequences


def packed(batch: Batch, budget: int, sequences: int, shared: bool) -> list[Batch]:
    """Rows of at most `budget` tokens, the longest units first; a longer unit has a row of its own."""
    sizes = unit_tokens(batch, sequences, shared)
    by_size = sorted(range(len(sizes)), key=lambda unit: -sizes[unit])
    rows = filled(by_size, lambda row: _row_tokens([sizes[unit] for unit in row], shared) <= budget)
    return [taken(batch, row, sequences) for row in rows]


def filled(items: Iterable[Item], fits: Callable[[Sequence[Item]], bool]) -> list[list[Item]]:
    """The items in their order, as many together as fit; one that does not fit is alone."""
    groups: list[list[Item]] = []
    for item in items:
        if groups and fits([*groups[-1], item]):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def unit_tokens(batch: Batch, sequences: int, shared: bool) -> list[int]:
    """Tokens of each unit alone in a row."""
    real = batch["attention_mask"].bool().view(sequences, -1, batch["attention_mask"].shape[1])
    lengths = real.sum(dim=2)
    if not shared:
        return (sequences * lengths.amax(dim=0)).tolist()
    scored = batch["completion_mask"].bool().view_as(real)
    prompts = (real & ~scored).sum(dim=2).amin(dim=0)
    return (lengths.sum(dim=0) - (sequences - 1) * prompts).tolist()


def shared_out(sizes: Sequence[int], processes: int) -> list[list[int]]:
    """The places of these sizes for each process, so that their sums are close to each other.

    The longest first, each to the process with the smallest sum: at most 4/3 of the best maximum (Graham, Bounds on
    multiprocessing timing anomalies, 1969).
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    sums = [0] * processes
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        least = sums.index(min(sums))
        shares[least].append(place)
        sums[least] += sizes[place]
    return shares


def row_tokens(row: Batch, sequences: int, shared: bool) -> int:
    """Tokens of a row that go through the model, with its padding."""
    return _row_tokens(unit_tokens(row, sequences, shared), shared)


def _row_tokens(sizes: Sequence[int], shared: bool) -> int:
    return sum(sizes) if shared else len(sizes) * max(sizes)


def taken(batch: Batch, units: Sequence[int], sequences: int) -> Batch:
    """The micro-batch of these units, without the padding that only others need."""
    count = units_in(batch, sequences)
    mask = batch["attention_mask"]
    places = torch.tensor([kind * count + unit for kind in range(sequences) for unit in units], device=mask.device)
    length = int(mask[places].sum(dim=1).max())
    return {name: column[places, :length] if column.shape == mask.shape else column[places] for name, column in batch.items()}
