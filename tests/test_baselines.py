"""Baselines of benchmarks: kept as they are printed, compared within their tolerance, and what the pages show."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "scripts"))
import floor
import reference
from baseline import BASELINES, EXACT, Baseline, Column, Table, compare, interval
from machine import machine, machine_line, versions
from suite import BENCHMARKS

FILES = sorted(BASELINES.glob("*.json"))
MODULES = {"baseline.py", "cluster.py", "floor.py", "machine.py", "suite.py"}  # no benchmarks themselves
NOT_ON_A_PAGE = {"cases", "spin", "unsloth"}
COLUMNS = (
    Column("model"),
    Column("seconds", "s", "{:.1f}, {:.1f}"),
    Column("ratio", "ratio", "{:.2f}x", (0.1, 0.05)),
    interval("accuracy", (0, 0.1)),
    Column("found", "rows", tolerance=EXACT),
)
PAIRS = Column("pairs", "pairs", tolerance=EXACT)


def table(seconds: float = 1.0, ratio: float | None = 2.0, accuracy: float = 0.5, found: int = 3, pairs: int = 8) -> Table:
    made = Table(COLUMNS)
    made.add("base", [seconds, 2.0], ratio, [accuracy, 0.4, 0.6], {"repeated": found, "broken": 1234})
    made.add("other", None, None, None, None)
    made.note("{pairs} pairs.", (PAIRS, pairs))
    return made


def test_a_table_is_printed_as_it_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Baseline("made-up", "python made_up.py", "2026-11-29", 200.0, machine(), versions(), table())
    (tmp_path / "made-up.json").write_text(made.text(), encoding="utf-8")
    kept = Baseline.read(tmp_path / "made-up.json")
    assert kept.markdown() == made.markdown() and kept.text() == made.text()
    printed = Table(COLUMNS, silent=False)
    for row in table().rows:
        printed.add(*row)
    head, dashes, base, other = capsys.readouterr().out.splitlines()
    assert made.markdown().splitlines()[:5] == [head, dashes, base, other, ""]
    assert dashes == "|---|---|---|---|---|"
    assert base == "| base | 1.0, 2.0 | 2.00x | 0.500 [0.400, 0.600] | 3 repeated, 1,234 broken |"
    assert made.below() == f"8 pairs.\n{machine_line(machine(), versions())}; 2026-11-29, 3 minutes in all."


def test_figures_within_their_tolerance_are_the_same() -> None:
    assert compare(table(), table(seconds=50.0, ratio=2.24, accuracy=0.59)) == []
    assert compare(table(ratio=None), table()) == []  # not known when it was kept


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (table(ratio=2.26), "base: ratio is 2.26x, kept 2.00x"),
        (table(ratio=1.74), "base: ratio is 1.74x, kept 2.00x"),
        (table(ratio=None), "base: ratio is , kept 2.00x"),
        (table(ratio=float("nan")), "base: ratio is nanx, kept 2.00x"),
        (table(accuracy=0.7), "base: accuracy is 0.700 [0.400, 0.600], kept 0.500 [0.400, 0.600]"),
        (table(found=4), "base: found is 4 repeated, 1,234 broken, kept 3 repeated, 1,234 broken"),
        (table(pairs=7), "pairs is 7, kept 8"),
    ],
)
def test_a_figure_beyond_its_tolerance_is_named(found: Table, said: str) -> None:
    assert compare(table(), found) == [said]


def test_rows_and_columns_have_to_be_the_same() -> None:
    fewer = table()
    row = fewer.rows.pop()
    assert compare(table(), fewer) == ["other: this row is missing"]
    assert compare(fewer, table()) == ["other: this row is new"]
    assert compare(table(), Table(COLUMNS[:2], [row[:2]])) == ["the columns are other ones: keep it again"]


def test_a_benchmark_is_kept_and_compared() -> None:
    """A small run by its command: its figures are those of the file, and a file that was changed is told."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "benchmarks/data_speed.py", "--small", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    file = ROOT / "runs" / "baselines" / "data-speed.json"
    kept = run("--keep", "--json")
    assert kept.returncode == 0 and kept.stdout == file.read_text(encoding="utf-8") + "\n", kept.stderr
    same = run("--compare")
    assert same.returncode == 0 and "| 1,000 |" in same.stdout, same.stderr
    changed = json.loads(kept.stdout)
    changed["rows"][0][-1]["row-not-json"] += 1
    file.write_text(json.dumps(changed), encoding="utf-8")
    other = run("--compare")
    assert other.returncode == 1 and "beyond the tolerance: 1,000: found is 1 row-not-json" in other.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_committed_baseline_is_whole(file: Path) -> None:
    kept = Baseline.read(file)
    assert kept.text() == file.read_text(encoding="utf-8"), "edited by hand"
    assert kept.name == file.stem and kept.name in BENCHMARKS and "--small" not in kept.command
    assert f"benchmarks/{BENCHMARKS[kept.name].script}" in kept.command
    assert kept.machine["processor"] and kept.machine["cores"] and kept.versions["torch"]
    assert any(column.tolerance for column in kept.table.columns) and compare(kept.table, kept.table) == []
    names = [kept.table.named(row) for row in kept.table.rows]
    assert names and len(set(names)) == len(names)


