"""Every case of bad_configs.py: what is wrong is named with its code, key, line and fix, and nothing else is an error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bad_configs import CASES, Case, lay_out
from bad_rows import FAULTS, Fault
from conftest import ROOT
from test_schema import reference

from dpo_cli.config.config import load
from dpo_cli.data.dataset import read
from dpo_cli.plan.preflight import inspect


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bad")
    lay_out(made)
    return made


def test_the_corpus_is_large() -> None:
    errors = [case for case in CASES if case.severity == "error"]
    assert len(errors) >= 120
    assert len({case.config for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.code}-{case.own or case.config[:20].decode(errors='replace')}"[:60]
)
def test_it_is_named(case: Case, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    Path("config.json").write_bytes(case.config)
    loaded = load("config.json")
    found = inspect(loaded, case.machine, case.vram_gb)
    named = [problem for problem in found.problems if (problem.code, problem.key) == (case.code, case.key)]
    assert len(named) == 1, [(problem.code, problem.key, problem.message) for problem in found.problems]
    (problem,) = named
    assert (problem.severity, problem.line, problem.file) == (case.severity, case.line, case.file)
    assert case.fix in (problem.fix or "")
    assert problem.message and "\n" not in problem.message
    is_of_model = case.key == "model_name"  # it may name a config.json, that of the model
    assert is_of_model or not problem.message.startswith(case.file)  # the place is in front of it
    assert (problem.column is None) == (case.line is None or case.file != "config.json")
    errors = [other.code for other in found.problems if other.severity == "error"]
    assert errors == ([case.code] if case.severity == "error" else [])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.code)
def test_a_bad_row_is_told_in_its_words(fault: Fault, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (problem,) = [problem for problem in read(fault.file).problems if problem.code == fault.code]
    assert (problem.severity, problem.line) == (fault.severity, fault.line)
    assert fault.says in problem.message


def test_every_code_has_a_case() -> None:
    """The codes that the source can give, but for those of a training (tests/integration)."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "dpo_cli").rglob("*.py"))
    before = r'(?:"(?:error|warning|hint)", |(?:BadRow|_wrong|stop|complain|damage)\()'
    given = re.compile(before + r'"([a-z0-9]+(?:-[a-z0-9]+)*)"')
    codes = set(given.findall(source))
    assert codes - {"error", "warning", "hint"} - {case.code for case in CASES} - reference.WHILE_RUNNING.keys() == set()
