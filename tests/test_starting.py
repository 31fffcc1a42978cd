"""From an adapter there are two ways on; on both, the policy is its reference at step 0, and that is never the base model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_cli.config.config import load_stages
from dpo_cli.console import Console
from dpo_cli.errors import Exit, InvalidInput
from dpo_cli.evaluation.judging import evaluate
from dpo_cli.hardware.adapters import adapter_at, foundation
from dpo_cli.hardware.probe import probe
from dpo_cli.inspection import inspect
from dpo_cli.training.run import train

Run = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path]) -> Run:
    """Trains in a folder of the given name: metrics.json and the folder."""
    common = {"model_name": str(tiny_model_dir), "dataset": str(pairs_file()), "device": "cpu", "bf16": False, "fp16": False}
    common |= {"eval_split": 0.3, "max_steps": 3, "lora_r": 4, "learning_rate": 5e-2}

    def train_in(name: str, **options: Any) -> tuple[dict[str, Any], Path]:
        config = tmp_path / f"{name}.json"
        values = {key: value for key, value in {**common, **options}.items() if value is not None}
        config.write_text(json.dumps({**values, "output_dir": str(tmp_path / name)}), encoding="utf-8")
        (loaded,) = load_stages(str(config))
        summary, code = train(loaded, inspect(loaded, probe()), probe(), Console(), overwrite=True, dry_run=False)
        assert code is Exit.DONE
        return summary, tmp_path / name

    return train_in


def first_line(place: Path) -> dict[str, Any]:
    line: dict[str, Any] = json.loads((place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return line


def plan_of(place: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((place / "plan.json").read_text(encoding="utf-8"))
    return plan


def assert_starts_at_its_reference(place: Path) -> None:
    """Loss ln 2, margin 0, both rewards 0: to the bit, since policy and reference are computed alike."""
    line = first_line(place)
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (line["margin"], line["reward_chosen"], line["reward_rejected"]) == (0, 0, 0)


@pytest.fixture
def sft(run: Run) -> Path:
    _, place = run("sft", strategy="sft")
    return place


def test_dpo_goes_on_from_the_sft_adapter_and_is_held_to_a_frozen_copy(run: Run, sft: Path) -> None:
    """A reference that is the bare base model, or that moves with the policy, gives other figures."""
    summary, place = run("dpo", model_name=str(sft), lora_r=None)
    assert_starts_at_its_reference(place)
    plan = plan_of(place)
    assert plan["config"]["reference"] == "adapter" and plan["config"]["lora_r"] == 4
    assert any("training goes on from the adapter of sft (rank 4)" in note for note in plan["notes"])
    pairs = str(sft.parent / "pairs.jsonl")
    on_sft, on_dpo = (evaluate(str(folder), pairs, Console()) for folder in (sft, place))
    for name, figure in on_dpo["base"].items():  # the reference of dpo is the policy of sft
        assert figure["value"] == pytest.approx(on_sft["policy"][name]["value"])
    assert on_sft["policy"]["kl_token"]["value"] > 0.01  # which is not the base model
    assert evaluate(str(place), None, Console())["policy"] == summary["eval"]  # as the run itself judged it
    # The saved adapter is one, on the base model, as PEFT loads it; and it has moved on from the SFT adapter.
    assert sorted(file.name for file in (place / "adapter").iterdir() if file.is_dir()) == []
    before, after = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (sft, place))
    assert before.keys() == after.keys() and not all(torch.equal(before[name], after[name]) for name in before)


def test_the_reference_is_the_sft_model_in_plain_transformers(run: Run, sft: Path, tiny_model_dir: Path) -> None:
    """log ref of the first line's pairs, by transformers and PEFT alone."""
    _, place = run("dpo", model_name=str(sft), lora_r=None, max_steps=1, per_device_train_batch_size=8, logging_steps=1)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with_sft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), str(sft / "adapter"))
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), str(place / "adapter"))
    ids = torch.arange(3, 40)[None]
    logits = [model.eval()(input_ids=ids).logits for model in (plain, with_sft, trained)]
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)  # the SFT run has moved the model
    assert (logits[2] - logits[1]).abs().max() < (logits[2] - logits[0]).abs().max()  # and DPO went on from there


@pytest.mark.parametrize("why", [{"lora_r": 2}, {"lora_r": None, "reference": "base"}])
def test_another_shape_is_trained_on_the_merged_model(run: Run, sft: Path, tiny_model_dir: Path, why: dict[str, Any]) -> None:
    summary, place = run("dpo", model_name=str(sft), max_steps=1, **why)
    assert_starts_at_its_reference(place)
    plan = plan_of(place)
    assert plan["config"]["reference"] == "base"
    assert any("is merged into its base model" in note for note in plan["notes"])
    assert evaluate(str(place), None, Console())["policy"] == summary["eval"]
    config = json.loads((place / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(sft)  # not the bare model, on which it would answer otherwise
    # A third run on top stands on both: its reference is the second run's policy.
    _, third = run("third", model_name=str(place), lora_r=None, max_steps=1)
    assert_starts_at_its_reference(third)
    assert foundation(str(third)) == str(tiny_model_dir)


def test_what_cannot_be_gone_on_from_is_told(run: Run, sft: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        run("dpo", model_name=str(sft), lora_r=2, reference="adapter")
    assert [problem.code for problem in caught.value.problems if problem.severity == "error"] == ["reference-adapter"]
    (sft / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(InvalidInput) as caught:
        run("dpo", model_name=str(sft), lora_r=None)
    assert "adapter-unusable" in [problem.code for problem in caught.value.problems]


def test_an_adapter_of_another_tool_is_a_start(run: Run, sft: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    """A PEFT folder alone, which names its base model."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((sft / "adapter" / name).read_bytes())
    adapter = adapter_at(str(folder))
    assert adapter is not None and adapter.model_name == str(tiny_model_dir) and adapter.shape["lora_r"] == 4
    _, place = run("dpo", model_name=str(folder), lora_r=None, max_steps=1)
    assert_starts_at_its_reference(place)


@pytest.mark.parametrize("strategy", ["dpo", "sft"])
def test_every_weight_is_trained_when_the_rank_is_0(run: Run, strategy: str, tiny_model_dir: Path) -> None:
    summary, place = run("whole", strategy=strategy, lora_r=0, learning_rate=1e-3)
    if strategy == "dpo":
        assert_starts_at_its_reference(place)
    assert not (place / "adapter").exists()
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model_dir, place / "model"))
    assert all(not torch.equal(before[name], after[name]) for name in before if "norm" not in name)
    assert evaluate(str(place), None, Console())["policy"] == summary["eval"]
    _, on_top = run("on-top", model_name=str(place), max_steps=1)
    assert_starts_at_its_reference(on_top)


def test_4bit_goes_on_from_a_4bit_adapter(run: Run) -> None:
    _, place = run("sft", strategy="sft", use_4bit=True, bf16=True)
    _, on_top = run("dpo", model_name=str(place), use_4bit=True, bf16=True, lora_r=None, max_steps=1)
    assert_starts_at_its_reference(on_top)
