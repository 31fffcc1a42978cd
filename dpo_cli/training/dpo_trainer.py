"""TRL's DPOTrainer as dpo uses it; the shared part of all trainers is in trainer.py.

What is overridden, and why (tests/test_dpo.py fails if TRL changes any of it):
- `_prepare_dataset`: TRL 1.15 tokenises rows itself and does not accept token ids. dpo's are made once, for plan, training
  and evaluation, and are the same ids (tests/test_tokens.py).
- `compute_loss`: TRL gets the reference's log-probs as columns of the micro-batch, as if it had computed them before
  (`precompute_ref_logps`, which is set after its constructor, because the constructor would compute them). The figures come
  from the log-probs of the one model call that remains, because TRL's own averages count ties as losses. TRL's loss is the
  mean over the micro-batch, and Trainer gives all micro-batches of a step the same weight: here each pair of a step counts
  1/n, so that the division of a step into micro-batches changes nothing. TRL averages the `sft` term over the tokens of a
  micro-batch; here it is averaged over the tokens of the step, as TRL does if the step is one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from dpo_cli.config.rules import sorts_pairs
from dpo_cli.data.encoded import EncodedRows
from dpo_cli.plan.plan import Plan
from dpo_cli.scoring import forward
from dpo_cli.scoring.lm_head import LOG_PROBS, LOG_SQUARES
from dpo_cli.scoring.packing import Batch, units_in
from dpo_cli.scoring.reference import PAIR, KeptReference, LiveReference
from dpo_cli.storage.log import Tell
from dpo_cli.storage.world import ALONE, World
from dpo_cli.strategies.figures import LINE_FIGURES, Columns, step_figures
from dpo_cli.strategies.row_kinds import PAIRS
from dpo_cli.training.trainer import (
    SIZE,
    CarefulTrainer,
    Evaluate,
    Totals,
    adapter_weights,
    common_arguments,
    of_process,
    ready,
    token_column,
)

SEQUENCES = 2  # of a pair
KnownPairs = tuple[list[int], Tensor]  # places of pairs, and the log-probs of their reference, (n, 2)
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
FIGURES = ("loss", *step_figures(PAIRS))


def reward_figures(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Figures of each pair from summed response log-probs, both (2B,) with the B chosen first: (B, 6), named by `FIGURES[1:]`.

    Their formulas are those of strategies/figures.py, in float64 on the CPU: Apple's GPUs have no float64.
    """
    sides, before = (log_probs.cpu().double().numpy().reshape(2, -1).T for log_probs in (policy, reference))  # (B, 2)
    unknown = np.empty(0)  # tokens, the most likely ones and KL: no figure of a step needs them
    columns = Columns(sides, unknown, unknown, unknown, beta * (sides - before))
    figures = torch.empty(len(sides), len(FIGURES) - 1, dtype=torch.float64)
    np.stack([LINE_FIGURES[name].formulas[PAIRS](columns)[0] for name in FIGURES[1:]], axis=1, out=figures.numpy())
    return figures


class StepSize(NamedTuple):
    """What an optimizer step holds."""

    pairs: int
    chosen_tokens: int  # counted if a loss is averaged over them


