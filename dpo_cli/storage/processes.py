"""Work on many things in processes of their own, in order. No torch.

A process is a copy of this one (fork), so it has what this one has loaded and counted. Without fork (on Windows, and on a Mac,
where its libraries do not allow it) all work is done here.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import chain, islice
from typing import Any, Generic, TypeVar

from dpo_cli.errors import RunFailed

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 8  # processes
AHEAD = 3  # chunks for each process, so that none waits
WATCH_SECONDS = 1.0
MAKE, SEE = "make", "see"
LARGE = 1 << 22  # characters of the items of a chunk
CAN_FORK = sys.platform == "linux"


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def may_fork() -> bool:
    """Whether this process may become several by `in_order`."""
    return CAN_FORK and cores() > 1 and multiprocessing.parent_process() is None


def in_order(
    work: Callable[[Sequence[Item]], Result],
    items: Iterable[Item],
    at_once: int,
    few: int,
    size: Callable[[Item], int] | None = None,
) -> Iterator[tuple[list[Item], Result]]:
    """Chunks of up to `at_once` items, each with its result, in order. Up to `few` chunks are worked on here.

    A chunk also ends when the `size` of its items is large. `RunFailed` if a process ends before its work.
    """
    chunks = _chunks(items, at_once, size)
    first = list(islice(chunks, few + 1))
    if len(first) <= few or not may_fork():
        yield from ((chunk, work(chunk)) for chunk in chain(first, chunks))
        return
    count = min(cores(), MOST)
    executor = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _begin, (work, os.getpid()))
    waiting: deque[tuple[list[Item], Future[Result]]] = deque()
    try:
        for chunk in chain(first, chunks):
            with quiet_fork():
                waiting.append((chunk, executor.submit(_work, chunk)))
            if len(waiting) > AHEAD * count:
                yield _taken(waiting)
        while waiting:
            yield _taken(waiting)
    except BrokenProcessPool as error:
        raise _ended_early() from error
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _chunks(items: Iterable[Item], at_once: int, size: Callable[[Item], int] | None) -> Iterator[list[Item]]:
    chunk, held = list[Item](), 0
    for item in items:
        chunk.append(item)
        held += size(item) if size else 0
        if len(chunk) == at_once or held > LARGE:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


@contextmanager
def quiet_fork() -> Iterator[None]:
    """Within, Python 3.12 does not warn of a fork while there are threads: the copies use none of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _ended_early() -> RunFailed:
    return RunFailed("a process ended before its work was done", "run the same command again, with more free memory")


def _taken(waiting: deque[tuple[list[Item], Future[Result]]]) -> tuple[list[Item], Result]:
    chunk, future = waiting.popleft()
    return chunk, future.result()


_WORK: dict[str, Callable[[Any], Any]] = {}


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    """In a new process: keep the work, leave Ctrl-C to the parent, and end with it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not in the copy
    os.environ["RAYON_NUM_THREADS"] = os.environ["FASTOKENS_BPE_THREADS"] = "1"  # there is a process for each core
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with(parent)
    _WORK["work"] = work


def end_with(parent: int) -> None:
    """This process ends as soon as its parent has ended."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def _work(chunk: Any) -> Any:
    return _WORK["work"](chunk)


class Apart(Generic[Item]):
    """Something that sees many items, in a process of its own if there are more than `few`.

    It is made there, by a new Python: a copy of this process would lack the threads of its libraries.
    """

    def __init__(self, make: Callable[[], Any], at_once: int, few: int) -> None:
        """`make` can be pickled. What it makes has the method `see`, and others that are called with `ask`."""
        self._make, self._at_once, self._few = make, at_once, few
        self._items: list[Item] = []
        self._inner: Any = None  # in this process
        self._process: subprocess.Popen[bytes] | None = None

    def see(self, item: Item) -> None:
        if self._inner is not None:
            self._inner.see(item)
            return
        self._items.append(item)
        if self._process is None and len(self._items) > self._few:
            if cores() == 1:
                self._see_here()
            else:
                self._start()
        if self._process is not None and len(self._items) >= self._at_once:
            self._send_items()

    def ask(self, method: str, *arguments: object) -> Any:
        """What a method returns after all items, or raises."""
        if self._process is None:
            if self._inner is None:
                self._see_here()
            return getattr(self._inner, method)(*arguments)
        self._send_items()
        self._send(method, arguments)
        return self._reply()

    def _see_here(self) -> None:
        self._inner = self._make()
        for item in self._items:
            self._inner.see(item)
        self._items = []

    def _start(self) -> None:
        # In a session of its own, so that Ctrl-C reaches this process only.
        code = f"import sys; sys.path[:] = {sys.path!r}; from dpo_cli.storage.processes import answer; answer({os.getpid()})"
        words, pipe = [sys.executable, "-P", "-c", code], subprocess.PIPE
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, start_new_session=True)
        self._send(MAKE, self._make)

    def _send_items(self) -> None:
        self._send(SEE, self._items)
        self._items = []

    def _send(self, method: str, given: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            pickle.dump((method, given), self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise _ended_early() from error

    def _reply(self) -> Any:
        assert self._process is not None and self._process.stdout is not None
        try:
            error, result = pickle.load(self._process.stdout)
        except EOFError as end:
            raise _ended_early() from end
        if error is not None:
            raise error
        return result

    def __del__(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def answer(parent: int) -> None:
    """In the other process: see items and answer, until the parent ends. An error is the answer to the next question."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)
    taken, given = sys.stdin.buffer, sys.stdout.buffer
    inner: Any = None
    failed: Exception | None = None
    with suppress(EOFError, BrokenPipeError):
        while True:
            method, argument = pickle.load(taken)
            result = None
            try:
                if failed is None and method == MAKE:
                    inner = argument()
                elif failed is None and method == SEE:
                    for item in argument:
                        inner.see(item)
                elif failed is None:
                    result = getattr(inner, method)(*argument)
            except Exception as error:  # it is raised in the parent
                failed = error
            if method not in (MAKE, SEE):
                pickle.dump((failed, result), given, pickle.HIGHEST_PROTOCOL)
                given.flush()
