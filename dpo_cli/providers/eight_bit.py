"""8-bit layers whose output for a token does not depend on the other tokens.

bitsandbytes 0.50 has two products for `Linear8bitLt`. On a GPU, and in evaluation mode on a CPU, it also rounds the input to 8
bits, except columns where some token has a large value. So the other pairs of a row change the log-probs of a pair. The
other product dequantises the weight, as for 4 bits. Here it is the only one.
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn


def use_exact_product(model: nn.Module) -> None:
    """Let each 8-bit layer of a model multiply with its dequantised weight, in training and in evaluation mode."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt" and type(module).__module__.startswith("bitsandbytes"):
            module.forward = types.MethodType(_forward, module)


def _forward(self: Any, x: Tensor) -> Tensor:
    from bitsandbytes.autograd._functions import MatMul8bitFp

    if self.weight.CB is not None:  # the first call: as in bitsandbytes' own forward
        self.init_8bit_state()
    bias = None if self.bias is None else self.bias.to(x.dtype)
    y: Tensor = MatMul8bitFp.apply(x, self.weight, None, bias, self.state)  # type: ignore[no-untyped-call]
    self.weight.data = self.state.CB
    return y
