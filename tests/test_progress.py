"""What a command works on is shown: as a bar on a terminal, as a line now and then in a pipe, and not at all if it is quick."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, made_row
from rich.console import Console as RichConsole
from test_live import Terminal, lines_of

from dpo_cli.errors import DpoError
from dpo_cli.storage.progress import RUNNING, Work, working
from dpo_cli.ui import progress_view
from dpo_cli.ui.live import LiveView
from dpo_cli.ui.progress_view import ProgressView, _line_within, line, long_work


def until(holds: Callable[[], bool]) -> None:
    """Wait for the thread of a view."""
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("it is never shown")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATIENCE", "BETWEEN_LINES"):
        monkeypatch.setattr(progress_view, name, 0.0)
    monkeypatch.setattr(progress_view, "LOOKS", 0.01)


def test_lines_by_hand() -> None:
    work = Work("scoring", 200, "pairs", start=100.0)
    assert line(work, 104.0) == "scoring 0 of 200 pairs, 0:00:04 so far"
    work.add(50, now=104.0)
    assert line(work, 104.0) == "scoring 50 of 200 pairs, 12 pairs/s, 0:00:12 left"
    assert line(work, 107.0) == "scoring 50 of 200 pairs, 12 pairs/s, 0:00:09 left"  # within a batch the time runs on
    work.add(8, "3 cut", now=110.0)
    assert line(work, 110.0) == "scoring 58 of 200 pairs, 5.8 pairs/s, 0:00:24 left, 3 cut"
    assert line(work, 150.0) == "scoring 58 of 200 pairs, 5.8 pairs/s, 0:00:50 so far, 3 cut"  # longer than expected
    assert line(Work("loading a model", None, start=100.0), 103.4) == "loading a model, 0:00:03 so far"
    reading = Work("reading", None, "rows", start=100.0)
    reading.add(12000, now=104.0)
    assert line(reading, 104.0) == "reading 12,000 rows, 3,000 rows/s, 0:00:04 so far"
    resumed = Work("augmenting", 100, "prompts", 60, before=60, start=100.0)
    resumed.add(10, now=105.0)
    assert line(resumed, 105.0) == "augmenting 70 of 100 prompts, 2.0 prompts/s, 0:00:15 left"


@pytest.mark.parametrize(
    ("width", "what"),
    [(88, "reading /home/me/pairs/preferences-of-today.jsonl"), (60, "reading /...day.jsonl"), (40, None)],
)
def test_a_long_path_leaves_room_for_the_counts(width: int, what: str | None) -> None:
    work = Work("reading /home/me/pairs/preferences-of-today.jsonl", None, "rows", start=100.0)
    work.add(4664, now=110.0)
    whole = line(work, 110.0)
    assert _line_within(width, work, 110.0) == (whole if what is None else f"{what} 4,664 rows, 466 rows/s, 0:00:10 so far")
    assert what is None or len(_line_within(width, work, 110.0)) <= width


def test_a_chain_of_short_works_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_view, "PATIENCE", 0.3)
    for _ in range(4):
        with working("short"):
            time.sleep(0.1)
    with working("short"):
        assert long_work(time.monotonic())
    time.sleep(0.6)
    with working("after a pause"):
        assert not long_work(time.monotonic())


def test_work_that_fails_is_over() -> None:
    with pytest.raises(ZeroDivisionError), working("outer"), working("inner"):
        assert [work.what for work in RUNNING] == ["outer", "inner"]
        raise ZeroDivisionError
    assert RUNNING == []


def test_a_pipe_gets_lines_while_the_work_runs(impatient: None) -> None:
    file = io.StringIO()
    with ProgressView(lambda: RichConsole(file=file, width=120)), working("evaluating"), working("scoring", 4, "pairs") as work:
        work.add(3)
        until(lambda: "3 of 4" in file.getvalue())
    said = file.getvalue()
    assert said.splitlines()[-1].startswith("evaluating: scoring 3 of 4 pairs, ") and "\x1b" not in said
    time.sleep(0.1)
    assert file.getvalue() == said


def test_quick_work_and_a_pipe_that_was_just_written_to_are_silent(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_view, "PATIENCE", 60.0)
    file = io.StringIO()
    with ProgressView(lambda: RichConsole(file=file, width=120)), working("reading"):
        time.sleep(0.1)
    assert file.getvalue() == ""
    monkeypatch.setattr(progress_view, "PATIENCE", 0.0)
    monkeypatch.setattr(progress_view, "BETWEEN_LINES", 60.0)
    with ProgressView(lambda: RichConsole(file=file, width=120)), working("reading"):
        until(lambda: file.getvalue() != "")
        time.sleep(0.1)
    assert len(file.getvalue().splitlines()) == 1


def test_a_closed_pipe_is_left_to_the_command(impatient: None) -> None:
    """Rich would write to nowhere from then on, and the command would never notice."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        out = RichConsole(file=pipe, width=120)
        with ProgressView(lambda: out) as view, working("reading"):
            until(lambda: not view._thread.is_alive())
        assert not out.quiet


