"""Commands without what only some systems have, and without reading weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Run
from typer.testing import CliRunner

from dpo_cli.app import app
from dpo_cli.config.config import load
from dpo_cli.errors import Exit
from dpo_cli.hardware.machine import probe
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.preflight import inspect
from dpo_cli.storage import digests
from dpo_cli.storage.lock import is_locked_now

# Windows has none of these, macOS not all of them.
WITHOUT = """
import os, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty"):
    sys.modules[name] = None
for place, names in (
    (os, ("sysconf", "statvfs", "sched_getaffinity", "getuid", "O_DIRECTORY", "uname", "fork")),
    (signal, ("setitimer", "SIGALRM", "SIGHUP", "SIGKILL")),
):
    for name in names:
        if hasattr(place, name):
            delattr(place, name)
from dpo_cli.__main__ import main
main()
"""


def without(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.mark.parametrize(
    "command",
    ["--help", "train --help", "--version", "validate configs/quickstart.json --json", "recommend --vram 12 --json"],
)
def test_commands_work_without_what_only_unix_has(command: str) -> None:
    done = without(*command.split())
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_is_reported_without_what_only_unix_has(run: Run) -> None:
    _, place = run()
    (place / "report.html").unlink()
    done = without("report", str(place))
    assert done.returncode == 0, done.stderr
    assert (place / "report.html").is_file()


def test_a_file_is_locked_once(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as one, (tmp_path / "lock").open("r+") as other:
        assert is_locked_now(one) and not is_locked_now(other)
        one.close()
        assert is_locked_now(other)


@pytest.mark.parametrize("words", [("eval",), ("report",), ("recommend", "--vram", "12", "--model")])
def test_a_name_that_is_too_long_is_told(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [*words, 300 * "x"])
    assert done.exit_code == Exit.USAGE and "too long" in done.stderr and "Errno" not in done.stderr


def test_validate_hashes_no_weights(
    run: Run, tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on a run."""
    _, first = run()
    first = first.rename(tmp_path / "first")
    config = tmp_path / "on.json"
    values = {"model_name": str(first), "dataset": str(pairs_file()), "output_dir": str(tmp_path / "on")}
    config.write_text(json.dumps(values), encoding="utf-8")
    source = ModelSource.of(str(first))
    assert list(source.weights_sha256) == source.folders == [str(first / "adapter")]

    def refuse(*_: object) -> str:
        raise AssertionError("weights are read")

    monkeypatch.setattr(digests, "sha256", refuse)
    monkeypatch.setattr(digests.hashlib, "file_digest", refuse)
    assert not inspect(load(str(config)), probe()).errors
    inside = inspect(load(str(config), [f"output_dir={first}"]), probe())
    assert [problem.code for problem in inside.errors] == ["output-is-input"]
    with pytest.raises(AssertionError):
        ModelSource.of(str(first)).weights_sha256  # noqa: B018
