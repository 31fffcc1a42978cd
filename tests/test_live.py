"""The live view as a terminal shows it: pyte plays what Rich writes. Times are worked by hand, on a clock of the test's own."""

from __future__ import annotations

import io
import json
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyte
import pytest
import torch
from builders import line_of
from rich.console import Console as RichConsole

from dpo_cli.commands.train import train
from dpo_cli.config.config import load
from dpo_cli.hardware.machine import probe
from dpo_cli.plan.preflight import inspect
from dpo_cli.results.summary import Event, Line
from dpo_cli.training.callbacks.metrics_log import Record
from dpo_cli.training.trainer import Totals
from dpo_cli.ui.console import Console
from dpo_cli.ui.live import ASCII_BARS, BARS, POINTS, Curve, LiveView, Pace, sparkline

EVENT = Event("chosen-falls", "warn", 12, "the reward of the chosen responses falls while the margin grows", "lower it")


class Terminal:
    """A console on a terminal of this size, and its screen."""

    def __init__(self, columns: int, rows: int, encoding: str = "utf-8", **variables: str) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=1000)
        self.stream, self.bytes = pyte.ByteStream(self.screen), io.BytesIO()
        self.console = Console()
        file = io.TextIOWrapper(self.bytes, encoding=encoding, newline="\r\n", write_through=True)
        size: dict[str, Any] = {"width": columns, "height": rows}
        options: dict[str, Any] = {
            "force_terminal": True,
            "color_system": "standard",
            "_environ": {"TERM": "xterm", **variables},
        }
        self.console.out = RichConsole(file=file, highlight=False, **size, **options)

    def play(self) -> list[str]:
        """The lines of the screen."""
        self.stream.feed(self.bytes.getvalue())
        self.bytes.seek(0)
        self.bytes.truncate()
        return [line.rstrip() for line in self.screen.display]

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        self.console.out.size = (columns, rows)  # type: ignore[assignment]


def lines_of(steps: int, every: int) -> list[Line]:
    """The lines of a run that is evaluated now and then; its third step has a loss that is NaN."""
    lines: list[Line] = []
    for step in range(1, steps + 1):
        figures = {"loss": 0.7 - step / 100, "accuracy": 0.5, "margin": step / 10}
        figures |= {"tokens": 800 * step, "tokens_per_second": 100.0, "peak_memory_gb": 4.9}
        lines.append(line_of(step=step, **(figures | {"loss": math.nan} if step == 3 else figures)))
        if step % every == 0:
            judged = {"loss": 0.6, "accuracy": 0.75, "margin": 0.4, "peak_memory_gb": 4.9}
            lines.append(line_of(split="eval", step=step, **judged, kl_token=step / 100, kl_sequence=float(step)))
    return lines


@pytest.mark.parametrize(("columns", "rows", "curve"), [(100, 30, "█▇ ▆▅▅▄▄▃▂▂▁"), (60, 20, "█▇ ▆▅▅▄▄▃▂▂▁"), (31, 12, "█▄▁")])
def test_all_figures_stand_on_terminals_large_and_small(columns: int, rows: int, curve: str) -> None:
    terminal = Terminal(columns, rows)
    with LiveView(terminal.console, 20, 2.83, clock=lambda: 0.0) as view:
        for line in lines_of(12, every=4):
            view.show(line)
        view.note(EVENT)
        view._live.refresh()
        shown = terminal.play()
    top = next(i for i, line in enumerate(shown) if line.startswith("12/20 ━"))
    frame = shown[top : top + 9]
    assert [line.split()[0] for line in frame[2:]] == ["loss", "accuracy", "margin", "KL/token", "KL/answer", "tok/s", "memory"]
    assert frame[0].endswith("0:01:04 left") and len(frame[0]) == columns  # 8 steps of 8 s; evaluations took no time
    assert frame[1].split() == ["train", "held", "out"]
    assert frame[2].split("0.580")[1].split("0.600")[0].strip() == curve
    assert [frame[i].split()[-1 if columns == 31 else -2] for i in (5, 6)] == ["0.120", "12.000"]
    assert frame[8] == "memory    4.9 GB, bill 2.8"
    assert shown[top + 9].startswith("warn [chosen-falls] the rewar") and len(shown[top + 9]) <= columns


def test_what_is_said_of_health_stays_above_the_view() -> None:
    terminal = Terminal(100, 30)
    with LiveView(terminal.console, 20, None, clock=lambda: 0.0) as view:
        view.show(lines_of(1, every=2)[0])
        view.note(EVENT)
        view.note(Event("no-movement", "note", 13, "nothing moves", "raise it"))
    shown = terminal.play()
    told = [line for line in shown if line]
    assert told[0].startswith("warn [chosen-falls]") and told[1] == "  lower it"
    assert told[2:4] == ["note [no-movement] nothing moves", "  raise it"]
    assert told[-1] == "note [no-movement] nothing moves" and told[-2] == "memory   4.9 GB"
    assert sum("chosen-falls" in line for line in told) == 1


