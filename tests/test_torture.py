"""A few tries of each part of `make torture`: kills, damage, failed writes, starts at once, full disks, signals."""

from __future__ import annotations

import json
import subprocess
import sys

from conftest import ROOT


def test_nothing_is_lost() -> None:
    """Every try of every part passes; those that need Linux's seccomp or the right to mount are not there without."""
    command = [sys.executable, "benchmarks/torture", "--short", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip(), done.stderr
    lines = json.loads(done.stdout)
    assert [fault for line in lines for fault in line["faults"]] == []
    assert len(lines) >= 5 and all(line["tries"] > 0 for line in lines)
