"""Configs as YAML and TOML: the values that the same JSON has, and problems at their lines and columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fork_server import dpo
from hypothesis import example, given
from hypothesis import strategies as st

from dpo_cli.config import toml_document, yaml_document
from dpo_cli.config.config import load
from dpo_cli.config.documents import Comment, Setting, parse, written

YAML = """\
# a comment
model_name: owner/model  # another
dataset:
  - path: a.jsonl
    weight: 2
  - b.jsonl
learning_rate: 1e-5
use_4bit: true
eval_split: .1
max_steps: null
report_to: "none"
seed: 0x10
warmup_ratio: 1_0
columns: {prompt: question, labels: [yes, no]}
augment:
  <<: &base {rank: shorter}
  responses: 4
"""
TOML = """\
# a comment
model_name = "owner/model"
dataset = [{path = "a.jsonl", weight = 2}, "b.jsonl"]
learning_rate = 1e-5
use_4bit = true
eval_split = 0.1
seed = 0x10

[columns]
prompt = "question"
labels = ["yes", "no"]

[augment]
rank = "shorter"
responses = 4
"""
VALUES: dict[str, Any] = {
    "model_name": "owner/model",
    "dataset": [{"path": "a.jsonl", "weight": 2}, "b.jsonl"],
    "learning_rate": 1e-5,
    "use_4bit": True,
    "eval_split": 0.1,
    "seed": 16,
    "columns": {"prompt": "question", "labels": ["yes", "no"]},
    "augment": {"rank": "shorter", "responses": 4},
}


def test_values_and_places_of_yaml() -> None:
    document = parse(YAML, "c.yaml")
    assert document.value == {**VALUES, "max_steps": None, "report_to": "none", "warmup_ratio": "1_0"}
    assert not document.problems and document.complete
    places = {
        ("learning_rate",): (7, 16),
        ("dataset", 0, "weight"): (5, 13),
        ("dataset", 1): (6, 5),
        ("columns", "labels"): (14, 37),
    }
    assert {path: document.positions[path] for path in places} == places


def test_values_and_places_of_toml() -> None:
    document = parse(TOML, "c.toml")
    assert document.value == VALUES and not document.problems
    places = {("learning_rate",): (4, 17), ("dataset",): (3, 11), ("dataset", 0): (3, 11), ("augment", "responses"): (15, 13)}
    assert {path: document.positions[path] for path in places} == places


TEXTS: tuple[tuple[str, str, str, str, int, int], ...] = (
    ("yaml", "beta: 0.1\nbeta: 0.2\n", "duplicate-key", "keep one of them", 2, 1),
    ("yaml", "beta: .nan\n", "json-nan", "finite", 1, 7),
    ("yaml", "beta: 1e999\n", "json-number", "smaller", 1, 7),
    ("yaml", "a: 1\n\tb: 2\n", "yaml-syntax", "indent with spaces", 2, 1),
    ("yaml", "a: [1, 2\nb: 3\n", "yaml-syntax", "correct the text", 2, 2),
    ("yaml", "a: 1\n---\nb: 2\n", "yaml-syntax", "keep one document", 2, 1),
    ("yaml", "a: !!python/object:os.system {}\n", "yaml-syntax", "delete the tag", 1, 4),
    ("yaml", "a: &a [*a]\n", "json-depth", "flat", 1, 4),
    ("yaml", "a: " + "[" * 5000 + "]" * 5000 + "\n", "json-depth", "flat", 1, 1),
    ("yaml", "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(8)
    ), "json-depth", "flat", 1, 7),
    ("yaml", "[1, 2]: 3\n", "yaml-syntax", "write key: value", 1, 1),
    ("toml", "beta = 0.1\nbeta = 0.2\n", "toml-syntax", "keep one of them", 2, 11),
    ("toml", "beta = nan\n", "json-nan", "finite", 1, 8),
    ("toml", "use_4bit = True\n", "toml-syntax", "true or false", 1, 12),
    ("toml", "beta = \n", "toml-syntax", "key = value", 1, 8),
    ("toml", "[a]\nx = 1\n[a]\n", "toml-syntax", "key = value", 3, 3),
    ("json", "beta: 0.1\n", "json-syntax", "ends in .yaml", 1, 1),
    ("json", "[training]\nbeta = 1\n", "json-syntax", "ends in .toml", 1, 1),
)  # fmt: skip


@pytest.mark.parametrize(("form", "text", "code", "fix", "line", "column"), TEXTS)
def test_problems_have_their_place(form: str, text: str, code: str, fix: str, line: int, column: int) -> None:
    problem = parse(text, f"c.{form}").problems[0]
    assert (problem.code, problem.line) == (code, line) and fix in str(problem.fix)
    if code != "json-depth":
        assert problem.column == column


@pytest.mark.parametrize("name", ["c.json", "c.yaml", "c.toml"])
def test_what_is_written_with_comments_is_read(name: str) -> None:
    lines = [Comment("why: this"), Setting("use_4bit", True), Setting("learning_rate", 2e-4, is_active=False)]
    text = written([*lines, Setting("columns", {"prompt": "q", "labels": [1, "a"]})], name)
    document = parse(text, name)
    assert document.value == {"use_4bit": True, "columns": {"prompt": "q", "labels": [1, "a"]}} and not document.problems
    assert "why: this" in text and "0.0002" in text


@pytest.mark.parametrize("form", ["yaml", "yml", "toml"])
def test_problems_of_values_point_into_the_file(form: str, tmp_path: Path) -> None:
    """The rules and the schema of JSON, with did-you-mean, on the line and column of the value."""
    text = {
        "toml": 'dataset = "d.jsonl"\nmodel_name = "m/m"\nlerning_rate = 1e-4\nbeta = "no"\n',
        "yaml": "dataset: d.jsonl\nmodel_name: m/m\nlerning_rate: 1e-4\nbeta: no\n",
    }["toml" if form == "toml" else "yaml"]
    path = tmp_path / f"my.{form}"
    path.write_text(text, encoding="utf-8")
    found = {problem.key: problem for problem in load(str(path)).problems if problem.severity == "error"}
    assert (found["lerning_rate"].line, found["lerning_rate"].fix) == (3, 'did you mean "learning_rate"?')
    assert (found["beta"].line, found["beta"].file) == (4, str(path))
    assert found["beta"].column == (8 if form == "toml" else 7)


def test_the_same_plan_from_each_form(tmp_path: Path) -> None:
    """`validate` of a config as JSON, YAML and TOML, and of YAML on standard input."""
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q {i}", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(9)), encoding="utf-8"
    )
    values = {"model_name": "owner/model", "dataset": "pairs.jsonl", "learning_rate": 2e-4, "use_4bit": True}
    (tmp_path / "c.json").write_text(json.dumps(values), encoding="utf-8")
    for name, lines in (("c.yaml", yaml_document), ("c.toml", toml_document)):
        (tmp_path / name).write_text("\n".join(lines.line_of(*item) for item in values.items()), encoding="utf-8")
    told = {}
    for name in ("c.json", "c.yaml", "c.toml"):
        done = dpo("validate", name, "--json", cwd=tmp_path)
        document = json.loads(done.stdout)
        assert done.returncode == 0, done.stderr
        assert Path(document["config"].pop("output_dir")).name == "c"
        told[name] = document["config"]
    assert told["c.yaml"] == told["c.json"] == told["c.toml"]


@example({"\n0": None, "": True, "null": 1, "\x85": "\u2028"})
@given(
    st.dictionaries(
        st.text(), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    )
)
def test_what_is_written_as_yaml_is_read(values: dict[str, Any]) -> None:
    """As `dpo recommend --write` writes it; of TOML too, which has no null."""
    text = "\n".join(yaml_document.line_of(*item) for item in values.items())
    document = parse(text or "{}", "c.yaml")
    assert document.value == values or document.problems  # a character that YAML does not have
    held = {key: value for key, value in values.items() if value is not None}
    document = parse("\n".join(toml_document.line_of(*item) for item in held.items()), "c.toml")
    assert document.value == held or document.problems


@given(st.text())
def test_any_text_gives_problems_or_values(text: str) -> None:
    for form in ("yaml", "toml"):
        document = parse(text, f"c.{form}")
        assert document.problems or document.complete
