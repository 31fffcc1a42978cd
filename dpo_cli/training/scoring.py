"""Which hidden states predict the responses' tokens: by TRL's padded rows, or with each prompt once where that is exact.

A micro-batch of B pairs comes from TRL as 2B padded rows, chosen rows first:

    input_ids        prompt | chosen   | pad        rows 0 .. B-1
                     prompt | rejected | pad        rows B .. 2B-1
    completion_mask  0 0 0    1 1 1 1    0 0
    predicted from   . . x    x x x .    . .        x: hidden states that meet the LM head (training/head.py)

The token at position t is predicted by the hidden state at t - 1, so the first response token comes from the last prompt
token. Two functions find the states marked x, in the same order: `plain_states` runs the rows as they are, `shared_states`
runs the layout of training/sharing.py. Training, reference and evaluation all take the one that `choose_path` returns.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput

from dpo_cli.data.tokens import EncodedPair
from dpo_cli.errors import RunFailed
from dpo_cli.plan import SCORING
from dpo_cli.training import sharing
from dpo_cli.training.head import Head, score_tokens
from dpo_cli.training.sharing import IGNORED

# Parts of TRL's contract that its DPOTrainer does not use; other trainers do, and would get a wrong loss without them.
UNSUPPORTED = frozenset({"num_items_in_batch", "shift_labels", "output_router_logits"})
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")  # what TRL's collator reads of a row
# Mean difference of a response's log-probs, nats per token, that rounding explains; tests/test_smollm2.py prints what it is.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}

States = Callable[..., Tensor]


def plain_states(model: PreTrainedModel, labels: Tensor, **inputs: Tensor) -> Tensor:
    """Run the backbone on the rows as they are: the hidden states that predict a labelled token, (n, H), in row order.

    `labels` is (rows, length) with `IGNORED` outside the responses; `inputs` go to the backbone as they are.
    """
    inputs.pop("use_cache", None)
    hidden: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    return hidden[labels[:, 1:] != IGNORED]


def shared_states(
    model: PreTrainedModel, labels: Tensor, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False
) -> Tensor:
    """Run the backbone on each prompt once: the same states as `plain_states`, (n, H), in the same order."""
    layout = sharing.lay_out(input_ids, attention_mask, labels)
    hidden: Tensor = model.base_model(**layout.inputs(), use_cache=False).last_hidden_state[0]
    return hidden[layout.place[:, :-1][labels[:, 1:] != IGNORED]]


@dataclass(frozen=True)
class ScoringPath:
    """How response tokens are scored in a run, and why."""

    states: States
    why: str

    @property
    def shares(self) -> bool:
        return self.states is shared_states


PLAIN = ScoringPath(plain_states, SCORING[False])


def choose_path(
    model: PreTrainedModel, pairs: Sequence[EncodedPair], pad_token_id: int, prompt_sharing: bool | str
) -> ScoringPath:
    """The path of a run, by its `prompt_sharing`: shared prompts only where this model gives the plain path's log-probs.

    The longest and the shortest pair are scored both ways, so that windows are exceeded if they ever are and two pairs share
    a row. Raises `RunFailed` where sharing is demanded (true) and not exact.
    """
    if prompt_sharing is False:
        return PLAIN
    by_length = sorted(pairs, key=lambda pair: pair.length)
    why_not = sharing.obstacle(model)
    apart = 0.0
    if why_not is None:
        batch = collate([by_length[-1], by_length[0]], pad_token_id, model.device)
        plain = response_log_probs(model, plain_states, batch)
        sharing.enable(model)
        try:
            apart = disagreement(plain, response_log_probs(model, shared_states, batch), batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model unknown to us may fail in any way; it is then scored the way it was made for
            why_not = f"this model cannot run shared prompts ({type(error).__name__}: {error})"
        else:
            if not apart <= (allowed := TOLERANCE[model.dtype]):
                why_not = f"shared prompts move this model's log-probs by {apart:.2g} nats a token ({allowed:g} allowed)"
    if why_not is None:
        agreement = f"the plain path's log-probs within {apart:.0e} nats a token"
        path = ScoringPath(shared_states, f"each prompt once: on the longest and the shortest pair, {agreement}")
    else:
        sharing.disable(model)
        if prompt_sharing is True:
            raise RunFailed(f'"prompt_sharing" is true, but {why_not}', 'leave it at "auto": the plain path is used then')
        path = ScoringPath(plain_states, f"each prompt twice: {why_not}")
    logging.getLogger("dpo").info("scoring: %s", path.why)
    return path


def response_log_probs(model: PreTrainedModel, states: States, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probs of the labelled tokens of a micro-batch from `collate`, in row order: (n,). No gradient."""
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        return score_tokens(states(model, **batch), labels[labels != IGNORED], Head.of(model)).log_probs


def disagreement(one: Tensor, other: Tensor, batch: Mapping[str, Tensor]) -> float:
    """The mean difference of two (n,) log-probs over the tokens of the response where it is largest, nats."""
    scored = batch["labels"][:, 1:] != IGNORED
    apart = one.new_zeros(scored.shape).masked_scatter(scored, (one - other).abs())
    return float((apart.sum(dim=1) / scored.sum(dim=1).clamp(min=1)).max())


def collate(pairs: Sequence[EncodedPair], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """TRL's micro-batch of these pairs: `labels`, `input_ids` and `attention_mask`, each (2B, L)."""
    batch = DataCollatorForPreference(pad_token_id)([{name: getattr(pair, name) for name in ID_COLUMNS} for pair in pairs])
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, IGNORED)
    return {name: value.to(device) for name, value in {**batch, "labels": labels}.items()}


def attach(model: PreTrainedModel, states: States, temperature: float = 1.0) -> None:
    """Make `model(..., labels=..., fused_lm_head=True)` score with our head; any other call is unchanged.

    The call and its output are TRL's contract (`add_fused_lm_head`): per-token tensors are (rows, length - 1), zero where
    nothing is labelled. `model` is the causal language model itself, below a PEFT wrapper.
    """
    original = type(model).forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(self, *args, labels=labels, **kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None}  # PEFT names all it knows
        if unknown := UNSUPPORTED & given.keys():
            raise NotImplementedError(f"the head does not honour {', '.join(sorted(unknown))}")
        hidden = states(self, labels, **given)
        mask = labels[:, 1:] != IGNORED
        scores = score_tokens(hidden, labels[:, 1:][mask], Head.of(self, temperature))
        # masked_scatter keeps the graph even when no token is labelled, so such a batch gives a zero gradient.
        fields = {name: value.new_zeros(mask.shape).masked_scatter(mask, value) for name, value in vars(scores).items()}
        loss = -fields["log_probs"].sum() / mask.sum().clamp(min=1)
        return FusedCausalLMOutput(loss=loss, label_mask=mask, **fields)

    # generate() checks its keyword arguments against the signature.
    functools.update_wrapper(forward, original)
    model.forward = types.MethodType(forward, model)
