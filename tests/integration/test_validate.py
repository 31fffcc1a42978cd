"""`dpo validate` as a process: several configs, overrides' neighbours, pipes, narrow terminals."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bad_configs import lay_out
from conftest import ROOT
from fork_server import dpo
from test_commands import DPO


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("validate")
    lay_out(made)
    good = {"model_name": "HuggingFaceTB/SmolLM2-135M-Instruct", "dataset": "pairs.jsonl", "eval_split": 0.1}
    (made / "good.json").write_text(json.dumps(good), encoding="utf-8")
    (made / "bad.json").write_text('{"dataset": "pairs.jsonl", "beta": -1}', encoding="utf-8")
    unfit = {"dataset": "pairs.jsonl", "model_name": "meta-llama/Llama-3.1-8B-Instruct"}
    (made / "unfit.json").write_text(json.dumps(unfit), encoding="utf-8")
    return made


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["good.json"], 0),
        (["good.json", "good.json"], 0),
        (["good.json", "unfit.json"], 4),
        (["unfit.json", "bad.json"], 3),
        (["bad.json", "unfit.json", "good.json"], 3),
        (["good.json", "gone.json"], 3),
        ([], 2),
    ],
)
def test_several_configs_end_in_the_code_of_the_worst(place: Path, names: list[str], code: int) -> None:
    done = dpo("validate", *names, "--vram", "8", "--json", cwd=place)
    assert done.returncode == code, done.stderr
    documents = json.loads(done.stdout)
    if len(names) > 1:
        assert [document["file"] for document in documents] == names
        assert [document["ok"] for document in documents] == [name == "good.json" for name in names]


def test_schema_names_a_file_that_an_editor_can_read() -> None:
    done = dpo("validate", "--schema")
    assert done.returncode == 0
    assert json.loads(dpo("validate", "--schema", "--json").stdout) == {"schema": done.stdout.strip()}
    assert "properties" in json.loads(Path(done.stdout.strip()).read_text(encoding="utf-8"))


def test_the_wheel_ships_the_schema(tmp_path: Path) -> None:
    """Built as pip builds it; a package that forgets a data file works only where it was written."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "dpo_cli", source / "dpo_cli", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta; print(build_meta.build_wheel('../wheel'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", *tmp_path.glob("wheel/*.whl")], capture_output=True, text=True, check=True
    ).stdout
    wanted = ["config/schema.json", "config/options.pyi", "models/models.json", "hardware/profiles.json"]
    assert [name for name in wanted if f"dpo_cli/{name}" not in listed] == []


def test_a_config_from_a_pipe_and_a_fifo(place: Path) -> None:
    config = (place / "good.json").read_text(encoding="utf-8")
    assert dpo("validate", "-", cwd=place, input=config).returncode == 0
    done = subprocess.run(
        ["bash", "-c", f"{DPO} validate <(cat good.json)"], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_overrides_are_checked_like_the_file(place: Path) -> None:
    done = dpo("validate", "good.json", "good.json", "beta=-1", cwd=place)
    assert done.returncode == 3
    assert done.stderr.count('command line: "beta": -1 is not a number above 0') == 2
    assert dpo("validate", "bad.json", "beta=0.2", cwd=place).returncode == 0


def test_a_place_is_file_line_and_column(place: Path) -> None:
    done = dpo("validate", "bad.json", cwd=place)
    assert 'bad.json:1:36: "beta": -1 is not a number above 0' in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
def test_60_columns_break_nothing(place: Path) -> None:
    command = f"unset COLUMNS; stty cols 60; {DPO} validate bad.json; {DPO} train --help"
    done = subprocess.run(["script", "-qec", command, "/dev/null"], capture_output=True, text=True, cwd=place, check=False)
    assert "Traceback" not in done.stdout and "prompt_sharing" in done.stdout
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert [line for line in plain.splitlines() if len(line) > 60] == []


OF_GGUF = "not shown, because a GGUF file's tokenizer is read when training starts; lengths are in characters"
OF_HUB = "not shown, because the tokenizer of HuggingFaceTB/SmolLM2-135M-Instruct is read when training starts"


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("models/large.gguf", (), [OF_GGUF]),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", (), [OF_HUB]),
        ("models/large.gguf", ("--rows", 0), []),
    ],
)
def test_why_no_row_is_rendered(place: Path, model: str, options: tuple[object, ...], says: list[str]) -> None:
    done = dpo("validate", "good.json", f"model_name={model}", "use_4bit=true", *options, cwd=place)
    assert done.returncode == 0, done.stderr
    assert [line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("rendered")] == says
