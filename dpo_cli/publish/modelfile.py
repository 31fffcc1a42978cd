"""An Ollama Modelfile, with the model's chat template in Ollama's language (Go's text/template).

Chat templates are jinja programs, which Ollama cannot run. But nearly all put fixed texts around each message. These texts are
read from renderings of the jinja template. They are used only if conversations that are composed of them equal the renderings
of jinja exactly:

    opening  (user before)question(user after)  (assistant before)answer(assistant after)  ...  (assistant before)

A system message has its own turn (ChatML, Llama), or is in the first user turn (Gemma) or the last one (Mistral). BOS is
omitted, since Ollama adds it. Other parts of a template (tools, thinking, trimming of blanks) are not converted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from dpo_cli.data.chat_template import ChatTemplate
from dpo_cli.data.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Around = tuple[str, str]  # the texts before and after a message

SYSTEM, USER, ASSISTANT = "The rules.", "First question?", "An answer."
NEXT = "Another question?"


def conversation(*turns: str, system: str | None = None) -> list[Message]:
    """Messages of a user and an assistant in turns, after an optional system message."""
    before: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return before + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


# The conversations to compare; a template must accept the first two.
CHECKED = (
    conversation("Hello"),
    conversation("Is it blue?", "Yes, it is.", "And at night?"),
    conversation("Hello", system="Be brief."),
    conversation("Is it blue?", "Yes, it is.", "And at night?", system="Be brief.\nBe kind."),
    conversation("One", "Two", "Three", "Four", 'Five "quoted" {{ braces }}'),
)


@dataclass(frozen=True)
class Turns:
    """The texts that a chat template puts around messages."""

    opening: str  # before the first turn, without a system message
    system: Around
    user: Around
    assistant: Around
    answer: str  # before the model's answer
    place: Literal["turn", "first", "last"]  # of the system message: its own turn, or a turn of the user

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation, as `go` renders it in Ollama."""
        system = next((message["content"] for message in messages if message["role"] == "system"), None)
        turns = [message for message in messages if message["role"] != "system"]
        has_turn = self.place == "turn" and system is not None
        text = f"{self.system[0]}{system}{self.system[1]}" if has_turn else self.opening
        host = {"first": 0, "last": len(turns) - 1}.get(self.place)
        for i, message in enumerate(turns):
            before, after = self.user if message["role"] == "user" else self.assistant
            within = f"{self.system[0]}{system}{self.system[1]}" if i == host and system is not None else ""
            text += before + within + message["content"] + after
        return text + self.answer

    def go(self) -> str:
        """The template in Go's text/template. Texts are quoted, so that blanks are kept exactly."""
        own, start, within = _around(self.system, "$.System"), _text(self.opening), ""
        if self.place == "turn":
            otherwise = f"{{{{ else }}}}{start}" if start else ""
            start = f"{{{{ if .System }}}}{own}{otherwise}{{{{ end }}}}"
        else:  # with a system message the first turn of the user is the second message
            is_host = "(eq $i 1)" if self.place == "first" else "(eq (len (slice $.Messages $i)) 1)"
            within = f"{{{{ if and $.System {is_host} }}}}{own}{{{{ end }}}}"
        user = _text(self.user[0]) + within + "{{ .Content }}" + _text(self.user[1])
        roles = (
            f'{{{{- if eq .Role "user" }}}}{user}',
            f'{{{{- else if eq .Role "assistant" }}}}{_around(self.assistant, ".Content")}',
            "{{- end }}",
        )
        return "\n".join((start, "{{- range $i, $_ := .Messages }}", *roles, "{{- end }}" + _text(self.answer)))


