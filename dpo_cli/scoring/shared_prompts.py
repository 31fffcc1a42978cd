"""Each prompt once: the layout of the pairs of a micro-batch, and which tokens see which.

TRL gives B pairs as 2B padded rows, chosen rows first, each with its own copy of the prompt. Here they become one row
without padding. P is a prompt token, C one of the chosen response, R one of the rejected, . padding:

    TRL's rows           one row, two pairs            pair 1 in attention       sees
    P P P C C            P P P C C R R R|P P C R       query   position   P P P  C C  R R R
    P P C . .            0 1 2 3 4 3 4 5|0 1 2 2       P P P      0 1 2   causal
    P P P R R R             position ids               C C        3 4     all    causal
    P P R . . .                                        R R R      3 4 5   all         causal

Position ids restart after the prompt for the rejected response. Outside of attention a decoder treats each token by itself,
so one row is enough. Inside, a pair is two ordinary causal sequences, prompt + chosen and prompt + rejected; the prompt's
keys and values, and its part of the output, are those of the first. So each token sees exactly the tokens, at exactly the
positions, of its row in TRL's layout: windows, rotary and learned positions and soft-capping need no special case.
The last prompt token predicts the first token of both responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from dpo_cli.scoring.row_attention import Cuts, Pair, attend

IGNORED = -100  # the label of tokens that are not scored, as in torch's cross entropy
# Attention implementations of transformers that take queries, keys and an optional explicit mask, and kinds of layer that
# consist only of such attention.
IMPLEMENTATIONS = frozenset({"sdpa", "eager"})
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})
PREFIX = "shared_prompt_"  # of the name of the second registration of an implementation


@dataclass(frozen=True)
class Layout:
    """B pairs in one row of N tokens: the sum over pairs of prompt + chosen + rejected."""

    input_ids: Tensor  # (1, N)
    position_ids: Tensor  # (1, N)
    pairs: tuple[Pair, ...]  # in order
    place: Tensor  # (2B, L): the position of each token of TRL's rows in the row; the same for both copies of a prompt

    @cached_property
    def cuts(self) -> Cuts:
        """For the attention."""
        return Cuts(self.pairs, self.input_ids.device)

    def inputs(self) -> dict[str, Any]:
        """The arguments of the backbone. transformers does not change a mask of four dimensions, and `attend` needs none."""
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.input_ids.device)
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "attention_mask": mask, "layout": self}


def lay_out(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Layout:
    """The layout of TRL's right-padded rows, all (2B, L); the i-th chosen and the i-th rejected row are a pair.

    The prompt of a pair is the common start of both rows before the first label. So responses with the same first tokens stay
    separate, and a pair with different prompts (cut at different starts) shares only the equal part.
    """
    count, length = len(input_ids) // 2, input_ids.shape[1]
    real = attention_mask.bool()
    unscored = real & (labels == IGNORED)
    same = unscored[:count] & unscored[count:] & (input_ids[:count] == input_ids[count:])
    prompt = same.long().cumprod(dim=1).sum(dim=1)
    chosen, rejected = real.sum(dim=1).view(2, count) - prompt
    size = prompt + chosen + rejected
    start = size.cumsum(dim=0) - size

    position = torch.arange(length, device=real.device).expand(2 * count, length)
    in_prompt = position < prompt.repeat(2)[:, None]
    place = position + torch.cat([start, start + chosen])[:, None]
    place[count:] = torch.where(in_prompt[count:], place[:count], place[count:])
    used = real.clone()
    used[count:] &= ~in_prompt[count:]

    order = place[used].argsort()
    sizes = torch.stack([prompt, chosen, rejected], dim=1).tolist()
    pairs = tuple((p, c, r) for p, c, r in sizes)
    return Layout(input_ids[used][order][None], position[used][order][None], pairs, place)


def obstacle(model: PreTrainedModel) -> str | None:
    """The reason in the class and config of this model why prompts cannot be shared; None if sharing can be tried."""
    config = model.config.get_text_config()
    strange = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if model.config.is_encoder_decoder:
        return "this is an encoder-decoder model"
    if strange or model._is_stateful:
        return f"this model has layers other than plain attention ({', '.join(sorted(strange)) or 'recurrent'})"
    parts = {
        part.config._attn_implementation.removeprefix(PREFIX) for part in model.modules() if isinstance(part, PreTrainedModel)
    }
    if len(parts) > 1 or not parts <= IMPLEMENTATIONS or not model._can_set_attn_implementation():
        return f"this model's attention ({', '.join(sorted(parts))}) does not take pairs one by one"
    return None


def enable(model: PreTrainedModel) -> None:
    """Let `model` take a `layout` with its inputs; without one, it does not change.

    Its attention implementation is registered with transformers a second time, under a name of dpo, wrapped in `attend`.
    """
    name = model.config._attn_implementation.removeprefix(PREFIX)
    AttentionInterface.register(PREFIX + name, partial(attend, name, {}))
    AttentionMaskInterface.register(PREFIX + name, AttentionMaskInterface()[name])
    model.set_attn_implementation(PREFIX + name)


def disable(model: PreTrainedModel) -> None:
    """Undo `enable`."""
    model.set_attn_implementation(model.config._attn_implementation.removeprefix(PREFIX))
