"""TRL's KTOTrainer as dpo uses it; the shared part of all trainers is in trainer.py.

What is overridden, and why (tests/test_kto.py fails if TRL changes any of it):
- `_prepare_dataset`: rows are token ids already. TRL would also make the answers to other prompts here, and so asks for a
  fixed order of the rows and for micro-batches of two rows or more. Here the order is drawn once, and steps are its parts.
- `training_step`: the KL divergence at the reference point is a mean over the rows of the whole step. It has no gradient, so it
  is computed first, in rows of its own, and the division of a step into micro-batches changes nothing.
- `_compute_kl_logps`: TRL gets that mean, as if it were the one of its micro-batch.
- `compute_loss`: the reference's log-probs are columns of the micro-batch, as for dpo, and each row of a step counts 1/n. TRL's
  own averages have the names of dpo's figures, and are dropped.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from dpo_cli.data.encoded import EncodedRows
from dpo_cli.plan.plan import Plan
from dpo_cli.scoring import forward
from dpo_cli.scoring.lm_head import LOG_PROBS
from dpo_cli.scoring.mismatched import is_good, mismatched_ids, partners
from dpo_cli.scoring.oom import in_halves, list_halves
from dpo_cli.scoring.packing import Batch, packed, shared_out, taken, units_in
from dpo_cli.scoring.reference import PAIR, KeptReference, LiveReference, digest_of_ids
from dpo_cli.storage.log import Tell
from dpo_cli.storage.world import ALONE, World
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

LABEL, REFERENCE, OF_BASELINE = "label", "ref_logps", "ref_KL_logps"  # TRL's columns of a micro-batch
OF_SIDES = ("reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
FIGURES = ("loss", "kl_baseline", *OF_SIDES)
KnownAnswers = tuple[list[int], Tensor]  # places, and the log-probs of the reference, (n, 1)


class RatingTotals(Totals):
    """With the margin: the mean reward of good answers minus that of bad ones."""

    @property
    def written(self) -> Sequence[str]:
        return *self.names, "margin"

    def _means(self, begin: int) -> dict[str, float]:
        means = super()._means(begin)
        if "reward_chosen" in means and "reward_rejected" in means:
            means["margin"] = means["reward_chosen"] - means["reward_rejected"]
        return means


class RatingTrainer(CarefulTrainer, KTOTrainer):
    """KTOTrainer on encoded ratings, with dpo's head. Its loss is the share of a micro-batch in the loss of the step.

    The reference knows the answers of all rows, and after these the answers to other prompts.
    """

    SEQUENCES_PER_UNIT = 1
    OUTPUTS = (LOG_PROBS,)
    reference: KeptReference
    mismatched: Dataset  # by place of a row, its prompt with the answer of another row
    kl = 0.0  # at the reference point of this step, nats

    def take_over(
        self, states: forward.States, totals: Totals, run_evaluation: Evaluate, tell: Tell, plan: Plan, world: World
    ) -> None:
        super().take_over(states, totals, run_evaluation, tell, plan, world)
        live = LiveReference(self.policy, states)
        self.reference = KeptReference(live, 2 * len(self.train_dataset), sides=1, noun="answers")
        self.precompute_ref_logps = True

    def digests(self, rows: EncodedRows) -> list[bytes]:
        others = ((row["prompt_ids"], row["completion_ids"]) for row in self.mismatched)
        return [digest_of_ids(*ids) for ids in chain(map(rows.ids, range(len(rows))), others)]

    def step_size(self, batches: Sequence[Batch]) -> int:
        """Rows of the step."""
        return sum(units_in(batch, self.SEQUENCES_PER_UNIT) for batch in batches)

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset

    def training_step(self, model: nn.Module, inputs: Batch, *args: object, **kwargs: object) -> Tensor:
        if self.calculate_KL:
            self.kl = self._kl(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def _kl(self, batch: Batch) -> float:
        """The KL divergence at the reference point of a step, nats: max(0, mean of log p - log p of the reference)."""
        places, world = batch[PAIR].tolist(), self.world
        own = shared_out(self._unit_sizes(batch), world.size)[world.rank]
        ratios = [*chain(*world.each(lambda: self._ratios([places[unit] for unit in own])))]
        return max(0.0, sum(ratios) / len(ratios))

    def _ratios(self, places: Sequence[int]) -> list[float]:
        """log p - log p of the reference of the answers to other prompts, without dropout."""
        if not places:
            return []
        rows = packed(self._with_other_answers(places), self.row_budget, 1, shared=False)
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            ratios = [ratio for _, ratio in in_halves(rows, self._ratio, _halves)]
        self.model.train()
        return torch.cat(ratios).tolist()

    def _ratio(self, row: Batch) -> Tensor:
        policy = LiveReference(self.policy, self.reference.live.states).of_policy(row)
        return policy.double().cpu() - self.reference.log_probs(row).double().cpu()

    def _with_other_answers(self, places: Sequence[int]) -> Batch:
        """A micro-batch of these rows' prompts with the answers of other rows."""
        trainer: Any = self
        batch: Batch = trainer._prepare_inputs(self.data_collator([self.mismatched[place] for place in places]))
        return batch

    def _compute_kl_logps(self, model: nn.Module, batch: Batch) -> Tensor:
        return torch.full((1,), self.kl, device=self.args.device)

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: object, num_items_in_batch: int | None = None) -> Tensor:
        """The share of these rows in the loss of a step of that size, or of these rows alone."""
        self.calls.clear()
        rows, step = units_in(inputs, self.SEQUENCES_PER_UNIT), num_items_in_batch or self.step_size([inputs])
        with self.accelerator.autocast():  # as in compute_loss of dpo
            reference = self.reference.log_probs(inputs)
        columns = {REFERENCE: reference, OF_BASELINE: torch.zeros(1, device=self.args.device)}
        known = {name: column for name, column in inputs.items() if name != PAIR}  # TRL hands all others to the model
        mean: Tensor = super().compute_loss(model, {**known, **columns}, *args)
        self._metrics["train"].clear()
        (call,) = self.calls
        log_probs, good = call.log_probs.detach().sum(dim=1).double().cpu(), inputs[LABEL].double().cpu()
        reward = self.beta * (log_probs - reference.double().cpu())
        of_row = [mean.detach().double().cpu().expand(rows), torch.full((rows,), self.beta * self.kl, dtype=torch.float64)]
        one = torch.ones_like(good)
        figures = torch.stack([*of_row, reward, reward, log_probs, log_probs], dim=1)
        weights = torch.stack([one, one, good, one - good, good, one - good], dim=1)
        self.totals.add(figures, int(inputs["attention_mask"].sum()), weights)
        return mean * (rows / step)

    def known_of(self, batch: Batch, units: Sequence[int]) -> KnownAnswers:
        own = batch[PAIR].cpu()[list(units)].tolist()
        places = [*own, *(len(self.train_dataset) + place for place in own)] if self.calculate_KL else own
        return places, self.reference.values[places]

    def learn(self, known: KnownAnswers) -> None:
        self.reference.learn(*known)


