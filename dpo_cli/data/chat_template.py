"""Chat templates with limits: they are untrusted code, and a sandbox alone does not limit their time and memory."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from dpo_cli.data.messages import Message, Tool, ToolCall, with_arguments
from dpo_cli.errors import invalid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SECONDS = 3.0  # one conversation takes milliseconds
MAX_BYTES = 1 << 30  # of memory in addition to what the process has
# What Python raises for a template that divides by zero, recurses without end, or nests deeper than Python compiles.
FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError)
STATM_BYTES = 200  # more than the line of /proc/PID/statm has
AGAIN_SECONDS = 1.0  # until the next signal, if a library lost one
GROWTH = 16  # a template adds markers to a conversation; a text this many times as long is not a rendering of it


@contextmanager
def bounded() -> Iterator[None]:
    """Stop the Python code inside after `MAX_SECONDS`, or if it needs more than a gibibyte; `InvalidInput` says which.

    The clock is a signal, so it needs the main thread, and not Windows; memory is limited on Linux. Only rendering belongs
    inside: a native library may end the process when it gets no memory.
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
        _refuse(f"does not finish within {MAX_SECONDS:g} s")
    except MemoryError:
        _refuse(f"needs more than {MAX_BYTES >> 30} GiB of memory")
    finally:
        if has_clock:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        if has_limit:
            resource.setrlimit(resource.RLIMIT_AS, limits)


class ChatTemplate:
    """The chat template of a tokenizer: messages to text, as transformers 5.17 renders them. No other place renders one.

    `day` is the date of `strftime_now`, so that a run renders the same text on every day. Tool arguments are objects, or JSON
    text for a template that joins texts.
    """

    def __init__(self, sources: str | Mapping[str, str], tokens: Mapping[str, object], day: date | None = None) -> None:
        self.sources = {"default": sources} if isinstance(sources, str) else dict(sources)
        self.tokens = tokens
        self.day = day or datetime.now().date()
        self._compiled: dict[str, Template] = {}
        self._wants_text: bool | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, day: date | None = None) -> ChatTemplate | None:
        """The template of a tokenizer, None if it has none."""
        if tokenizer.chat_template is None:
            return None
        return cls(tokenizer.chat_template, tokenizer.special_tokens_map, day)

    @property
    def source(self) -> str:
        """The text of all its templates."""
        return "\n".join(self.sources.values())

    @property
    def writes_date(self) -> bool:
        return "strftime_now" in self.source

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, **options: bool | str) -> str:
        """The rendered conversation, within the limits; the template writes its own BOS.

        `TemplateError` if the template rejects the conversation, `TemplateFailed` if it fails on it.
        """
        has_calls = any(message.get("tool_calls") for message in messages)
        if has_calls and self._wants_text is None:
            self._wants_text = self._joins_text(messages, tools)
        return self._rendered(messages, tools, options, self._wants_text if has_calls else None)

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, options: Mapping[str, object], as_text: bool | None
    ) -> str:
        """The conversation with the arguments of tool calls as JSON text or as objects; None without tool calls."""
        said = sum(len(str(message)) for message in messages) + len(str(tools))
        variables = {**self.tokens, "add_generation_prompt": False, "documents": None, **options}
        try:
            given = list(messages) if as_text is None else [with_arguments(message, as_text) for message in messages]
            with bounded():
                text = self._template(tools).render(messages=given, tools=tools, **variables)
        except FAILURES as error:
            raise TemplateFailed(f"{type(error).__name__}: {error}") from error
        except TemplateError as error:
            if type(error) is TemplateError:  # raised by the template itself
                raise
            raise TemplateFailed(f"{type(error).__name__}: {error}") from error
        check_size(text, said)
        return text

    def _template(self, tools: Sequence[Tool] | None) -> Template:
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise TemplateError(f"the tokenizer has no default template, only {', '.join(sorted(self.sources))}")
        if name not in self._compiled:
            self._compiled[name] = _environment(self.day).from_string(self.sources[name])
        return self._compiled[name]

    def _joins_text(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> bool:
        """Whether arguments must be JSON text: objects fail or are written in Python's notation, and text appears once."""
        as_object, as_text = (self._probed(messages, tools, as_text) for as_text in (False, True))
        return not _is_once(as_object) and _is_once(as_text)

    def _probed(self, messages: Sequence[Message], tools: Sequence[Tool] | None, as_text: bool) -> str:
        """The conversation with probes as arguments; empty if the template fails on it."""
        probed: list[Message] = [
            {**message, "tool_calls": [_with_probe(call) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in messages
        ]
        try:
            return self._rendered(probed, tools, {}, as_text)
        except TemplateError:
            return ""


class TemplateFailed(TemplateError):
    """A Python error inside a template: the template expects another value than it was given."""


PROBE = "dpo_probe"


def _with_probe(call: ToolCall) -> ToolCall:
    return {**call, "function": {**call["function"], "arguments": {PROBE: PROBE}}}


def _is_once(text: str) -> bool:
    """Whether a rendering holds the probe, neither encoded twice nor in Python's notation."""
    return PROBE in text and f'\\"{PROBE}' not in text and f"{{'{PROBE}" not in text


class _Generation(Extension):
    """`{% generation %}` marks text of the assistant; it renders its content."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(day: date) -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up (utils/chat_template_utils.py), but without torch; its clock shows `day`."""

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [_Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.combine(day, datetime.min.time()).strftime
    return environment


def check_size(text: str, said: int) -> None:
    """Reject a rendering of more than `GROWTH` times the `said` characters, plus some for markers and tools."""
    if len(text) > GROWTH * said + 1_000_000:
        _refuse(f"turns {said:,} characters into {len(text):,}")


class _TooSlow(BaseException):
    """Not an `Exception`: jinja computes constants while it compiles, ignores exceptions there, and computes them again."""


def _too_slow(number: int, frame: FrameType | None) -> NoReturn:
    raise _TooSlow


def _refuse(what: str) -> NoReturn:
    message = f"the model's chat template {what} on one conversation"
    fix = 'use a model whose template you trust, or write "use_chat_template": false for rows of plain text'
    raise invalid("template-unbounded", message, fix, "model_name") from None


def _address_space() -> int:
    """Bytes that this process has mapped."""
    return int(os.pread(_own_statm(os.getpid()), STATM_BYTES, 0).split()[0]) * resource.getpagesize()


@functools.cache
def _own_statm(process: int) -> int:
    """The open file with the memory of this process: each rendering reads it, and opening it takes longer than rendering."""
    return os.open(f"/proc/{process}/statm", os.O_RDONLY | os.O_CLOEXEC)
