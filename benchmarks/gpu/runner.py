"""A check as a process of its own, with a deadline; its lines go to the results file at once, so a stop keeps what is done.

Processes are forked from one that has imported everything, and imports are most of a short check. CUDA does not survive a fork:
the parent never starts it, which needs two measures. torch counts the devices through NVML. bitsandbytes, which PEFT imports,
asks CUDA for the capability of each device; while it is imported, nvidia-smi answers. `ForkFails` is raised if that is not
enough on some machine; `__main__.py` then starts a process for each check, which imports everything again.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from baseline import Column

ROOT = Path(__file__).parents[2]
RIGHT, WRONG, MEASURED, NOT_RUN = "right", "wrong", "measured", "not run"
LEAST_SECONDS = 3.0  # with less time left a check is not started
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
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


def most(values: Iterable[float]) -> float:
    """The largest value, or NaN if one is: `max` loses it, and it is what a wrong kernel gives most often."""
    return max(values, key=lambda value: (value != value, value))


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


def begin(results: Path, baselines: Sequence[str]) -> None:
    """Empty results, and no table of these names; those of an earlier run are kept, with its time in their names."""
    results.parent.mkdir(parents=True, exist_ok=True)
    files = [results, *(results.with_name(f"{name}.json") for name in baselines)]
    if results.exists():
        ended = time.strftime("%Y-%m-%d-%H%M%S", time.localtime(results.stat().st_mtime))
        for file in filter(Path.exists, files):
            file.rename(file.with_name(f"{file.stem}-{ended}{file.suffix}"))
    results.write_text("", encoding="utf-8")


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
    at_once: int = 1  # checks that run at the same time on a GPU
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

    pid = forked(lambda: torch.ones(1, device="cuda").sum().item(), Path(os.devnull))
    if os.waitpid(pid, 0)[1] != 0:
        raise ForkFails


def forked(work: Callable[[], object], log: Path) -> int:
    """The id of a process that does `work`, the leader of a group that does not outlive this process."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
        os.setpgid(0, 0)
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


def carry_out(check: Check, setting: Setting) -> None:
    """Run a check in this process, with an empty user cache; what it cannot run is a line too."""
    os.environ["XDG_CACHE_HOME"] = str(setting.place / "cache")
    try:
        check.run(setting)
    except CannotRun as error:
        setting.not_run("", str(error))


class Running:
    """A check in a process of its own, in a folder that is removed at its end."""

    def __init__(self, check: Check, device: str, seconds: float, results: Path, forks: bool) -> None:
        self.check, self.seconds, self.results = check, seconds, results
        self._folder = tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True)
        self.setting = Setting(check.name, device, time.monotonic() + seconds, Path(self._folder.name), results)
        self._log = self.setting.place / "check.log"
        words = [sys.executable, str(Path(__file__).parent), "--only", check.name, "--device", device]
        words += ["--seconds", str(seconds), "--results", str(results)]
        work = partial(carry_out, check, self.setting) if forks else partial(os.execv, sys.executable, words)
        self.pid = forked(work, self._log)

    def has_ended(self) -> bool:
        """Whether it has ended; it is stopped at its deadline. How it ended is a line too, where the check could not say it."""
        found, status = os.waitpid(self.pid, os.WNOHANG)
        is_late = not found and self.setting.seconds_left < 0
        if not found and not is_late:
            return False
        with suppress(ProcessLookupError):  # what the check has started ends with it, and all of it may have ended
            os.killpg(self.pid, signal.SIGKILL)
        if is_late:
            os.waitpid(self.pid, 0)
            self.setting.not_run("", f"stopped after {self.seconds:.0f} s")
        elif (code := os.waitstatus_to_exitcode(status)) != 0 or not lines_of(self.results, self.check.name):
            last = " | ".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
            self.setting.says("", WRONG, {}, f"ended with {code}: {last}")
        self._folder.cleanup()
        return True

    def stop(self) -> None:
        """End it, with what it has started, and remove its folder."""
        os.kill(self.pid, signal.SIGKILL)  # it may not lead a group yet
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        end = time.monotonic() + LEAST_SECONDS
        with suppress(ProcessLookupError):
            while time.monotonic() < end:  # until nothing of the group writes into the folder
                os.killpg(self.pid, 0)
                time.sleep(0.02)
        self._folder.cleanup()


def run_checks(checks: Sequence[Check], at_once: int, device: str, end: float, results: Path, forks: bool) -> Iterator[Check]:
    """Run checks until `end`, of time.monotonic(), a few at once; gives each when it has ended."""
    waiting, running = list(checks), list[Running]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                check, left = waiting.pop(0), end - time.monotonic()
                if left < LEAST_SECONDS:
                    Setting(check.name, device, end, results.parent, results).not_run("", "no time was left")
                    yield check
                    continue
                seconds = left if device == "cpu" else min(check.seconds, left)
                running.append(Running(check, device, seconds, results, forks))
            for one in [one for one in running if one.has_ended()]:
                running.remove(one)
                yield one.check
            time.sleep(0.02)
    finally:
        for one in running:
            one.stop()


def shares(parts: Sequence[Part], end: float) -> Callable[[int], float]:
    """The end of the n-th part, of time.monotonic(): time that earlier parts leave is that of later ones."""

    def end_of(number: int) -> float:
        left = end - time.monotonic()
        return time.monotonic() + left * parts[number].share / sum(part.share for part in parts[number:])

    return end_of
