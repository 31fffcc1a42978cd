"""The composer in this process, where a part of the program can be broken on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import judged_json
from safetensors.torch import load_file
from test_forward import rejected_sees_chosen

from dpo_cli.commands.requests import Request
from dpo_cli.commands.train import train
from dpo_cli.config.config import load
from dpo_cli.errors import DoesNotFit, Exit, RunFailed
from dpo_cli.hardware.machine import probe
from dpo_cli.plan.preflight import inspect
from dpo_cli.scoring import shared_prompts
from dpo_cli.training.dpo_trainer import PairTrainer
from dpo_cli.ui.console import Console


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """Trains five steps in a folder of the given name and gives the plan it left."""
    values = {"model_name": str(tiny_model_dir), "dataset": str(pairs_file()), "device": "cpu", "bf16": False, "fp16": False}
    values |= {"learning_rate": 5e-3, "eval_split": 0.3, "max_steps": 5, "lora_r": 4}
    values |= {"kl_prompts": 2, "max_new_tokens": 4}

    def train_in(name: str, **options: object) -> dict[str, Any]:
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps({**values, "output_dir": str(tmp_path / name), **options}), encoding="utf-8")
        loaded = load(str(config))
        summary, code = train(loaded, inspect(loaded, probe()), probe(), Console(), overwrite=False, dry_run=False)
        assert code is Exit.DONE and summary["steps"] == 5
        plan: dict[str, Any] = json.loads((tmp_path / name / "plan.json").read_text(encoding="utf-8"))
        return plan

    return train_in


def test_a_broken_mask_falls_back_to_the_plain_path(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When rejected sees chosen, the run says so, and its adapter is that of the plain path to the bit."""
    plain = run("plain", prompt_sharing=False)
    lay_out = shared_prompts.lay_out
    monkeypatch.setattr(shared_prompts, "lay_out", lambda *rows: rejected_sees_chosen(lay_out(*rows)))
    capsys.readouterr()
    fallen = run("fallen")
    shown = capsys.readouterr().out
    assert "scoring: each prompt twice: with shared prompts this model's states differ by" in shown
    assert "each prompt twice" in (tmp_path / "fallen" / "train.log").read_text(encoding="utf-8")
    assert fallen["scoring"]["shared"] is False and "of their size" in fallen["scoring"]["why"]
    assert fallen["config"]["prompt_sharing"] == "auto"
    assert plain["scoring"] == {"shared": False, "why": 'each prompt twice: "prompt_sharing" is false'}
    weights = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "fallen")]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])
    with pytest.raises(RunFailed, match="of their size"):
        run("demanded", prompt_sharing=True)


def test_a_plan_that_is_trained_again_checks_again(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan repeats the wish ("auto"), not what came of it on another machine."""
    run("first")
    lay_out = shared_prompts.lay_out
    monkeypatch.setattr(shared_prompts, "lay_out", lambda *rows: rejected_sees_chosen(lay_out(*rows)))
    loaded = load(str(tmp_path / "first" / "plan.json"), [f"output_dir={tmp_path / 'again'}"])
    summary, _ = train(loaded, inspect(loaded, probe()), probe(), Console(), overwrite=False, dry_run=False)
    plan = json.loads((tmp_path / "again" / "plan.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 5 and plan["scoring"]["shared"] is False


def test_an_evaluation_checks_again(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan keeps what was decided on its machine; another machine, or another version of a library, may be different."""
    assert run("shared")["scoring"]["shared"] is True
    right = judged_json(Request(str(tmp_path / "shared")), Console())
    lay_out = shared_prompts.lay_out
    monkeypatch.setattr(shared_prompts, "lay_out", lambda *rows: rejected_sees_chosen(lay_out(*rows)))
    capsys.readouterr()
    checked = judged_json(Request(str(tmp_path / "shared")), Console())
    assert "each prompt twice" in capsys.readouterr().out
    for name, figure in checked["policy"].items():
        assert figure is None or figure["value"] == pytest.approx(right["policy"][name]["value"], abs=1e-3)


def test_a_pair_that_does_not_fit_alone_is_told_with_what_to_change(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 4 before the first step, with the longest pair's place and each remedy's saving; a second try is not in the way."""

    def none_left(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as broken:
        broken.setattr(PairTrainer, "compute_loss", none_left)
        with pytest.raises(DoesNotFit) as caught:
            run("large", gradient_checkpointing=False)
    (problem,) = caught.value.problems
    assert "the longest pair (" in problem.message and "pairs.jsonl:" in problem.message
    assert problem.fix is not None
    run("large")


def test_the_measured_peak_stands_beside_the_bill(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run("measured")
    memory = json.loads((tmp_path / "measured" / "metrics.json").read_text(encoding="utf-8"))["memory"]
    lines = [json.loads(line) for line in (tmp_path / "measured" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert memory["measured_gb"] == [line["peak_memory_gb"] for line in lines if line["split"] == "train"][-1]
    assert 0 < memory["predicted_gb"] <= memory["measured_gb"]  # of a tiny model the libraries are nearly all
