"""Chat templates under a bound: they are code from strangers, and a sandbox alone lets them run and grow without end."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from dpo_cli.data.messages import Message
from dpo_cli.errors import InvalidInput, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SECONDS = 3.0  # one conversation takes milliseconds
MAX_BYTES = 1 << 30  # of memory beyond what the process has
# What Python raises for a template that divides by zero, calls itself without end, or nests more than Python compiles.
FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError)
AGAIN_SECONDS = 1.0  # until the next signal, should a library have lost one
GROWTH = 16  # a template adds markers to a conversation; what is so many times as long is no rendering of it


@contextmanager
def bounded() -> Iterator[None]:
    """Stop the Python code inside after `MAX_SECONDS`, or when it asks for a gibibyte; `InvalidInput` says which.

    The clock is a signal, which only the main thread can have, and Windows does not; the memory is bounded on Linux. Only
    rendering belongs inside: a library of another language may end the process when it gets no memory.
    """
    has_clock = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    has_limit = sys.platform == "linux" and resource is not None
    limits = resource.getrlimit(resource.RLIMIT_AS) if has_limit else (0, 0)
    before = signal.signal(signal.SIGALRM, _too_slow) if has_clock else None
    try:
        if has_limit:
            wanted = _address_space() + MAX_BYTES
            hard = limits[1]
            resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
        if has_clock:
            signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS, AGAIN_SECONDS)
        yield
    except _TooSlow:
        _refuse(f"does not end within {MAX_SECONDS:g} s")
    except MemoryError:
        _refuse(f"asks for more than {MAX_BYTES >> 30} GiB of memory")
    finally:
        if has_clock:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        if has_limit:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[Any] | None, **options: Any) -> str:
    """A rendered conversation, under the bound; the template writes its own BOS. No other place renders a template.

    `TemplateError` with the reason, where the template refuses the conversation or fails on it.
    """
    said = sum(len(str(message)) for message in messages) + len(str(tools))
    try:
        with bounded():
            text = str(tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options))
    except FAILURES as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error
    check_size(text, said)
    return text


def check_size(text: str, said: int) -> None:
    """Refuse a rendering of more than `GROWTH` times the `said` characters and some for markers and tools."""
    if len(text) > GROWTH * said + 1_000_000:
        _refuse(f"makes {len(text):,} characters of {said:,}")


class _TooSlow(BaseException):
    """No `Exception`: jinja computes constants while it compiles, passes over what that raises, and computes them again."""


def _too_slow(number: int, frame: FrameType | None) -> NoReturn:
    raise _TooSlow


def _refuse(what: str) -> NoReturn:
    message = f"the model's chat template {what} on one conversation"
    fix = 'use a model whose template you trust, or write "use_chat_template": false for rows of plain text'
    raise InvalidInput([Problem("error", "template-unbounded", message, fix, "model_name")]) from None


def _address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
