"""Chat templates under a bound: they are code from strangers, and a sandbox alone lets them run and grow without end."""

from __future__ import annotations

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from dpo_cli.errors import InvalidInput, Problem

MAX_SECONDS = 3.0  # one conversation takes milliseconds
MAX_BYTES = 1 << 30  # of memory beyond what the process has
GROWTH = 16  # a template adds markers to a conversation; what is so many times as long is no rendering of it


@contextmanager
def bounded(seconds: float = MAX_SECONDS) -> Iterator[None]:
    """Stop the Python code inside after `seconds`, or when it asks for a gibibyte; `InvalidInput` says which.

    The clock is a signal, which only the main thread can have; the memory is bounded on Linux. Only rendering belongs inside:
    a library of another language may end the process when it gets no memory.
    """
    is_main = threading.current_thread() is threading.main_thread()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, _too_slow) if is_main else None
    try:
        if sys.platform == "linux":
            wanted = _address_space() + MAX_BYTES
            hard = limits[1]
            resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
        if is_main:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    except MemoryError:
        _refuse(f"asks for more than {MAX_BYTES >> 30} GiB of memory")
    finally:
        if is_main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def check_size(text: str, said: int) -> None:
    """Refuse a rendering of more than `GROWTH` times the `said` characters and some for markers and tools."""
    if len(text) > GROWTH * said + 1_000_000:
        _refuse(f"makes {len(text):,} characters of {said:,}")


def _too_slow(number: int, frame: FrameType | None) -> NoReturn:
    _refuse(f"does not end within {MAX_SECONDS:g} s")


def _refuse(what: str) -> NoReturn:
    message = f"the model's chat template {what} on one conversation"
    fix = 'use a model whose template you trust, or write "use_chat_template": false for rows of plain text'
    raise InvalidInput([Problem("error", "template-unbounded", message, fix, "model_name")]) from None


def _address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