def test_the_operations_of_a_training_by_hand() -> None:
    """One pair of 2 + 1 + 1 tokens: 4 tokens with the prompt once, and (4 + 1 + 1) / 2 + 2 * 2 = 7 places of the scores.

    forward: linear 2 * 10 * 4 = 80, attention 4 * 3 * 7 = 84, head 2 * 5 * 2 = 20: 184
    backward: 80 + 2 * 84 + 20 = 268, adapter 6 * 2 * 4 = 48: a step 500; two epochs and one reference 2 * 500 + 184
    """
    model, pair = floor.Model(linear=10, lora=2, attention=3, head=5), floor.Pair(2, 1, 1)
    assert (pair.tokens, pair.places) == (4, 7)
    assert floor.operations(model, [pair], epochs=2) == 1184
    assert floor.operations(model, [pair, pair], epochs=1, with_reference=False) == 1000
    config = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 10}
    # q and o are 8 x 8, k and v 8 x 4, gate, up and down 8 x 12; an adapter of rank 3 has 3 * (inputs + outputs)
    linear, lora = 2 * (2 * 64 + 2 * 32 + 3 * 96), 2 * 3 * (2 * 16 + 2 * 12 + 3 * 20)
    assert floor.Model.of({**config, "num_key_value_heads": 2}, rank=3) == floor.Model(linear, lora, attention=16, head=80)


def test_baselines_stay_small() -> None:
    assert sum(file.stat().st_size for file in FILES) < 60_000


def test_each_benchmark_has_its_table_on_a_page() -> None:
    """That the text is fresh, tests/test_schema.py tests."""
    shown = [section for text in reference.pages().values() for section in reference.sections_of(text)]
    assert len(set(shown)) == len(shown)
    assert reference.SECTIONS.keys() - set(shown) == {f"baseline {name}" for name in NOT_ON_A_PAGE}


def test_no_page_has_a_table_of_figures_that_was_typed() -> None:
    """Outside the sections that are written there is no line that says on what something was measured."""
    measured_on = re.compile(r"\d+ cores of |torch\s+\d+\.\d|transformers \d+\.\d")
    for path, text in reference.pages().items():
        assert measured_on.findall(reference.MARKED.sub("", text)) == [], path.name


def test_every_benchmark_is_in_the_suite() -> None:
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - MODULES
    listed = {Path(benchmark.script.split()[0]) for benchmark in BENCHMARKS.values()}
    assert {path.name for path in listed if path.parent == Path()} - {"torture", "gpu"} == scripts
    assert all((ROOT / "benchmarks" / path).exists() for path in listed)
    for path in scripts:  # by the shared module, under the name in the suite
        (name,) = re.findall(r'baseline\.main\("([a-z-]+)"', (ROOT / "benchmarks" / path).read_text(encoding="utf-8"))
        assert BENCHMARKS[name].script == path
