"""`dpo validate` on documented configs that were damaged in every way: always one JSON document and a documented exit code.

500 of them in `make test`; `make fuzz` runs 10,000.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest
from bad_configs import lay_out
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer import testing
from typer.testing import CliRunner

from dpo_cli.app import app
from dpo_cli.config.schema import options

# Typer's runner builds the command from its signatures each time, which takes as long as a validation.
testing._get_command = functools.cache(testing._get_command)
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "500"))
SOURCES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").glob("*.json"))]
SOURCES.append('{"model_name": "HuggingFaceTB/SmolLM2-135M-Instruct", "dataset": "pairs.jsonl", "eval_split": 0.1}')
DATASETS = ["pairs.jsonl", "data/few.jsonl", "data/row-not-json.jsonl", "data/object.json", "models/bert", ".", "/", "\0", ""]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(DATASETS)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), SCALARS, max_size=3)
KEYS = st.sampled_from([*options(), "$schema", "plan_version", "config"]) | st.text(max_size=8)
SNIPPETS = st.sampled_from(
    ["{", "}", "[", "]", ",", ":", '"', "'", "//", "/*", "*/", "\\", "\n", "NaN", "1e999", "True", "-", "\ud800"]
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A config with up to four changes of its keys and values, and up to three of its text."""
    source = draw(st.sampled_from(SOURCES))
    text = source
    if changes := draw(st.lists(st.tuples(KEYS, VALUES), max_size=4)):
        plain = "\n".join(line.split("//")[0] for line in source.splitlines())
        text = json.dumps(
            {**json.loads(plain), **dict(changes)}, indent=draw(st.none() | st.just(2)), ensure_ascii=draw(st.booleans())
        )
    data = text.encode("utf-8", errors="surrogatepass")
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 6)))
        new = draw(
            SNIPPETS.map(lambda word: word.encode("utf-8", errors="surrogatepass"))
            | st.binary(max_size=3)
            | st.just(data[start:end] * 2)
        )
        data = data[:start] + new + data[end:]
    return data


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzz")
    lay_out(made)
    return made


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 500)
@given(data=damaged(), words=st.lists(st.sampled_from(["--strict", "--no-data", "--vram=8"]), max_size=2, unique=True))
def test_nothing_but_problems_comes_of_a_damaged_config(place: Path, data: bytes, words: list[str]) -> None:
    before = Path.cwd()
    os.chdir(place)  # not the fixture of pytest, which hypothesis would use once for all examples
    try:
        Path("config.json").write_bytes(data)
        done = CliRunner().invoke(app, ["validate", "config.json", "--json", *words])
    finally:
        os.chdir(before)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (0, 3, 4)
    assert "Traceback" not in done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] == (done.exit_code == 0) == (not [p for p in document["problems"] if p["severity"] == "error"])
    assert all(problem["message"] and problem["fix"] for problem in document["problems"])
