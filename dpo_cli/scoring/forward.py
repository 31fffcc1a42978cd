"""The hidden states that predict the tokens of responses: from TRL's padded rows, or with each prompt once if that is exact.

A micro-batch of B pairs comes from TRL as 2B padded rows, chosen rows first:

    input_ids        prompt | chosen   | pad        rows 0 .. B-1
                     prompt | rejected | pad        rows B .. 2B-1
    completion_mask  0 0 0    1 1 1 1    0 0
    predicted from   . . x    x x x .    . .        x: hidden states that meet the LM head (scoring/lm_head.py)

The token at position t is predicted by the hidden state at t - 1, so the first response token comes from the last prompt
token. Two functions return the states marked x, in the same order: `plain_states` runs the rows unchanged, `shared_states`
runs the layout of scoring/shared_prompts.py. Training, reference and evaluation all use the choice of `choose`.
"""

from __future__ import annotations

import functools
import logging
import math
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from dpo_cli.data.encoded import Encoded
from dpo_cli.errors import RunFailed
from dpo_cli.plan.plan import EXPECTED, ONE_RESPONSE, Scoring
from dpo_cli.providers.classifier import head_of
from dpo_cli.providers.out_of_memory import is_out_of_memory
from dpo_cli.providers.precision import in_float32
from dpo_cli.scoring import score_head, shared_prompts
from dpo_cli.scoring.lm_head import ALL, LOG_PROBS, Head, score_tokens
from dpo_cli.scoring.shared_prompts import IGNORED, Layout
from dpo_cli.storage.progress import working

# Parts of TRL's contract that its DPOTrainer does not use. Other trainers use them, and would get a wrong loss.
UNSUPPORTED = frozenset({"num_items_in_batch", "shift_labels", "output_router_logits"})
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")  # what TRL's collator reads from a row
ALLOWANCE = 1e-3  # relative to a state: the difference between two ways to run a pair that counts as rounding
COMPARED, BEYOND = 1024, 256  # tokens: of a sequence that both ways run, and after the end of a window
HEAD_ALLOWANCE = 1e-3  # nats per token between the head and the model's own logits, in float32

States = Callable[..., Tensor]


def plain_states(model: PreTrainedModel, labels: Tensor, **inputs: Tensor) -> Tensor:
    """Run the backbone on the rows unchanged: the hidden states that predict a labelled token, (n, H), in row order.

    `labels` is (rows, length) with `IGNORED` outside the responses; `inputs` go to the backbone unchanged.
    """
    hidden: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    return hidden[labels[:, 1:] != IGNORED]


