"""The bytes of a model's weights: whole, or divided over processes (providers/sharding.py). No torch."""

from __future__ import annotations

import math

from dpo_cli.hardware.memory_inputs import Settings
from dpo_cli.models.shape import ModelFacts
from dpo_cli.strategies.strategies import STRATEGIES

# Bytes per 4-bit weight: half a byte; a one-byte scale per block of 64; a float32 per 256 of those (QLoRA, arXiv:2305.14314
# section 3, double quantisation).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
PLAIN_4BIT_BYTES = 0.5 + 4 / 64  # without double quantisation: a float32 scale per block


def weight_bytes(facts: ModelFacts, settings: Settings) -> float:
    """Bytes of the model's weights.

    bitsandbytes quantises the linear layers of the blocks; embeddings, head and norms keep the compute dtype (transformers
    excludes the head). 8 bits: a byte per weight and a float32 per row (LLM.int8, arXiv:2208.07339, section 3). Full
    fine-tuning holds float32 weights, because updates are too small for bf16.
    """
    if settings.rank == 0:
        return 4.0 * facts.parameters
    rows = sum(linear.outputs for linear in facts.linears) * facts.num_hidden_layers
    scales = 4.0 * rows if settings.bits == 8 else 0.0
    linear_bytes = facts.linear_parameters * weight_width(settings) + scales
    others = facts.other_parameters
    if STRATEGIES[settings.strategy].gives_rewards and not facts.tie_word_embeddings:
        others -= facts.vocab_size * facts.hidden_size  # the LM head is left out
    return linear_bytes + others * settings.bytes_per_value


def weight_width(settings: Settings) -> float:
    """Bytes of a frozen weight of a linear layer, without the scales of 8 bits."""
    if settings.bits == 4:
        return NF4_BYTES if settings.nested_quantisation else PLAIN_4BIT_BYTES
    return 1.0 if settings.bits == 8 else float(settings.bytes_per_value)


def divided_bytes(facts: ModelFacts, settings: Settings) -> float:
    """Bytes of weights that a device holds all the time, where the blocks are divided over processes or wait in the RAM.

    Embeddings and head stay whole, and so do the scales of 4-bit weights. On a CPU the RAM is the device.
    """
    blocks, tables, scales = _parts(facts, settings)
    return tables + scales + (0.0 if settings.in_ram and settings.on_gpu else blocks / settings.shards)


def gathered_bytes(facts: ModelFacts, settings: Settings) -> float:
    """Bytes of blocks that are whole on the device while one runs; 0 for whole weights.

    Several processes exchange a block into a buffer and copy it from there, while torch 2.13 still holds the buffer of the
    block before: three blocks (tests/test_sharding.py measures them). From the RAM a process alone takes weight by weight, and
    several take their shards of a block.
    """
    if not settings.is_divided:
        return 0.0
    block = _parts(facts, settings)[0] / facts.num_hidden_layers
    if settings.shards > 1:
        return block * (3 + (1 / settings.shards if settings.in_ram else 0))
    weight = max(linear.parameters for linear in facts.linears) * (0.5 if settings.bits == 4 else settings.bytes_per_value)
    return block + (weight if settings.on_gpu else 0.0)


def pinned_bytes(facts: ModelFacts, settings: Settings) -> float:
    """Bytes of the shards of linear layers in pinned memory, where torch rounds each up to a power of two."""
    width = 0.5 if settings.bits == 4 else float(settings.bytes_per_value)
    sizes = [linear.parameters * width / settings.shards for linear in facts.linears]
    return facts.num_hidden_layers * sum(2.0 ** math.ceil(math.log2(size)) for size in sizes)


def block_bytes(facts: ModelFacts, settings: Settings) -> float:
    """Bytes of the blocks, without the scales of 4-bit weights."""
    return _parts(facts, settings)[0]


def _parts(facts: ModelFacts, settings: Settings) -> tuple[float, float, float]:
    """(bytes of the blocks that can be divided, of embeddings and head, of the scales of 4-bit weights)."""
    gives_rewards = STRATEGIES[settings.strategy].gives_rewards
    table = float(settings.bytes_per_value) * facts.vocab_size * facts.hidden_size
    tables = table * (1 if facts.tie_word_embeddings or gives_rewards else 2)
    scales = facts.linear_parameters * (weight_width(settings) - 0.5) if settings.bits == 4 else 0.0
    return weight_bytes(facts, settings) - tables - scales, tables, scales