def _halves(row: Batch) -> list[Batch]:
    """Both halves of a row; none of a row of one sequence."""
    return [taken(row, units, 1) for units in list_halves([*range(units_in(row, 1))])]


class WithPlaces(DataCollatorForUnpairedPreference):
    """TRL's collator, whose micro-batch also has the place of each row."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**super().torch_call(examples), PAIR: torch.tensor([row[PAIR] for row in examples])}


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
) -> RatingTrainer:
    """The trainer of a plan; `adapter`, `model` and `frozen` as for dpo."""
    start, order = adapter_weights(model), order_of_rows(len(train), plan.config.seed)
    trainer = RatingTrainer(
        model=model,
        ref_model=frozen,
        args=of_process(trainer_arguments(plan), world),
        data_collator=WithPlaces(int(tokenizer.pad_token_id)),
        train_dataset=rating_rows(train, order),
        eval_dataset=rating_rows(held_out, range(len(held_out))) if held_out else None,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.mismatched = mismatched_rows(train, order, plan.pairs_a_step, plan.config.max_seq_length)
    trainer.take_over(forward.plain_states, RatingTotals(FIGURES), run_evaluation, tell, plan, world)
    ready(trainer, plan, start)
    return trainer


def trainer_arguments(plan: Plan) -> KTOConfig:
    """The plan as arguments of TRL."""
    config = plan.config
    return KTOConfig(
        **{**common_arguments(plan), "train_sampling_strategy": "sequential"},
        beta=config.beta,
        loss_type=str(config.loss_type),
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        disable_dropout=False,  # as for dpo: lora_dropout would be lost
    )


def order_of_rows(rows: int, seed: int) -> list[int]:
    """The order of the rows, the same in each epoch: a file may have all good answers first, and a step needs both."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()


def rating_rows(rows: EncodedRows, order: Sequence[int]) -> Dataset:
    """The columns that TRL's collator and its sampler read, in this order."""
    sequences = [rows.ids(place) for place in order]
    lengths = [sum(map(len, sequence)) for sequence in sequences]
    labels = [is_good(rows.rows[place]) for place in order]
    return Dataset.from_dict({**_columns(sequences), LABEL: labels, "length": lengths, SIZE: lengths, PAIR: list(order)})


def mismatched_rows(rows: EncodedRows, order: Sequence[int], a_step: int, max_length: int) -> Dataset:
    """By place of a row: its prompt, and the answer of another row of its step; of a step of one row that of the row before."""
    other: dict[int, int] = {}
    for start in range(0, len(order), a_step):
        start = max(0, min(start, len(order) - 2))
        places = order[start : start + a_step]
        other |= {
            place: places[partner]
            for place, partner in zip(places, partners([rows.rows[place].prompt_key for place in places]), strict=True)
            if place not in other
        }
    sequences = []
    for place in range(len(rows)):
        prompt, _ = rows.ids(place)
        sequences.append([prompt, mismatched_ids(prompt, rows.ids(other[place])[1], max_length)])
    places = [len(rows) + place for place in range(len(rows))]
    return Dataset.from_dict({**_columns(sequences), LABEL: [True] * len(rows), PAIR: places})


def _columns(sequences: Sequence[Sequence[list[int]]]) -> dict[str, Any]:
    """Prompts and answers as columns of token ids."""
    names = ("prompt_ids", "completion_ids")
    columns = {}
    for name, pieces in zip(names, zip(*sequences, strict=True), strict=True):
        ends = array("q", accumulate(map(len, pieces), initial=0))
        columns[name] = token_column(array("i", chain(*pieces)), ends)
    return columns
