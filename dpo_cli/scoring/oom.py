"""A micro-batch that does not fit the GPU is run in halves: the same gradient except for new dropout, and the run continues.

The loss of a micro-batch is its share of the loss of the whole step, so the gradients of its halves add up to its own. A
backward pass that runs out of memory has already changed some gradients. So each try starts without gradients, and only those
of a complete one are added to the earlier gradients, as autograd would add them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


def units_in(batch: Batch, rows_a_unit: int) -> int:
    """Units of a micro-batch of TRL: pairs, with two rows per tensor, or demonstrations, with one."""
    return len(next(iter(batch.values()))) // rows_a_unit


def halves(batch: Batch, rows_a_unit: int) -> list[Batch]:
    """Two micro-batches with the first and the second half of the units; first rows of all units come before second rows."""
    count = units_in(batch, rows_a_unit)
    assert all(len(rows) == rows_a_unit * count for rows in batch.values())
    cuts = (slice(0, count // 2), slice(count // 2, count))
    return [{name: torch.cat([part[cut] for part in torch.split(rows, count)]) for name, rows in batch.items()} for cut in cuts]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, or cuBLAS (for its workspace) or Apple's GPU, which have other errors."""
    message = str(error)
    is_other_device = "CUBLAS_STATUS_ALLOC_FAILED" in message or "MPS backend out of memory" in message
    return isinstance(error, torch.OutOfMemoryError) or is_other_device


def free_memory() -> None:
    """Free models in reference cycles, and return the freed memory that torch keeps to the device."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


Part = TypeVar("Part")
Result = TypeVar("Result")


def in_halves(
    parts: Iterable[Part], run: Callable[[Part], Result], divided: Callable[[Part], list[Part]]
) -> Iterator[tuple[Part, Result]]:
    """Each part with the result of `run`; a part that is out of memory is `divided`, or its error is raised."""
    waiting = list(parts)
    while waiting:
        part = waiting.pop(0)
        try:
            result = run(part)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # its frames hold the tensors that fill the memory
        else:
            yield part, result
            continue
        free_memory()
        if not (smaller := divided(part)):
            raise failure
        waiting[:0] = smaller


def list_halves(rows: list[Result]) -> list[list[Result]]:
    """Both halves of a list; none of a list of one."""
    middle = len(rows) // 2
    return [rows[:middle], rows[middle:]] if middle else []


def run_in_parts(
    step: Callable[[Batch], Tensor],
    batch: Batch,
    parameters: Sequence[nn.Parameter],
    tell: Callable[[str], None],
    rows_a_unit: int = 2,
) -> Tensor:
    """`step(batch)`, forward and backward; if that is out of memory, the same in halves, down to one unit.

    Adds the gradients of the whole micro-batch to those of `parameters`. Returns its loss, the sum of the losses of its parts.
    """
    sums = [parameter.grad for parameter in parameters]

    def one(part: Batch) -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        loss = step(part)
        for i, parameter in enumerate(parameters):
            sums[i] = _sum(sums[i], parameter.grad)
        return loss

    def divided(part: Batch) -> list[Batch]:
        if (count := units_in(part, rows_a_unit)) == 1:
            return []
        tell(f"out of memory with {count} rows at once: they run in halves; a smaller per_device_train_batch_size is faster")
        return halves(part, rows_a_unit)

    losses = [loss for _, loss in in_halves([batch], one, divided)]
    for parameter, grad in zip(parameters, sums, strict=True):
        parameter.grad = grad
    return torch.stack(losses).sum()


def _sum(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if total is None or grad is None:
        return grad if total is None else total
    return total.add_(grad)
