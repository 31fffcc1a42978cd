"""Rules of health: each by hand, and trainings that are spoilt on purpose; a healthy one raises no warning and no stop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, made_row

from dpo_cli.config.config import load
from dpo_cli.config.schema import options
from dpo_cli.console import Console
from dpo_cli.errors import Exit
from dpo_cli.evaluation.metrics import Scores
from dpo_cli.hardware.probe import probe
from dpo_cli.inspection import inspect
from dpo_cli.plan import Counts, Plan, resolve
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.training.callbacks import health
from dpo_cli.training.callbacks.health import RULES, Course, not_at_reference
from dpo_cli.training.dpo import PairTrainer
from dpo_cli.training.run import train

ALWAYS_STOP = {"not-finite", "not-at-reference"}
COUNTS = Counts(80, 0, 80, 0, 0, 0, 0, 0, 9, "", 9, 9, 9, 9)
STEP = {"loss": 0.6, "accuracy": 0.7, "margin": 0.5, "reward_chosen": 0.3, "reward_rejected": -0.2, "logp_chosen": -97.0}


def plan(tmp_path: Path, **options: object) -> Plan:
    """Of 80 pairs, 8 a step, two epochs: 20 steps, of which the last five are the recent ones."""
    config = tmp_path / "rules.json"
    values = {"model_name": "m", "dataset": "d", "device": "cpu", "bf16": False, "fp16": False, "num_train_epochs": 2}
    values |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, **options}
    config.write_text(json.dumps(values), encoding="utf-8")
    return resolve(load(str(config)), probe(), COUNTS)


def spoken(course: Course) -> list[str]:
    return [event.rule for event in filter(None, (rule(course) for rule in RULES))]


def steps(count: int, **figures: Any) -> list[dict[str, float]]:
    """Steps with these figures, each a number or a function of the step from 0."""
    return [{**STEP, **{name: f(i) if callable(f) else f for name, f in figures.items()}} for i in range(count)]


@pytest.mark.parametrize(
    ("made", "rules"),
    [
        (steps(20), []),
        (steps(3, loss=math.nan), ["not-finite"]),
        # |differences| are 0.8, more than the 0.6 of the first step, and their mean 1.0 is more than 1.25 * 0.6
        (steps(6, loss=lambda i: 0.6 + 0.8 * (i % 2)), ["loss-oscillates", "loss-rises"]),
        (steps(6, loss=lambda i: 0.6 + 0.6 * (i % 2)), ["loss-rises"]),  # 0.6 is not more; recent mean 0.96 > 0.75
        (steps(6, loss=lambda i: 0.6 + 0.1 * (i % 2)), []),
        (steps(10, loss=lambda i: 0.6 if i < 5 else 0.74), []),
        (steps(10, loss=lambda i: 0.6 if i < 5 else 0.76), ["loss-rises"]),
        # an epoch is 10 steps: all of the second one right, before 0.75 * 20 = 15 steps; 20 are too late
        (steps(15, accuracy=lambda i: float(i > 4)), []),
        (steps(20, accuracy=1.0), []),
        # the reference: -210 - (-11) / 0.1 = -100; twice as unlikely is less than -200
        (steps(5, logp_chosen=-210.0, reward_chosen=-11.0), ["chosen-collapses"]),
        (steps(5, logp_chosen=-190.0, reward_chosen=-9.0), []),
        # chosen reward -0.2, before it 0.3; margin 0.9, before it 0.5
        (steps(10, reward_chosen=lambda i: 0.3 - 0.5 * (i > 4), margin=lambda i: 0.5 + 0.4 * (i > 4)), ["chosen-falls"]),
        (steps(10, reward_chosen=lambda i: 0.3 - 0.5 * (i > 4), margin=0.5), []),
        # 0.2 nats at beta 0.1 are a margin of 0.02
        (steps(10, margin=0.01), ["no-movement"]),
        (steps(20, margin=-0.01), ["no-movement"]),
        (steps(10, margin=0.03), []),
        (steps(12, margin=0.01), []),  # it is asked half-way, and at the end
    ],
)
def test_rules_by_hand(tmp_path: Path, made: list[dict[str, float]], rules: list[str]) -> None:
    assert spoken(Course(plan(tmp_path), made)) == rules


def test_all_right_is_memory_only_where_nothing_held_out_says_otherwise(tmp_path: Path) -> None:
    """Four epochs of 10 steps: 20 steps are a second pass, and before 0.75 * 40."""
    course = Course(plan(tmp_path, num_train_epochs=4), steps(20, accuracy=lambda i: float(i > 3)))
    assert spoken(course) == ["all-right-early"]
    course.evaluation = {"accuracy": 0.85}
    assert spoken(course) == ["all-right-early"]
    course.evaluation = {"accuracy": 0.95}
    assert spoken(course) == []


def test_max_kl_is_a_limit_on_what_was_sampled(tmp_path: Path) -> None:
    for limit, kl, rules in [(10, 10.0, []), (10, 10.1, ["kl"]), (3, 4.0, ["kl"]), (None, 99.0, []), (10, None, [])]:
        course = Course(plan(tmp_path, max_kl=limit), steps(6), evaluation={"accuracy": 0.9, "kl_sequence": kl})
        assert spoken(course) == rules, (limit, kl)


def test_a_policy_that_is_not_its_reference_is_told_of(tmp_path: Path) -> None:
    """Two responses of 10 tokens: 0.02 and 0 nats apart are 0.001 a token, which rounding may cost; twice that is not."""
    made = plan(tmp_path)

    def scores(apart: float) -> Scores:
        policy, nothing = np.array([[-10.0, -20.0]]), np.zeros((1, 2))
        return Scores(policy, policy + np.array([[apart, 0.0]]), nothing, nothing, np.full((1, 2), 10.0), nothing)

    assert not_at_reference(scores(0.0), made) is None and not_at_reference(scores(0.019), made) is None
    event = not_at_reference(scores(-0.04), made)
    assert event is not None and event.action == "stop" and "0.002 nats a token" in event.message
    assert not_at_reference(scores(math.nan), made) is not None


def test_the_schema_and_the_readme_know_every_rule() -> None:
    """A rule is what some event is named: the names are read off the module's own text."""
    text = Path(health.__file__).read_text(encoding="utf-8")
    named = {part.split('"')[1] for part in (*text.split("course.event(")[1:], *text.split(" Event(")[1:]) if part[0] == '"'}
    assert len(named) == len(RULES) + 1
    assert set(options()["stop_on"].rule["items"]["enum"]) == named - ALWAYS_STOP
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [name for name in named if f"| `{name}` |" not in readme]


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
    kl = [line["kl_sequence"] for line in lines if line["split"] == "eval"]
    assert len(kl) == 3 and 0 < kl[0] < kl[-1] < 10  # it learned something


