"""The commands as functions: the results are those of the command line, and errors are raised."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from typer.testing import CliRunner

import dpo_cli
from dpo_cli.app import app
from dpo_cli.errors import Exit, InvalidInput, UsageError
from dpo_cli.results.codec import to_json


def values(tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path]) -> dict[str, object]:
    model = {"model_name": str(tiny_model_dir), "dataset": str(pairs_file()), "eval_split": 0.4, "device": "cpu", "bf16": False}
    return {**model, "max_steps": 2, "lora_r": 4, "output_dir": str(tmp_path / "run"), "kl_prompts": 2, "max_new_tokens": 4}


def test_a_notebook(
    tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = values(tmp_path, tiny_model_dir, pairs_file)
    found = dpo_cli.validate(config)
    assert found.ok and found.memory is not None
    run = dpo_cli.train(config, learning_rate=1e-2)
    assert (run.exit_code, run.summary.status, run.summary.steps) == (Exit.DONE, "completed", 2)
    plan = json.loads((run.run_dir / "plan.json").read_text(encoding="utf-8"))
    assert run.run_dir == tmp_path / "run" and plan["config"]["learning_rate"] == 1e-2
    judged = dpo_cli.evaluate(run.run_dir)
    assert judged.sides == run.summary.sides and judged.sides is not None
    assert capsys.readouterr().out == ""
    told = CliRunner().invoke(app, ["eval", str(run.run_dir), "--json"])
    assert json.loads(told.stdout)["policy"] == to_json(judged.sides)["policy"]
    with pytest.raises(InvalidInput, match="holds a run"):
        dpo_cli.train(config)


@pytest.mark.long
def test_a_training_in_two_processes(
    tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    config = values(tmp_path, tiny_model_dir, pairs_file)
    run = dpo_cli.train(config, num_processes=2)
    assert (run.exit_code, run.summary.status, run.summary.steps) == (Exit.DONE, "completed", 2)
    plan = json.loads((run.run_dir / "plan.json").read_text(encoding="utf-8"))
    assert plan["config"]["num_processes"] == 2 and capfd.readouterr().out == ""
    with pytest.raises(InvalidInput, match="holds a run"):
        dpo_cli.train(config, num_processes=2)


def test_what_is_wrong_is_raised_or_returned(tmp_path: Path) -> None:
    found = dpo_cli.validate({"dataset": str(tmp_path / "gone.jsonl"), "model_name": "m", "beta": -1})
    assert not found.ok and {"dataset", "beta"} <= {problem.key for problem in found.problems}
    assert found.exit_code is Exit.INVALID
    with pytest.raises(InvalidInput):
        dpo_cli.train({"dataset": tmp_path / "gone.jsonl", "model_name": "m"}, output_dir=tmp_path / "run")
    assert {problem.file for problem in found.problems} == {"config"}
    with pytest.raises(UsageError, match="no output_dir"):
        dpo_cli.train({"dataset": "d", "model_name": "m"})
    with pytest.raises(UsageError, match="is not the memory of a card"):
        dpo_cli.recommend(vram=-3)
    with pytest.raises(UsageError, match="is not the memory of a card"):
        dpo_cli.validate({"dataset": "d", "model_name": "m"}, vram=0)
    with pytest.raises(UsageError, match="unknown strategy rl"):
        dpo_cli.recommend(vram=12, strategy="rl")
    with pytest.raises(InvalidInput, match="is not a finished run"):
        dpo_cli.evaluate(tmp_path)


def test_a_recommendation_is_a_config_that_is_valid() -> None:
    made = dpo_cli.recommend(vram=12, dataset=ROOT / "data-samples" / "assistant-preferences.jsonl")
    assert made.config["dataset"] and made.memory.fits
    assert dpo_cli.validate(made.config, vram=12).ok


def test_the_package_is_light_until_a_function_is_asked_for() -> None:
    code = "import sys, dpo_cli; assert dpo_cli.__version__; print([n for n in sys.modules if n.startswith('dpo_cli.')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert set(dpo_cli.__all__) <= set(dir(dpo_cli))
    assert set(dpo_cli.__all__) == {"__version__", "compare", "evaluate", "recommend", "sweep", "train", "validate"}
    with pytest.raises(AttributeError, match="no attribute 'chat'"):
        dpo_cli.chat  # noqa: B018
