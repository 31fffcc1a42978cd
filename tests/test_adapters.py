"""Kinds of adapters, and of base models below them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import judged_json
from conftest import ROOT, Run
from safetensors.torch import load_file

from dpo_cli.commands.requests import Request
from dpo_cli.errors import Exit, InvalidInput
from dpo_cli.plan import feasibility
from dpo_cli.ui.console import Console


def trained_names(place: Path) -> set[str]:
    """The tensors of an adapter."""
    return set(load_file(place / "adapter" / "adapter_model.safetensors"))


def test_dora_trains_magnitudes(run: Run) -> None:
    _, place = run(use_dora=True)
    assert any("lora_magnitude_vector" in name for name in trained_names(place))


def test_targets_by_pattern(run: Run) -> None:
    _, place = run(target_modules=r"model\.layers\.1\.self_attn\.[qv]_proj")
    assert {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in trained_names(place)} == {
        f"model.layers.1.self_attn.{letter}_proj" for letter in "qv"
    }


def test_modules_to_save_are_trained_whole_and_left_out_of_the_reference(run: Run) -> None:
    """The head itself is trained here, which the log-probs of policy and reference then meet differently."""
    summary, place = run(modules_to_save=["lm_head"], target_modules=["q_proj"], learning_rate=1e-2, eval_split=0.3)
    model = json.loads((place / "plan.json").read_text(encoding="utf-8"))["config"]["model_name"]
    weights = load_file(place / "adapter" / "adapter_model.safetensors")
    head = weights["base_model.model.lm_head.weight"]
    assert not torch.equal(head, load_file(Path(model) / "model.safetensors")["lm_head.weight"])
    assert summary["train"]["margin"] != 0
    assert judged_json(Request(str(place)), Console())["policy"] == summary["eval"]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_train_and_are_judged_alike(run: Run, bits: int) -> None:
    summary, place = run(**{f"use_{bits}bit": True}, learning_rate=1e-2, max_steps=3, eval_split=0.3)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[0]["grad_norm"] > 0
    assert lines[-1]["margin"] != 0
    assert judged_json(Request(str(place)), Console())["policy"]["margin"]["value"] == pytest.approx(
        summary["eval"]["margin"]["value"], rel=1e-3
    )


def test_without_bitsandbytes_no_training_starts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a silent 16-bit run: that it is missing is told by validate too, before anything is loaded."""
    monkeypatch.setattr(feasibility, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput) as caught:
        run(use_4bit=True)
    assert [problem.code for problem in caught.value.problems if problem.severity == "error"] == ["bitsandbytes-missing"]


def test_a_broken_bitsandbytes_is_told(tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path]) -> None:
    (tmp_path / "broken" / "bitsandbytes").mkdir(parents=True)
    broken = "raise ImportError('libbitsandbytes.so: cannot open shared object file')"
    (tmp_path / "broken" / "bitsandbytes" / "__init__.py").write_text(broken, encoding="utf-8")
    config = tmp_path / "config.json"
    values = {
        "model_name": str(tiny_model_dir),
        "dataset": str(pairs_file()),
        "use_4bit": True,
        "output_dir": str(tmp_path / "run"),
    }
    config.write_text(json.dumps(values), encoding="utf-8")
    command = [sys.executable, "-m", "dpo_cli", "train", str(config)]
    paths = f"{tmp_path / 'broken'}:{ROOT}"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert done.returncode == Exit.FAILED
    assert "libbitsandbytes.so" in done.stderr and "pip install bitsandbytes" in done.stderr
    assert not (tmp_path / "run" / "adapter").exists()