def test_a_learning_rate_100_times_too_high(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    events, code, _ = trained(learning_rate=3e-1)
    assert code is Exit.DONE and actions(events) == {"kl": "warn"}
    told = capsys.readouterr().out
    assert "warn [kl] the policy is" in told and "lower learning_rate" in told


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
        return {
            name: torch.cat(value.chunk(2)[::-1]) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }

    spoil(monkeypatch, swap_late)
    events, code, _ = trained()
    found = {event["rule"]: event for event in events}
    assert code is Exit.DONE and found["loss-rises"]["action"] == "warn" and found["loss-rises"]["step"] > 30
    assert "chosen and rejected swapped" in found["loss-rises"]["remedy"]


def test_a_loss_that_is_no_number(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda trainer, inputs: math.nan if trainer.state.global_step == 7 else inputs)
    events, code, place = trained()
    summary = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    assert code is Exit.MISSED and actions(events) == {"not-finite": "stop"}
    assert summary["status"] == "unhealthy" and summary["steps"] == 8 and summary["eval"] is None
    splits = [json.loads(line)["split"] for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert splits == ["train"] * 8  # nothing is evaluated after it


def test_one_pair_is_learned_by_heart(trained: Trained) -> None:
    events, _, _ = trained(pairs=1, eval_split=0, num_train_epochs=12)
    assert actions(events) == {"all-right-early": "warn"}


def test_a_training_that_does_not_start_at_its_reference(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider of a run that goes on from an adapter, changed so that the frozen copy is another one."""
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
