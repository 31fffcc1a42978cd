"""The plan: open values decided, and where each came from."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_cli.config.config import load
from dpo_cli.errors import DoesNotFit, InvalidInput
from dpo_cli.hardware.machine import Gpu, Machine
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.feasibility import does_not_fit
from dpo_cli.plan.plan import MEASURED, Counts, Plan
from dpo_cli.plan.preflight import inspect

CPU = Machine("cpu", 2, 16.0, gpus=(), is_apple=False)
AMX = replace(CPU, bf16_flag="amx_bf16")
TURING = replace(CPU, gpus=(Gpu("T4", 15.0, 14.5, 7.5),))
AMPERE = replace(CPU, gpus=(Gpu("3060", 12.0, 11.5, 8.6),))
APPLE = replace(CPU, is_apple=True)
COUNTS = Counts(
    train_pairs=21,
    eval_pairs=3,
    train_prompts=20,
    eval_prompts=3,
    cut=0,
    too_long=0,
    parted=0,
    bad_rows=0,
    longest=90,
    longest_at="pairs.jsonl:1",
    longest_pair=150,
    longest_prompt=60,
    longest_responses=60,
    train_tokens=4000,
    digest="",
    writes_date=False,
    shared_tokens=2600,
)


def write(tmp_path: Path, **options: object) -> str:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    path = tmp_path / "my-run.json"
    values = {"model_name": "meta-llama/Llama-3.1-8B-Instruct", "dataset": str(data), "use_4bit": True, **options}
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("machine", "device", "dtype"),
    [
        (CPU, "cpu", "float32"),
        (AMX, "cpu", "bfloat16"),
        (replace(AMX, bf16_speed=1.1), "cpu", "float32"),
        (replace(CPU, bf16_speed=2.25), "cpu", "bfloat16"),
        (TURING, "cuda", "float16"),
        (AMPERE, "cuda", "bfloat16"),
        (APPLE, "mps", "float32"),
    ],
)
def test_precision_is_what_the_machine_does_best(tmp_path: Path, machine: Machine, device: str, dtype: str) -> None:
    plan = resolve(load(write(tmp_path)), machine, COUNTS)
    assert (plan.config.device, plan.dtype) == (device, dtype)
    assert plan.sources["bf16"] == "measured"


@pytest.mark.parametrize(
    ("machine", "note"),
    [
        (
            CPU,
            "float32 is assumed, since the processor names no bfloat16 products: `dpo train` measures which is faster",
        ),
        (AMX, "bfloat16 is assumed, since the processor has amx_bf16: `dpo train` measures which is faster"),
        (replace(AMX, bf16_speed=1.1), "float32: products in bfloat16 are 1.1 times as fast as in float32 here"),
        (replace(CPU, bf16_speed=2.26), "bfloat16: products in bfloat16 are 2.3 times as fast as in float32 here"),
    ],
)
def test_the_plan_notes_why_a_processor_has_its_precision(tmp_path: Path, machine: Machine, note: str) -> None:
    assert note in resolve(load(write(tmp_path)), machine, COUNTS).notes
    for chosen in ({"bf16": True}, {"bf16": False}, {"fp16": True}):
        assert not [one for one in resolve(load(write(tmp_path, **chosen)), machine, COUNTS).notes if "bfloat16" in one]


@pytest.mark.parametrize(
    ("options", "dtype"), [({"bf16": True}, "bfloat16"), ({"bf16": False}, "float32"), ({"fp16": True}, "float16")]
)
def test_a_precision_in_the_config_wins_over_the_measurement(tmp_path: Path, options: dict[str, object], dtype: str) -> None:
    for speed in (0.5, 3.0):
        assert resolve(load(write(tmp_path, **options)), replace(AMX, bf16_speed=speed), COUNTS).dtype == dtype


def test_a_mac_trains_on_its_processor_with_an_optimizer_that_its_gpu_does_not_know(tmp_path: Path) -> None:
    assert resolve(load(write(tmp_path, optim="adamw_8bit")), APPLE, COUNTS).config.device == "cpu"
    assert resolve(load(write(tmp_path, optim="sgd")), APPLE, COUNTS).config.device == "mps"


def test_both_false_means_float32(tmp_path: Path) -> None:
    plan = resolve(load(write(tmp_path, bf16=False, fp16=False)), AMPERE, COUNTS)
    assert plan.dtype == "float32"


def test_names_paths_and_defaults_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve(load(write(tmp_path, lora_r=8)), CPU, COUNTS).config
    assert config.output_dir == str(tmp_path / "runs" / "my-run")
    assert config.lora_alpha == 16
    assert None not in (config.bf16, config.fp16, config.gradient_checkpointing)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"num_train_epochs": 3}, 9),  # 21 pairs: 11 batches of 2, 3 steps of 4 batches, three times
        ({"num_train_epochs": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}, 3),
        ({"max_steps": 5}, 5),
    ],
)
def test_total_steps(tmp_path: Path, options: dict[str, object], steps: int) -> None:
    assert resolve(load(write(tmp_path, gradient_checkpointing=True, **options)), AMPERE, COUNTS).total_steps == steps


def test_micro_batches_are_regrouped_to_fit_and_steps_stay(tmp_path: Path) -> None:
    wide = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_seq_length": 2048}
    plan = resolve(load(write(tmp_path, **wide)), AMPERE)
    assert plan.memory is not None and plan.memory.fits
    assert plan.config.per_device_train_batch_size < 8
    assert plan.config.per_device_train_batch_size * plan.config.gradient_accumulation_steps == 8
    assert plan.config.gradient_checkpointing is True
    assert plan.notes
    compared = resolve(load(write(tmp_path, **wide, loss_type=["sft", "aot"])), AMPERE)
    assert compared.memory is not None and compared.memory.fits is False and compared.config.per_device_train_batch_size == 8
    assert any("micro-batches stay at 8" in note for note in compared.notes)


def test_a_run_that_goes_on_is_not_decided_by_the_memory_that_is_free_now(tmp_path: Path) -> None:
    """A bill within the free memory but not within a new run's margin; then above what is free; then above all there is."""
    wide = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_seq_length": 2048}
    first = resolve(load(write(tmp_path, **wide)), replace(CPU, gpus=(Gpu("4080", 16.0, 15.5, 8.9),)))
    assert first.memory is not None and 1 < first.config.per_device_train_batch_size < 8
    need = first.memory.total_gb
    decided = {name: getattr(first.config, name) for name in MEASURED}
    loaded = load(write(tmp_path, **{**wide, **decided}))

    def on(total_gb: float, free_gb: float, is_resumed: bool = True) -> Plan:
        return resolve(loaded, replace(CPU, gpus=(Gpu("4080", total_gb, free_gb, 8.9),)), is_resumed=is_resumed)

    for free_gb in (1.01 * need, 0.9 * need):
        plan = on(16.0, free_gb)
        assert {name: getattr(plan.config, name) for name in MEASURED} == decided and does_not_fit(plan) is None
        assert any("free now" in note for note in plan.notes) == (free_gb < need)
        assert on(16.0, free_gb, is_resumed=False).config.per_device_train_batch_size < decided["per_device_train_batch_size"]
    assert does_not_fit(on(0.95 * need, 0.9 * need)) is not None


