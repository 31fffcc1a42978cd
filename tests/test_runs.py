"""The run directory: refused, replaced, never half written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

from dpo_cli.commands.session import AGAIN, session, unexpected
from dpo_cli.errors import InvalidInput
from dpo_cli.report.run_data import Contents
from dpo_cli.runs.resume import TO_RESUME, resumable
from dpo_cli.storage.atomic import free_bytes
from dpo_cli.storage.run_directory import ADAPTER, MANIFEST, PLAN, SUMMARY, WEIGHTS, RunDirectory


def claimed(path: Path, overwrite: bool = False) -> AbstractContextManager[RunDirectory]:
    return RunDirectory.claim(path, overwrite, resume=False)


def test_a_run_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    with claimed(tmp_path / "run") as run:
        run.write_json(PLAN, {})
    with claimed(tmp_path / "run"):  # a run that failed before its first step is not a run
        run.write_json(SUMMARY, {"status": "completed"})
    (run.path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InvalidInput), claimed(tmp_path / "run"):
        pass
    with claimed(tmp_path / "run", overwrite=True) as run:
        run.clear()
    assert not (run.path / PLAN).exists() and not (run.path / SUMMARY).exists()
    assert (run.path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)

    def save(place: Path) -> None:
        place.mkdir()
        (place / WEIGHTS).write_bytes(b"one")

    first = run.write_trained(save, whole=False)

    def fail(place: Path) -> None:
        place.mkdir()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.write_trained(fail, whole=False)
    assert (run.path / ADAPTER / WEIGHTS).read_bytes() == b"one"
    assert run.write_trained(save, whole=False) == first


def test_an_unwritable_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InvalidInput), claimed(tmp_path / "file" / "run"):
        pass


def test_a_full_disk_is_told_as_such() -> None:
    for error in (OSError(28, "No space left on device"), ValueError("I/O error: No space left on device (os error 28)")):
        assert unexpected(error).message.startswith("the disk is full")
    assert unexpected(ValueError("x")).message == "ValueError: x"


def test_opening_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        RunDirectory.open(tmp_path)


def test_an_unfinished_start_is_called_so_by_every_command(tmp_path: Path) -> None:
    """A run that was stopped right after it replaced another: its lock, and the adapter of the earlier run."""
    (tmp_path / "run.lock").touch()
    (tmp_path / ADAPTER).mkdir()
    (tmp_path / ADAPTER / WEIGHTS).touch()
    told = []
    for opened in (RunDirectory.open, Contents.read, partial(RunDirectory.check, replace=False)):
        with pytest.raises(InvalidInput) as caught:
            opened(tmp_path)
        told += caught.value.problems
    assert [problem.code for problem in told] == ["not-a-run", "not-a-run", "run-exists"]
    assert all("holds a run that is not finished" in problem.message for problem in told)
    assert all("--resume" in str(problem.fix) for problem in told)


@pytest.mark.parametrize(("within", "fix"), [(nullcontext, AGAIN), (resumable, TO_RESUME)])
def test_a_stop_says_how_to_continue(
    within: Callable[[], AbstractContextManager[None]], fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as left, session(as_json=True, debug=False), within():
        raise KeyboardInterrupt
    assert (left.value.exit_code, json.loads(capsys.readouterr().out)["fix"]) == (130, fix)


def test_a_stop_that_a_library_hides_is_still_one(capsys: pytest.CaptureFixture[str]) -> None:
    """As transformers' `no_init_weights` does, between two lines."""
    with pytest.raises(typer.Exit) as left, session(as_json=True, debug=False), resumable():
        try:
            raise KeyboardInterrupt
        finally:
            raise UnboundLocalError("cannot access local variable 'original_init_weights'")
    said = json.loads(capsys.readouterr().out)
    assert (left.value.exit_code, said["error"], said["fix"]) == (130, "stopped before the end", TO_RESUME)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), InvalidInput([])])
def test_an_error_of_its_own_after_an_interrupt_is_reported(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as left, session(as_json=True, debug=False):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise error  # noqa: B904 - as an unplanned error would
    assert left.value.exit_code in (1, 3)


def test_the_runs_below_a_folder_are_named(tmp_path: Path) -> None:
    """Of 13 folders the finished runs only, in the order of their names, at most ten; those of stages are one folder deeper."""
    names = [f"runs/{number:02}" for number in range(11)]
    for name in (*names, "runs/cut", "two/1-sft", "two/2-dpo"):
        run = RunDirectory(tmp_path / name)
        run.path.mkdir(parents=True)
        run.write_json(PLAN, {})
        if name != "runs/cut":
            run.write_json(SUMMARY, {})
            run.write_json(MANIFEST, {})
    for folder, wanted in {"runs": names, "two": ["two/1-sft", "two/2-dpo"], ".": [*names, "two/1-sft"]}.items():
        more = ", ..." if len(wanted) > 10 else ""
        for opened in (RunDirectory.open, Contents.read):
            with pytest.raises(InvalidInput) as caught:
                opened(tmp_path / folder)
            (problem,) = caught.value.problems
            shown = ", ".join(str(tmp_path / name) for name in wanted[:10])
            assert (problem.code, problem.fix) == ("not-a-run", f"name a run below it: {shown}{more}")


def test_what_was_trained_can_be_read_like_any_other_file(tmp_path: Path) -> None:
    """safetensors keeps its files to their owner."""

    def save(place: Path) -> None:
        place.mkdir()
        save_file({"weight": torch.zeros(1)}, place / WEIGHTS)

    RunDirectory(tmp_path).write_trained(save, whole=False)
    (tmp_path / "other").touch()
    assert (tmp_path / ADAPTER / WEIGHTS).stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/run"])
def test_a_place_that_cannot_hold_a_run_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("text", encoding="utf-8")
    path = tmp_path / name
    with pytest.raises(InvalidInput) as caught, RunDirectory.claim(path, overwrite=False, resume=False):
        pass
    assert [problem.code for problem in caught.value.problems] == ["run-unwritable"]
    if name != "/proc/run":  # its folder exists, so only the attempt shows it
        with pytest.raises(InvalidInput, match="file is a file"):
            RunDirectory.require_place(path)
    else:
        assert free_bytes(path) == sys.maxsize  # it has no disk that could be full


def test_a_place_that_this_user_may_not_write_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    with pytest.raises(InvalidInput, match=f"may not write in {tmp_path}"):
        RunDirectory.require_place(tmp_path / "new" / "run")

    def forbidden(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", forbidden)
    with pytest.raises(InvalidInput, match="Permission denied"):
        RunDirectory.require_place(tmp_path / "run")
