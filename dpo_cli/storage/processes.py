"""Work on many things in processes of their own, in order. No torch.

A process is a copy of this one (fork), so it has the tokenizer and the template without loading them again. Without fork (on
Windows, and on a Mac, where its libraries do not allow it) all work is done here.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any, TypeVar

from dpo_cli.errors import RunFailed

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 8  # processes
AHEAD = 3  # chunks for each process, so that none waits
WATCH_SECONDS = 1.0
CAN_FORK = sys.platform == "linux"


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    work: Callable[[Sequence[Item]], Result], items: Iterable[Item], at_once: int, few: int
) -> Iterator[tuple[list[Item], Result]]:
    """Chunks of `at_once` items, each with its result, in order. Up to `few` chunks are worked on here.

    `RunFailed` if a process ends before its work.
    """
    items = iter(items)
    chunks = iter(lambda: list(islice(items, at_once)), [])
    first = list(islice(chunks, few + 1))
    if len(first) <= few or not CAN_FORK or cores() == 1:
        yield from ((chunk, work(chunk)) for chunk in chain(first, chunks))
        return
    count = min(cores(), MOST)
    executor = ProcessPoolExecutor(count, get_context("fork"), _begin, (work, os.getpid()))
    waiting: deque[tuple[list[Item], Future[Result]]] = deque()
    try:
        for chunk in chain(first, chunks):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the copies use none of theirs
                waiting.append((chunk, executor.submit(_work, chunk)))
            if len(waiting) > AHEAD * count:
                yield _taken(waiting)
        while waiting:
            yield _taken(waiting)
    except BrokenProcessPool as error:
        raise RunFailed(
            "a process ended before its work was done", "run the same command again, with more free memory"
        ) from error
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _taken(waiting: deque[tuple[list[Item], Future[Result]]]) -> tuple[list[Item], Result]:
    chunk, future = waiting.popleft()
    return chunk, future.result()


_WORK: dict[str, Callable[[Any], Any]] = {}


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    """In a new process: keep the work, leave Ctrl-C to the parent, and end with it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not in the copy
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    _WORK["work"] = work


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def _work(chunk: Any) -> Any:
    return _WORK["work"](chunk)
