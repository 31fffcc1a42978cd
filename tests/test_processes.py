"""Work in other processes: the same results in order, and none of them outlives its work, a fault, or its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from dpo_cli.errors import InvalidInput, RunFailed, invalid
from dpo_cli.storage import processes
from dpo_cli.storage.processes import CAN_FORK, Apart, in_order

forks = pytest.mark.skipif(not CAN_FORK, reason="this system does not fork")


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 2)


def doubled(items: Sequence[int]) -> tuple[list[int], int]:
    return [2 * item for item in items], os.getpid()


@pytest.mark.parametrize("count", [0, 1, 7, 100])
@pytest.mark.parametrize("few", [0, 3, 1000])
def test_results_come_in_order(count: int, few: int) -> None:
    given, results = [], []
    for chunk, (result, process) in in_order(doubled, iter(range(count)), 4, few):
        given += chunk
        results += result
        assert (process != os.getpid()) == (CAN_FORK and count > 4 * few)
    assert given == [*range(count)] and results == [2 * item for item in given]


def refuses(items: Sequence[int]) -> int:
    if 5 in items:
        raise invalid("bad", "a row is bad", "mend it", "dataset", "a.jsonl", 5)
    return 0


@forks
def test_an_error_of_the_work_arrives_as_it_is() -> None:
    with pytest.raises(InvalidInput) as caught:
        list(in_order(refuses, range(100), 1, 0))
    (problem,) = caught.value.problems
    assert (problem.code, problem.place, problem.fix) == ("bad", "a.jsonl:5", "mend it")


def dies(items: Sequence[int]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@forks
def test_a_killed_process_is_an_error() -> None:
    with pytest.raises(RunFailed, match="ended before its work was done"):
        list(in_order(dies, range(100), 1, 0))


def ids(items: Sequence[int]) -> int:
    return os.getpid()


def alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


def gone(process: int) -> bool:
    """Within ten seconds."""
    return any(not alive(process) or time.sleep(0.1) for _ in range(100))


@forks
def test_processes_end_when_nobody_wants_their_work() -> None:
    works: Iterator[tuple[list[int], int]] = in_order(ids, range(1000), 1, 0)
    _, process = next(works)
    assert alive(process)
    works.close()  # type: ignore[attr-defined]
    assert gone(process)


SLOW = """
import os, time
class Slow:
    def see(self, item): pass
    def process(self): return os.getpid()
    def sleep(self): time.sleep(60)
"""
PARENT = """
import os, sys, time
from dpo_cli.storage import processes
from slow import Slow
processes.cores = lambda: 2
if sys.argv[1] != "order":
    apart = processes.Apart(Slow, 1, 0)
    for item in range(3): apart.see(item)
    print(apart.ask("process"), flush=True)
    apart.ask("sleep") if sys.argv[1] == "asked" else time.sleep(60)
for _, process in processes.in_order(lambda items: os.getpid(), range(1000), 1, 0):
    print(process, flush=True)
    time.sleep(60)
"""


@forks
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("way", ["order", "apart", "asked"])
def test_processes_end_with_their_parent(way: str, stop: int, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, str(tmp_path / "parent.py"), way]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    process = int(parent.stdout.readline())
    assert alive(process)
    time.sleep(0.5)  # Python does not wake for a signal that arrives just before it sleeps
    parent.send_signal(stop)
    parent.wait(10)
    assert gone(process)


class Sums:
    """Sees numbers."""

    def __init__(self, start: int) -> None:
        self.seen = [start]

    def see(self, item: int) -> None:
        self.seen.append(item)

    def total(self, times: int) -> int:
        return times * sum(self.seen)

    def process(self) -> int:
        return os.getpid()

    def fail(self) -> None:
        raise invalid("bad", "a row is bad")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("count", [0, 1, 5, 6, 100])
def test_what_is_apart_sees_all(count: int) -> None:
    apart = Apart[int](partial(Sums, 7), 4, 5)
    for item in range(count):
        apart.see(item)
    assert apart.ask("total", 2) == 2 * (7 + sum(range(count))) == apart.ask("total", 2)
    process = apart.ask("process")
    assert (process != os.getpid()) == (count > 5)
    del apart
    assert process == os.getpid() or gone(process)


class Refuses(Sums):
    def see(self, item: int) -> None:
        if item == 3:
            self.fail()


@pytest.mark.parametrize("few", [0, 100])
def test_an_error_there_is_raised_here(few: int) -> None:
    with pytest.raises(InvalidInput, match="a row is bad"):
        ask_after(10, Refuses, few).ask("total", 1)
    with pytest.raises(InvalidInput, match="a row is bad"):
        ask_after(1, Sums, few).ask("fail")


def ask_after(count: int, kind: type[Sums], few: int) -> Apart[int]:
    apart = Apart[int](partial(kind, 7), 1, few)
    for item in range(count):
        apart.see(item)
    return apart


def test_with_one_core_nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 1)
    apart = ask_after(100, Sums, 5)
    assert apart._items == [] and apart.ask("process") == os.getpid() and apart.ask("total", 1) == 7 + sum(range(100))


def test_large_items_make_small_chunks() -> None:
    chunks = [chunk for chunk, _ in in_order(len, ["x" * 3_000_000] * 5 + ["y"] * 9, 4, 100, len)]
    assert [len(chunk) for chunk in chunks] == [2, 2, 4, 4, 2]


@forks
def test_a_process_that_may_have_no_children_works_alone() -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:  # whose processes are daemons
        assert pool.apply(worked) == [0, 2, 4, 6]


def worked() -> list[int]:
    return [number for _, (numbers, _) in in_order(doubled, range(4), 1, 0) for number in numbers]


def test_its_end_is_an_error() -> None:
    apart = Apart[int](partial(Sums, 7), 1, 0)
    apart.see(1)
    with pytest.raises(RunFailed, match="ended before its work was done"):
        apart.ask("die")
    assert apart._process is not None and apart._process.wait(10) < 0  # its end of the pipe is closed by then
    with pytest.raises(RunFailed, match="ended before its work was done"):
        for _ in range(100):
            apart.see(1)