def test_a_terminal_that_is_resized_shows_one_whole_view() -> None:
    terminal = Terminal(100, 30)
    with LiveView(terminal.console, 20, 2.83, clock=lambda: 0.0) as view:
        for size, line in zip([(100, 30), (60, 20), (30, 12), (80, 24)], lines_of(4, every=9), strict=True):
            terminal.resize(*size)
            view.show(line)
            view._live.refresh()
            shown = terminal.play()
            assert [sum(text.startswith(name) for text in shown) for name in ("loss", "margin", "memory")] == [1, 1, 1]
            assert max(map(len, shown)) <= size[0]


def test_before_the_first_step_nothing_is_said_of_the_time_left() -> None:
    terminal = Terminal(60, 20)
    with LiveView(terminal.console, 20, 2.83) as view:
        view._live.refresh()
        (line,) = filter(None, terminal.play())
    assert line.startswith("0/20 ") and line.endswith("preparing")


def test_a_terminal_without_utf8_gets_ascii() -> None:
    terminal = Terminal(60, 20, encoding="ascii")
    with LiveView(terminal.console, 20, 2.83, clock=lambda: 0.0) as view:
        for line in lines_of(12, every=4):
            view.show(line)
        view.note(EVENT)
    shown = "\n".join(terminal.play())
    assert "#* +=" in shown and shown.isascii()


def test_colours_are_left_out_where_they_are_not_wanted() -> None:
    coloured, plain = Terminal(60, 20), Terminal(60, 20, NO_COLOR="1")
    for terminal in (coloured, plain):
        with LiveView(terminal.console, 20, 2.83, clock=lambda: 0.0) as view:
            view.show(lines_of(1, every=2)[0])
    assert b"\x1b[36m" in coloured.bytes.getvalue() and b"\x1b[3" not in plain.bytes.getvalue().replace(b"\x1b[39", b"")
    assert coloured.play()[1:] == plain.play()[1:]  # without colours Rich's bar ends where the steps do


def test_demonstrations_have_figures_of_their_own() -> None:
    terminal = Terminal(60, 20)
    with LiveView(terminal.console, 20, 2.83, clock=lambda: 0.0) as view:
        figures = {"loss": None, "token_accuracy": 0.25, "peak_memory_gb": 1.0}
        view.show(line_of(**figures, tokens=10, tokens_per_second=5.0))  # the loss as metrics.jsonl has one that is NaN
    shown = [line for line in terminal.play() if line]
    assert [line.split() for line in shown[1:]] == [
        ["loss", "nan"],
        ["accuracy", "0.250", "▁"],
        ["tok/s", "5.000", "▁"],
        ["memory", "1.0", "GB,", "bill", "2.8"],
    ]


def test_a_pipe_gets_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where FORCE_COLOR is set, as CI has it."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with LiveView(Console(), 100, 2.83) as view:
        for line in lines_of(100, every=50):
            view.show(line)
        view.note(EVENT)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 21 + 2 + 2  # the first line and each twentieth, two evaluations, an event with its remedy
    assert told[0] == "step 1/100  loss 0.690  accuracy 0.500  margin 0.100  tok/s 100"
    assert "step 50/100  held out: loss 0.600  accuracy 0.750  margin 0.400  KL/token 0.500  KL/answer 50.000" in told
    assert told[-2:] == ["warn [chosen-falls] the reward of the chosen responses falls while the margin grows", "  lower it"]


def test_time_left_counts_the_evaluations_on_the_way() -> None:
    """10 steps of 2 s, and an evaluation of 30 s: 90 steps are left, and 9 evaluations: 180 + 270 = 450 s."""
    pace = Pace(now=0.0)  # loading takes 100 s, and is not training
    assert pace.left(100, 50.0) is None
    for step in range(1, 11):
        pace.see(line_of(split="train", step=step, tokens=50 * step, tokens_per_second=25.0), 100.0 + 2 * step)
    assert pace.left(100, 120.0) == 180
    pace.see(line_of(split="eval", step=10), 150.0)
    assert pace.left(100, 150.0) == 450
    assert pace.left(100, 151.0) == 449  # it counts down between lines
    pace.see(line_of(split="train", step=20, tokens=1000, tokens_per_second=25.0), 170.0)
    assert pace.left(100, 170.0) == 80 * 2 + 9 * 30  # the one of step 20 is still to come
    pace.see(line_of(split="eval", step=20), 200.0)
    assert pace.left(100, 200.0) == 80 * 2 + 8 * 30
    assert pace.left(100, 9999.0) == 0


