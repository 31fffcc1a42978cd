"""What a training and its evaluations cost: counted in tokens that go through the model once, forward. No torch.

A step takes the policy forward, and backward to the inputs of its frozen layers, which is as much again, and to the adapter. A
token that is sampled reads all weights for one token of each answer of a batch. The counts decide how many answers an
evaluation samples by default: they do not depend on the machine, so a run samples as many everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_cli.config.options import Config

if TYPE_CHECKING:
    from dpo_cli.plan.plan import Counts

TRAINED, REFERENCE, RECOMPUTED, SCORED, SAMPLED = 2.5, 1.0, 1.0, 2.0, 8.0  # forward passes a token takes
SHARE = 0.25  # of the training's cost, for all its evaluations
FEWEST, MOST_ANSWERED = 16, 32  # prompts; apart from kl_sequence, so many are answered with and without the adapter
REACHED = 0.5  # of the speed of large products, in a training of configs/quickstart.json on two cores


@dataclass(frozen=True)
class Cost:
    """Tokens that go through the model once, forward."""

    training: float
    evaluation: float  # all of them

    @property
    def is_within_share(self) -> bool:
        return self.evaluation <= SHARE * self.training

    def seconds(self, weights: int, speed: float) -> tuple[float, float]:
        """Of the training and of its evaluations, with so many weights, and `speed` operations of a product in a second."""
        a_token = 2 * weights / (REACHED * speed)
        return self.training * a_token, self.evaluation * a_token


def answered_prompts(config: Config) -> int:
    """The number of held-out prompts that an evaluation answers, with and without what was trained."""
    return min(MOST_ANSWERED, max(FEWEST, config.kl_prompts))


def cost_of(config: Config, counts: Counts, steps: int, refers: bool, gives_rewards: bool = False) -> Cost:
    """The cost of a run of so many steps on these rows; `refers` to a reference. A reward model has none, and no answers."""
    pairs = steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    of_pair = counts.shared_tokens / counts.train_pairs
    a_token = TRAINED + RECOMPUTED * (config.gradient_checkpointing is True)
    training = of_pair * (a_token * pairs + REFERENCE * refers * min(pairs, counts.train_pairs))
    an_answer, prompts = SAMPLED * config.max_new_tokens, counts.eval_prompts
    scored = SCORED / 2 if gives_rewards else SCORED
    measured = scored * counts.eval_pairs * of_pair + refers * an_answer * min(config.kl_prompts, prompts)
    answered = 0.0 if gives_rewards else 2 * an_answer * min(answered_prompts(config), prompts)
    batches = math.ceil(counts.train_pairs / config.per_device_train_batch_size)
    of_epoch = math.ceil(batches / config.gradient_accumulation_steps)  # a last, incomplete step is one too
    times = math.ceil(steps / (config.eval_steps or of_epoch))
    return Cost(training, times * measured + answered)


def affordable_prompts(config: Config, counts: Counts, steps: int) -> int:
    """The most held-out prompts, up to those of the config, whose answers keep the evaluations within their share; at least
    `FEWEST`, as far as there are so many. Whether a step computes states again depends on the machine, and does not count."""
    most = min(config.kl_prompts, counts.eval_prompts)
    for prompts in range(most, FEWEST, -1):
        tried = config.replaced({"kl_prompts": prompts, "gradient_checkpointing": False})
        if cost_of(tried, counts, steps, refers=True).is_within_share:
            return config.kl_prompts if prompts == most else prompts
    return config.kl_prompts if most <= FEWEST else FEWEST
