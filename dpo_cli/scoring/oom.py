"""A row that does not fit the GPU is divided: the same gradient except for new dropout, and the run continues.

The loss of a row is its share of the loss of the whole step, so the gradients of its parts add up to its own. A backward
pass that runs out of memory has already changed some gradients. So each try starts without gradients, and only those of a
complete one are added to the earlier gradients, as autograd would add them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from dpo_cli.providers.out_of_memory import free_memory, is_out_of_memory

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
    step: Callable[[Part], Tensor],
    parts: Sequence[Part],
    parameters: Sequence[nn.Parameter],
    divided: Callable[[Part], list[Part]],
) -> Tensor:
    """`step` of each part of an optimizer step, forward and backward; a part that is out of memory is `divided`.

    Adds the gradients of all parts to those of `parameters`. Returns the sum of their losses.
    """
    sums = [parameter.grad for parameter in parameters]

    def one(part: Part) -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        loss = step(part)
        for i, parameter in enumerate(parameters):
            sums[i] = _sum(sums[i], parameter.grad)
        return loss

    losses = [loss for _, loss in in_halves(parts, one, divided)]
    for parameter, grad in zip(parameters, sums, strict=True):
        parameter.grad = grad
    return torch.stack(losses).sum()


def _sum(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if total is None or grad is None:
        return grad if total is None else total
    return total.add_(grad)
