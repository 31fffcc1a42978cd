"""Chat templates under a bound: they are code from strangers, and a sandbox alone lets them run and grow without end."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import Path
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


class ChatTemplate:
    """The chat template of a tokenizer: messages to text, as transformers 5.17 renders them. No other place renders one.

    `day` is what `strftime_now` writes: a run renders the same text on every day. Tool arguments are given as objects, or as
    JSON text to a template that joins texts.
    """

    def __init__(self, sources: str | Mapping[str, str], tokens: Mapping[str, object], day: date | None = None) -> None:
        self.sources = {"default": sources} if isinstance(sources, str) else dict(sources)
        self.tokens = tokens
        self.day = day or datetime.now().date()
        self._compiled: dict[str, Template] = {}
        self._wants_text: bool | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, day: date | None = None) -> ChatTemplate | None:
        """The template of a tokenizer, where it has one."""
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
        """The rendered conversation, under the bound; the template writes its own BOS.

        `TemplateError` where the template refuses the conversation, `TemplateFailed` where it fails on it.
        """
        has_calls = any(message.get("tool_calls") for message in messages)
        if has_calls and self._wants_text is None:
            self._wants_text = self._joins_text(messages, tools)
        return self._rendered(messages, tools, options, self._wants_text if has_calls else None)

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, options: Mapping[str, object], as_text: bool | None
    ) -> str:
        """With the arguments of tool calls as JSON text or as objects; None where there are none."""
        said = sum(len(str(message)) for message in messages) + len(str(tools))
        variables = {**self.tokens, "add_generation_prompt": False, "documents": None, **options}
        try:
            given = list(messages) if as_text is None else [with_arguments(message, as_text) for message in messages]
            with bounded():
                text = self._template(tools).render(messages=given, tools=tools, **variables)
        except FAILURES as error:
            raise TemplateFailed(f"{type(error).__name__}: {error}") from error
        except TemplateError as error:
            if type(error) is TemplateError:  # which the template raises itself, about what it does not take
                raise
            raise TemplateFailed(f"{type(error).__name__}: {error}") from error
        check_size(text, said)
        return text

    def _template(self, tools: Sequence[Tool] | None) -> Template:
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise TemplateError(f"the tokenizer has the templates {', '.join(sorted(self.sources))}, and none is the default")
        if name not in self._compiled:
            self._compiled[name] = _environment(self.day).from_string(self.sources[name])
        return self._compiled[name]

    def _joins_text(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> bool:
        """Whether arguments must be JSON text: objects fail, or come out as Python writes them, and text comes out once."""
        as_object, as_text = (self._probed(messages, tools, as_text) for as_text in (False, True))
        return not _is_once(as_object) and _is_once(as_text)

    def _probed(self, messages: Sequence[Message], tools: Sequence[Tool] | None, as_text: bool) -> str:
        """The conversation with arguments of our own; empty where the template fails on it."""
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
    """Whether the probe stands in a rendering, and neither encoded twice nor in Python's notation."""
    return PROBE in text and f'\\"{PROBE}' not in text and f"{{'{PROBE}" not in text


class _Generation(Extension):
    """`{% generation %}` marks what an assistant says; it renders as what is inside."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(day: date) -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up (utils/chat_template_utils.py), which needs no torch here; its clock stands at `day`."""

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
    raise invalid("template-unbounded", message, fix, "model_name") from None


def _address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
