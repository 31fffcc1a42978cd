"""TRL's DPOTrainer as this program uses it; what both trainers share is in trainer.py.

What is overridden, and why (tests/test_dpo.py fails when TRL moves any of it):
- `_prepare_dataset`: TRL 1.15 tokenises rows itself and takes no ready token ids. Ours are made once, for plan, training
  and evaluation alike, and are the same ids (tests/test_tokens.py).
- `compute_loss`: the response log-probs are read off the two model calls TRL makes for a micro-batch, policy first and
  reference second, because its own averages count ties as losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from dpo_cli.config.rules import sorts_pairs
from dpo_cli.data.tokens import Encoded
from dpo_cli.plan import Plan
from dpo_cli.training import scoring
from dpo_cli.training.trainer import SIZE, CarefulTrainer, Evaluate, Tell, Totals, common_arguments, on_one_device, ready

FIGURES = ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")


def reward_figures(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Per-pair figures from summed response log-probs, both (2B,) with the B chosen first: (B, 6), named by `FIGURES[1:]`.

    The reward is beta * (log pi - log ref) (Rafailov et al., arXiv:2305.18290, equation 5 without its constant); a tie counts
    one half. In float64 on the CPU: Apple's GPUs have no float64.
    """
    policy, reference = policy.cpu().double(), reference.cpu().double()
    pi_chosen, pi_rejected = policy.chunk(2)
    reward_chosen, reward_rejected = (beta * (policy - reference)).chunk(2)
    margin = reward_chosen - reward_rejected
    accuracy = (margin > 0).double() + 0.5 * (margin == 0).double()
    return torch.stack([accuracy, margin, reward_chosen, reward_rejected, pi_chosen, pi_rejected], dim=1)


class PairTrainer(CarefulTrainer, DPOTrainer):
    """DPOTrainer on encoded pairs, scoring with our head."""

    ROWS_A_UNIT = 2
    IS_MEAN = True

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.clear()
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        policy, reference = (call.log_probs.detach().sum(dim=1) for call in self.calls)
        figures = reward_figures(policy, reference, self.beta)
        losses = loss.detach().cpu().double().expand(len(figures), 1)
        self.totals.add(torch.cat([losses, figures], dim=1), int(inputs["attention_mask"].sum()))
        return loss


def build_trainer(
    model: PreTrainedModel | PeftModel,
    adapter: LoraConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    train: Sequence[Encoded],
    held_out: Sequence[Encoded],
    run_evaluation: Evaluate,
    tell: Tell = print,
    frozen: PreTrainedModel | None = None,
) -> PairTrainer:
    """The trainer of a plan; its figures leave through callbacks.

    A fresh `adapter` is left to TRL, which then knows that the reference is the model with the adapter off. `model` may come
    with an adapter already: TRL makes a frozen copy of that, which is the reference. Without either, it is `frozen`.
    """
    trainer = PairTrainer(
        model=model,
        ref_model=frozen,
        args=on_one_device(trainer_arguments(plan)),
        train_dataset=_rows(train, plan.scoring.shared),
        eval_dataset=_rows(held_out, plan.scoring.shared) if held_out else None,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.IS_WHOLE = sorts_pairs(plan.config.loss_type)
    trainer.take_over(scoring.states_of(plan.scoring), Totals(FIGURES), run_evaluation, tell)
    ready(trainer, plan)
    return trainer


def trainer_arguments(plan: Plan) -> DPOConfig:
    """The plan in TRL's words."""
    config = plan.config
    return DPOConfig(
        **common_arguments(plan),
        beta=config.beta,
        loss_type=config.loss_type,
        loss_weights=config.loss_weights,
        label_smoothing=config.label_smoothing,
        disable_dropout=False,  # the provider stops the base model's; stopping the adapter's would undo lora_dropout
    )


def _rows(pairs: Sequence[Encoded], shared: bool) -> Dataset:
    columns = {name: [getattr(pair, name) for pair in pairs] for name in (*scoring.ID_COLUMNS, "length")}
    return Dataset.from_dict({**columns, SIZE: [pair.shared_length if shared else pair.length for pair in pairs]})
