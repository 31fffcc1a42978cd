"""Out of memory on a device: its errors, and what is freed after one."""

from __future__ import annotations

import gc

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory, or a kernel of CUDA, cuBLAS or Apple's GPU, or a CPU, which have other errors."""
    is_other = any(words in str(error) for words in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory"))
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and is_other)


def free_memory() -> None:
    """Free models in reference cycles, and return the freed memory that torch keeps to the device."""
    for _ in range(2):  # the shards of a model are garbage only once what torch holds of them is collected
        gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
