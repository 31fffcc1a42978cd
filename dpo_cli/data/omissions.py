"""What a chat template leaves out of a conversation: a part of a message whose change changes nothing that is rendered.

A part that stands in the rendering is there. One that does not is replaced, and the conversation rendered again: a template
may write it otherwise (trimmed, escaped, in another place).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from dpo_cli.data.chat_template import PROBE, ChatTemplate
from dpo_cli.data.messages import REASONING, Message, with_arguments

TAGS = r"think|thinking|thought|reasoning|reflection"
THOUGHT = re.compile(
    rf"(?:<({TAGS})>|\[THINK\]|\A)((?:(?!<(?:{TAGS})>).)*?)(?:</(?:{TAGS})>|\[/THINK\])", re.DOTALL | re.IGNORECASE
)
MOST_LINES = 200  # of a part that are looked at one by one


@dataclass(frozen=True)
class Part:
    """A part of a message: what it is, its texts, and the message with one of them replaced."""

    what: str
    texts: tuple[str, ...]
    key: str = "content"


def parts_of(message: Message) -> Iterator[Part]:
    """The parts of a message that a model could learn from."""
    role, content = message["role"], message["content"]
    thoughts = [match for match in THOUGHT.finditer(content) if match[2].strip()] if role == "assistant" else []
    said, at = [], 0
    for match in thoughts:
        said.append(content[at : match.start()])
        at = match.end()
        opening = (
            f"between {content[match.start() : match.start(2)].strip()} and" if match.start(2) > match.start() else "before"
        )
        yield Part(f"what stands {opening} {content[match.end(2) : match.end()].strip()}", (match[2].strip(),))
    said.append(content[at:])
    if texts := tuple(text.strip() for text in said if text.strip()):
        yield Part(f"the {role} message" if role != "tool" else "the result of a tool", texts)
    for key, value in message.items():
        is_prose = isinstance(value, str) and (key in REASONING or " " in value.strip())
        if key not in ("role", "content") and is_prose and value.strip():
            yield Part(f'"{key}" of the {role} message', (value.strip(),), key)


def left_out(
    template: ChatTemplate,
    messages: list[Message],
    place: int,
    tools: list[Any] | None,
    rendered: str,
    start: int = 0,
    **options: Any,
) -> Iterator[Part]:
    """The parts of the message at `place` that are not in the `rendered` conversation, where it stands after `start`."""
    message, at = messages[place], start

    def is_seen(altered: Message) -> bool:
        try:
            return template.render([*messages[:place], altered, *messages[place + 1 :]], tools, **options) != rendered
        except TemplateError:  # it reads the part, and does not take this one
            return True

    for part in parts_of(message):
        for text in part.texts:
            found = rendered.find(text, at if part.key == "content" else start)
            if found < 0 and any(not is_seen(_replaced(message, part.key, line)) for line in _missing(text, rendered)):
                yield part
                break
            at = found + len(text) if found >= 0 and part.key == "content" else at
    for number, call in enumerate(message.get("tool_calls") or ()):
        if not all(_stands_in(rendered, text) for text in _said_by(call)) and not is_seen(_with_other_call(message, number)):
            yield Part("a tool call", ())


def _missing(text: str, rendered: str) -> Iterator[str]:
    """The lines of a part that are not in the rendering; the part as a whole where they all are."""
    lines = [line.strip() for line in text.splitlines() if line.strip()][:MOST_LINES]
    yield from [line for line in lines if line not in rendered] or [text]


def _replaced(message: Message, key: str, text: str) -> Message:
    return {**message, key: message[key].replace(text, PROBE, 1)}


def _said_by(call: Mapping[str, Any]) -> Iterator[str]:
    """The name of a call, and the texts among its arguments."""
    (made,) = with_arguments({"tool_calls": [call]}, as_text=False)["tool_calls"]
    yield made["function"]["name"]
    stack: list[Any] = [made["function"]["arguments"]]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            stack += [*value, *value.values()]
        elif isinstance(value, list):
            stack += value


def _stands_in(rendered: str, text: str) -> bool:
    """Whether a text is in a rendering, as it is or as JSON writes it."""
    return any(form in rendered for form in (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]))


def _with_other_call(message: Message, number: int) -> Message:
    calls = list(message["tool_calls"])
    calls[number] = {**calls[number], "function": {"name": PROBE, "arguments": {PROBE: PROBE}}}
    return {**message, "tool_calls": calls}


def fails(template: ChatTemplate, messages: list[Message], tools: list[Any] | None, **options: Any) -> bool:
    """Whether the template does not take a conversation."""
    try:
        template.render(messages, tools, **options)
    except TemplateError:
        return True
    return False


def cause(template: ChatTemplate, messages: list[Message], tools: list[Any] | None, **options: Any) -> str:
    """The part of a conversation on which a template fails: the first message that it fails on, and the key without which it
    does not."""
    if tools and not fails(template, messages, None, **options):
        return "the tools"
    counts = range(1, len(messages) + 1)
    count = next((count for count in counts if fails(template, messages[:count], tools, **options)), len(messages))
    *before, last = messages[:count]
    without = {key: {k: value for k, value in last.items() if k != key} for key in last if key not in ("role", "content")}
    key = next((key for key, less in without.items() if not fails(template, [*before, less], tools, **options)), "content")
    return f'"{key}" of message {count} ({last["role"]})'
