"""A model that computes in float32 for a while, with little more memory: measurements without rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let each module compute in float32 while it runs, for any dtype of its weights; one module at a time.

    A layer with an adapter is one module with its parts, because PEFT may join its weights. Quantised weights are not floats:
    bitsandbytes multiplies them in its compute_dtype.
    """
    held: dict[nn.Module, tuple[dict[nn.Parameter, Tensor], object]] = {}

    def widen(module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        if not isinstance(module, nn.Embedding):  # a lookup is exact in any dtype, and the table is large
            own = module.parameters(recurse=isinstance(module, BaseTunerLayer))
            narrow = [p for p in own if p.is_floating_point() and p.dtype.itemsize < 4]
            held[module] = {p: p.data for p in narrow}, getattr(module, "compute_dtype", None)
            for parameter in narrow:
                parameter.data = parameter.data.float()
            if hasattr(module, "compute_dtype"):
                setattr(module, "compute_dtype", torch.float32)  # noqa: B010 - mypy does not know bitsandbytes' attribute
        return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() and a.dtype.itemsize < 4 else a for a in args)

    def restore(module: nn.Module) -> None:
        kept, compute_dtype = held.pop(module, ({}, None))
        for parameter, data in kept.items():
            parameter.data = data
        if hasattr(module, "compute_dtype"):
            setattr(module, "compute_dtype", compute_dtype)  # noqa: B010

    def narrow_again(module: nn.Module, args: object, output: object) -> object:
        restore(module)
        return output.float() if isinstance(module, nn.Embedding) and isinstance(output, Tensor) else output

    whole = list(_units(model))
    hooks = [module.register_forward_pre_hook(widen) for module in whole]
    hooks += [module.register_forward_hook(narrow_again) for module in whole]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(held):  # modules that an exception interrupted
            restore(module)


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The layers with adapters, and all other modules with their own weights."""
    is_adapted = isinstance(module, BaseTunerLayer)
    if is_adapted or next(module.parameters(recurse=False), None) is not None:
        yield module
    for child in () if is_adapted else module.children():
        yield from _units(child)
