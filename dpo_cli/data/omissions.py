"""Parts of a conversation that a chat template omits: changing such a part does not change the rendered text.

A part that is in the rendered text as written is fine. Any other part is replaced by a probe, and the conversation is
rendered again: a template may write it in another form (trimmed, escaped, in another place).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from dpo_cli.data.chat_template import PROBE, ChatTemplate
from dpo_cli.data.messages import REASONING, Message, Tool, ToolCall, as_message, call_with_arguments, without_key

TAGS = r"think|thinking|thought|reasoning|reflection"
OPENING = rf"<(?:{TAGS})>|\[THINK\]"
THOUGHT = re.compile(rf"(?:{OPENING}|\A)((?:(?!{OPENING}).)*?)(?:</(?:{TAGS})>|\[/THINK\])", re.DOTALL | re.IGNORECASE)
ENDINGS = ("</", "[/")  # of a thought
MOST_RENDERED = 16  # maximum parts to try one by one, if the template rejects all changes together


@dataclass(frozen=True)
class Part:
    """A part of a message: its description, its texts, its key, and whether it is reasoning."""

    what: str
    texts: tuple[str, ...]
    key: str = "content"
    is_reasoning: bool = False


def parts_of(message: Message, source: str) -> Iterator[Part]:
    """The parts of a message that a model could learn; other keys only if the `source` of a template names them."""
    role, content = message["role"], message["content"]
    may_think = role == "assistant" and any(end in content for end in ENDINGS)  # the expression is slow on long texts
    thoughts = [match for match in THOUGHT.finditer(content) if match[1].strip()] if may_think else []
    said, at = [], 0
    for match in thoughts:
        said.append(content[at : match.start()])
        at = match.end()
        opening = (
            f"between {content[match.start() : match.start(1)].strip()} and" if match.start(1) > match.start() else "before"
        )
        what = f"the text {opening} {content[match.end(1) : match.end()].strip()}"
        yield Part(what, (match[1].strip(),), is_reasoning=True)
    said.append(content[at:])
    if texts := tuple(text.strip() for text in said if text.strip()):
        yield Part(f"the {role} message" if role != "tool" else "the result of a tool", texts)
    for key, value in message.items():
        is_meant = key in REASONING or (key not in ("role", "content", "name") and re.search(rf"\b{re.escape(key)}\b", source))
        if is_meant and isinstance(value, str) and value.strip():
            yield Part(f'"{key}" of the {role} message', (value.strip(),), key, key in REASONING)
    for call in message.get("tool_calls") or ():
        yield Part("a tool call", tuple(_said_by(call)), "tool_calls")


def left_out(
    template: ChatTemplate,
    messages: list[Message],
    places: Sequence[int],
    tools: Sequence[Tool] | None,
    rendered: str,
    start: int = 0,
    **options: bool | str,
) -> list[Part]:
    """The parts of the messages at `places` that are not in the `rendered` conversation after `start`.

    Parts that are not there as written are changed, all at once, and the conversation is rendered again.
    """
    suspects = [suspect for place in places for suspect in _suspects(messages[place], place, rendered, start, template.source)]
    if not suspects:
        return []

    def unseen(tried: Sequence[_Suspect]) -> list[_Suspect] | None:
        altered = list(messages)
        for suspect in tried:
            altered[suspect.place] = suspect.changed(altered[suspect.place])
        try:
            text = template.render(altered, tools, **options).lower()
        except TemplateError:  # the template reads the parts, and rejects the probes
            return None
        return [suspect for suspect in tried if not all(probe in text for probe in suspect.probes)]

    missing = unseen(suspects)
    if missing is None:
        missing = [one for suspect in suspects[:MOST_RENDERED] for one in unseen([suspect]) or ()]
    return [suspect.part for suspect in missing]


@dataclass(frozen=True)
class _Suspect:
    """A part that is not in a rendering as written, and the probes that replace its texts."""

    part: Part
    place: int
    texts: tuple[str, ...]
    number: int  # the index of the part in its message, or of a tool call among the calls
    probes: tuple[str, ...]

    def changed(self, message: Message) -> Message:
        """The message with a probe instead of each text."""
        if self.part.key == "tool_calls":
            calls = list(message["tool_calls"])
            name, argument = self.probes
            calls[self.number] = {**calls[self.number], "function": {"name": name, "arguments": {argument: argument}}}
            return {**message, "tool_calls": calls}
        value = str(dict(message)[self.part.key])
        for text, probe in zip(self.texts, self.probes, strict=True):
            value = value.replace(text, probe, 1)
        return as_message({**message, self.part.key: value})


def _suspects(message: Message, place: int, rendered: str, start: int, source: str) -> Iterator[_Suspect]:
    at, calls = start, 0
    for number, part in enumerate(parts_of(message, source)):
        if part.key == "tool_calls":
            if not all(_stands_in(rendered, text) for text in part.texts):
                yield _Suspect(part, place, (), calls, (f"{PROBE}{place}c{calls}n", f"{PROBE}{place}c{calls}a"))
            calls += 1
            continue
        missing: list[str] = []
        for text in part.texts:
            position = rendered.find(text, at if part.key == "content" else start)
            if position < 0:
                missing += _lines_not_in(rendered, text) or [text]
            elif part.key == "content":
                at = position + len(text)
        if missing:
            probes = tuple(f"{PROBE}{place}p{number}t{i}x" for i in range(len(missing)))
            yield _Suspect(part, place, tuple(missing), number, probes)


def _lines_not_in(rendered: str, text: str) -> list[str]:
    """The lines of a text that are not in a rendering, longest first, because one may contain another."""
    lines = {line.strip() for line in text.splitlines()}
    return sorted((line for line in lines if line and line not in rendered), key=len, reverse=True)


def _said_by(call: ToolCall) -> Iterator[str]:
    """The name of a call, and the texts among its arguments."""
    function = call_with_arguments(call, as_text=False)["function"]
    yield function["name"]
    stack: list[object] = [function["arguments"]]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            stack += [*value, *value.values()]
        elif isinstance(value, list):
            stack += value


def _stands_in(rendered: str, text: str) -> bool:
    """Whether a text is in a rendering, as written or in JSON's form."""
    return any(form in rendered for form in (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]))


def fails(template: ChatTemplate, messages: list[Message], tools: Sequence[Tool] | None, **options: bool | str) -> bool:
    """Whether the template raises an error for a conversation."""
    try:
        template.render(messages, tools, **options)
    except TemplateError:
        return True
    return False


def cause(template: ChatTemplate, messages: list[Message], tools: Sequence[Tool] | None, **options: bool | str) -> str:
    """The part of a conversation on which a template fails: the first message that it fails on, and the key of it that causes
    that."""
    if tools and not fails(template, messages, None, **options):
        return "the tools"
    counts = range(1, len(messages) + 1)
    count = next((count for count in counts if fails(template, messages[:count], tools, **options)), len(messages))
    *before, last = messages[:count]
    without = {key: without_key(last, key) for key in last if key not in ("role", "content")}
    key = next((key for key, less in without.items() if not fails(template, [*before, less], tools, **options)), "content")
    return f'"{key}" of message {count} ({last["role"]})'
