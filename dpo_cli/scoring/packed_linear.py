"""Linear layers of 16 bits on a CPU whose weight is already in the order of oneDNN's kernel.

For each product of another weight oneDNN copies it into that order, which takes as long as the product of a few rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ROWS = 64  # of a product, at least in most of them: one token of each sampled answer


class PackedLinear:
    """The product of a linear layer, with a copy of its weight (out, in)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._dtype, self._bias = weight.dtype, bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + bias (..., out) in the dtype of the weight, for x (..., in)."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self._dtype), self._weight, self._bias, "none", [], "")
        return y

    def plus(self, x: Tensor, total: Tensor) -> Tensor:
        """total + x W^T, rounded once, for x (n, in) and total (n, out) in the dtype of the weight. The bias is left out."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, total, self._weight, None, "add")
        return y


def packs(dtype: torch.dtype) -> bool:
    """Whether this processor has products of this dtype with weights in another order."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return dtype == torch.bfloat16 and has_onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_linear(layer: nn.Module, dtype: torch.dtype) -> PackedLinear | None:
    """The product of this layer in this dtype; None for a layer that is not a plain one on a CPU, or another dtype."""
    if type(layer) is not nn.Linear or "forward" in vars(layer) or layer.weight.device.type != "cpu" or not packs(dtype):
        return None
    if isinstance(layer.weight, DTensor):  # a shard
        return None
    bias: Any = layer.bias  # None without one
    return PackedLinear(layer.weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))
