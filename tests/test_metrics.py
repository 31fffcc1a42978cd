"""The figures by hand, and their intervals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import made_row, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from dpo_cli.data.rows import to_pair
from dpo_cli.data.tokens import encode
from dpo_cli.evaluation.bootstrap import Intervals
from dpo_cli.evaluation.metrics import Scores, figures, point_figures, score_rows
from dpo_cli.hardware.memory import EvaluationRoom
from dpo_cli.providers.policy import Policy
from dpo_cli.results.intervals import Interval
from dpo_cli.scoring import forward, shared_prompts

# Pair 1: pi = (-10, -12), ref = (-11, -10), tokens (5, 2). Pair 2: pi = (-8, -6), ref = (-8, -6), tokens (4, 2).
SCORES = Scores(
    policy=np.array([[-10.0, -12], [-8, -6]]),
    reference=np.array([[-11.0, -10], [-8, -6]]),
    policy_right=np.array([[4.0, 1], [2, 0]]),
    reference_right=np.array([[3.0, 1], [2, 0]]),
    tokens=np.array([[5.0, 2], [4, 2]]),
    kl=np.array([[1.0, 0.5], [0, 0.1]]),
)


def test_figures_by_hand() -> None:
    """beta 0.1.

    margins: 0.1 * ((-10 + 11) - (-12 + 10)) = 0.3 and 0; mean 0.15. accuracy: 1 and a tie, mean 0.75.
    loss: (ln(1 + e^-0.3) + ln 2) / 2. kl_token: (1 + 0.5 + 0 + 0.1) / (5 + 2 + 4 + 2) = 1.6 / 13.
    logp_accuracy: policy -10 > -12 yes, -8 > -6 no: 0.5; base -11 > -10 no, no: 0. Gain 0.5.
    normalized: policy -2 > -6 yes, -2 > -3 yes: 1; base -2.2 > -5 yes, yes: 1. Gain 0.
    """
    made = figures(SCORES, ["a", "b"], 0.1)
    values = {side: {k: f.value for k, f in made.of(side).items() if f} for side in ("policy", "base", "gain")}
    loss = (math.log(1 + math.exp(-0.3)) + math.log(2)) / 2
    assert values["policy"] == pytest.approx(
        {"accuracy": 0.75, "margin": 0.15, "loss": loss, "kl_token": 1.6 / 13}
        | {"logp_accuracy": 0.5, "normalized_logp_accuracy": 1.0}
    )
    assert values["base"] == pytest.approx({"logp_accuracy": 0.0, "normalized_logp_accuracy": 1.0})
    assert values["gain"] == pytest.approx({"logp_accuracy": 0.5, "normalized_logp_accuracy": 0.0})
    assert point_figures(SCORES, 0.1) == pytest.approx(
        {"loss": loss, "accuracy": 0.75, "margin": 0.15, "kl_token": 1.6 / 13}
        | {"reward_chosen": 0.05, "reward_rejected": -0.1, "logp_chosen": -9, "logp_rejected": -9}
    )


def test_interval_draws_whole_prompts() -> None:
    """Four pairs of one prompt are one observation: with one prompt the interval is the value itself."""
    values = np.array([1.0, 0, 1, 0])
    one = Intervals(["a"] * 4).of((values, np.ones(4)))
    assert one == Interval(0.5, 0.5, 0.5)
    four = Intervals(list("abcd")).of((values, np.ones(4)))
    assert four.low == 0 and four.high == 1


def test_interval_covers_a_known_mean() -> None:
    """A 95 % interval over 50 prompts covers the true mean in about 95 of 100 samples; fewer than 85 would be wrong."""
    draws = np.random.default_rng(5)
    covered = 0
    for _ in range(100):
        values = draws.random(50)
        made = Intervals([str(i) for i in range(50)]).of((values, np.ones(50)))
        covered += made.low <= 0.5 <= made.high
    assert 85 <= covered <= 100


@pytest.mark.parametrize("states", [forward.plain_states, forward.shared_states])
def test_scores_equal_full_logits_pair_by_pair(tokenizer: PreTrainedTokenizerFast, states: forward.States) -> None:
    model = get_peft_model(tiny_model("llama", torch.float32), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    pairs = encode([to_pair(made_row(i), i) for i in range(5)], tokenizer)
    shared_prompts.enable(model.get_base_model())
    scores = score_rows(Policy(model), pairs, states, tokenizer.pad_token_id, batch_size=2, dtype=torch.float32)
    for i, pair in enumerate(pairs):
        for side, response in enumerate((pair.chosen_ids, pair.rejected_ids)):
            ids = torch.tensor([pair.prompt_ids + response])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0, len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
                with model.disable_adapter():
                    log_q = model(input_ids=ids).logits[0, len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
            targets = torch.tensor(response)[:, None]
            assert scores.policy[i, side] == pytest.approx(log_p.gather(-1, targets).sum().item(), abs=1e-3)
            assert scores.reference[i, side] == pytest.approx(log_q.gather(-1, targets).sum().item(), abs=1e-3)
            assert scores.kl[i, side] == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), abs=1e-3)
            assert scores.tokens[i, side] == len(response)


def test_a_batch_has_no_more_rows_than_there_is_room_for(tokenizer: PreTrainedTokenizerFast) -> None:
    model = get_peft_model(tiny_model("llama", torch.float32), LoraConfig(r=4, target_modules="all-linear"))
    pairs = encode([to_pair(made_row(i), i + 1) for i in range(7)], tokenizer)
    tokens: list[int] = []

    def states(base: object, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        tokens.append(labels.numel())
        return forward.plain_states(base, labels, **inputs)  # type: ignore[arg-type]

    longest = 2 * max(pair.length for pair in pairs)
    room = EvaluationRoom(free=3 * longest, moment=1.0, state=0.0, logits=0.0, cached=0.0, layers=0.0)
    whole = score_rows(Policy(model), pairs, forward.plain_states, 2, 7, torch.float32)
    parted = score_rows(Policy(model), pairs, states, 2, 7, torch.float32, room)
    assert max(tokens) <= 3 * longest and len(tokens) < 2 * len(pairs)  # policy and reference, in more than one batch
    np.testing.assert_allclose(whole.policy, parted.policy, rtol=1e-5)
    alone = score_rows(Policy(model), pairs, forward.plain_states, 2, 7, torch.float32, replace(room, free=1.0))
    np.testing.assert_allclose(whole.policy, alone.policy, rtol=1e-5)


def test_a_batch_that_is_out_of_memory_is_scored_in_halves(tokenizer: PreTrainedTokenizerFast) -> None:
    model = get_peft_model(tiny_model("llama", torch.float32), LoraConfig(r=4, target_modules="all-linear"))
    pairs = encode([to_pair(made_row(i), i + 1) for i in range(7)], tokenizer)
    rows: list[int] = []

    def states(base: object, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        rows.append(len(labels) // 2)
        if len(labels) > 4:
            raise torch.OutOfMemoryError("none left")
        return forward.plain_states(base, labels, **inputs)  # type: ignore[arg-type]

    whole = score_rows(Policy(model), pairs, forward.plain_states, 2, 7, torch.float32)
    parted = score_rows(Policy(model), pairs, states, 2, 7, torch.float32)
    assert rows[:3] == [7, 3, 1] and max(rows[3:]) <= 4
    np.testing.assert_allclose(whole.policy, parted.policy, rtol=1e-5)
    np.testing.assert_allclose(whole.kl, parted.kl, atol=1e-5)