class PairTrainer(CarefulTrainer, DPOTrainer):
    """DPOTrainer on encoded pairs, with dpo's head. Its loss is the share of a micro-batch in the loss of the step."""

    SEQUENCES_PER_UNIT = SEQUENCES
    OUTPUTS: tuple[str, ...] = (LOG_PROBS,)
    reference: KeptReference
    loss_types: list[str]
    loss_weights: list[float]
    sft_weight = 0.0  # weight of the loss that is averaged over tokens
    ld_alpha: float | None

    def take_over(
        self, states: forward.States, totals: Totals, run_evaluation: Evaluate, tell: Tell, plan: Plan, world: World
    ) -> None:
        super().take_over(states, totals, run_evaluation, tell, plan, world)
        live = LiveReference(self.policy, states, with_shared=self.ld_alpha is not None)
        self.reference = KeptReference(live, len(self.train_dataset))
        self.precompute_ref_logps = True
        # TRL's loop skips the loss that is averaged over tokens: `compute_loss` adds it.
        weights = dict(zip(self.loss_types, self.loss_weights, strict=True))
        self.sft_weight = weights.pop("sft", 0.0)
        self.loss_types, self.loss_weights = list(weights), list(weights.values())

    def step_size(self, batches: Sequence[Batch]) -> StepSize:
        pairs, tokens = sum(units_in(batch, self.SEQUENCES_PER_UNIT) for batch in batches), 0
        if self.sft_weight:
            chosen = [batch["completion_mask"].chunk(2)[0][:, 1:] for batch in batches]
            tokens = sum(int(mask.sum()) for mask in chosen)
        return StepSize(pairs, tokens)

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset

    def compute_loss(
        self, model: nn.Module, inputs: Batch, *args: object, num_items_in_batch: StepSize | None = None
    ) -> Tensor:
        """The share of these pairs in the loss of a step of that size, or of these pairs alone."""
        self.calls.clear()
        step, pairs = num_items_in_batch or self.step_size([inputs]), units_in(inputs, self.SEQUENCES_PER_UNIT)
        # Before the call of the policy, which keeps tensors for its gradient; in the precision that accelerate gives that call.
        with self.accelerator.autocast():
            reference, *shared = torch.split(self.reference.log_probs(inputs), SEQUENCES * pairs)
        weighted = reference if self.ld_alpha is None else shared[0] + self.ld_alpha * (reference - shared[0])
        columns = dict(zip(REFERENCE_COLUMNS, weighted.chunk(2), strict=True))
        known = {name: column for name, column in inputs.items() if name != PAIR}  # TRL hands all others to the model
        loss: Tensor = super().compute_loss(model, {**known, **columns}, *args) * (pairs / step.pairs)
        (call,) = self.calls
        if self.sft_weight:
            log_probs = call.log_probs.chunk(2)[0]  # of the chosen responses, zero elsewhere
            loss = loss - self.sft_weight * log_probs.sum() / max(1, step.chosen_tokens)
        figures = reward_figures(call.log_probs.detach().sum(dim=1), reference, self.beta)
        losses = loss.detach().cpu().double() * step.pairs / pairs  # the mean over a step is its loss
        losses = losses.expand(len(figures), 1)
        self.totals.add(torch.cat([losses, figures], dim=1), int(inputs["attention_mask"].sum()))
        return loss

    def known_of(self, batch: Batch, units: Sequence[int]) -> KnownPairs:
        places = batch[PAIR].chunk(SEQUENCES)[0].cpu()[list(units)].tolist()
        return places, self.reference.values[places]

    def learn(self, known: KnownPairs) -> None:
        self.reference.learn(*known)


Collator = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


def with_places(collate: Collator) -> Collator:
    """TRL's collator, whose micro-batch also has the place of each sequence's pair in the training set."""

    def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {**collate(rows), PAIR: torch.tensor([row[PAIR] for row in rows] * 2)}

    return collated


def build_trainer(
    model: PreTrainedModel | PeftModel,
    adapter: LoraConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    train: EncodedRows,
    held_out: EncodedRows,
    run_evaluation: Evaluate,
    tell: Tell = print,
    frozen: PreTrainedModel | None = None,
    world: World = ALONE,
) -> PairTrainer:
    """The trainer of a plan; its figures leave through callbacks.

    TRL adds a fresh `adapter`, and then knows that the reference is the model with the adapter off. `model` may come
    with an adapter: TRL makes a frozen copy of it as the reference, unless that is the model with the adapter off. Without any
    adapter, the reference is `frozen`.
    """
    start = adapter_weights(model)
    trainer = PairTrainer(
        model=model,
        ref_model=frozen,
        args=of_process(trainer_arguments(plan), world),
        train_dataset=pair_rows(train, plan.scoring.shared),
        eval_dataset=pair_rows(held_out, plan.scoring.shared) if held_out else None,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.data_collator = with_places(trainer.data_collator)
    trainer.IS_WHOLE = sorts_pairs(plan.config.loss_type)
    if plan.config.use_weighting:  # of the policy only
        trainer.OUTPUTS = (LOG_PROBS, LOG_SQUARES)
    trainer.take_over(forward.states_of(plan.scoring), Totals(FIGURES), run_evaluation, tell, plan, world)
    ready(trainer, plan, start)
    return trainer


def trainer_arguments(plan: Plan) -> DPOConfig:
    """The plan as arguments of TRL."""
    config = plan.config
    return DPOConfig(
        **common_arguments(plan),
        beta=config.beta,
        loss_type=config.loss_type,
        loss_weights=config.loss_weights,
        label_smoothing=config.label_smoothing,
        f_divergence_type=config.f_divergence_type,
        f_alpha_divergence_coef=config.f_alpha_divergence_coef,
        ld_alpha=config.ld_alpha,
        use_weighting=config.use_weighting,
        disable_dropout=False,  # the provider disables that of the base; without that of the adapter, lora_dropout is lost
    )


def pair_rows(pairs: EncodedRows, shared: bool) -> Dataset:
    """The columns that TRL's collator and its sampler read; sizes with each prompt once if `shared`."""
    columns = {name: token_column(*pairs.column(piece)) for piece, name in enumerate(forward.ID_COLUMNS)}
    sizes = [*pairs.sizes()]
    lengths = {"length": [size.length for size in sizes]}
    lengths[SIZE] = [size.shared_length for size in sizes] if shared else lengths["length"]
    return Dataset.from_dict({**columns, **lengths, PAIR: range(len(pairs))})
