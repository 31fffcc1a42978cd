"""A micro-batch that does not fit the GPU, run in halves: the same gradient but for dropout drawn anew, and the run goes on.

The loss of a micro-batch is the mean over its pairs, so its gradient is the mean of its halves' gradients, weighted by their
pairs. A backward pass that runs out of memory has added to some gradients already. So each try starts without gradients, and
only those of a whole one are added to what was there, as autograd itself would have added them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


def pairs_in(batch: Batch) -> int:
    """Pairs of a micro-batch of TRL's, whose tensors have two rows a pair."""
    return len(next(iter(batch.values()))) // 2


def halves(batch: Batch) -> list[Batch]:
    """Two micro-batches with the first and the second half of the pairs; chosen rows stand before rejected ones."""
    count = pairs_in(batch)
    assert all(len(rows) == 2 * count for rows in batch.values())
    cuts = (slice(0, count // 2), slice(count // 2, count))
    return [{name: torch.cat([rows[:count][cut], rows[count:][cut]]) for name, rows in batch.items()} for cut in cuts]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch had no memory left, or cuBLAS none for its workspace, which is told otherwise."""
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def run_in_parts(
    step: Callable[[Batch], Tensor], batch: Batch, parameters: Sequence[nn.Parameter], tell: Callable[[str], None]
) -> Tensor:
    """`step(batch)`, forward and backward; where that is out of memory, the same in halves, down to one pair.

    The gradients of `parameters` are then what they were, plus those of the whole micro-batch. Returns its loss.
    """
    sums = [parameter.grad for parameter in parameters]
    waiting, losses = [(batch, 1.0)], []
    while waiting:
        part, share = waiting.pop(0)
        for parameter in parameters:
            parameter.grad = None
        try:
            losses.append(share * step(part))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            lacking = error.with_traceback(None)  # whose frames hold the tensors that fill the memory
        else:
            for i, parameter in enumerate(parameters):
                sums[i] = _sum(sums[i], parameter.grad, share)
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        count = pairs_in(part)
        if count == 1:
            raise lacking
        tell(f"out of memory with {count} pairs at once: they go on in halves; a smaller per_device_train_batch_size is faster")
        waiting[:0] = [(half, share * pairs_in(half) / count) for half in halves(part)]
    for parameter, grad in zip(parameters, sums, strict=True):
        parameter.grad = grad
    return torch.stack(losses).sum()


def _sum(total: Tensor | None, grad: Tensor | None, share: float) -> Tensor | None:
    if grad is None:
        return total
    if total is None:
        return grad if share == 1.0 else grad.mul_(share)
    return total.add_(grad, alpha=share)
