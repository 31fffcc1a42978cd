"""The floor of a DPO training: the floating-point operations that the maths needs, and the rate of this machine's products.

A linear layer of n weights takes 2n operations per token in the forward pass. In the backward pass of an adapter the frozen
weight needs no gradient, so it takes 2n again (the gradient of its input); the two LoRA weights take 2n forward and 4n
backward. Causal attention over s tokens takes 2 s^2 per hidden unit forward (two products over half of the s x s places) and
twice that backward. The head runs on response positions only: 2 H V forward, and 2 H V backward for its input.

Each prompt is counted once for both responses, and the reference once per pair and run: the forward pass without LoRA.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

SIZES, SECONDS = {"cpu": 2048, "cuda": 8192}, 1.0  # of the measured product, and of its measurement


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder that count."""

    linear: int  # weights of the linear layers of all blocks
    lora: int  # weights of their adapters
    attention: int  # hidden units of the queries of all blocks together
    head: int  # weights of the head

    @classmethod
    def of(cls, config: dict[str, Any], rank: int) -> Model:
        """Those of a Llama with an adapter on each linear layer of its blocks, from its config.json."""
        hidden, middle, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        queries, keys = heads * size, config["num_key_value_heads"] * size
        shapes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        shapes += [(hidden, middle), (hidden, middle), (middle, hidden)]
        return cls(
            linear=layers * sum(inputs * outputs for inputs, outputs in shapes),
            lora=layers * rank * sum(inputs + outputs for inputs, outputs in shapes),
            attention=layers * queries,
            head=hidden * config["vocab_size"],
        )


@dataclass(frozen=True)
class Pair:
    """The tokens of a pair."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def tokens(self) -> int:
        """With the prompt once."""
        return self.prompt + self.responses

    @property
    def responses(self) -> int:
        return self.chosen + self.rejected

    @property
    def places(self) -> float:
        """Places of the causal score matrix with the prompt once: half of each square, and the responses on the prompt."""
        squares = self.prompt**2 + self.chosen**2 + self.rejected**2
        return squares / 2 + self.prompt * self.responses


def operations(model: Model, pairs: Sequence[Pair], epochs: float, with_reference: bool = True) -> float:
    """Floating-point operations of a training over these pairs."""
    tokens, responses = (sum(counts) for counts in zip(*((pair.tokens, pair.responses) for pair in pairs), strict=True))
    attention = 4 * model.attention * sum(pair.places for pair in pairs)  # two products forward
    forward = 2 * model.linear * tokens + attention + 2 * model.head * responses
    adapter = 6 * model.lora * tokens
    policy = forward + (2 * model.linear * tokens + 2 * attention + 2 * model.head * responses) + adapter
    return epochs * policy + (forward if with_reference else 0.0)


def rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations per second of a large product in this dtype, with torch's threads: the best of a second of turns."""
    size, wait = SIZES[device], torch.cuda.synchronize if device == "cuda" else lambda: None
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        torch.mm(one, other)
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
