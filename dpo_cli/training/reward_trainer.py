"""TRL's RewardTrainer as dpo uses it; the shared part of all trainers is in trainer.py.

What is overridden, and why (tests/test_reward.py fails if TRL changes any of it):
- `_prepare_dataset`: as for dpo, rows are token ids already, the same as those of dpo. TRL's collator for DPO makes the
  micro-batch, with the mask of the responses, by which a prompt is shared.
- `attach`: the score head of scoring/score_head.py. TRL hands all columns of a micro-batch to the model, so also that mask.
- `compute_loss`: TRL's loss is the mean over the micro-batch; here each pair of a step counts 1/n, as for dpo. The figures come
  from the rewards of TRL's model call. TRL's own averages have the names of dpo's, and count ties as losses: they are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_cli.data.encoded import EncodedRows
from dpo_cli.evaluation.metrics import Rewards
from dpo_cli.plan.plan import Plan
from dpo_cli.providers.classifier import HEAD
from dpo_cli.providers.policy import TRAINED
from dpo_cli.scoring import forward, score_head
from dpo_cli.scoring.packing import Batch, units_in
from dpo_cli.storage.log import Tell
from dpo_cli.storage.world import ALONE, World
from dpo_cli.strategies.figures import LINE_FIGURES, step_figures
from dpo_cli.strategies.row_kinds import REWARDS
from dpo_cli.training.dpo_trainer import pair_rows
from dpo_cli.training.trainer import CarefulTrainer, Evaluate, Totals, common_arguments, of_process, ready

FIGURES = ("loss", *step_figures(REWARDS))


class RewardModelTrainer(CarefulTrainer, RewardTrainer):
    """RewardTrainer on encoded pairs. Its loss is the share of a micro-batch in the loss of the step."""

    SEQUENCES_PER_UNIT = 2

    def attach(self, model: PreTrainedModel, states: forward.States) -> None:
        score_head.attach(model, shared=states is forward.shared_states)

    def step_size(self, batches: Sequence[Batch]) -> int:
        """Pairs of the step."""
        return sum(units_in(batch, self.SEQUENCES_PER_UNIT) for batch in batches)

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset

    def compute_loss(self, model: nn.Module, inputs: Batch, *_: object, num_items_in_batch: int | None = None) -> Tensor:
        """The share of these pairs in the loss of a step of that size, or of these pairs alone."""
        pairs = units_in(inputs, self.SEQUENCES_PER_UNIT)
        mean: Tensor
        mean, outputs = super().compute_loss(model, dict(inputs), return_outputs=True)
        self._metrics["train"].clear()
        rewards = outputs.logits.detach().cpu().double().view(2, pairs).T.numpy()
        columns = Rewards(rewards).columns()
        figures = np.stack([LINE_FIGURES[name].formulas[REWARDS](columns)[0] for name in FIGURES], axis=1)
        self.totals.add(torch.from_numpy(figures), int(inputs["attention_mask"].sum()))
        share = pairs / (num_items_in_batch or self.step_size([inputs]))
        return mean * share


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
) -> RewardModelTrainer:
    """The trainer of a plan, with a fresh `adapter` that includes the score head. There is no reference."""
    assert adapter is not None and adapter.modules_to_save is not None  # config/rules.py
    saved = list(adapter.modules_to_save)
    trainer = RewardModelTrainer(
        model=model,
        args=of_process(trainer_arguments(plan), world),
        data_collator=DataCollatorForPreference(int(tokenizer.pad_token_id)),
        train_dataset=pair_rows(train, plan.scoring.shared),
        eval_dataset=pair_rows(held_out, plan.scoring.shared) if held_out else None,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.take_over(forward.states_of(plan.scoring), Totals(FIGURES), run_evaluation, tell, plan, world)
    ready(trainer, plan, {})
    trainer.model.peft_config[TRAINED].modules_to_save = saved  # PEFT adds names of heads that other classifiers have
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad and HEAD in name.split("."):
            weight.data = weight.data.float()  # TRL rounds what is trained on quantised weights
    return trainer


def trainer_arguments(plan: Plan) -> RewardConfig:
    """The plan as arguments of TRL."""
    arguments: dict[str, Any] = common_arguments(plan)
    del arguments["router_aux_loss_coef"]  # its model calls give none
    return RewardConfig(**arguments, disable_dropout=False)  # as for dpo: lora_dropout would be lost
