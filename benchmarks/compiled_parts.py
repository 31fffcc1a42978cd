"""What torch.compile could save in a step on a CPU: the elementwise parts of a layer as they are and compiled.

Forward and backward. Products, attention and the head are library calls, which it does not change. The parts are those of
SmolLM2-135M on a row of 2,000 tokens, in bfloat16. `warm-up` is the time until the first compiled call has ended.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import baseline
import torch
from baseline import Column, Table
from torch import Tensor
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

TOKENS, HIDDEN, WIDE, HEADS, WIDTH = 2000, 576, 1536, 12, 64
ROUNDS = 9
COLUMNS = (
    Column("part"),
    Column("as it is", "ms", "{:.1f}"),
    Column("compiled", "ms", "{:.1f}"),
    Column("faster", "ratio", "{:.1f}x", (0.3, 0)),
    Column("warm-up", "s", "{:.0f}"),
)


def parts() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each part with its inputs."""
    norm = LlamaRMSNorm(HIDDEN).to(torch.bfloat16)
    norm.weight.requires_grad_(False)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16).requires_grad_()

    angles = torch.rand(1, TOKENS, WIDTH, dtype=torch.bfloat16)
    cos, sin = angles.cos(), angles.sin()

    def rope(query: Tensor, key: Tensor) -> Tensor:
        return torch.cat(apply_rotary_pos_emb(query, key, cos, sin), dim=1)

    return {
        "norm": (norm, [drawn(1, TOKENS, HIDDEN)]),
        "rope": (rope, [drawn(1, 9, TOKENS, WIDTH), drawn(1, 3, TOKENS, WIDTH)]),
        "SwiGLU": (lambda gate, up: silu(gate) * up, [drawn(1, TOKENS, WIDE), drawn(1, TOKENS, WIDE)]),
    }


def seconds(part: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    started = time.perf_counter()
    output = part(*inputs)
    torch.autograd.grad(output, inputs, torch.ones_like(output))
    return time.perf_counter() - started


def measure(table: Table, options: argparse.Namespace) -> None:
    for name, (part, inputs) in parts().items():
        compiled = torch.compile(part)
        warm_up = seconds(compiled, inputs)
        seconds(part, inputs)
        both: tuple[list[float], list[float]] = ([], [])
        for _ in range(2 if options.small else ROUNDS):
            for way, taken in zip((part, compiled), both, strict=True):
                taken.append(seconds(way, inputs))
        plain, fast = map(statistics.median, both)
        table.add(name, 1000 * plain, 1000 * fast, plain / fast, warm_up)


if __name__ == "__main__":
    sys.exit(baseline.main("compiled-parts", COLUMNS, measure))
