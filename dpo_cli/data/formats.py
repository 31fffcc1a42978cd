"""Rows as people write them, to `Pair`. A row is a preference pair of strings or of chat messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
Text = str | list[Message]

KEYS = ("prompt", "chosen", "rejected")
RESPONSE_ROLES = ("assistant", "tool")  # anything else in a response would put part of a prompt into the loss


@dataclass(frozen=True)
class Pair:
    """One prompt with its chosen and rejected response; all three strings, or all three lists of messages.

    `line` is the physical line of the file it stands on, from 1.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    line: int

    @property
    def prompt_key(self) -> str:
        """The same for two pairs exactly when their prompts are."""
        return json.dumps(self.prompt, sort_keys=True, ensure_ascii=False)


class BadRow(Exception):
    """Why a row cannot be used: a stable code, and the reason in words."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def to_pair(row: Any, line: int) -> Pair:
    """A parsed row to a pair, or `BadRow`."""
    if not isinstance(row, Mapping):
        raise BadRow("row-not-object", "not a JSON object")
    missing = [key for key in KEYS if key not in row]
    if missing:
        raise BadRow("row-missing-key", f"no {' and no '.join(missing)}; found {', '.join(sorted(row)) or 'nothing'}")
    prompt, chosen, rejected = (_text(row[key], key) for key in KEYS)
    if not isinstance(prompt, str) == isinstance(chosen, str) == isinstance(rejected, str):
        raise BadRow("row-mixed-types", "prompt, chosen and rejected must all be strings, or all be message lists")
    if chosen == rejected:
        raise BadRow("row-identical", "chosen and rejected are identical")
    return Pair(prompt, chosen, rejected, line)


def _text(value: Any, key: str) -> Text:
    if isinstance(value, str):
        return _sound(value, key)
    if not isinstance(value, list):
        raise BadRow("row-wrong-type", f"{key} is {type(value).__name__}, not a string or a list of messages")
    if not value:
        raise BadRow("row-empty", f"{key} is empty")
    return [_message(message, key) for message in value]


def _message(value: Any, key: str) -> Message:
    if not isinstance(value, Mapping) or not all(isinstance(value.get(name), str) for name in ("role", "content")):
        raise BadRow("row-wrong-type", f'{key} holds a message without "role" and "content" strings')
    if key != "prompt" and value["role"] not in RESPONSE_ROLES:
        raise BadRow("row-role", f"{key} holds a message of another role than {' or '.join(RESPONSE_ROLES)}")
    return {"role": value["role"], "content": _sound(value["content"], key)}


def _sound(text: str, key: str) -> str:
    if not text.strip():
        raise BadRow("row-empty", f"{key} is empty")
    if "\0" in text:
        raise BadRow("row-nul", f"{key} holds a NUL character")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise BadRow("row-surrogate", f"{key} holds half of a surrogate pair, which is not a character")
    return text
