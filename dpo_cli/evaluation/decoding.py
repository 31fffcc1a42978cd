"""What makes sampling fast: the cache, and on a CPU attention and head of one new token. The maths is that of transformers.

Cache: transformers copies all keys and values for each new token. Here they lie at the start of larger tensors, and a new token
writes only its own.

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
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

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


class RoomyLayer(DynamicLayer):
    """The keys and values of a layer, (B, heads, tokens, d), as the start of tensors with room for `most` tokens."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._rooms: list[Tensor] = []  # of keys and of values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the states of new tokens; returns those of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[2]
        if not self._rooms:
            self._rooms = [new.new_empty(*new.shape[:2], self._most, new.shape[3]) for new in (key_states, value_states)]
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, before:after] = new
        self.keys, self.values = (room[:, :, :after] for room in self._rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences only."""
        if not self._rooms:  # Phi 3 drops the cache where its positions change, and computes all states again
            return
        tokens = self.get_seq_length()
        self._rooms = [room[indices] for room in self._rooms]
        self.keys, self.values = (room[:, :, :tokens] for room in self._rooms)


def roomy_cache(network: PreTrainedModel, tokens: int) -> DynamicCache | None:
    """An empty cache for sequences of so many tokens, which can be selected; None for a model with other states."""
    is_replaced = "generate" in vars(network)  # Unsloth's own takes no cache
    if is_replaced or not network._supports_default_dynamic_cache() or network._is_stateful:
        return None
    cache = DynamicCache(config=network.config.get_text_config())
    if any(not isinstance(layer, DynamicLayer) for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
