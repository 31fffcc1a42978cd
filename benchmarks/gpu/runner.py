"""A check as a process of its own, with a deadline; its lines go to the results file at once, so a stop keeps what is done.

Processes are forked from one that has imported everything, and imports are most of a short check. CUDA does not survive a fork:
the parent never starts it, which needs two measures. torch counts the devices through NVML. bitsandbytes, which PEFT imports,
asks CUDA for the capability of each device; while it is imported, nvidia-smi answers. `ForkFails` is raised if that is not
enough on some machine; `__main__.py` then starts a process for each check, which imports everything again.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from baseline import Column

ROOT = Path(__file__).parents[2]
RIGHT, WRONG, MEASURED, NOT_RUN = "right", "wrong", "measured", "not run"
LEAST_SECONDS = 3.0  # with less time left a check is not started
LAST_LINES = 12  # of the log of a check that failed


class CannotRun(Exception):
    """Why a check cannot run here."""


class ForkFails(Exception):
    """CUDA cannot be used in a process that is forked from this one."""


@dataclass
class Setting:
    """What a check gets: its device, deadline and folder, and where its lines go."""

    check: str
    device: str
    deadline: float  # of time.monotonic()
    place: Path
    results: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def is_small(self) -> bool:
        """Whether this is the rehearsal."""
        return self.device == "cpu"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def agrees(self, case: str, figures: Mapping[str, Any], limits: Mapping[str, float], why: str = "") -> None:
        """Write a line: right if each of these figures is within its limit."""
        beyond = [
            f"{name} {figures[name]:.3g} is over {limit:g}" for name, limit in limits.items() if not figures[name] <= limit
        ]
        self.says(case, WRONG if beyond else RIGHT, figures, "; ".join([*beyond, *filter(None, [why])]))

    def measured(self, case: str, figures: Mapping[str, Any], why: str = "") -> None:
        self.says(case, MEASURED, figures, why)

    def not_run(self, case: str, why: str) -> None:
        self.says(case, NOT_RUN, {}, why)

    def says(self, case: str, verdict: str, figures: Mapping[str, Any], why: str = "") -> None:
        """Write a line of the results."""
        seconds = round(time.monotonic() - self.started, 2)
        line = {"check": self.check, "case": case, "verdict": verdict, "figures": _plain(figures), "why": _short(why)}
        append(self.results, {**line, "seconds": seconds})


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: such a figure is text."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value for name, value in figures.items()
    }


def _short(why: str) -> str:
    """Without the folders of this machine, whose names may be private."""
    for folder, name in ((str(ROOT), "."), (tempfile.gettempdir(), "$TMP"), (str(Path.home()), "~")):
        why = why.replace(folder, name) if len(folder) > 1 else why
    return why


def append(results: Path, line: Mapping[str, Any]) -> None:
    """Add a line, and see it written."""
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def lines_of(results: Path, check: str | None = None) -> list[dict[str, Any]]:
    """The lines of a check, or of all checks. A line that a stop has cut is not there."""
    lines = []
    for text in results.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if "check" in line and check in (None, line["check"]):
            lines.append(line)
    return lines


@dataclass(frozen=True)
class Check:
    """A function that proves something, and the most seconds that it takes on a GPU."""

    name: str
    run: Callable[[Setting], None]
    seconds: float


@dataclass(frozen=True)
class Part:
    """Checks of one kind, their share of the time, and the columns of their figures."""

    name: str
    baseline: str
    share: float
    checks: Sequence[Check]
    columns: Sequence[Column]
    after: Callable[[list[dict[str, Any]]], list[tuple[str, list[tuple[Column, Any]]]]] = lambda lines: []  # notes of a table


@contextmanager
def cuda_later() -> Iterator[None]:
    """Within, libraries can be imported that ask for the GPU, and CUDA is not started."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    asked = torch.cuda.get_device_capability

    def capability(*device: Any) -> tuple[int, int]:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            first = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
            major, minor = map(int, first.split("."))
        except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
            return asked(*device)  # CUDA starts, and `require_fork` says so
        return major, minor

    with patch.object(torch.cuda, "get_device_capability", capability):
        yield


def require_fork() -> None:
    """`ForkFails` if a process that is forked from this one cannot use the GPU."""
    import torch

    if run_forked(lambda: torch.ones(1, device="cuda").sum().item(), Path(os.devnull), 60) != 0:
        raise ForkFails


def run_forked(work: Callable[[], object], log: Path, seconds: float) -> int | None:
    """The exit code of a forked process that does `work`; None if it was stopped after so many seconds."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # the child must not continue as a second copy of its parent
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return _ended(pid, seconds)


def _ended(pid: int, seconds: float) -> int | None:
    """The exit code of the leader of a process group; the group does not outlive it, nor so many seconds."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        is_late = not found and time.monotonic() > end
        if found or is_late:
            _kill_group(pid)
        if is_late:
            os.waitpid(pid, 0)
            return None
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)


def _kill_group(pid: int) -> None:
    """What the check has started too."""
    with suppress(ProcessLookupError):  # all of it may have ended
        os.killpg(pid, signal.SIGKILL)


def carry_out(check: Check, setting: Setting) -> None:
    """Run a check in this process; what it cannot run is a line too."""
    try:
        check.run(setting)
    except CannotRun as error:
        setting.not_run("", str(error))


def run_check(check: Check, device: str, seconds: float, results: Path, forks: bool) -> None:
    """Run a check in a process of its own. How it ended is a line too, where the check could not say it."""
    if seconds < LEAST_SECONDS:
        Setting(check.name, device, 0, results.parent, results).not_run("", "no time was left")
        return
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        setting = Setting(check.name, device, time.monotonic() + seconds, Path(folder), results)
        log = Path(folder) / "check.log"
        if forks:
            code = run_forked(lambda: carry_out(check, setting), log, seconds)
        else:
            words = ["--only", check.name, "--device", device, "--seconds", str(seconds), "--results", str(results)]
            with log.open("a", encoding="utf-8") as output:
                child = subprocess.Popen(
                    [sys.executable, str(Path(__file__).parent), *words], stdout=output, stderr=output, start_new_session=True
                )
                code = _ended(child.pid, seconds)
        if code is None:
            setting.not_run("", f"stopped after {seconds:.0f} s")
        elif code != 0 or not lines_of(results, check.name):
            last = " | ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
            setting.says("", WRONG, {}, f"ended with {code}: {last}")


def shares(parts: Sequence[Part], seconds: float) -> Callable[[int], float]:
    """The end of the n-th part, of time.monotonic(): time that earlier parts leave is that of later ones."""
    end = time.monotonic() + seconds

    def end_of(number: int) -> float:
        left = end - time.monotonic()
        return time.monotonic() + left * parts[number].share / sum(part.share for part in parts[number:])

    return end_of
