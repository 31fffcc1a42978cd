"""The precision that a processor is measured for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_cli.commands.train import train
from dpo_cli.config.config import load
from dpo_cli.hardware.machine import Gpu, Machine
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.preflight import inspect
from dpo_cli.providers import precision
from dpo_cli.providers.precision import bf16_speed, same_bits, with_bf16_speed
from dpo_cli.runs import open_run
from dpo_cli.ui.console import Console

CPU = Machine("cpu", 2, 16.0, gpus=(), is_apple=False)
Trained = Callable[..., dict[str, Any]]


@pytest.fixture
def wide_model_dir(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model whose products are large enough to be measured."""
    torch.manual_seed(0)
    place = tmp_path / "wide"
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "hidden_size": 128, "intermediate_size": 256})).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def trained(tmp_path: Path, wide_model_dir: Path, pairs_file: Callable[..., Path]) -> Trained:
    """Trains two steps on this machine, with an open precision; the plan.json of the run."""
    values: dict[str, object] = {
        "model_name": str(wide_model_dir),
        "dataset": str(pairs_file()),
        "device": "cpu",
        "max_steps": 2,
    }
    values |= {"lora_r": 4, "kl_prompts": 0, "max_new_tokens": 2, "save_steps": 1, "output_dir": str(tmp_path / "run")}

    def start(machine: Machine, resume: bool = False, **options: object) -> dict[str, Any]:
        config = tmp_path / "config.json"
        config.write_text(json.dumps({**values, **options}), encoding="utf-8")
        loaded = load(str(config))
        inspection = inspect(loaded, machine, with_fit=False).stricter(lambda found: found.stops_training)
        train(loaded, inspection, machine, Console(), resume=resume)
        plan: dict[str, Any] = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
        return plan

    return start


def hardware(run: Path) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["hardware"]
    return kept


def test_a_measurement_gives_a_ratio_and_leaves_no_trace() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert bf16_speed(128, 256) > 0
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert bf16_speed(32, 48) == 1  # too small for its products to matter


def test_the_ratio_is_that_of_the_fastest_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.6 seconds in float32 and 0.2 in bfloat16, in the best of several turns: 3 times as fast."""
    turns = {torch.float32: iter([9.0, 0.7, 0.6, 0.8]), torch.bfloat16: iter([9.0, 0.2, 0.3, 0.4])}
    monkeypatch.setattr(precision, "_seconds", lambda states, weight: next(turns[states.dtype]))
    monkeypatch.setattr(precision, "TURNS", 3)
    monkeypatch.setattr(precision, "BUDGET_S", 100.0)
    assert bf16_speed(128, 256) == pytest.approx(3.0)


def test_a_run_measures_its_precision_and_keeps_it(tmp_path: Path, trained: Trained) -> None:
    plan = trained(CPU)
    speed = hardware(tmp_path / "run")["bf16_speed"]
    measured = replace(CPU, bf16_speed=speed)
    assert measured.cpu_words in plan["notes"]
    assert plan["config"]["bf16"] is measured.cpu_has_bf16 and plan["sources"]["bf16"] == "measured"


def test_a_resumed_run_keeps_its_precision_and_measures_nothing(tmp_path: Path, trained: Trained) -> None:
    first = trained(replace(CPU, bf16_speed=3.0))
    assert first["config"]["bf16"] is True
    again = trained(replace(CPU, bf16_speed=0.5), resume=True, max_steps=3)
    assert again["config"]["bf16"] is True and again["sources"]["bf16"] == "measured"
    trained(CPU, resume=True, max_steps=4)
    assert hardware(tmp_path / "run")["bf16_speed"] is None


def test_an_adapter_on_a_config_without_a_precision_is_evaluated_in_the_measured_one(tmp_path: Path, trained: Trained) -> None:
    trained(replace(CPU, bf16_speed=0.5), eval_split=0.5)
    opened = open_run.open_adapter(str(tmp_path / "config.json"), tmp_path / "run" / "adapter", None, [], Console())
    said = [note for note in opened.plan.notes if "bfloat16" in note]
    assert len(said) == 1 and "assumed" not in said[0]


@pytest.mark.parametrize(
    ("machine", "options"),
    [
        (CPU, {"bf16": True}),
        (CPU, {"bf16": False}),
        (CPU, {"fp16": True}),
        (replace(CPU, gpus=(Gpu("3060", 12.0, 11.5, 8.6),)), {"device": "auto"}),
        (replace(CPU, is_apple=True), {"device": "auto"}),
        (replace(CPU, bf16_speed=1.5), {}),
    ],
)
def test_nothing_is_measured_where_the_precision_is_settled(
    machine: Machine, options: dict[str, object], tmp_path: Path, wide_model_dir: Path
) -> None:
    config = tmp_path / "config.json"
    values = {"model_name": str(wide_model_dir), "dataset": "pairs.jsonl", "device": "cpu", **options}
    config.write_text(json.dumps(values), encoding="utf-8")
    loaded = load(str(config))
    assert with_bf16_speed(machine, loaded.require(), ModelSource.of(str(wide_model_dir)).facts) is machine


@pytest.mark.parametrize(("device", "is_asked", "is_on"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)])
def test_full_determinism_is_for_a_gpu_and_ends_with_the_training(
    tmp_path: Path, device: str, is_asked: bool, is_on: bool
) -> None:
    file = tmp_path / "config.json"
    values = {"model_name": "a/model", "dataset": "none.jsonl", "device": device, "full_determinism": is_asked}
    file.write_text(json.dumps(values), encoding="utf-8")
    machine = replace(CPU, gpus=(Gpu("3090", 24.0, 23.0, 8.6),)) if device == "cuda" else CPU
    plan = resolve(load(str(file)), machine)
    fills: Any = torch.utils.deterministic
    before = fills.fill_uninitialized_memory
    with same_bits(plan):
        assert torch.are_deterministic_algorithms_enabled() == is_on
        assert fills.fill_uninitialized_memory == (before and not is_on)
    assert not torch.are_deterministic_algorithms_enabled() and fills.fill_uninitialized_memory == before
