"""Attention within each sequence of a row (scoring/shared_prompts.py): a call for each, or one for all.

A pair is two causal sequences. The second takes keys and values of the prompt from the first:

    pair           P P P  C C  R R R
    queries        P P P C C | R R R             first sequence | second sequence
    keys, values   P P P C C | P P P R R R       the last query of a sequence sees its last key

`_one_by_one` calls the attention function of transformers for each sequence; it is right for any implementation that takes a
mask. `_together` is torch's variable-length attention, which exists on CUDA in 16 bits: one call, and no explicit mask, which
keeps the second sequence from the fast kernels. It is used where it computes the same, which `_is_same` finds out for each kind
of layer.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from dpo_cli.providers.out_of_memory import is_out_of_memory
from dpo_cli.scoring.lm_head import product_dtype

Pair = tuple[int, int, int]  # tokens of prompt, chosen and rejected

ALLOWANCE = 0.02  # of the norm of a tensor: several roundings of bfloat16
SAMPLE: tuple[Pair, ...] = ((150, 70, 90), (0, 3, 5), (40, 60, 0))  # longer than a block of a kernel, and with empty parts


@dataclass(frozen=True)
class Cuts:
    """The pairs of a row, in their order, and what attention needs of them, created when a layer needs it."""

    pairs: tuple[Pair, ...]
    device: torch.device
    masks: dict[Any, Tensor | None] = field(default_factory=dict)  # of `_one_by_one`, by shape and window

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.pairs))

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Queries and keys of each sequence that has queries."""
        return tuple(size for p, c, r in self.pairs for size in ((p + c, p + c), (r, p + r)) if size[0])

    @cached_property
    def starts(self) -> tuple[Tensor, Tensor]:
        """Where the sequences start, and the last ends, among the queries and among the keys: (n + 1,) int32 each."""
        queries, keys = (torch.tensor([0, *itertools.accumulate(sizes)]) for sizes in zip(*self.sizes, strict=True))
        return queries.to(self.device, torch.int32), keys.to(self.device, torch.int32)

    @cached_property
    def longest(self) -> tuple[int, int]:
        """The most queries, and the most keys, of a sequence."""
        return max(queries for queries, _ in self.sizes), max(keys for _, keys in self.sizes)


