"""TRL's SFTTrainer as dpo uses it; the shared part of all trainers is in trainer.py.

Rows come with their token ids and labels, which TRL uses unchanged (`skip_prepare_dataset`). `compute_loss` is overridden
only to read the figures from TRL's model call. TRL divides by the tokens of the whole step (`step_size`).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from dpo_cli.data.encoded import EncodedRows
from dpo_cli.plan.plan import Plan
from dpo_cli.scoring import forward
from dpo_cli.scoring.lm_head import IS_TOP1, LOG_PROBS
from dpo_cli.scoring.packing import Batch
from dpo_cli.scoring.shared_prompts import IGNORED
from dpo_cli.storage.log import Tell
from dpo_cli.storage.world import ALONE, World
from dpo_cli.strategies.figures import step_figures
from dpo_cli.strategies.row_kinds import DEMONSTRATIONS
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

FIGURES = ("loss", *step_figures(DEMONSTRATIONS))


class DemonstrationTrainer(CarefulTrainer, SFTTrainer):
    """SFTTrainer on encoded demonstrations, with dpo's head.

    The loss is the mean of -log p over all completion tokens of a step, for any division into micro-batches.
    """

    SEQUENCES_PER_UNIT = 1
    OUTPUTS = (LOG_PROBS, IS_TOP1)

    def step_size(self, batches: Sequence[Batch]) -> Tensor:
        """Completion tokens: all labels except a first one, which no state predicts."""
        tokens = torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]).sum()
        return tokens.to(self.args.device)

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: object, **kwargs: object) -> Tensor:
        self.calls.clear()
        loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        (call,) = self.calls
        tokens = call.label_mask.sum(dim=1)
        sums = torch.stack([-call.log_probs.detach().sum(dim=1), call.is_top1.sum(dim=1)], dim=1)
        self.totals.add(sums / tokens.clamp(min=1)[:, None], int(inputs["attention_mask"].sum()), weights=tokens)
        return loss


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
) -> DemonstrationTrainer:
    """The trainer of a plan, with a fresh `adapter`, that of `model`, or none; evaluations compare with `frozen`."""
    start = adapter_weights(model)
    trainer = DemonstrationTrainer(
        model=model,
        args=of_process(trainer_arguments(plan), world),
        train_dataset=_rows(train),
        eval_dataset=_rows(held_out) if held_out else None,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.ref_model = frozen
    trainer.take_over(forward.plain_states, Totals(FIGURES), run_evaluation, tell, plan, world)
    ready(trainer, plan, start)
    return trainer


def trainer_arguments(plan: Plan) -> SFTConfig:
    """The plan as arguments of TRL."""
    return SFTConfig(**common_arguments(plan), dataset_kwargs={"skip_prepare_dataset": True}, packing=False)


def _rows(demonstrations: EncodedRows) -> Dataset:
    ids, labels, lengths = array("i"), array("i"), [size.length for size in demonstrations.sizes()]
    for place in range(len(demonstrations)):
        prompt, completion = demonstrations.ids(place)
        ids.extend(prompt + completion)
        labels.extend([IGNORED] * len(prompt) + completion)
    ends = array("q", accumulate(lengths, initial=0))
    columns = {"input_ids": token_column(ids, ends), "labels": token_column(labels, ends)}
    return Dataset.from_dict({**columns, "length": lengths, SIZE: lengths})