@pytest.mark.parametrize("columns", [100, 40])
def test_a_terminal_gets_a_bar_that_goes_away(impatient: None, columns: int) -> None:
    terminal = Terminal(columns, 12)
    with terminal.console.progress, working("evaluating"), working("scoring", 4, "pairs") as work:
        work.add(3)
        seen: list[str] = []
        until(lambda: bool(seen.extend(terminal.play()) or any("scoring 3 of 4" in text for text in seen)))
        terminal.console.line("a line of the command")
        assert all(len(text) <= columns for text in seen)
    terminal.console.line("the end")
    assert [text for text in terminal.play() if text] == ["a line of the command", "the end"]


def test_an_error_stands_below_what_was_shown(impatient: None) -> None:
    """Errors go to another stream of the same terminal, past the bars."""
    terminal = Terminal(80, 12)
    console = terminal.console
    console.errors = RichConsole(file=console.out.file, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    with console.progress, working("evaluating"), working("scoring", 4, "pairs"):
        until(lambda: any("scoring" in text for text in terminal.play()))
        console.error(DpoError("the disk is full", "free space"))
        until(lambda: console.progress._live is not None)
    text = [line.strip("│ ") for line in terminal.play() if line]
    assert "the disk is full" in text[1] and text[2] == "free space" and len(text) == 4, text


def test_the_view_of_a_training_shows_its_evaluation_and_no_time_left(impatient: None) -> None:
    terminal = Terminal(80, 12)
    with terminal.console.progress, LiveView(terminal.console, 6, 2.8) as view:
        for line_of_run in lines_of(6, every=6):
            view.show(line_of_run)
        assert terminal.console.progress._left == 1
        with working("evaluating"), working("answering", 32, "prompts") as work:
            work.add(8)
            view._live.refresh()
            screen = "\n".join(terminal.play())
    assert "answering 8 of 32 prompts" in screen and "evaluating" in screen and "left" not in screen.splitlines()[0]
    assert terminal.console.progress._left == 0


@pytest.mark.long
def test_a_training_says_in_a_pipe_what_it_does(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(made_row(i)) + "\n" for i in range(24)), encoding="utf-8")
    program = (
        "import dpo_cli.ui.progress_view as view\n"
        "view.PATIENCE = view.BETWEEN_LINES = 0.0; view.LOOKS = 0.001\n"
        "from dpo_cli.__main__ import main\n"
        "main()\n"
    )
    values = [f"model_name={tiny_model_dir}", f"dataset={data}", f"output_dir={tmp_path / 'run'}", "device=cpu", "bf16=false"]
    command = [sys.executable, "-c", program, "train", str(ROOT / "configs/quickstart.json"), *values, "max_steps=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = [text.partition(",")[0] for text in done.stdout.splitlines()]
    for work in ("starting torch", f"loading {tiny_model_dir}", "the first step", "evaluating: scoring", "answering as the "):
        assert any(text.startswith(work) for text in said), (work, done.stdout)
    as_json = subprocess.run([*command, "--overwrite", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(as_json.stdout)["status"] == "completed" and "evaluating: scoring" in as_json.stderr