def _text(text: str) -> str:
    """An action that writes a text unchanged: Go's quoted strings have the escapes of JSON."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _around(around: Around, value: str) -> str:
    return f"{_text(around[0])}{{{{ {value} }}}}{_text(around[1])}"


def turns_of(template: ChatTemplate) -> Turns | None:
    """The texts that a chat template puts around messages; None for a template that does more."""
    try:
        bare = _bare(template)
    except (TemplateError, ValueError):  # refused, or a text is not in its place
        return None
    for turns in (bare, *_with_system(template, bare)):
        if all(turns.render(messages) == text for messages in CHECKED if (text := _accepted(template, messages)) is not None):
            return turns
    return None


def rendered(template: ChatTemplate, messages: Sequence[Message], answer: bool = True) -> str:
    """A conversation as the chat template renders it, without BOS."""
    return template.render(messages, None, add_generation_prompt=answer, bos_token="")


def _accepted(template: ChatTemplate, messages: Sequence[Message]) -> str | None:
    """The same; None for a conversation that the template refuses because of its system message."""
    try:
        return rendered(template, messages)
    except TemplateError:
        return None


def _bare(template: ChatTemplate) -> Turns:
    """The texts around a user's and an assistant's messages; `ValueError` unless each message is rendered exactly once."""
    first, between, again, last = _split(rendered(template, conversation(USER, ASSISTANT, NEXT)), USER, ASSISTANT, NEXT)
    user_end = _split(rendered(template, conversation(USER), answer=False), USER)[1]
    assistant_end = _split(rendered(template, conversation(USER, ASSISTANT), answer=False), USER, ASSISTANT)[2]
    eos = str(template.tokens["eos_token"])  # Phi 3 writes it after the last turn too
    user_after = user_end if between.startswith(user_end) else user_end.removesuffix(eos)
    assistant_after = assistant_end if again.startswith(assistant_end) else assistant_end.removesuffix(eos)
    user_before = _without(again, assistant_after)
    if not first.endswith(user_before):
        raise ValueError("the first turn is another")
    return Turns(
        opening=first.removesuffix(user_before),
        system=("", ""),
        user=(user_before, user_after),
        assistant=(_without(between, user_after), assistant_after),
        answer=_without(last, user_after),
        place="turn",
    )


def _with_system(template: ChatTemplate, bare: Turns) -> list[Turns]:
    """The same with the possible places of a system message, from the texts around one."""
    try:
        head, middle, _ = _split(rendered(template, conversation(USER, system=SYSTEM)), SYSTEM, USER)
    except (TemplateError, ValueError):
        return []
    start = bare.opening + bare.user[0]
    if bare.user[0] and middle.endswith(bare.user[0]):
        return [replace(bare, system=(head, middle.removesuffix(bare.user[0])))]
    if not head.startswith(start):
        return []
    around = (head.removeprefix(start), middle)
    return [replace(bare, system=around, place="first"), replace(bare, system=around, place="last")]


def _split(text: str, *messages: str) -> list[str]:
    """The texts around messages; `text` must have each message once, in this order."""
    parts = []
    for message in messages:
        before, found, text = text.partition(message)
        if not found or message in text:
            raise ValueError(f"{message!r} is not in the rendering once")
        parts.append(before)
    return [*parts, text]


def _without(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(f"{text!r} does not start with {start!r}")
    return text.removeprefix(start)


def modelfile(gguf_name: str, tokenizer: PreTrainedTokenizerBase, day: date) -> tuple[str, bool]:
    """The Modelfile for a GGUF file in the same folder, and whether it has the chat template, which may write `day`."""
    template = ChatTemplate.of(tokenizer, day)
    turns = turns_of(template) if template is not None else None
    stop = (turns.assistant[1].strip() if turns else "") or str(tokenizer.eos_token)
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{gguf_name}"]
    if template is not None and turns:
        if template.writes_date:
            lines.append(
                f"# The chat template writes the date. Ollama cannot: any date below is the day of the training, {day}."
            )
        lines.append(f'TEMPLATE """{turns.go()}"""')
    else:
        lines.append("# No TEMPLATE: this chat template does more than put texts around messages. Ollama takes the file's own.")
    return "\n".join([*lines, f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}", ""]), turns is not None