def attend(
    name: str,
    known: dict[Any, bool],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    layout: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of the implementation `name` of transformers; with a `layout`, within each sequence of its cuts.

    query is (1, heads, N, d), key and value (1, key-value heads, N, d), the output (1, N, heads, d). `known` is kept between
    calls: whether one call computes the same, for each kind of layer.
    """
    function = _implementation(name, module)
    if layout is None:
        return function(module, query, key, value, attention_mask, *args, **kwargs)
    cuts: Cuts = layout.cuts
    one_by_one = partial(_one_by_one, partial(function, module, *args, **kwargs), partial(_mask, name, module))
    window, dtype = kwargs.get("sliding_window"), product_dtype(query)
    if name != "sdpa" or not _has_kernel(query.device, dtype):
        return one_by_one(cuts, window, query, key, value), None
    if window and window >= cuts.longest[1]:
        window = None  # it hides nothing
    together = partial(_together, kwargs.get("scaling"))
    states = [each.to(dtype) for each in (query, key, value)]
    kind = (type(module), window, *(each.shape[1::2] for each in states), dtype, query.device)
    if kind not in known:
        # The tokens before a window closes would hide what it does to the others: only the responses after it are compared.
        pairs, compared = ((*SAMPLE, (window, 40, 60)), 100) if window else (SAMPLE, sum(map(sum, SAMPLE)))
        sample = Cuts(pairs, query.device)
        ways = partial(one_by_one, sample, window), partial(together, sample, window)
        known[kind] = _is_same(*ways, states, sample.tokens, compared)
    return (together if known[kind] else one_by_one)(cuts, window, *states), None


def _one_by_one(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    mask_of: Callable[..., Tensor | None],
    cuts: Cuts,
    window: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """A call of `function` for each sequence, with the mask that it needs."""
    sizes = [size for prompt, chosen, rejected in cuts.pairs for size in (prompt + chosen, rejected)]
    queries, keys, values = (list(torch.split(states, sizes, dim=2)) for states in (query, key, value))
    for i, (prompt, _, _) in enumerate(cuts.pairs):
        for states in (keys, values):
            states[2 * i + 1] = torch.cat([states[2 * i][:, :, :prompt], states[2 * i + 1]], dim=2)
    outputs = [
        function(q, k, v, mask_of(cuts, q, k.shape[2], window))[0]
        for q, k, v in zip(queries, keys, values, strict=True)
        if q.shape[2]
    ]
    return torch.cat(outputs, dim=1)


def _implementation(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function of that name; each model family has its own eager one."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., tuple[Tensor, Tensor | None]] = AttentionInterface().get(name, eager)
    return function


def _mask(name: str, module: nn.Module, cuts: Cuts, query: Tensor, keys: int, window: int | None) -> Tensor | None:
    """transformers' own causal or sliding-window mask when `query` is the last of `keys` tokens; None if none is needed."""
    queries = query.shape[2]
    wanted = (queries, keys, window)
    if wanted not in cuts.masks:
        cuts.masks[wanted] = AttentionMaskInterface()[name](
            batch_size=1,
            q_length=queries,
            kv_length=keys,
            q_offset=keys - queries,
            mask_function=sliding_window_causal_mask_function(window) if window else causal_mask_function,
            local_size=window,
            dtype=query.dtype,
            device=query.device,
            config=module.config,
        )
    return cuts.masks[wanted]


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch may have a variable-length attention for these states."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


@cache
def _kernel() -> Callable[..., Tensor]:
    """torch's variable-length attention. torch 2.10 has none with windows, and `_is_same` then sees it fail."""
    from torch.nn.attention.varlen import varlen_attn

    known: Callable[..., Any] = varlen_attn
    takes_fewer_keys = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 does without being told
    return partial(known, enable_gqa=True) if takes_fewer_keys else known


def _together(scale: float | None, cuts: Cuts, window: int | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One call for all sequences. The kernel takes (tokens, heads, d), and sequences one after another."""
    before = window - 1 if window else -1  # tokens before its own that a token sees; transformers' window counts its own
    keys, values = (_with_prompts(states[0].transpose(0, 1), cuts.pairs) for states in (key, value))
    queries = query[0].transpose(0, 1)
    output = _kernel()(queries, keys, values, *cuts.starts, *cuts.longest, scale=scale, window_size=(before, 0))
    return output[None]


def _with_prompts(states: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """(N, heads, d) of a row to those of its sequences: the prompt again before each second response."""
    pieces = iter(torch.split(states, [size for pair in pairs for size in pair]))
    ordered: list[Tensor] = []
    for prompt, chosen, rejected in zip(pieces, pieces, pieces, strict=True):
        ordered += [prompt, chosen, *([prompt, rejected] if len(rejected) else [])]
    return torch.cat(ordered)


def _is_same(
    one: Callable[..., Tensor], other: Callable[..., Tensor], like: Sequence[Tensor], tokens: int, compared: int
) -> bool:
    """Whether both ways give the same output for the last `compared` tokens, and the same gradients of a loss of these.

    Queries, keys and values are random; `like` has their heads, width, dtype and device. Also False if `other` fails; the log
    has the reason.
    """
    generator, log = torch.Generator().manual_seed(0), logging.getLogger("dpo")
    inputs = []
    for states in like:
        drawn = torch.randn(1, states.shape[1], tokens, states.shape[3], generator=generator)
        inputs.append(drawn.to(states.device, states.dtype).requires_grad_())
    share = torch.randn(1, compared, like[0].shape[1], like[2].shape[3], generator=generator)
    results = []
    try:
        # Hooks of its own: those of a checkpointed layer, in which this may run, would count its tensors as the layer's.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            for way in (one, other):
                output = way(*inputs)[:, -compared:]
                gradients = torch.autograd.grad(output, inputs, share.to(output.device, output.dtype))
                results.append([output.detach(), *gradients])
    except Exception as error:  # another version of torch, or an older card, may fail in any way
        if is_out_of_memory(error):
            raise
        log.exception("sequences cannot run in one call of attention, and run one by one")
        return False
    is_same = all(bool((a - b).norm() <= ALLOWANCE * a.norm()) for a, b in zip(*results, strict=True))
    if not is_same:
        log.warning("sequences compute something else in one call of attention, and run one by one")
    return is_same
