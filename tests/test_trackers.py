"""`report_to`: what arrives at a tracker are our own figures, and what a tracker lacks is told before anything is loaded."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_cli.errors import InvalidInput
from dpo_cli.plan import feasibility
from dpo_cli.training.dpo_trainer import FIGURES

absent = pytest.mark.skipif(
    not (find_spec("wandb") and find_spec("trackio")), reason="`make check-trackers` installs wandb and trackio"
)


def lines(place: Path, split: str) -> list[dict[str, Any]]:
    text = (place / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["split"] == split]


def scalars(place: Path, name: str) -> list[tuple[int, float]]:
    """The steps and values of a curve, over all event files of the run."""
    events = EventAccumulator(str(place / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_gets_the_figures_of_metrics_jsonl(run: Run) -> None:
    _, place = run(report_to=["tensorboard"], eval_split=0.3, eval_steps=1)
    for split, names in (("train", ("loss", *FIGURES)), ("eval", ("loss", "accuracy", "margin", "kl_token"))):
        for name in names:
            written = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines(place, split)]  # float32 there
            assert scalars(place, f"{split}/{name}") == written
            assert [step for step, _ in written] == [1, 2]


def test_a_run_that_is_replaced_leaves_no_events(run: Run) -> None:
    small = {"gradient_accumulation_steps": 1}
    run(report_to="tensorboard", max_steps=2, **small)
    _, place = run(report_to="tensorboard", max_steps=1, **small)
    assert [step for step, _ in scalars(place, "train/loss")] == [1]
    _, place = run(max_steps=1, **small)
    assert not (place / "tensorboard").exists()


def test_without_its_package_no_training_starts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasibility, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(InvalidInput) as caught:
        run(report_to=["tensorboard", "wandb"])
    (problem,) = [problem for problem in caught.value.problems if problem.code == "tracker-missing"]
    assert problem.key == "report_to" and "pip install wandb" in (problem.fix or "")


def test_a_folder_of_its_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tracker_of_this_name").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_spec("tracker_of_this_name") is not None
    assert not feasibility._installed("tracker_of_this_name") and feasibility._installed("tensorboard")


def dpo(place: Path, run_dir: Path, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`dpo train` once more as an earlier run was trained, without a terminal and with no credentials but these."""
    words = [sys.executable, "-m", "dpo_cli", "train", str(place / "plan.json"), f"output_dir={run_dir}", "--json"]
    clean = {"HOME": str(home), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "WANDB_DIR": str(home)}
    return subprocess.run(words, env=clean | variables, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


@absent
def test_wandb_without_a_login_is_told_before_anything_is_loaded(run: Run, tmp_path: Path) -> None:
    _, place = run()
    plan = json.loads((place / "plan.json").read_text(encoding="utf-8"))
    plan["config"]["report_to"] = "wandb"
    (place / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    for variables, says in (({}, "no API key"), ({"WANDB_API_KEY": "short"}, "cannot log in")):
        done = dpo(place, tmp_path / "again", tmp_path, **variables)
        (message,) = [found["message"] for found in json.loads(done.stdout)["problems"] if found["code"] == "wandb-login"]
        assert done.returncode == 3 and says in message
        assert not (tmp_path / "again").exists()
    assert dpo(place, tmp_path / "again", tmp_path, WANDB_MODE="offline").returncode == 0
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1


@absent
def test_trackio_keeps_runs_of_one_name_apart_and_the_json_alone(run: Run, tmp_path: Path) -> None:
    _, place = run()
    plan = json.loads((place / "plan.json").read_text(encoding="utf-8"))
    plan["config"]["report_to"] = "trackio"
    (place / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    for folder in ("one", "other"):
        done = dpo(place, tmp_path / folder / "run", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
        assert json.loads(done.stdout)["status"] == "completed" and "Trackio" in done.stderr
    with sqlite3.connect(tmp_path / "trackio" / "huggingface.db") as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    margins = [(name, margin) for name, text in rows if (margin := json.loads(text).get("train/margin")) is not None]
    assert [margin for _, margin in margins] == 2 * [line["margin"] for line in lines(place, "train")]
    assert len({name for name, _ in margins}) == 2 and all(name.startswith("run ") for name, _ in margins)
