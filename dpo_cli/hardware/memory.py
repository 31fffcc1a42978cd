"""The memory bill: bytes by component, from the shape of the model alone. No torch. GB are 2^30 bytes.

A first bill, for DPO with a LoRA adapter on a decoder of the Llama family (attention with grouped keys, gated MLP).
Per micro-batch of B pairs TRL runs 2B padded rows of L tokens: T = 2 * B * L tokens. With shared prompts T is the tokens of
the pairs, each prompt counted once and without padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dpo_cli.hardware.models import ModelFacts
from dpo_cli.hardware.probe import GIB

# Bytes per 4-bit weight: half a byte; a one-byte scale per block of 64; a float32 per 256 of those (QLoRA, arXiv:2305.14314
# section 3, double quantisation).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
PLAIN_4BIT_BYTES = 0.5 + 4 / 64  # without it: a float32 scale per block
# Bytes of optimizer state per adapter weight, beside the weight's own width: AdamW's two moments, in the adapter's dtype or
# in 8 bits; paged ones may leave the GPU and are billed all the same; Adafactor keeps a row and a column; SGD nothing.
MOMENTS = {"adamw_8bit": 2.0, "paged_adamw_8bit": 2.0, "adafactor": 0.0, "sgd": 0.0}
CUDA_CONTEXT_BYTES = 0.5 * GIB  # driver context and the libraries' workspaces
ALLOCATOR_SLACK = 0.05  # share of the rest lost to fragmentation
SCORING_CHUNK_BYTES = 4 * (1 << 24) * 4  # logits, log-softmax, probabilities and gradient of one chunk of the head, float32


@dataclass(frozen=True)
class Settings:
    """What of a run decides its memory."""

    batch: int  # pairs per forward pass
    length: int  # tokens of the longest row
    rank: int
    four_bit: bool
    bytes_per_value: int  # 2 for bf16 and fp16, 4 for float32
    checkpointing: bool
    on_gpu: bool = True
    nested_quantisation: bool = True
    optimizer: str = "adamw_torch_fused"
    pair_tokens: int | None = None  # of the longest pair, its prompt counted once, where prompts are shared and lengths known

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch as they go through the model."""
        padded = 2 * self.length
        return self.batch * (padded if self.pair_tokens is None else min(self.pair_tokens, padded))


@dataclass(frozen=True)
class Bill:
    """Bytes by component; `budget_gb` is what the hardware offers, when known."""

    components: dict[str, float]
    budget_gb: float | None
    largest_change: str | None = None

    @property
    def total_gb(self) -> float:
        return sum(self.components.values()) / GIB

    @property
    def fits(self) -> bool | None:
        return None if self.budget_gb is None else self.total_gb <= self.budget_gb

    def to_json(self) -> dict[str, Any]:
        return {
            "total_gb": round(self.total_gb, 3),
            "components": {name: round(size / GIB, 3) for name, size in self.components.items()},
            "budget_gb": self.budget_gb,
            "fits": self.fits,
            "largest_change": self.largest_change,
        }


def bill(facts: ModelFacts, settings: Settings, budget_gb: float | None) -> Bill:
    """The bill of these settings, with the cheapest documented remedy when they do not fit."""
    made = Bill(_components(facts, settings), budget_gb)
    return replace(made, largest_change=_remedy(facts, settings, budget_gb)) if budget_gb and not made.fits else made


def fit(facts: ModelFacts, wanted: Settings, budget_gb: float | None, checkpointing: bool | str) -> tuple[Settings, Bill]:
    """The first way to run `wanted` that fits the budget, or the smallest with its bill when none does.

    Only what leaves the training unchanged is tried: `checkpointing` when it is "auto", then smaller micro-batches (the
    accumulation grows by the same factor, so pairs per optimizer step stay).
    """
    choices = (False, True) if checkpointing == "auto" else (bool(checkpointing),)
    batches = [size for size in range(wanted.batch, 0, -1) if wanted.batch % size == 0]
    ways = [replace(wanted, batch=wanted.batch, checkpointing=choice) for choice in choices]
    ways += [replace(wanted, batch=size, checkpointing=choices[-1]) for size in batches[1:]]
    for settings in ways:
        made = bill(facts, settings, budget_gb)
        if made.fits is not False:
            break
    return settings, made


