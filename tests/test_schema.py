"""The schema as the one place of an option: what is made from it, in files and at run time."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import reference

from dpo_cli.config.schema import options, options_help, schema_path

NEW = {
    "type": "number",
    "minimum": 0,
    "default": 0.25,
    "description": "A number made up by a test.",
    "x-group": "Preference",
    "x-strategies": ["dpo"],
    "x-source": "a test",
}


def test_what_is_written_from_the_schema_is_fresh() -> None:
    for path, text in reference.written().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make reference`"


@pytest.mark.long
def test_an_option_is_added_through_the_schema_alone(tmp_path: Path) -> None:
    """In a copy of the program: the schema gets an option, and Config, help, loader and its page know it."""
    for name in ("dpo_cli", "benchmarks", "scripts", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    file = tmp_path / "dpo_cli" / "config" / "schema.json"
    changed = json.loads(file.read_text(encoding="utf-8"))
    changed["properties"]["made_up"] = NEW
    file.write_text(json.dumps(changed), encoding="utf-8")
    (tmp_path / "c.json").write_text('{"dataset": "d", "made_up": 0.5}', encoding="utf-8")
    (tmp_path / "bad.json").write_text('{"dataset": "d", "made_up": -1}', encoding="utf-8")

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, check=True, env={"PYTHONPATH": "."}
        )
        return done.stdout

    code = (
        "from dpo_cli.config.config import load; print(load('c.json').require().made_up, load('bad.json').problems[0].message)"
    )
    assert run("-c", code) == '0.5 "made_up": -1 is not a number of at least 0\n'
    helped = run("-c", "from dpo_cli.app import app; app(['train', '--help'])")
    assert "made_up: a number of at least 0; default 0.25; dpo only" in helped and NEW["description"] in helped
    assert "options.pyi" in run("scripts/reference.py") and "options.md" in run("scripts/reference_pages.py")
    page = (tmp_path / "docs" / "reference" / "options.md").read_text(encoding="utf-8")
    assert "### `made_up`" in page and NEW["description"] in page
    assert "made_up: float" in (tmp_path / "dpo_cli" / "config" / "options.pyi").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [40, 60, 200])
def test_help_names_every_option_and_keeps_to_its_width(width: int) -> None:
    text = options_help(width)
    assert all(f"   {name}: " in text for name in options())
    assert max(map(len, text.splitlines())) <= width


def test_the_schema_is_a_schema_that_lies_in_the_package() -> None:
    assert schema_path().parent == ROOT / "dpo_cli" / "config"
    from jsonschema.validators import Draft202012Validator

    Draft202012Validator.check_schema(json.loads(schema_path().read_text(encoding="utf-8")))


def test_every_word_of_ours_is_explained_and_read() -> None:
    """At the top of the schema, and in the module that all others ask."""
    declared = json.loads(schema_path().read_text(encoding="utf-8"))
    used = {word for rule in declared["properties"].values() for word in rule if word.startswith("x-")}
    read = (ROOT / "dpo_cli" / "config" / "schema.py").read_text(encoding="utf-8")
    assert used == {word for word in re.findall(r"x-[a-z-]+", declared["description"])}
    assert [word for word in sorted(used) if f'"{word}"' not in read] == []
