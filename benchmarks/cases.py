"""`make cases`: the tests of ../shared/cases, counted by what they show."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter

import baseline
from baseline import EXACT, Column, Table
from exact import outcomes, tested

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core has a test of its own
COLUMNS = (Column("shown"), Column("cases", "cases", tolerance=EXACT), Column("passed", "cases", tolerance=EXACT))


def measure(table: Table, options: argparse.Namespace) -> int:
    cases = tested("-n", "auto", "--dist", "loadfile", "tests/test_cases.py", *(("-k", "token") if options.small else ()))
    for name, count in Counter(case.name for case in cases).items():
        passed = sum(case.outcome == "passed" for case in cases if case.name == name)
        table.add(name.removeprefix("test_").replace("_", " "), count, passed)
    ends = outcomes(cases)
    if ends["skipped"]:
        table.note("Skipped where ../shared/cases is not there.")
    return int(ends["failed"] > 0)


if __name__ == "__main__":
    sys.exit(baseline.main("cases", COLUMNS, measure))