def _components(facts: ModelFacts, settings: Settings) -> dict[str, float]:
    width = settings.bytes_per_value
    four_bit_width = NF4_BYTES if settings.nested_quantisation else PLAIN_4BIT_BYTES
    linear_width = four_bit_width if settings.four_bit else width
    adapter = facts.num_hidden_layers * sum(settings.rank * (a + b) for a, b in facts.linear_shapes)
    adapter_width = 2 if settings.four_bit else 4  # TRL holds a QLoRA adapter in bf16; PEFT holds any other in float32
    tokens = settings.tokens
    parts = {
        "weights": facts.linear_parameters * linear_width + facts.other_parameters * width,
        "adapter": adapter * adapter_width,
        "gradients": adapter * adapter_width,
        "optimizer": adapter * MOMENTS.get(settings.optimizer, 2 * adapter_width),
        "activations": _activations(facts, settings),
        "scoring": min(SCORING_CHUNK_BYTES, 4 * 4 * tokens * facts.vocab_size) + 2.0 * tokens * facts.hidden_size * width,
    }
    if settings.on_gpu:
        parts["cuda_context"] = CUDA_CONTEXT_BYTES
        parts["allocator_slack"] = ALLOCATOR_SLACK * sum(parts.values())
    return parts


def _activations(facts: ModelFacts, settings: Settings) -> float:
    """Bytes kept for the backward pass of a micro-batch; tests/test_hardware.py counts them in a real model.

    Per token, one block with an adapter on every linear layer keeps, in the compute dtype: the input of each adapter (q, k,
    v, gate and up: 5h; o: q; down: i) and its product with A (7r), the attention's q, k, v and output (2q + 2kv), and of the
    MLP gate, up and silu(gate) (3i); and in float32 the inputs of both norms (2h). A checkpointed block keeps only its
    input; one block at a time is then recomputed, with its gradients alongside. With shared prompts the rejected response
    attends to keys and values put together for it, the prompt's and its own, one per head (2q per token of prompt + rejected).
    Attention with a soft-cap has no fused kernel and keeps, for each head and each query with each key of a sequence, the
    tanh and the probabilities in the compute dtype and the softmax in float32.
    """
    h, i, width = facts.hidden_size, facts.intermediate_size, settings.bytes_per_value
    q, kv = facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
    block = settings.tokens * (width * (5 * h + 3 * q + 2 * kv + 4 * i + 7 * settings.rank) + 4 * 2 * h)
    if settings.pair_tokens is not None:
        block += settings.batch * settings.length * width * 2 * q
    if facts.attn_logit_softcapping is not None:
        block += 2 * settings.batch * facts.num_attention_heads * settings.length**2 * (2 * width + 4)
    if settings.checkpointing:
        return settings.tokens * facts.num_hidden_layers * width * h + 1.5 * block
    return facts.num_hidden_layers * block


def _remedy(facts: ModelFacts, settings: Settings, budget_gb: float) -> str:
    """The documentation's remedies ("High Memory Usage") in its order, each on top of those before it."""
    tried: list[str] = []
    for name, change in _remedies(settings):
        tried.append(name)
        settings = replace(settings, **change)
        if Bill(_components(facts, settings), budget_gb).fits:
            return ", ".join(tried)
    return "use a smaller model"


def _remedies(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    if not settings.checkpointing:
        yield '"gradient_checkpointing": true', {"checkpointing": True}
    if not settings.four_bit:
        yield '"use_4bit": true', {"four_bit": True}
    if settings.batch > 1:
        fix = f'"per_device_train_batch_size": 1 with {settings.batch} times the "gradient_accumulation_steps"'
        yield fix, {"batch": 1}
    for length in (1024, 512, 256):
        if length < settings.length:
            yield f'"max_seq_length": {length}', {"length": length}
