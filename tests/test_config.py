"""Config files: the schema is the only declaration, every problem is found at once, every shipped config is read."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT

from dpo_cli.config.config import Config, defaults, load, schema
from dpo_cli.errors import Problem, UsageError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    return str(path)


def codes(problems: tuple[Problem, ...]) -> list[tuple[str, str | None]]:
    return [(problem.code, problem.key) for problem in problems if problem.severity == "error"]


def test_config_and_schema_declare_the_same_options() -> None:
    options = schema()["properties"]
    assert [field.name for field in fields(Config)] == [name for name in options if name != "$schema"]
    assert all(option["description"] for option in options.values())
    assert set(options) - set(defaults()) == set(schema()["required"])
    assert not set(schema()["x-not-yet"]["keys"]) & set(options)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.name)
def test_shipped_configs_have_only_what_they_leave_out(path: Path) -> None:
    allowed = {"missing-key": {"model_name", "dataset"}, "not-yet": {"strategy", "provider"}}
    for code, key in codes(load(str(path)).problems):
        assert key in allowed.get(code, set()), (code, key)
    if path.name in ("quickstart.json", "basic-dpo.json", "two-stage-dpo.json"):
        assert load(str(path)).config is not None


def test_everything_wrong_is_told_at_once_with_its_place(tmp_path: Path) -> None:
    text = """{
  "model_name": "m", // no dataset
  "lerning_rate": 3,
  "lora_r": "16",
  "beta": -5,
  "strategy": "sft",
  "use_dora": true,
  "num_train_epochs": true
}"""
    loaded = load(write(tmp_path, text))
    found = {problem.key: problem for problem in loaded.problems if problem.severity == "error"}
    assert {key: problem.code for key, problem in found.items()} == {
        "dataset": "missing-key",
        "lerning_rate": "unknown-key",
        "lora_r": "bad-value",
        "beta": "bad-value",
        "strategy": "not-yet",
        "use_dora": "not-yet",
        "num_train_epochs": "bad-value",
    }
    assert "learning_rate" in (found["lerning_rate"].fix or "")
    assert found["lora_r"].fix == "write it without quotes: 16"
    assert (found["beta"].line, found["beta"].column) == (5, 11)
    assert loaded.config is None


def test_a_syntax_error_brings_no_false_follow_ups(tmp_path: Path) -> None:
    path = write(tmp_path, '{"learning_rate": NaN, "dataset": "d", "model_name": "m"}')
    assert codes(load(path).problems) == [("json-nan", None)]


def test_overrides_pass_the_same_schema_and_win(tmp_path: Path) -> None:
    path = write(tmp_path, '{"model_name": "m", "dataset": "d", "beta": 0.1, "seed": 3.0}')
    assert load(path, ["dataset=2024", "model_name=true"]).require().dataset == "2024"
    loaded = load(path, ["beta=0.5", "dataset=other.jsonl", 'target_modules=["q_proj"]'])
    config = loaded.require()
    assert (config.beta, config.dataset, config.target_modules, config.seed) == (0.5, "other.jsonl", ["q_proj"], 3)
    assert isinstance(config.seed, int)
    assert [loaded.sources[key] for key in ("beta", "seed", "lora_r")] == ["override", "config", "default"]
    assert codes(load(path, ["beta=-1", "nonsense=1"]).problems) == [("unknown-key", "nonsense"), ("bad-value", "beta")]
    with pytest.raises(UsageError):
        load(path, ["beta"])


def test_a_plan_is_a_config(tmp_path: Path) -> None:
    values = {**defaults(), "model_name": "m", "dataset": "d", "beta": 0.7}
    del values["$schema"]
    loaded = load(write(tmp_path, json.dumps({"plan_version": 1, "config": values, "sources": {}})))
    assert loaded.require().beta == 0.7


@pytest.mark.parametrize(
    ("values", "code", "severity"),
    [
        ({"bf16": True, "fp16": True}, "two-precisions", "error"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "two-warmups", "error"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm-head-adapter", "error"),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, "warmup-ignored", "warning"),
        ({"eval_steps": 5}, "eval-steps-ignored", "warning"),
        ({"target_modules": ".*"}, "bad-value", "error"),
        ({"learning_rate": 5e-7}, "learning-rate-small", "hint"),
        ({"learning_rate": 5e-5}, "learning-rate-adapter", "hint"),
        ({"num_train_epochs": 9}, "epochs", "hint"),
        ({"lora_r": 16, "lora_alpha": 8}, "lora-alpha", "hint"),
    ],
)
def test_rules(tmp_path: Path, values: dict[str, object], code: str, severity: str) -> None:
    path = write(tmp_path, json.dumps({"model_name": "m", "dataset": "d", **values}))
    assert (code, severity) in [(problem.code, problem.severity) for problem in load(path).problems]
    plain = write(tmp_path, json.dumps({"model_name": "m", "dataset": "d", "learning_rate": 1e-6}))
    assert code == "learning-rate-small" or code not in [problem.code for problem in load(plain).problems]


@pytest.mark.parametrize("path", ["missing.json", ".", "tests"])
def test_an_unreadable_file_is_a_problem(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert codes(load(path).problems) == [("config-unreadable", None)]


@pytest.mark.parametrize("data", [b"\xff\xfe{\x00}\x00", b"x" * (1 << 20) + b"y", b"[]", b"3"])
def test_a_file_that_is_no_config_is_a_problem(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(data)
    assert len(codes(load(str(path)).problems)) == 1
