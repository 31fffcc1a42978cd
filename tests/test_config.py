"""Config files: the schema is the only declaration, every problem is found at once, every shipped config is read."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT
from jsonschema.validators import Draft202012Validator

from dpo_cli.config.config import load, load_stages
from dpo_cli.config.options import Config
from dpo_cli.config.schema import STRATEGIES, Option, defaults, options, profile_defaults, schema
from dpo_cli.errors import Problem, UsageError
from dpo_cli.hardware.machine import Machine
from dpo_cli.plan.preflight import inspect


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    return str(path)


def codes(problems: tuple[Problem, ...]) -> list[tuple[str, str | None]]:
    return [(problem.code, problem.key) for problem in problems if problem.severity == "error"]


def test_config_and_schema_declare_the_same_options() -> None:
    assert [field.name for field in fields(Config)] == list(options())
    assert set(options()) - set(defaults()) == set(schema()["required"])
    known = [name for option in options().values() for name in (option.name, *option.known_as)]
    assert len(known) == len(set(known))


@pytest.mark.parametrize("option", options().values(), ids=lambda option: option.name)
def test_every_option_declares_all_that_is_asked_of_it(option: Option) -> None:
    """Type, default within its own bounds, description, strategies, source; and what it refers to exists."""
    assert option.description and option.source and option.group and option.type_words
    assert set(option.strategies) <= set(STRATEGIES)
    assert set(option.rule.get("x-default-for", {})) <= {*STRATEGIES, "low_end", "mid_range", "high_end"}
    is_valid = Draft202012Validator(option.rule).is_valid
    assert all(
        is_valid(option.default(name)) for name in (*STRATEGIES, "low_end", "mid_range", "high_end") if option.name != "dataset"
    )
    for other, wanted in option.needs.items():
        assert all(Draft202012Validator(options()[other].rule).is_valid(value) for value in wanted)
    if isinstance(not_yet := option.rule.get("x-not-yet"), list):
        assert all(map(is_valid, not_yet)) and option.works(option.default())
    bounded = {"integer", "number"} & set(
        [option.rule["type"]] if isinstance(option.rule.get("type"), str) else option.rule.get("type", [])
    )
    assert not bounded or {"minimum", "exclusiveMinimum"} & option.rule.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.name)
def test_shipped_configs_have_only_what_they_leave_out(path: Path) -> None:
    machine = Machine("cpu", 2, 8.0, gpus=(), is_apple=False)
    (found, *others) = [inspect(loaded.on_foundation(), machine) for loaded in load_stages(str(path))]
    assert not any(codes(other.problems) for other in others)
    says = {
        "high-end.json": "missing-key",
        "mid-range.json": "missing-key",
        "lora.json": "missing-key",
        "epochs.json": "missing-key",
    }
    expected = (
        []
        if path.name in ("quickstart.json", "kto.json", "concise.json", "compare.json", "smollm2-two-stage.json")
        else [(says.get(path.name, "dataset-missing"), "dataset")]
    )
    expected += [("model-missing", "model_name")] if path.name == "two-stage-dpo.json" else []
    assert sorted(codes(found.problems)) == expected


def test_everything_wrong_is_told_at_once_with_its_place(tmp_path: Path) -> None:
    text = """{
  "model_name": "m", // no dataset
  "lerning_rate": 3,
  "lora_r": "16",
  "beta": -5,
  "strategy": "rlhf", "reward_functions": ["longer"], "num_processes": 0,
  "use_dora": True,
  'seed': 3
  "num_train_epochs": true
}"""
    loaded = load(write(tmp_path, text))
    found = [(problem.code, problem.key, problem.line, problem.column) for problem in loaded.problems]
    assert sorted(found, key=lambda place: place[2] or 0) == [
        ("missing-key", "dataset", None, None),
        ("nothing-to-judge", "eval_split", None, None),
        ("unknown-key", "lerning_rate", 3, 19),
        ("bad-value", "lora_r", 4, 13),
        ("bad-value", "beta", 5, 11),
        ("bad-value", "num_processes", 6, 72),
        ("json-syntax", "use_dora", 7, 15),
        ("json-syntax", None, 8, 3),
        ("json-syntax", None, 9, 3),
        ("bad-value", "num_train_epochs", 9, 23),
    ]
    assert loaded.config is None


def test_a_value_that_cannot_be_read_brings_no_false_follow_ups(tmp_path: Path) -> None:
    path = write(tmp_path, '{"learning_rate": NaN, "dataset": None, "model_name": \'m\'}')
    found = [(problem.code, problem.key) for problem in load(path).problems if problem.code != "nothing-to-judge"]
    assert found == [("json-nan", "learning_rate"), ("json-syntax", "dataset"), ("json-syntax", "model_name")]


def test_a_default_said_in_other_words_is_the_default(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, '{"dataset": "d", "max_steps": -1, "max_seq_length": null, "num_train_epochs": 3}'))
    config = loaded.require()
    assert (config.max_steps, config.max_seq_length) == (None, 1024)
    assert "epochs-ignored" not in [problem.code for problem in loaded.problems]


def test_defaults_follow_the_strategy_and_the_profile(tmp_path: Path) -> None:
    def made(text: str) -> Config:
        return load(write(tmp_path, '{"dataset": "d", ' + text + "}")).require()

    assert [made(f'"strategy": "{name}"').learning_rate for name in STRATEGIES] == [5e-7, 1e-4, 2e-4, 1e-4, 1.41e-5]
    qlora = made('"strategy": "qlora"')
    assert (qlora.strategy, qlora.use_4bit, qlora.learning_rate) == ("sft", True, 2e-4)
    loaded = load(write(tmp_path, '{"dataset": "d", "compute_specs": "high_end", "lora_r": 8}'))
    config = loaded.require()
    assert (config.lora_r, config.use_4bit, config.max_seq_length, config.per_device_train_batch_size) == (8, True, 2048, 4)
    assert [loaded.sources[key] for key in ("lora_r", "use_4bit", "seed")] == ["config", "profile", "default"]


@pytest.mark.parametrize(("profile", "file"), [("mid_range", "mid-range.json"), ("high_end", "high-end.json")])
def test_profiles_are_the_documented_settings(profile: str, file: str) -> None:
    documented = json.loads((ROOT / "configs" / file).read_text(encoding="utf-8"))
    assert {**profile_defaults(profile), "strategy": "dpo", "model_name": defaults()["model_name"]} == documented


# Every key of ModelForge's TrainingConfig, as its own documentation shows it.
MODELFORGE = """{
  "task": "text-generation", "model_name": "meta-llama/Llama-3.1-8B-Instruct", "provider": "huggingface", "strategy": "dpo",
  "dataset": "d.jsonl", "compute_specs": "mid_range",
  "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1,
  "use_4bit": true, "use_8bit": false, "bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_type": "nf4",
  "use_nested_quant": false, "fp16": false, "bf16": false,
  "num_train_epochs": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
  "gradient_accumulation_steps": 4, "gradient_checkpointing": true, "max_grad_norm": 0.3, "learning_rate": 2e-4,
  "weight_decay": 0.001, "optim": "paged_adamw_32bit", "lr_scheduler_type": "cosine", "max_steps": -1, "warmup_ratio": 0.03,
  "group_by_length": true, "packing": false, "max_seq_length": null, "eval_split": 0.2, "eval_steps": 100
}"""


def test_a_config_of_modelforge_loads_and_means_the_same(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, MODELFORGE))
    assert [problem.code for problem in loaded.problems if problem.severity != "hint"] == []
    config, given = loaded.require().to_json(), json.loads(MODELFORGE)
    assert {key: value for key, value in given.items() if config[key] != value} == {"max_steps": -1, "max_seq_length": None}


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


def test_a_plan_is_a_config_that_knows_where_its_values_came_from(tmp_path: Path) -> None:
    values = {**defaults(), "dataset": "d", "beta": 0.7, "device": "cpu", "num_train_epochs": 9}
    sources = {**dict.fromkeys(values, "default"), "beta": "override", "dataset": "config", "device": "measured"}
    plan = write(tmp_path, json.dumps({"plan_version": 1, "config": values, "sources": sources}))
    loaded = load(plan)
    assert loaded.require().beta == 0.7
    assert loaded.sources == {**sources, "max_seq_length": "default"}
    assert "beta" in [problem.code for problem in loaded.problems]
    assert "epochs" not in [problem.code for problem in loaded.problems]  # nobody wrote that key
    changed = load(plan, ["num_train_epochs=9"])
    assert changed.sources["num_train_epochs"] == "override" and "epochs" in [problem.code for problem in changed.problems]


def test_a_damaged_plan_is_told_as_a_damaged_value(tmp_path: Path) -> None:
    path = write(tmp_path, '{"plan_version": 1, "config": {"dataset": "d", "beta": NaN}, "sources": {}}')
    assert [problem.code for problem in load(path).problems if problem.severity == "error"] == ["json-nan"]


def test_overrides_are_text_where_the_option_is(tmp_path: Path) -> None:
    path = write(tmp_path, '{"dataset": "d"}')
    config = load(path, ["output_dir=2024", "eval_dataset=5", 'dataset=["a.jsonl", "b.jsonl"]', "lora_alpha=null"]).require()
    assert (config.output_dir, config.eval_dataset, config.dataset, config.lora_alpha) == (
        "2024",
        "5",
        ["a.jsonl", "b.jsonl"],
        None,
    )


def test_what_another_strategy_owns_is_told_once(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, '{"strategy": "sft", "dataset": "d", "label_smoothing": 0.1, "num_train_epochs": 1}'))
    found = [
        (problem.severity, problem.code)
        for problem in loaded.problems
        if problem.key in ("label_smoothing", "num_train_epochs")
    ]
    assert found == [("warning", "other-strategy")]


def test_a_user_wins_over_the_profile(tmp_path: Path) -> None:
    config = load(write(tmp_path, '{"dataset": "d", "compute_specs": "mid_range", "use_8bit": true}')).require()
    assert (config.use_8bit, config.use_4bit) == (True, False)


def test_a_text_that_is_no_json_at_all_ends_soon(tmp_path: Path) -> None:
    problems = load(write(tmp_path, "{" + "a: b, " * 100_000 + "}")).problems
    assert len([problem for problem in problems if problem.code in ("json-syntax", "duplicate-key")]) == 100


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('"eval_dataset": "./d.jsonl"', "eval-is-train"),
        ('"output_dir": "../here/d.jsonl"', "output-is-input"),
    ],
)
def test_one_file_under_two_names_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert says in [code for code, _ in codes(load(write(tmp_path, '{"dataset": "d.jsonl", ' + text + "}")).problems)]


@pytest.mark.parametrize("path", ["missing.json", ".", "tests"])
def test_an_unreadable_file_is_a_problem(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert codes(load(path).problems) == [("config-unreadable", None)]


@pytest.mark.parametrize("name", ["", "config.json", "generation_config.json", "adapter_config.json", "model.safetensors"])
def test_a_model_is_no_config(tmp_path: Path, name: str) -> None:
    keys = {
        "config.json": "architectures",
        "generation_config.json": "transformers_version",
        "adapter_config.json": "peft_type",
    }
    for file, key in keys.items():
        (tmp_path / file).write_text(f'{{"{key}": "x", "lora_alpha": 3}}')
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (problem,) = load(str(tmp_path / name)).problems
    assert "a model, not a config" in problem.message and problem.fix == f'name it in a config: "model_name": "{tmp_path}"'


@pytest.mark.parametrize("data", [b"\xff\xfe{\x00}\x00", b"x" * (1 << 20) + b"y", b"[]", b"3"])
def test_a_file_that_is_no_config_is_a_problem(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(data)
    assert len(codes(load(str(path)).problems)) == 1