def test_what_cannot_fit_is_refused(tmp_path: Path) -> None:
    inspection = inspect(load(write(tmp_path, use_4bit=False)), CPU, vram_gb=4)
    with pytest.raises(DoesNotFit):
        inspection.require()
    both = inspect(load(write(tmp_path, use_4bit=False, dataset="gone.jsonl")), CPU, vram_gb=4)
    with pytest.raises(InvalidInput) as caught:
        both.require()
    assert {problem.code for problem in caught.value.problems} >= {"does-not-fit", "dataset-missing"}
    assert not isinstance(caught.value, DoesNotFit)
    needed = resolve(load(write(tmp_path, use_4bit=False)), CPU, vram_gb=4).memory
    assert needed is not None
    a_little_less = resolve(load(write(tmp_path, use_4bit=False)), CPU, vram_gb=needed.total_gb - 0.002)
    misfit = does_not_fit(a_little_less)
    assert misfit is not None and len(set(re.findall(r"([0-9.]+) GB", misfit.message))) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, 1),
        ({"learning_rate": 5e-7}, 1),
        ({"learning_rate": 2e-4}, 0),
        ({"lora_r": 0, "use_4bit": False}, 0),
        ({"strategy": "sft"}, 0),
    ],
)
def test_a_rate_that_moves_no_adapter_is_said_once(tmp_path: Path, options: dict[str, object], said: int) -> None:
    inspection = inspect(load(write(tmp_path, **options)), AMPERE)
    assert inspection.plan is not None
    hints = [problem.message for problem in inspection.problems if problem.code == "learning-rate-small"]
    assert len([text for text in (*hints, *inspection.plan.notes) if "learning_rate" in text]) == said == len(hints)
