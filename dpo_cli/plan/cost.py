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
from dpo_cli.strategies.strategy import Strategy

if TYPE_CHECKING:
    from dpo_cli.plan.plan import Counts

TRAINED, REFERENCE, RECOMPUTED, SCORED, SAMPLED = 2.5, 1.0, 1.0, 2.0, 8.0  # forward passes a token takes
SHARE = 0.25  # of the training's cost, for all its evaluations
FEWEST, MOST_ANSWERED = 16, 32  # prompts; apart from kl_sequence, so many are answered with and without the adapter
AT_ONCE = 64  # prompts that are answered in one batch, if there is memory for their answers
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


def cost_of(config: Config, counts: Counts, steps: int, strategy: Strategy) -> Cost:
    """The cost of a run of so many steps on these rows."""
    of_pair, refers = counts.shared_tokens / counts.train_pairs, strategy.refers
    an_answer, prompts = SAMPLED * config.max_new_tokens, counts.eval_prompts
    scored = SCORED / 2 if strategy.gives_rewards else SCORED  # a reward model has no reference
    scored *= 1 + strategy.mismatches
    measured = scored * counts.eval_pairs * of_pair + refers * an_answer * min(config.kl_prompts, prompts)
    answered = 0.0 if strategy.gives_rewards else 2 * an_answer * min(answered_prompts(config), prompts)
    times = _evaluations(config, counts, steps, strategy)
    return Cost(_training(config, counts, steps, strategy), times * measured + answered)


def _evaluations(config: Config, counts: Counts, steps: int, strategy: Strategy) -> int:
    """The evaluations of so many steps."""
    units, uses = counts.train_pairs, 1
    if strategy.generates:
        units, uses = counts.train_prompts * config.num_generations, config.num_iterations
    batches = math.ceil(units / config.per_device_train_batch_size)
    of_epoch = uses * math.ceil(batches / config.gradient_accumulation_steps)  # a last, incomplete step is one too
    return math.ceil(steps / (config.eval_steps or of_epoch))


def passes_of(config: Config, counts: Counts, steps: int, strategy: Strategy, rows: int) -> tuple[float, float]:
    """How often all blocks run, forward or backward, in a training of so many rows and in its evaluations.

    Each time they come to the device, where they are not there. A batch of answers takes all blocks for each token.
    """
    units = steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    once = min(1.0, counts.train_pairs / units)  # a reference is computed once
    training = rows * (2.0 + strategy.refers * once + strategy.mismatches * (1 + once))
    an_answer = config.max_new_tokens
    if strategy.generates:
        training += (2 + strategy.refers + an_answer) * math.ceil(units / config.num_iterations / AT_ONCE)
    scored = math.ceil(counts.eval_pairs / config.per_device_eval_batch_size) * (1 + strategy.refers)
    sampled = strategy.refers * an_answer * math.ceil(min(config.kl_prompts, counts.eval_prompts) / AT_ONCE)
    answered = 0 if strategy.gives_rewards or not counts.eval_prompts else 2 * an_answer
    return training, _evaluations(config, counts, steps, strategy) * (scored + sampled) + answered


def _training(config: Config, counts: Counts, steps: int, strategy: Strategy) -> float:
    """The cost of the steps. A sample is drawn once, and scored by the policy, by the reference and by what rewards it."""
    units = steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    a_token = TRAINED + RECOMPUTED * (config.gradient_checkpointing is True)
    if strategy.generates:
        prompt = (counts.train_tokens - counts.shared_tokens) / counts.train_pairs
        drawn, tokens = units / config.num_iterations, prompt + config.max_new_tokens
        return a_token * units * tokens + drawn * (3 * REFERENCE * tokens + SAMPLED * config.max_new_tokens)
    of_pair = counts.shared_tokens / counts.train_pairs
    # Answers to other prompts are scored by the policy in each step, and by the reference once.
    others = strategy.mismatches * (units + min(units, counts.train_pairs))
    return of_pair * (a_token * units + REFERENCE * (strategy.refers * min(units, counts.train_pairs) + others))


def compared_with_pairs(config: Config, tokens: float) -> float:
    """The cost of a step that samples answers, over that of a step of dpo on as many pairs. A row of the data has so many
    tokens, half of them in its prompt: an estimate before the rows are tokenised."""
    prompt, new = tokens / 2, config.max_new_tokens
    sample = (prompt + new) * (TRAINED + 3 * REFERENCE / config.num_iterations) + SAMPLED * new / config.num_iterations
    pair = (prompt + 2 * tokens / 2) * (TRAINED + REFERENCE)
    return sample / pair


def affordable_prompts(config: Config, counts: Counts, steps: int, strategy: Strategy) -> int:
    """The most held-out prompts, up to those of the config, whose answers keep the evaluations within their share; at least
    `FEWEST`, as far as there are so many. Whether a step computes states again depends on the machine, and does not count."""
    most = min(config.kl_prompts, counts.eval_prompts)
    for prompts in range(most, FEWEST, -1):
        tried = config.replaced({"kl_prompts": prompts, "gradient_checkpointing": False})
        if cost_of(tried, counts, steps, strategy).is_within_share:
            return config.kl_prompts if prompts == most else prompts
    return config.kl_prompts if most <= FEWEST else FEWEST
