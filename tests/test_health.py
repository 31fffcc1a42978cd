"""Rules of health: each by hand, and trainings that are spoilt on purpose; a healthy one raises no warning and no stop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import line_of
from conftest import ROOT, made_row

from dpo_cli.commands.train import train
from dpo_cli.config.config import load
from dpo_cli.config.schema import options
from dpo_cli.errors import Exit
from dpo_cli.evaluation.metrics import Scores
from dpo_cli.hardware.machine import probe
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.plan import Counts, Plan, Rounding
from dpo_cli.plan.preflight import inspect
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.results.intervals import Interval
from dpo_cli.strategies.strategies import STRATEGIES
from dpo_cli.training.callbacks.health_rules import NOT_AT_REFERENCE, NOT_FINITE, RULES, Course, watching, wrong_start
from dpo_cli.training.dpo_trainer import PairTrainer
from dpo_cli.ui.console import Console

COUNTS = Counts(80, 0, 80, 0, 0, 0, 0, 0, 9, "", 9, 9, 9, 9, 9, "", False)
STEP = {"loss": 0.6, "accuracy": 0.7, "margin": 0.5, "reward_chosen": 0.3, "reward_rejected": -0.2, "logp_chosen": -97.0}


def plan(tmp_path: Path, **options: object) -> Plan:
    """Of 80 pairs, 8 a step, two epochs: 20 steps, of which the last eight are the recent ones."""
    config = tmp_path / "rules.json"
    values = {"model_name": "m", "dataset": "d", "device": "cpu", "bf16": False, "num_train_epochs": 2}
    values |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, **options}
    config.write_text(json.dumps(values), encoding="utf-8")
    return resolve(load(str(config)), probe(), COUNTS)


def spoken(course: Course) -> list[str]:
    return [name for name, (_, rule) in watching(course.plan.strategy).items() if rule(course) is not None]


def steps(count: int, **figures: Any) -> list[dict[str, float]]:
    """Steps with these figures, each a number or a function of the step from 0."""
    return [{**STEP, **{name: f(i) if callable(f) else f for name, f in figures.items()}} for i in range(count)]


@pytest.mark.parametrize(
    ("made", "rules"),
    [
        (steps(20), []),
        (steps(3, loss=math.nan), ["not-finite"]),
        # 16 differences of 1.3 are more than 2 * 0.6, of 1.1 they are not; 15 are too few
        (steps(17, loss=lambda i: 0.6 + 1.3 * (i % 2)), ["loss-oscillates"]),
        (steps(17, loss=lambda i: 0.6 + 1.1 * (i % 2)), []),
        (steps(16, loss=lambda i: 0.6 + 1.3 * (i % 2)), []),
        # 1 nat at beta 0.1 is a margin of 0.1
        (steps(8, margin=-0.11), ["prefers-rejected"]),
        (steps(8, margin=-0.09), []),
        (steps(7, margin=-0.5), []),
        # eight steps of 0.2 and -0.6 have a mean of -0.2, sd 0.43, an error of 0.15: -0.2 is 1.3 of them
        (steps(8, margin=lambda i: 0.2 - 0.8 * (i % 2)), []),
        # an epoch is 10 steps: 10 right ones in a row are a whole one; after 0.75 * 20 = 15 steps it is not early
        (steps(20, accuracy=1.0), []),
        # the reference: -210 - (-11) / 0.1 = -100; twice as unlikely is less than -200
        (steps(8, logp_chosen=-210.0, reward_chosen=-11.0), ["chosen-collapses"]),
        (steps(8, logp_chosen=-190.0, reward_chosen=-9.0), []),
        (steps(8, logp_chosen=-6.0, reward_chosen=-0.4), []),  # from -2: three times, and 4 nats
        # chosen reward -0.2, before it 0.3; margin 0.9, before it 0.5
        (steps(16, reward_chosen=lambda i: 0.3 - 0.5 * (i > 7), margin=lambda i: 0.5 + 0.4 * (i > 7)), ["chosen-falls"]),
        (steps(16, reward_chosen=lambda i: 0.3 - 0.5 * (i > 7), margin=0.5), []),
        # 0.5 nats at beta 0.1 are a reward of 0.05
        (steps(20, reward_chosen=0.04, reward_rejected=-0.04), ["no-movement"]),
        (steps(20, reward_chosen=0.04, reward_rejected=-0.06), []),
        (steps(20, reward_chosen=lambda i: 0.2 - 0.4 * (i % 2), reward_rejected=0.0), []),  # 0 on average, and it moved
        (steps(19, reward_chosen=0.04, reward_rejected=-0.04), []),  # it is asked at the end
    ],
)
def test_rules_by_hand(tmp_path: Path, made: list[dict[str, float]], rules: list[str]) -> None:
    assert spoken(Course(plan(tmp_path), made)) == rules


SAMPLED = {
    **{"loss": 0.0, "reward": 1.0, "reward_spread": 0.5, "kl_sampled": 2.0, "entropy": 3.0, "sample_tokens": 40.0},
    "length_correlation": 0.1,
}


def sampled(count: int, **figures: Any) -> list[dict[str, float]]:
    """Steps of rlhf with these figures, each a number or a function of the step from 0."""
    return [{**SAMPLED, **{name: f(i) if callable(f) else f for name, f in figures.items()}} for i in range(count)]


@pytest.mark.parametrize(
    ("made", "rules"),
    [
        (sampled(16), []),
        (sampled(8, reward_spread=0.0), ["no-variance"]),
        (sampled(7, reward_spread=0.0), []),
        (sampled(8, reward_spread=lambda i: 0.1 * (i == 7)), []),
        # the first 4 steps have 40 tokens, the last 8 have 50: a quarter more; 47 are 17.5 % more; -0.9 is for shorter answers
        (sampled(16, sample_tokens=lambda i: 40 + 10 * (i > 7), length_correlation=0.9), ["reward-hacks-length"]),
        (sampled(16, sample_tokens=lambda i: 40 + 7 * (i > 7), length_correlation=0.9), []),
        (sampled(16, sample_tokens=lambda i: 40 + 10 * (i > 7), length_correlation=0.7), []),
        (sampled(16, sample_tokens=lambda i: 40 + 10 * (i > 7), length_correlation=-0.9), []),
        (sampled(16, sample_tokens=lambda i: 40 - 10 * (i > 7), length_correlation=-0.9), ["reward-hacks-length"]),
        # 2 of 8 recent steps are at 40: 28 of 32 pairs of steps with a tie half, 7/8 < 0.9
        (sampled(16, sample_tokens=lambda i: 40 + 20 * (7 < i < 14), length_correlation=0.9), []),
        (sampled(16, entropy=lambda i: 3 - 2.2 * (i > 7)), ["entropy-collapses"]),  # 0.8 of 3 is 27 %
        (sampled(16, entropy=lambda i: 3 - 2.0 * (i > 7)), []),
        (sampled(16, reward=lambda i: 1 + (i > 7), kl_sampled=lambda i: 2 + 9 * (i > 7)), ["reward-against-kl"]),
        (sampled(16, reward=lambda i: 1 - (i > 7), kl_sampled=lambda i: 2 + 9 * (i > 7)), []),
        (sampled(40, kl_sampled=0.0), ["no-movement"]),
    ],
)
def test_rules_of_samples_by_hand(tmp_path: Path, made: list[dict[str, float]], rules: list[str]) -> None:
    """80 prompts, 8 samples a step in two groups of 4: 40 steps an epoch; the last 8 steps are the recent ones."""
    ours = plan(tmp_path, strategy="rlhf", reward_functions=["shorter"], num_train_epochs=1)
    assert spoken(Course(ours, made)) == rules


def test_the_reward_of_held_out_pairs_and_prompts_by_hand(tmp_path: Path) -> None:
    """An accuracy whose interval reaches 0.5 is chance for a model; a rule is wrong if it is below. Four prompts fall by 1, 2,
    3 and 2: by 2 on average, sd 0.816, an error of 0.41. By -1, 2, 3 and 0 they fall by 1, with an error of 0.91."""
    ours = plan(tmp_path, strategy="rlhf", reward_functions=["shorter"])
    of_model = replace(ours, config=ours.config.replaced({"reward_model": "a/b"}))
    for one, low, high, rules in (
        *((of_model, 0.5, 0.9, ["reward-is-wrong"]), (of_model, 0.51, 0.9, [])),
        *((ours, 0.5, 0.9, []), (ours, 0.3, 0.49, ["reward-is-wrong"])),
    ):
        course = Course(one, sampled(16))
        course.reward_accuracy = Interval(0.7, low, high)
        assert spoken(course) == rules
    best = [5.0, 5.0, 5.0, 5.0]
    for last, recent, rules in (
        ([4.0, 3.0, 2.0, 3.0], 2.0, ["held-out-reward-falls"]),
        ([4.0, 3.0, 2.0, 3.0], 1.0, []),  # the reward of samples does not rise
        ([6.0, 3.0, 2.0, 5.0], 2.0, []),
    ):
        course = Course(ours, sampled(16, reward=lambda i, r=recent: r if i > 7 else 1.0))
        for rewards in ([1.0, 1.0, 1.0, 1.0], best, [4.9, 4.9, 4.9, 4.9], last):
            course.see_held_out(rewards)
        assert spoken(course) == rules and course.rewards == [best, last]
        again = Course(ours, sampled(16))
        again.restore(course.state())
        assert again.rewards == [best, last]


@pytest.mark.parametrize(
    ("made", "pair", "response", "rules"),
    [
        # the mean of 64 pairs: 0.1 * 1 nat / 8 = 0.0125, five times that is 0.06; of 2 nats 0.125
        (steps(8, margin=-0.11), 1.0, 0.1, ["prefers-rejected"]),
        (steps(8, margin=-0.11), 2.0, 0.1, []),
        # five times 0.1 * 5 nats / 8 is 0.31, of 8 nats 0.5; the reward falls by 0.5, the margin grows by 0.4
        (
            steps(16, reward_chosen=lambda i: 0.3 - 0.5 * (i > 7), margin=lambda i: 0.5 + 0.4 * (i > 7)),
            5.0,
            0.1,
            ["chosen-falls"],
        ),
        (steps(16, reward_chosen=lambda i: 0.3 - 0.5 * (i > 7), margin=lambda i: 0.5 + 0.4 * (i > 7)), 8.0, 0.1, []),
        # 0.5 nats are "hardly moved": rounding of 0.4 nats is less, of 0.6 more
        (steps(20, reward_chosen=0.04, reward_rejected=-0.04), 0.1, 0.4, ["no-movement"]),
        (steps(20, reward_chosen=0.04, reward_rejected=-0.04), 0.1, 0.6, []),
    ],
)
def test_no_rule_fires_within_the_rounding(
    tmp_path: Path, made: list[dict[str, float]], pair: float, response: float, rules: list[str]
) -> None:
    assert spoken(Course(plan(tmp_path).with_rounding(Rounding(response, pair)), made)) == rules


def test_rewards_of_exactly_0_are_seen_in_few_steps(tmp_path: Path) -> None:
    """A step is measured before it is taken, and the first of a warm-up has the rate 0: an evaluation or a later step tells."""
    still = {"reward_chosen": 0.0, "reward_rejected": 0.0}
    for warmup, count, evaluation, rules in [
        (0, 1, None, []),
        (0, 1, {**still, "step": 1}, ["no-movement"]),
        (0, 2, None, ["no-movement"]),
        (0, 2, {"step": 2, "reward_chosen": 1e-6, "reward_rejected": 0.0}, []),
        (1, 2, None, []),
        (1, 2, {**still, "step": 2}, ["no-movement"]),
        (1, 3, {**still, "step": 2}, ["no-movement"]),
    ]:
        made = plan(tmp_path, max_steps=count, warmup_ratio=0.0, **({"warmup_steps": warmup} if warmup else {}))
        course = Course(made, steps(count, margin=0.0, **still), line_of(**evaluation) if evaluation else None)
        assert spoken(course) == rules, (warmup, count, evaluation)
    moved = [*steps(1, **still), *steps(1, reward_chosen=0.001)]
    assert spoken(Course(plan(tmp_path, max_steps=2, warmup_ratio=0.0), moved)) == []


def test_a_rising_loss_of_sft(tmp_path: Path) -> None:
    """2.0 to 2.6 is more than a quarter; where steps differ by 2 nats, eight of them do not show it."""
    made = plan(tmp_path, strategy="sft")
    rising = [{"loss": 2.0 if i < 8 else 2.6, "token_accuracy": 0.5} for i in range(16)]
    assert spoken(Course(made, rising)) == ["loss-rises"]
    assert spoken(Course(made, rising[:15])) == []
    noisy = [{"loss": step["loss"] + (1 if i % 2 else -1), "token_accuracy": 0.5} for i, step in enumerate(rising)]
    assert spoken(Course(made, noisy)) == []
    assert spoken(Course(made, [{"loss": 2.0 if i < 8 else 2.4, "token_accuracy": 0.5} for i in range(16)])) == []


def test_chance_is_no_warning(tmp_path: Path) -> None:
    """Steady trainings of 300 steps, whose margins are drawn for each pair: batches of 1, 4 and 8, 70 to 85 % right."""
    draws = np.random.default_rng(0)
    for batch, mean, spread in [(1, 1.0, 1.5), (1, 1.5, 2.0), (4, 1.5, 2.0), (8, 1.0, 2.0)]:
        made = plan(tmp_path, per_device_train_batch_size=batch, max_steps=300)
        for _ in range(5):
            course, found = Course(made), set()
            for i in range(300):
                margin = draws.normal(mean, spread, batch) if i else np.zeros(batch)
                figures = {"loss": np.logaddexp(0, -margin).mean(), "accuracy": (margin > 0).mean(), "margin": margin.mean()}
                course.add({**STEP, **{name: float(value) for name, value in figures.items()}})
                found |= set(spoken(course))
            assert not found, (batch, mean, spread)


def test_an_infinite_gradient_of_fp16_is_its_scaler_at_work(tmp_path: Path) -> None:
    for fp16, rules in [(False, ["not-finite"]), (True, [])]:
        course = Course(plan(tmp_path, fp16=fp16), steps(3))
        course.line = line_of(grad_norm=math.inf)
        assert spoken(course) == rules


def test_all_right_is_memory_only_where_nothing_held_out_says_otherwise(tmp_path: Path) -> None:
    """Four epochs of 10 steps: 20 steps are a second pass, and before 0.75 * 40."""
    made = plan(tmp_path, num_train_epochs=4)
    right = steps(20, accuracy=lambda i: float(i > 9))
    assert spoken(Course(made, right)) == ["all-right-early"]
    assert spoken(Course(made, right[:19])) == []
    assert spoken(Course(made, right, line_of(accuracy=0.85))) == ["all-right-early"]
    assert spoken(Course(made, right, line_of(accuracy=0.95))) == []


def test_a_dataset_of_one_step_is_learned_by_heart_at_once(tmp_path: Path) -> None:
    made = plan(tmp_path, per_device_train_batch_size=80, num_train_epochs=3)
    right = steps(3, accuracy=lambda i: float(i > 0))
    assert spoken(Course(made, right)) == ["all-right-early"] and spoken(Course(made, right[:2])) == []


def test_a_long_training_takes_no_more_memory(tmp_path: Path) -> None:
    course = Course(plan(tmp_path), steps(1000))
    assert course.done == 1000 and len(course.first) == 8 and len(course.last) == 32


def test_max_kl_is_a_limit_on_what_was_sampled(tmp_path: Path) -> None:
    for limit, kl, rules in [(10, 10.0, []), (10, 10.1, ["kl"]), (3, 4.0, ["kl"]), (None, 99.0, []), (10, None, [])]:
        course = Course(plan(tmp_path, max_kl=limit), steps(6), line_of(accuracy=0.9, kl_sequence=kl))
        assert spoken(course) == rules, (limit, kl)


def test_a_policy_that_is_not_its_reference_is_told_of(tmp_path: Path) -> None:
    """Two responses of 10 tokens: 0.019 and 0 nats apart are less than 0.001 a token, which rounding may cost; 0.04 are not."""
    made = plan(tmp_path)

    def scores(apart: float) -> Scores:
        policy, nothing = np.array([[-10.0, -20.0]]), np.zeros((1, 2))
        return Scores(policy, policy + np.array([[apart, 0.0]]), nothing, nothing, np.full((1, 2), 10.0), nothing)

    assert wrong_start(scores(0.0), made) is None and wrong_start(scores(0.019), made) is None
    event = wrong_start(scores(-0.04), made)
    assert event is not None and event.action == "stop" and "0.002 nats per token" in event.message
    broken = wrong_start(scores(math.nan), made)
    assert broken is not None and broken.rule == NOT_FINITE


def test_the_schema_and_the_page_of_rules_know_every_rule() -> None:
    enum = options()["stop_on"].rule["items"]["enum"]
    assert enum == [name for name, (action, _) in RULES.items() if action != "stop"]
    assert {name for strategy in STRATEGIES.values() for name in strategy.health} == set(RULES)
    page = (ROOT / "docs" / "reference" / "health-rules.md").read_text(encoding="utf-8")
    assert not [name for name in (*RULES, NOT_AT_REFERENCE) if f"| `{name}` |" not in page]


Trained = Callable[..., tuple[list[dict[str, Any]], Exit, Path]]


@pytest.fixture
def trained(tmp_path: Path, tiny_model_dir: Path) -> Trained:
    """Trains three epochs over 77 of 96 pairs, 4 a step, for real: its events, the exit code, and the run directory."""
    values = {"model_name": str(tiny_model_dir), "dataset": str(tmp_path / "pairs.jsonl"), "device": "cpu", "bf16": False}
    values |= {"fp16": False, "lora_r": 4, "learning_rate": 3e-3, "eval_split": 0.2, "num_train_epochs": 3}
    values |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "kl_prompts": 16, "max_new_tokens": 16}

    def start(pairs: int = 96, **options: object) -> tuple[list[dict[str, Any]], Exit, Path]:
        rows = (json.dumps(made_row(2 * i)) + "\n" for i in range(pairs))
        (tmp_path / "pairs.jsonl").write_text("".join(rows), encoding="utf-8")
        config, place = tmp_path / "config.json", tmp_path / "run"
        config.write_text(json.dumps({**values, "output_dir": str(place), **options}), encoding="utf-8")
        loaded = load(str(config))
        summary, code = train(loaded, inspect(loaded, probe()), probe(), Console(), overwrite=True, dry_run=False)
        assert (place / "adapter" / "adapter_model.safetensors").is_file()  # saved, however it ended
        assert json.loads((place / "metrics.json").read_text(encoding="utf-8"))["health"] == summary["health"]
        return summary["health"], code, place

    return start


def actions(events: list[dict[str, Any]]) -> dict[str, str]:
    return {event["rule"]: event["action"] for event in events}


def test_a_healthy_training_raises_nothing(trained: Trained) -> None:
    events, code, place = trained()
    assert code is Exit.DONE and not {"warn", "stop"} & set(actions(events).values())
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kl = [line["kl_token"] for line in lines if line["split"] == "eval"]
    assert len(kl) == 3 and 0 < kl[0] < kl[-1]  # it learned something
    assert all(line["kl_sequence"] < 10 for line in lines if line["split"] == "eval")


def test_a_learning_rate_100_times_too_high(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    events, code, _ = trained(learning_rate=3e-1)
    assert code is Exit.DONE and actions(events) == {"kl": "warn"}
    told = capsys.readouterr().out
    assert "warn [kl] the KL per sampled answer is" in told and "lower learning_rate" in told


def test_stop_on_ends_with_what_there_is(trained: Trained) -> None:
    """After the first of three epochs; the adapter is judged, since its figures mean something."""
    events, code, place = trained(learning_rate=3e-1, stop_on=["kl"])
    summary = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    assert code is Exit.MISSED and actions(events) == {"kl": "stop"} and events[0]["step"] == summary["steps"] == 20
    assert summary["status"] == "unhealthy" and summary["eval"]["kl_sequence"]["value"] > 10


def spoil(monkeypatch: pytest.MonkeyPatch, how: Callable[[PairTrainer, Any], Any]) -> None:
    """Let each micro-batch, or its loss, pass through `how` before it is trained on."""
    real = PairTrainer.compute_loss

    def compute_loss(self: PairTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        spoilt = how(self, inputs)
        if isinstance(spoilt, float):
            return real(self, model, inputs, *args, **kwargs) * spoilt
        return real(self, model, spoilt, *args, **kwargs)

    monkeypatch.setattr(PairTrainer, "compute_loss", compute_loss)


def test_labels_that_are_flipped_half_way(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap_late(trainer: PairTrainer, inputs: Any) -> Any:
        if trainer.state.global_step < 30:
            return inputs
        trainer.reference.known.zero_()  # what is kept is of the labels as they were
        return {
            name: torch.cat(value.chunk(2)[::-1]) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }

    spoil(monkeypatch, swap_late)
    events, code, _ = trained()
    found = {event["rule"]: event for event in events}
    assert code is Exit.DONE and found["prefers-rejected"]["action"] == "warn" and found["prefers-rejected"]["step"] > 30
    assert "chosen and rejected are not swapped" in found["prefers-rejected"]["remedy"]


def test_a_loss_that_is_no_number(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda trainer, inputs: math.nan if trainer.state.global_step == 7 else inputs)
    events, code, place = trained(logging_steps=10)  # the spoilt gradient of step 8 is seen by the loss of step 9
    summary = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    assert code is Exit.MISSED and actions(events) == {"not-finite": "stop"}
    assert summary["status"] == "unhealthy" and summary["steps"] == 9 and summary["eval"] is None
    (line,) = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert line["split"] == "train" and line["step"] == 9 and line["loss"] is None  # it has a line, and no evaluation follows
    assert "not-finite" in (place / "train.log").read_text(encoding="utf-8")


def test_one_pair_is_learned_by_heart(trained: Trained) -> None:
    events, _, place = trained(pairs=1, eval_split=0)  # three epochs, as documented, are three steps
    assert actions(events) == {"all-right-early": "warn"}
    assert json.loads((place / "metrics.json").read_text(encoding="utf-8"))["steps"] == 3


def test_a_training_that_does_not_start_at_its_reference(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider of a run that continues an adapter, changed so that the frozen copy is another one."""
    ready = HuggingFace.ready

    def moved(self: HuggingFace, model: Any, plan: Plan) -> None:
        ready(self, model, plan)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1)

    monkeypatch.setattr(HuggingFace, "ready", moved)
    events, code, place = trained()
    assert code is Exit.MISSED and actions(events) == {"not-at-reference": "stop"}
    assert json.loads((place / "metrics.json").read_text(encoding="utf-8"))["steps"] == 0
