"""What makes sampling on a CPU fast: attention and head of one new token per sequence. The maths is that of transformers.

Attention: transformers repeats keys and values for each head of a group (grouped-query attention, arXiv:2305.13245). With one
query per head the heads of a group can be the queries of one head, and nothing is repeated.

Head: `generate` takes the last position of each prompt, a view with gaps. torch 2.13 multiplies such a view by a frozen weight
as a batch, with a copy of the weight for each sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

PREFIX = "dpo-decoding-"
SDPA = "sdpa"  # the end of the names of implementations that call torch's attention


@contextmanager
def fast_decoding(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within, `model.generate` decodes in this way."""
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    name = network.config._attn_implementation
    is_grouped = network.device.type == "cpu" and name.endswith(SDPA) and network._can_set_attn_implementation()
    if is_grouped:
        AttentionInterface.register(PREFIX + name, partial(_attend, AttentionInterface()[name]))
        AttentionMaskInterface.register(PREFIX + name, AttentionMaskInterface()[name])
        network.set_attn_implementation(PREFIX + name)
    hook = network.get_output_embeddings().register_forward_pre_hook(_without_gaps)
    try:
        yield
    finally:
        hook.remove()
        if is_grouped:
            network.set_attn_implementation(name)


def _attend(
    attention: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The function `attention` of transformers, but for one query per head of a group.

    query is (B, heads, queries, d), key and value (B, key-value heads, N, d), the output (B, queries, heads, d).
    """
    sequences, heads, queries, size = query.shape
    groups = key.shape[1]
    is_per_head = mask is not None and mask.shape[1] != 1
    if queries != 1 or groups == heads or is_per_head or args or kwargs.get("dropout"):
        result: tuple[Tensor, Tensor | None] = attention(module, query, key, value, mask, *args, **kwargs)
        return result
    grouped = query.reshape(sequences, groups, heads // groups, size)
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=kwargs.get("scaling"))
    return output.reshape(sequences, 1, heads, size), None


def _without_gaps(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(states.contiguous() for states in inputs)