def test_time_left_where_evaluations_fall_between_lines() -> None:
    """Steps of 2 s and 50 tokens; a line every 10 and an evaluation of 30 s every 15, which is on the way once more."""
    pace = Pace(now=0.0)
    pace.see(line_of(split="train", step=10, tokens=500, tokens_per_second=25.0), 20.0)
    pace.see(line_of(split="eval", step=15), 60.0)
    pace.see(line_of(split="train", step=20, tokens=1000, tokens_per_second=25.0), 70.0)
    assert pace.left(30, 70.0) == 10 * 2 + 30


def test_the_time_left_is_read_while_lines_come() -> None:
    """Rich draws in a thread of its own, and an error would end it."""
    pace, failed, ended = Pace(now=0.0), [], threading.Event()

    def draw() -> None:
        while not ended.is_set():
            try:
                pace.left(10**6, 0.0)
            except RuntimeError as error:
                failed.append(error)
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    drawing = threading.Thread(target=draw)
    drawing.start()
    for step in range(1, 5001):
        pace.see(line_of(split="train", step=step, tokens=step, tokens_per_second=1.0), float(step))
    ended.set()
    drawing.join()
    sys.setswitchinterval(interval)
    assert failed == []


def test_an_evaluation_between_two_lines_is_no_time_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line every 2 steps of 5 s and 100 tokens, an evaluation of 60 s after step 3: 20 tokens a second all the same."""
    now, lines = 0.0, []
    monkeypatch.setattr("dpo_cli.training.callbacks.metrics_log.time.monotonic", lambda: now)
    totals = Totals(("accuracy",))
    record = Record(totals, [lines.append])
    args, control = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(should_log=False)
    record.on_train_begin(args, None, control)
    for step in range(1, 5):
        now, totals.tokens = now + 5, totals.tokens + 100
        state = SimpleNamespace(global_step=step, max_steps=4, epoch=0.0)
        record.on_step_end(args, state, control)
        if step % 2 == 0:
            record.on_log(args, state, control, {"loss": 0.5, "accuracy": 1.0, "grad_norm": 1.0, "learning_rate": 1.0})
        if step == 3:
            now += 60
            record.on_log(args, state, control, {"eval_loss": 0.5})
    assert [line.figures.get("tokens_per_second") for line in lines] == [20.0, None, 20.0]


def test_sparklines_by_hand() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 10, BARS) == BARS
    assert sparkline([7, math.nan, 0, math.inf], 10, ASCII_BARS) == "# _ "
    assert sparkline([1, 3, math.nan, 9, 5, 5], 3, BARS) == "▁█▄"  # means 2, 9 and 5, of which 5 is at 3/7 of the way
    assert sparkline([2, 2], 5, BARS) == "▁▁" and sparkline([math.nan], 5, BARS) == " " and sparkline([], 5, BARS) == ""


def test_a_long_run_keeps_few_points() -> None:
    """Neighbours are joined, none is lost: the mean of all means is that of the values."""
    curve = Curve()
    most = 0
    for i in range(2**10 * POINTS):  # 98,304 lines
        curve.add(float(i) if i else math.nan)
        most = max(most, len(curve._sums))
    assert most == 2 * POINTS and len(curve.points) == POINTS
    assert curve.points[-1] == 2**10 * POINTS - (2**10 + 1) / 2
    assert curve.points[0] == pytest.approx(sum(range(2**10)) / (2**10 - 1))  # without the one that was NaN


def test_a_real_training_is_seen_on_a_terminal(tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path]) -> None:
    values = {"model_name": str(tiny_model_dir), "dataset": str(pairs_file()), "device": "cpu", "bf16": False, "fp16": False}
    values |= {"max_steps": 2, "gradient_accumulation_steps": 1, "eval_split": 0.3, "lora_r": 4, "learning_rate": 1e-2}
    (tmp_path / "config.json").write_text(json.dumps({**values, "output_dir": str(tmp_path / "run")}), encoding="utf-8")
    terminal = Terminal(100, 60)
    loaded = load(str(tmp_path / "config.json"))
    summary, _ = train(loaded, inspect(loaded, probe()), probe(), terminal.console, overwrite=False, dry_run=False)
    shown = terminal.play()
    top = next(i for i, line in enumerate(shown) if line.startswith("2/2 ━"))
    rows = {line.split()[0]: line.split() for line in shown[top : top + 9] if line}
    assert {"loss", "accuracy", "margin", "KL/token", "KL/answer", "tok/s", "memory"} <= rows.keys()
    assert rows["margin"][1] == f"{summary['train']['margin']:.3f}" and rows["KL/token"][1][:2] == "0."
    bill = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))["memory"]
    assert ("bill" in rows["memory"]) == (bill is not None)
