"""A few tries of each part of `make torture`: kills, damage, failed writes, starts at once, full disks, signals."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.long
def test_nothing_is_lost() -> None:
    """Every try of every part passes; those that need Linux's seccomp or the right to mount are not there without."""
    command = [sys.executable, "benchmarks/torture", "--small", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [check for check, tries, passed, _ in rows if passed != tries] == []
    assert len(rows) >= 5 and all(tries > 0 for _, tries, _, _ in rows)
