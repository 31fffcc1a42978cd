"""The score head of a reward model: one number for a whole response, from the hidden state of its last token.

transformers' sequence classifiers read the last token of a row that is not the padding token, so where the EOS token also pads,
they read the token before it. Their rows are padded, with a prompt for each response; here each prompt may run once, in the
layout of scoring/shared_prompts.py, and only the states at the ends of responses meet the head, in float32: 16 bits would round
a reward to three digits.

    input_ids        prompt | chosen   | pad        rows 0 .. B-1
                     prompt | rejected | pad        rows B .. 2B-1
    rewarded         . . .    . . . x    . .        x: the hidden state that meets the head
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from dpo_cli.providers.classifier import HEAD
from dpo_cli.scoring import shared_prompts
from dpo_cli.scoring.shared_prompts import IGNORED


def last_tokens(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The place in each row of the token that a sequence classifier reads: (rows,)."""
    padding = model.config.get_text_config().pad_token_id
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    last: Tensor = (places * (input_ids != padding)).argmax(dim=1)
    return last


def end_states(model: PreTrainedModel, shared: bool, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """The hidden states of the last tokens of TRL's rows, (2B, H), with each prompt once if `shared`.

    `labels` is (2B, length) with `IGNORED` outside the responses.
    """
    rows, ends = torch.arange(len(input_ids), device=input_ids.device), last_tokens(model, input_ids)
    if shared:
        layout = shared_prompts.lay_out(input_ids, attention_mask, labels)
        hidden: Tensor = model.base_model(**layout.inputs(), use_cache=False).last_hidden_state[0]
        return hidden[layout.place[rows, ends]]
    padded: Tensor = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return padded[rows, ends]


def rewards(model: PreTrainedModel, shared: bool, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """The reward of each row, (2B,), in float32 or wider; arguments as for `end_states`."""
    hidden = end_states(model, shared, input_ids, attention_mask, labels)
    with torch.autocast(hidden.device.type, enabled=False):
        scores: Tensor = getattr(model, HEAD)(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))
    return scores[:, 0]


def attach(model: PreTrainedModel, shared: bool) -> None:
    """Make `model(..., completion_mask=...)` give the rewards of TRL's rows as `logits`, (2B, 1); any other call is unchanged.

    `model` is the classifier itself, below a PEFT wrapper. `completion_mask` is (2B, length), 1 in the responses.
    """
    original = type(model).forward

    def forward(self: Any, *args: Any, completion_mask: Any = None, **kwargs: Any) -> Any:
        if completion_mask is None:
            return original(self, *args, **kwargs)
        labels = kwargs["input_ids"].masked_fill(completion_mask == 0, IGNORED)
        scores = rewards(self, shared, kwargs["input_ids"], kwargs["attention_mask"], labels)
        return SequenceClassifierOutputWithPast(logits=scores[:, None])

    functools.update_wrapper(forward, original)
    model.forward = types.MethodType(forward, model)
