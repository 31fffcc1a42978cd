"""`make exact`: the tests that take minutes, and how far shared prompts and padded rows are apart in them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import baseline
from baseline import EXACT, Column, Table

ROOT = Path(__file__).parent.parent
ROUNDING = (9.0, 0.0)  # up to ten times as far; the tests have limits of their own
COLUMNS = (
    Column("compared"),
    Column("losses differ by", "nats", "{:.1e}", ROUNDING),
    Column("adapters, or gradients, differ by", "share of the norm", "{:.1e}", ROUNDING),
)
OUTCOMES = ("passed", "skipped", "failed")


@dataclass(frozen=True)
class Case:
    """A test that was run: its function, how it ended, and what it recorded."""

    name: str
    outcome: str
    recorded: dict[str, str]


def tested(*words: str) -> list[Case]:
    """The slow tests that pytest runs for these words, with its own output on standard error."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "slow", f"--junitxml={file}", *words]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False)
        return list(_cases(ElementTree.parse(file).getroot()))


def _cases(root: ElementTree.Element) -> Iterator[Case]:
    for case in root.iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        recorded = {one.attrib["name"]: one.attrib["value"] for one in case.iter("property")}
        yield Case(case.attrib["name"].partition("[")[0], outcome, recorded)


def outcomes(cases: list[Case]) -> Counter[str]:
    return Counter(case.outcome for case in cases)


def measure(table: Table, options: argparse.Namespace) -> int:
    cases = tested("-s", *(("tests/test_smollm2.py", "-k", "float32_does") if options.small else ()))
    for case in cases:
        for compared, figures in case.recorded.items():
            losses, weights = (None if figure == "-" else float(figure) for figure in figures.split())
            table.add(compared, losses, weights)
    ends = outcomes(cases)
    columns = (Column(name, "tests", tolerance=EXACT if name == "failed" else None) for name in OUTCOMES)
    table.note(
        "Of the tests {passed} passed, {skipped} are skipped here, {failed} failed.",
        *((column, ends[column.name]) for column in columns),
    )
    return int(ends["failed"] > 0)


if __name__ == "__main__":
    sys.exit(baseline.main("exact", COLUMNS, measure))
