"""What makes sampling fast: the cache, and on a CPU attention, layers and the draw. The maths is that of transformers.

Cache: transformers copies all keys and values for each new token. Here they lie at the start of larger tensors, and a new token
writes only its own.

Attention: transformers repeats keys and values for each head of a group (grouped-query attention, arXiv:2305.13245). With one
query per head the heads of a group can be the queries of one head, and nothing is repeated.

Head: `generate` takes the last position of each prompt, a view with gaps. torch 2.13 multiplies such a view by a frozen weight
as a batch, with a copy of the weight for each sequence.

Weights of 16 bits: oneDNN's order is made once (`packed_linear`), of the head, and of all layers where there is memory for it.

Adapters: their weights are float32, and the products of 16 bits need them narrow: they are converted once. In float32 they are
merged into a copy of the layer, where there is memory for it.

Sampled tokens: `torch.multinomial` draws a random number for each token of the vocabulary, one after another on a CPU. Two for
each row are enough, and they can be drawn before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from dpo_cli.errors import RunFailed
from dpo_cli.scoring.lora_linear import narrow_adapters
from dpo_cli.scoring.packed_linear import packed_linear

PREFIX = "dpo-decoding-"
NOT_FINITE_FIX = "the weights are damaged, or the temperature is too low"
BLOCK = 64  # tokens of the vocabulary
SDPA = "sdpa"  # the end of the names of implementations that call torch's attention


@contextmanager
def fast_decoding(model: PreTrainedModel | PeftModel, dtype: torch.dtype, copies_layers: bool = False) -> Iterator[None]:
    """Within, `model.generate` decodes in this way, with products in this dtype.

    `copies_layers`: there is memory for a second copy of all linear layers.
    """
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    name = network.config._attn_implementation
    head: Any = network.get_output_embeddings()
    with ExitStack() as undone:  # in each case: a copy may be out of memory
        if network.device.type == "cpu" and name.endswith(SDPA) and network._can_set_attn_implementation():
            AttentionInterface.register(PREFIX + name, partial(_attend, AttentionInterface()[name]))
            AttentionMaskInterface.register(PREFIX + name, AttentionMaskInterface()[name])
            network.set_attn_implementation(PREFIX + name)
            undone.callback(network.set_attn_implementation, name)
        undone.callback(head.register_forward_pre_hook(_without_gaps).remove)
        layers = [head, *(_plain_modules(network.get_decoder()) if copies_layers else [])]
        products = {layer: product for layer in layers if (product := packed_linear(layer, dtype)) is not None}
        undone.enter_context(narrow_adapters(model, dtype, products, merges=copies_layers and dtype == torch.float32))
        for layer, product in products.items():
            undone.callback(vars(layer).pop, "forward", None)  # the class has its own
            layer.forward = product
        yield


def _plain_modules(decoder: nn.Module) -> list[nn.Module]:
    """The modules of a decoder without the parts that PEFT adds.

    Adapters have their own narrow copies. Of a layer that is trained whole only one of two versions runs.
    """
    own = set[nn.Module]()
    for module in decoder.modules():
        if isinstance(module, BaseTunerLayer):
            own.update(part for name in module.adapter_layer_names for part in getattr(module, name).modules())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            own.update(module.modules())
    return [module for module in decoder.modules() if module not in own]


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


def points_for(rows: int, tokens: int) -> Tensor:
    """Random numbers in [0, 1) for so many rows and tokens, (rows, tokens, 2), float64, from torch's random state.

    They are drawn before the first token: so an answer does not depend on the batch, nor on the process, that makes it.
    """
    return torch.rand(rows, tokens, 2, dtype=torch.float64)


class Drawing:
    """How the tokens of some rows are chosen: drawn by `points` (rows, tokens, 2), or the most likely ones without."""

    def __init__(self, temperature: float | None, top_p: float, points: Tensor | None) -> None:
        self.processors = LogitsProcessorList()
        self._drawn = Drawn(points) if points is not None else None
        if temperature is not None and self._drawn is not None:
            if temperature != 1.0:
                self.processors.append(TemperatureLogitsWarper(temperature))
            if top_p != 1.0:
                self.processors.append(TopPLogitsWarper(top_p))
            self.processors.append(self._drawn)

    def next_are(self, rows: Sequence[int], width: int) -> None:
        """From now on tokens of these rows are chosen; the prompts have `width` tokens."""
        if self._drawn is not None:
            self._drawn.rows, self._drawn.width = list(rows), width


class Drawn(LogitsProcessor):
    """Scores of which the largest is that of a token that was drawn by its probability, for each row."""

    def __init__(self, points: Tensor) -> None:
        self.points = points
        self.rows, self.width = list(range(len(points))), 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (n, vocabulary) from those of the model; of `input_ids` (n, tokens) only the width is read."""
        points = self.points[:, input_ids.shape[1] - self.width]
        points = torch.stack([points[row] for row in self.rows])
        return torch.zeros_like(scores).scatter_(1, drawn_tokens(scores, points)[:, None].to(scores.device), 1.0)


