"""Secrets are kept out of all that is written: files of a run, logs, the screen. What is trained on is left as it is.

A secret is known by its form (a token of a hub or an API, what an address carries before its host or as a key), or because a
variable of the environment that is named for one holds it.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterable
from typing import Any, TextIO, TypeVar
from urllib.parse import quote

MASK = "[redacted]"
FEWEST = 12  # characters of such a variable: shorter ones stand in too many words
NAMES = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
IN_QUERIES = ("token", "access_token", "key", "api_key", "apikey", "secret", "password", "sig", "signature")
FORMS = re.compile(
    r"""
      (?<![A-Za-z0-9])(?:hf_|api_org_)[A-Za-z0-9]{16,}                         # Hugging Face
    | (?<![A-Za-z0-9/])(?:sk-|wandb_v1_|gh[opsu]_)(?=[\w-]*\d)[\w-]{16,}        # OpenAI, W&B, GitHub
    | (?<=\bBearer\ )[\w.~+/=-]{8,}
    | (?<=://)[^\s/@"'<>]+(?=@)                                                # user and password of an address
    """
    + "".join(rf"""| (?<=[?&;]{name}=)[^\s&"'<>\\]+""" for name in IN_QUERIES),
    re.VERBOSE,
)

Json = TypeVar("Json")


def redact(text: str) -> str:
    """The text with a mark in place of each secret."""
    for secret in _known():
        text = text.replace(secret, MASK)
    return FORMS.sub(MASK, text)


def redacted(value: Json) -> Json:
    """The same of what JSON can hold."""
    made: Json = json.loads(redact(json.dumps(value, ensure_ascii=False)))
    return made


class Redacted:
    """A stream of text that passes on what is written to it without secrets."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _known() -> list[str]:
    """What the environment holds of secrets, as text and as JSON, HTML and an address write it; the longest first."""
    values = [
        value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= FEWEST and not value.isdecimal()
    ]
    forms = {
        form
        for value in values
        if not value.startswith(("/", "~"))  # where a key lies
        for form in (
            value,
            json.dumps(value)[1:-1],
            json.dumps(value, ensure_ascii=False)[1:-1],
            html.escape(value),
            quote(value),
        )
    }
    return sorted(forms, key=len, reverse=True)
