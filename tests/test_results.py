"""Results as JSON and back: the same again, and a damaged file is a ValueError that says what is wrong."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import Run
from typer.testing import CliRunner

from dpo_cli.app import app
from dpo_cli.results.codec import to_json
from dpo_cli.results.compared import compared
from dpo_cli.results.judgement import Evaluation
from dpo_cli.results.summary import Line, RunSummary
from dpo_cli.storage.jsonio import json_text

FIGURE = {"value": 0.5, "low": 0.25, "high": None}  # not a number in JSON
SIDES = {"policy": {"accuracy": FIGURE, "kl_sequence": None}, "base": {}, "gain": {"loss": FIGURE}}
PAIR = {"file": "f", "line": 3, "category": None, "margin": None, "reward_chosen": 1, "reward_rejected": 0.5}
EVALUATION: dict[str, Any] = {
    **{
        "pairs": 2,
        "prompts": 1,
        **SIDES,
        "answer_tokens": {"policy": FIGURE, "base": FIGURE, "gain": FIGURE},
        "unanswered": 1,
        "dtype": "float32",
    },
    "categories": {"x": {"pairs": 1, "prompts": 1, **SIDES}},
    "samples": [{"prompt": "p", "base": "b", "adapter": "a"}],
    **{"rows": [PAIR], "best": [{**PAIR, "prompt": "p", "chosen": "c", "rejected": "r"}], "worst": []},
}
LINE = {"split": "train", "step": 3, "epoch": 0.5, "loss": None, "tokens": 12}
EVENT = {"rule": "kl", "action": "warn", "step": 3, "message": "far", "remedy": "less"}
SUMMARY: dict[str, Any] = {
    **{"status": "completed", "steps": 3, "best_step": None, "seconds": 1.5, "train": LINE},
    **{"eval": SIDES["policy"], "base": {}, "gain": SIDES["gain"]},
    **{"memory": {"predicted_gb": 1.0, "measured_gb": None}, "health": [EVENT], "adapter_sha256": "ab"},
}


def test_json_comes_back_as_it_was() -> None:
    assert json.loads(json_text(to_json(Evaluation.of_json(EVALUATION, "pairs")))) == EVALUATION
    assert json.loads(json_text(to_json(RunSummary.of_json(SUMMARY)))) == SUMMARY
    assert json.loads(json_text(to_json(Line.of_json(LINE)))) == LINE
    assert math.isnan(Evaluation.of_json(EVALUATION, "pairs").rows[0].gain)


def test_a_later_version_may_add_keys() -> None:
    without = {name: value for name, value in EVALUATION.items() if name != "dtype"}  # as an older version wrote it
    assert Evaluation.of_json(without, "pairs").dtype is None
    assert RunSummary.of_json({**SUMMARY, "more": {"a": 1}}) == RunSummary.of_json(SUMMARY)
    assert Line.of_json({**LINE, "device": "cpu"}) == Line.of_json(LINE)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda e: e.pop("pairs"), "it has no pairs"),
        (lambda e: e.pop("samples"), "it has no samples"),
        (lambda e: e.update(policy=[1]), "policy"),
        (lambda e: e["policy"].update(accuracy=3), "accuracy"),
        (lambda e: e.update(categories=[1]), "it is not an object"),
        (lambda e: e.update(rows=5), "rows is not a list"),
        (lambda e: e.update(rows=[3]), "it is not an object"),
        (lambda e: e["rows"][0].pop("margin"), "it has no loss and no base_loss"),
        (lambda e: e["rows"][0].update(margin="x"), "it has no loss and no base_loss"),
        (lambda e: e.update(samples=None), "samples"),
        (lambda e: e.update(prompts=1.5), "prompts: invalid value"),
    ],
)
def test_a_damaged_evaluation(change: Callable[[dict[str, Any]], object], says: str) -> None:
    damaged = copy.deepcopy(EVALUATION)
    change(damaged)
    with pytest.raises(ValueError, match=says):
        Evaluation.of_json(damaged, "pairs")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("health"), "it has no health"),
        (lambda s: s.pop("seconds"), "it has no seconds"),
        (lambda s: s.update(seconds=None), "seconds is not a number"),
        (lambda s: s.update(status=None), "status"),
        (lambda s: s.update(steps=1.5), "steps: invalid value"),
        (lambda s: s.update(gain=None), "gain"),
        (lambda s: s["health"][0].pop("remedy"), "remedy"),
    ],
)
def test_a_damaged_summary(change: Callable[[dict[str, Any]], object], says: str) -> None:
    damaged = copy.deepcopy(SUMMARY)
    change(damaged)
    with pytest.raises(ValueError, match=says):
        RunSummary.of_json(damaged)


def test_a_run_with_damaged_results_is_named_or_mended(run: Run, tmp_path: Path) -> None:
    """A report names the file and exits with 3; --resume repeats the end of the run."""
    _, place = run(eval_split=0.4)
    whole = {name: (place / name).read_text(encoding="utf-8") for name in ("metrics.json", "evaluation.json")}
    for name, key in (("metrics.json", "health"), ("evaluation.json", "rows")):
        value = json.loads(whole[name])
        (place / name).write_text(json.dumps({k: v for k, v in value.items() if k != key}), encoding="utf-8")
        told = CliRunner().invoke(app, ["report", str(place), "--json"])
        assert told.exit_code == 3 and f"it has no {key}" in json.loads(told.stdout)["problems"][0]["message"]
        done = CliRunner().invoke(app, ["train", str(tmp_path / "config.json"), "--resume", "--json"])
        assert done.exit_code == 0 and json.loads(done.stdout)["status"] == "completed", done.stderr
        kept = {name: json.loads((place / name).read_text(encoding="utf-8")) for name in whole}
        assert kept["evaluation.json"] == json.loads(whole["evaluation.json"])
        assert kept["metrics.json"]["eval"] == json.loads(whole["metrics.json"])["eval"]


def test_a_plan_that_is_missing_or_no_run_wrote_is_a_config(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}', encoding="utf-8")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    for text in (None, '{"config": {}, "sources": [], "scoring": {}}'):
        if text is not None:
            (tmp_path / "plan.json").write_text(text, encoding="utf-8")
        told = CliRunner().invoke(app, ["eval", str(tmp_path / "plan.json"), "--adapter", str(adapter), "--json"])
        assert told.exit_code == 3, told.stdout


@pytest.mark.parametrize(
    ("figures", "digits", "kind", "texts"),
    [
        ((27.28, 12.0), 1, "f", ("27.3", "12.0")),
        ((1.04, 1.0), 1, "f", ("1.04", "1.00")),
        ((1.0, 1.0), 1, "f", ("1.0", "1.0")),
        ((16.2, 15.9), 0, "f", ("16.2", "15.9")),
        ((10.004, 10), 3, "g", ("10.004", "10")),
        ((0.1 + 0.2, 0.3), 6, "g", ("0.30000000000000004", "0.29999999999999999")),
    ],
)
def test_figures_that_differ_read_differently(
    figures: tuple[float, float], digits: int, kind: Literal["f", "g"], texts: tuple[str, str]
) -> None:
    assert compared(*figures, digits, kind) == texts