def drawn_tokens(scores: Tensor, points: Tensor) -> Tensor:
    """Tokens (n,), int64, on the CPU: one for each row of scores (n, vocabulary), drawn by their softmax, by points (n, 2).

    By the inverse of the cumulative distribution: first a block of tokens, then a token of it. Raises `RunFailed` for a row
    with a score that is NaN or infinity, or without a finite one.
    """
    probabilities = scores.softmax(dim=-1)
    if not probabilities[:, 0].isfinite().all():  # such a row is NaN everywhere
        raise RunFailed("no token can be drawn: the scores of the model are not finite", NOT_FINITE_FIX)
    blocks = pad(probabilities, (0, -scores.shape[1] % BLOCK)).view(len(scores), -1, BLOCK)  # (n, blocks, BLOCK)
    block = _drawn(blocks.sum(dim=-1), points[:, :1])
    return block * BLOCK + _drawn(blocks[torch.arange(len(blocks)), block.to(blocks.device)], points[:, 1:])


def _drawn(weights: Tensor, points: Tensor) -> Tensor:
    """A place in each row of weights (n, m), with the probability of its share, by points (n, 1).

    In float32 a cumulative sum near 1 would hide a share below 6e-8. An Apple GPU has no float64.
    """
    sums = weights.cpu().cumsum(dim=-1, dtype=torch.float64)
    places = torch.searchsorted(sums, sums[:, -1:] * points, right=True)[:, 0]
    return places.clamp(max=weights.shape[1] - 1)  # a product may round to the sum


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

    def place(self, states: RoomyLayer, places: Sequence[int], sequences: int, width: int) -> None:
        """Take other states as the last ones of these sequences.

        An empty layer first gets so many sequences and `width` tokens, all zero.
        """
        if not self._rooms:
            self.lazy_initialization(states.keys, states.values)
            for given in (states.keys, states.values):
                self._rooms.append(given.new_zeros(sequences, given.shape[1], self._most, given.shape[3]))
            self.keys, self.values = (room[:, :, :width] for room in self._rooms)
        for mine, theirs in ((self.keys, states.keys), (self.values, states.values)):
            mine[list(places), :, width - theirs.shape[2] :] = theirs

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


def is_roomy(cache: DynamicCache) -> bool:
    """Whether all its layers keep all tokens."""
    return all(type(layer) is RoomyLayer for layer in cache.layers)


def place_states(states: DynamicCache, cache: DynamicCache, places: Sequence[int], sequences: int, width: int) -> None:
    """Take the states of a narrower batch as the last ones of these sequences of a cache; both are roomy."""
    for layer, given in zip(cache.layers, states.layers, strict=True):
        assert isinstance(layer, RoomyLayer) and isinstance(given, RoomyLayer)
        layer.place(given, places, sequences, width)
