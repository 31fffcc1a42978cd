"""Which hidden states predict the responses' tokens: by TRL's padded rows, or with each prompt once where that is exact.

A micro-batch of B pairs comes from TRL as 2B padded rows, chosen rows first:

    input_ids        prompt | chosen   | pad        rows 0 .. B-1
                     prompt | rejected | pad        rows B .. 2B-1
    completion_mask  0 0 0    1 1 1 1    0 0
    predicted from   . . x    x x x .    . .        x: hidden states that meet the LM head (training/head.py)

The token at position t is predicted by the hidden state at t - 1, so the first response token comes from the last prompt
token. Two functions find the states marked x, in the same order: `plain_states` runs the rows as they are, `shared_states`
runs the layout of training/sharing.py. Training, reference and evaluation all take what `choose` decides.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput

from dpo_cli.data.tokens import EncodedPair
from dpo_cli.errors import RunFailed
from dpo_cli.plan import EXPECTED, Scoring
from dpo_cli.training import sharing
from dpo_cli.training.head import Head, score_tokens
from dpo_cli.training.sharing import IGNORED

# Parts of TRL's contract that its DPOTrainer does not use; other trainers do, and would get a wrong loss without them.
UNSUPPORTED = frozenset({"num_items_in_batch", "shift_labels", "output_router_logits"})
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")  # what TRL's collator reads of a row
# The least difference of log-probs that is taken for rounding, nats per token; tests/test_smollm2.py prints real ones.
SMALLEST_ALLOWANCE = 1e-4

States = Callable[..., Tensor]


def plain_states(model: PreTrainedModel, labels: Tensor, **inputs: Tensor) -> Tensor:
    """Run the backbone on the rows as they are: the hidden states that predict a labelled token, (n, H), in row order.

    `labels` is (rows, length) with `IGNORED` outside the responses; `inputs` go to the backbone as they are.
    """
    hidden: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    return hidden[labels[:, 1:] != IGNORED]


def shared_states(model: PreTrainedModel, labels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Run the backbone on each prompt once: the same states as `plain_states`, (n, H), in the same order."""
    layout = sharing.lay_out(input_ids, attention_mask, labels)
    hidden: Tensor = model.base_model(**layout.inputs(), use_cache=False).last_hidden_state[0]
    return hidden[layout.place[:, :-1][labels[:, 1:] != IGNORED]]


def states_of(scoring: Scoring) -> States:
    return shared_states if scoring.shared else plain_states


def choose(model: PreTrainedModel, pairs: Sequence[EncodedPair], pad_token_id: int, prompt_sharing: bool | str) -> Scoring:
    """How a run scores, by its `prompt_sharing`: shared prompts only where this model then gives the same log-probs.

    Raises `RunFailed` where sharing is demanded (true) and not exact.
    """
    if prompt_sharing is False:
        return EXPECTED[False]
    by_length = sorted(pairs, key=lambda pair: pair.length)
    why_not = sharing.obstacle(model)
    if why_not is None:
        # The longest pair exceeds a window if any does; with the shortest beside it there are two in the row.
        batch = collate([by_length[-1], by_length[0]], pad_token_id, model.device)
        sharing.enable(model)
        exact, finding = _try_sharing(model, batch)
        if exact:
            return Scoring(True, f"each prompt once: {finding}")
        sharing.disable(model)
        why_not = finding
    if prompt_sharing is True:
        raise RunFailed(f'"prompt_sharing" is true, but {why_not}', 'with "auto" the padded rows are used instead')
    return Scoring(False, f"each prompt twice: {why_not}")


def _try_sharing(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[bool, str]:
    """Score a micro-batch both ways: whether the log-probs are the same but for rounding, and the finding in words.

    What rounding does to this model in its dtype is measured: on each row by itself, with and without padding.
    """
    plain = _alone(model, batch, padding=0)
    rounding = disagreement(plain, _alone(model, batch, padding=8), batch)
    allowed = max(SMALLEST_ALLOWANCE, 4 * torch.finfo(model.dtype).eps, 4 * rounding)
    try:
        apart = disagreement(plain, response_log_probs(model, shared_states, batch), batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model unknown to us may fail in any way; it is then scored the way it was made for
        logging.getLogger("dpo").exception("shared prompts failed")
        return False, f"this model cannot run shared prompts ({type(error).__name__}: {error})"
    if len(plain) and apart <= allowed:
        return True, f"log-probs differ from those of separate rows by {apart:.0e} nats a token, which is rounding"
    return False, f"shared prompts move this model's log-probs by {apart:.2g} nats a token ({allowed:.1g} allowed for rounding)"


def _alone(model: PreTrainedModel, batch: Mapping[str, Tensor], padding: int) -> Tensor:
    """The log-probs of a micro-batch, (n,), each of its rows run by itself with `padding` tokens after it."""
    parts = []
    for row, size in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        filler = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
        inputs = {
            name: nn.functional.pad(batch[name][row : row + 1, :size], (0, padding), value=value)
            for name, value in filler.items()
        }
        parts.append(response_log_probs(model, plain_states, inputs))
    return torch.cat(parts)


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
        given.pop("use_cache", None)
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