def shared_states(model: PreTrainedModel, labels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Run the backbone on each prompt once: the same states as `plain_states`, (n, H), in the same order."""
    return _laid_out_states(model, labels, shared_prompts.lay_out(input_ids, attention_mask, labels))


def _laid_out_states(model: PreTrainedModel, labels: Tensor, layout: Layout) -> Tensor:
    hidden: Tensor = model.base_model(**layout.inputs(), use_cache=False).last_hidden_state[0]
    return hidden[layout.place[:, :-1][labels[:, 1:] != IGNORED]]


def states_of(scoring: Scoring) -> States:
    return shared_states if scoring.shared else plain_states


def choose(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    pad_token_id: int,
    prompt_sharing: bool | str,
    no_sharing: str | None = None,
) -> Scoring:
    """The way of scoring of a run, by its `prompt_sharing`: shared prompts only if this model computes the same with them.

    `no_sharing` is the reason of the provider why it cannot.
    Raises `RunFailed` if sharing is required (true) and not exact, and for a model with an unsupported head.
    """
    with working("checking the scoring"):
        return _chosen(model, rows, pad_token_id, prompt_sharing, no_sharing)


def _chosen(
    model: PreTrainedModel, rows: Sequence[Encoded], pad_token_id: int, prompt_sharing: bool | str, no_sharing: str | None
) -> Scoring:
    """As `choose`."""
    shortest, longest = (end(rows, key=lambda row: row.length) for end in (min, max))
    require = _require_our_head if head_of(model) is None else _require_our_rewards
    require(model, collate([shortest], pad_token_id, model.device))
    if len(rows[0].responses) == 1:
        return ONE_RESPONSE
    if prompt_sharing is False:
        return EXPECTED[False]
    why_not = no_sharing or shared_prompts.obstacle(model)
    if why_not is None:
        # The longest pair exceeds a window if any does; with the shortest there are two pairs in the row, and padding.
        batch = collate([_cut(row, _compared(model)) for row in (longest, shortest)], pad_token_id, model.device)
        exact, finding = _try_sharing(model, batch)
        if exact:
            shared_prompts.enable(model)
            return Scoring(True, f"each prompt once: {finding}")
        why_not = finding
    if prompt_sharing is True:
        raise RunFailed(f'"prompt_sharing" is true, but {why_not}', 'with "auto" the padded rows are used instead')
    return Scoring(False, f"each prompt twice: {why_not}")


def _compared(model: PreTrainedModel) -> int:
    """The tokens of a sequence that are compared at most: padded rows in float32 need far more memory than a training step."""
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    return max(COMPARED, window + BEYOND)


def _cut(row: Encoded, most: int) -> Encoded:
    """The end of the prompt and the start of each response of a row, of at most so many tokens together."""
    responses = tuple(ids[: most // 2] for ids in row.responses)
    kept = most - max(map(len, responses))
    return replace(row, prompt_ids=row.prompt_ids[-kept:], responses=responses)


def _try_sharing(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[bool, str]:
    """Run a micro-batch both ways: whether the states that predict the responses are equal, and the finding as text.

    States and not log-probs, since the head is the same for both ways; in float32, where rounding is a thousandth of the
    smallest error of a wrong layout (tests/test_smollm2.py prints both).
    """
    layout = shared_prompts.lay_out(batch["input_ids"], batch["attention_mask"], batch["labels"])
    shared_prompts.enable(model)
    try:
        with torch.no_grad(), in_float32(model.base_model):
            plain = plain_states(model, **batch)
            apart = disagreement(plain, _laid_out_states(model, batch["labels"], layout))
    except Exception as error:  # an unknown model may fail in any way; it is then scored with padded rows
        if is_out_of_memory(error):
            raise
        logging.getLogger("dpo").exception("shared prompts failed")
        return False, f"this model cannot run shared prompts ({type(error).__name__}: {error})"
    finally:
        shared_prompts.disable(model)
    if not layout.cuts.masks:
        return False, "this model does not pass the layout of the pairs to its attention"
    if apart <= ALLOWANCE:
        return (
            True,
            f"checked against padded rows (relative difference {max(apart, torch.finfo(torch.float32).eps):.0e})",
        )
    return False, f"with shared prompts this model's states differ by {apart:.2g} of their size ({ALLOWANCE:g} allowed)"


def disagreement(one: Tensor, other: Tensor) -> float:
    """The largest |a - b| / |a| over the (n, H) states of two ways; infinite for no states or a NaN."""
    if not len(one):
        return math.inf
    apart = float(((one - other).norm(dim=1) / one.norm(dim=1)).max())
    return math.inf if math.isnan(apart) else apart


def _require_our_head(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Compare the head's log-probs with those of the model's own logits; a family may compute logits in an unknown way."""
    labels = batch["labels"][:, 1:]
    scored = labels != IGNORED
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        ours = response_log_probs(model, plain_states, batch)
        logits = model(**inputs, use_cache=False).logits[:, :-1][scored]
    theirs = logits.to(ours.dtype).log_softmax(dim=-1).gather(-1, labels[scored][:, None])[:, 0]
    apart = float((ours - theirs).abs().mean()) if len(ours) else 0.0
    if not apart <= max(HEAD_ALLOWANCE, 16 * torch.finfo(logits.dtype).eps):
        message = f"this model computes logits in a way that is not supported: log-probs differ by {apart:.2g} nats per token"
        raise RunFailed(message, "choose another model, and please report this one")


def _require_our_rewards(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Compare the rewards of a reward model with its own; a family may read another token, or change the score."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad(), torch.autocast(model.device.type, model.dtype, enabled=model.dtype.itemsize < 4):
        ours = score_head.rewards(model, False, **batch)
        theirs = model(**inputs, use_cache=False).logits[:, 0].to(ours.dtype)
    apart, size = float((ours - theirs).abs().mean()), float(theirs.abs().mean())
    if not apart <= max(HEAD_ALLOWANCE, 16 * torch.finfo(model.dtype).eps) * max(1.0, size):
        message = f"this model computes the score of a response in a way that is not supported: rewards differ by {apart:.2g}"
        raise RunFailed(message, "choose another model, and please report this one")


def response_log_probs(model: PreTrainedModel, states: States, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probs of the labelled tokens of a micro-batch of `collate`, in row order: (n,). No gradient."""
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        return score_tokens(states(model, **batch), labels[labels != IGNORED], Head.of(model), [LOG_PROBS]).log_probs


def collate(rows: Sequence[Encoded], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """TRL's micro-batch of these B rows with k responses each: `labels`, `input_ids` and `attention_mask`, each (kB, L)."""
    kinds = range(len(rows[0].responses))
    sequences = [(row.prompt_ids, row.responses[kind]) for kind in kinds for row in rows]  # all chosen, then all rejected
    columns = {
        "input_ids": ([prompt + response for prompt, response in sequences], pad_token_id),
        "attention_mask": ([[1] * (len(prompt) + len(response)) for prompt, response in sequences], 0),
        "labels": ([[IGNORED] * len(prompt) + response for prompt, response in sequences], IGNORED),
    }
    return {
        name: nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in values], batch_first=True, padding_value=pad).to(device)
        for name, (values, pad) in columns.items()
    }


def attach(model: PreTrainedModel, states: States, temperature: float = 1.0, outputs: Collection[str] = ALL) -> None:
    """Make `model(..., labels=..., fused_lm_head=True)` score with dpo's head; any other call is unchanged.

    The call and its output are TRL's contract (`add_fused_lm_head`): per-token tensors are (rows, length - 1), zero at
    tokens without a label. The ones that are not in `outputs` are all zero: TRL reads them for averages of its own.
    `model` is the causal language model itself, below a PEFT wrapper.
    """
    original = type(model).forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(self, *args, labels=labels, **kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None}  # PEFT passes all arguments that it knows
        given.pop("use_cache", None)
        if unknown := UNSUPPORTED & given.keys():
            raise NotImplementedError(f"the head does not honour {', '.join(sorted(unknown))}")
        hidden = states(self, labels, **given)
        mask = labels[:, 1:] != IGNORED
        scores = score_tokens(hidden, labels[:, 1:][mask], Head.of(self, temperature), outputs)
        # masked_scatter keeps the graph even without a labelled token, so such a batch has a zero gradient.
        fields = {name: value.new_zeros(mask.shape).masked_scatter(mask, value) for name, value in vars(scores).items()}
        loss = -fields["log_probs"].sum() / mask.sum().clamp(min=1)
        return FusedCausalLMOutput(loss=loss, label_mask=mask, **fields)

    # generate() checks its keyword arguments against the signature.
    functools.update_wrapper(forward, original)
    model.forward = types.MethodType(forward, model)
