"""What an evaluation costs against its training, and how many answers it samples by default."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_plan import COUNTS as PLANNED

from dpo_cli.config.config import load
from dpo_cli.config.options import Config
from dpo_cli.plan.cost import Cost, affordable_prompts, answered_prompts, compared_with_pairs, cost_of
from dpo_cli.strategies.dpo import DPO
from dpo_cli.strategies.rlhf import RLHF
from dpo_cli.strategies.sft import SFT

COUNTS = replace(PLANNED, train_pairs=100, eval_pairs=20, eval_prompts=20, shared_tokens=40_000)  # 400 a pair


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    values = {"model_name": "m", "dataset": "d", "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}
    return load({**values, "max_new_tokens": 50, "kl_prompts": 64, "bf16": False, "gradient_checkpointing": False}).require()


def test_the_cost_by_hand(config: Config) -> None:
    """10 steps of 10 pairs: 2.5 x 100 x 400 for the policy, 1 x 100 x 400 for the reference. An evaluation scores
    2 x 20 x 400, and samples 20 answers of 50 tokens at 8 each; at the end 2 x 20 answers more."""
    training, scored, sampled = 100_000 + 40_000, 16_000, 20 * 50 * 8
    assert cost_of(config, COUNTS, 10, DPO) == Cost(training, scored + sampled + 2 * sampled)
    demonstrations = cost_of(config, COUNTS, 10, SFT)  # no reference, and no kl_sequence
    assert demonstrations == Cost(100_000, scored + 2 * sampled)
    recomputed = cost_of(config.replaced({"gradient_checkpointing": True}), COUNTS, 10, DPO)
    assert recomputed.training == training + 40_000


@pytest.mark.parametrize(
    ("steps", "eval_steps", "times"),
    [(10, None, 1), (30, None, 3), (25, None, 3), (4, None, 1), (10, 5, 2), (10, 4, 3), (10, 10, 1), (10, 11, 1)],
)
def test_each_evaluation_counts(config: Config, steps: int, eval_steps: int | None, times: int) -> None:
    """After each epoch, or each `eval_steps`, and after the last step, which is evaluated once."""
    cost = cost_of(config.replaced({"eval_steps": eval_steps}), COUNTS, steps, DPO)
    assert cost.evaluation == times * (16_000 + 20 * 50 * 8) + 2 * 20 * 50 * 8


def test_an_incomplete_last_step_belongs_to_its_epoch(config: Config) -> None:
    """95 pairs are 10 steps of 10."""
    counts = replace(COUNTS, train_pairs=95, shared_tokens=38_000)
    one, two = (cost_of(config, counts, steps, DPO).evaluation for steps in (10, 11))
    assert two - one == 16_000 + 20 * 50 * 8


def test_the_most_prompts_that_a_quarter_pays_for(config: Config) -> None:
    """20 steps: a quarter of 2.5 x 200 x 400 + 40,000 is 60,000. Two evaluations score 32,000. The rest is 28,000: each
    prompt is sampled twice for kl_sequence and answered twice, 4 x 400 tokens: 17 prompts cost 27,200 and 18 cost 28,800."""
    counts = replace(COUNTS, eval_prompts=40)
    assert affordable_prompts(config, counts, 20, DPO) == 17
    checkpointing = config.replaced({"gradient_checkpointing": True})  # which the memory of a machine decides
    assert affordable_prompts(checkpointing, counts, 20, DPO) == 17
    assert affordable_prompts(config, counts, 1, DPO) == 16  # the fewest
    assert affordable_prompts(config, replace(counts, train_pairs=10_000, shared_tokens=4_000_000), 1000, DPO) == 64
    assert affordable_prompts(config, replace(counts, eval_prompts=9), 1, DPO) == 64  # fewer would save nothing
    assert affordable_prompts(config.replaced({"kl_prompts": 3}), counts, 1, DPO) == 3


@pytest.mark.parametrize(("kl_prompts", "answered"), [(0, 16), (16, 16), (20, 20), (64, 32)])
def test_as_many_are_answered(config: Config, kl_prompts: int, answered: int) -> None:
    assert answered_prompts(config.replaced({"kl_prompts": kl_prompts})) == answered


def test_seconds() -> None:
    """A token takes 2 x 10 operations of 100 a second, of which a training reaches a half."""
    assert Cost(10, 5).seconds(10, 100) == (4.0, 2.0)


def test_a_sample_costs_more_than_a_pair_by_hand(config: Config) -> None:
    """Rows of 100 tokens, 50 of them the prompt, answers of 20: a sample takes 70 * (2.5 + 3) + 8 * 20 = 545 forward tokens, a
    pair (50 + 2 * 50) * (2.5 + 1) = 525. Used for two steps, drawing and scoring count half: 70 * (2.5 + 1.5) + 80 = 360."""
    config = config.replaced({"max_new_tokens": 20})
    assert compared_with_pairs(config.replaced({"num_iterations": 1}), 100) == 545 / 525
    assert compared_with_pairs(config.replaced({"num_iterations": 2}), 100) == 360 / 525


def test_samples_cost_what_is_drawn_scored_and_trained_on_by_hand(config: Config) -> None:
    """3 steps of 8 samples: 24 samples of 70 + 20 tokens at 2.5 + 3 forward passes, and 24 * 20 drawn tokens at 8 each.

    The prompts of the pairs have (4000 - 2600) / 20 = 70 tokens.
    """
    config = config.replaced({"max_new_tokens": 20, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1})
    counts = replace(PLANNED, train_pairs=20, train_tokens=4000, shared_tokens=2600)
    assert cost_of(config, counts, 3, RLHF).training == 24 * 90 * 5.5 + 24 * 20 * 8
