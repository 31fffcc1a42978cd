"""Secrets are removed from all output: files of a run, logs, the screen. Training data is not changed.

A secret is recognised by its form (a token of a hub or an API, a password or a key in an address), or because an environment
variable with the name of a secret holds it. SORT_KEY=learning_rate has such a name and is not a secret: the words of the
schema are not secrets, nor are paths. JSON is redacted value by value: its keys stay, since programs look for them.
The config in plan.json, which a resume reads, is redacted only by form.
"""

from __future__ import annotations

import functools
import html
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast
from urllib.parse import quote

from dpo_cli.storage.jsonio import read_json

MASK = "[redacted]"
FEWEST = 12  # minimum characters of such a variable: shorter ones are part of too many words
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

Value = TypeVar("Value")


def redact(text: str) -> str:
    """The text with a mark in the place of each secret."""
    return _without(_known(), text)


def _without(secrets: Sequence[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    return redact_forms(text)


def redact_forms(text: str) -> str:
    """The same only by form, for what dpo reads back: a variable may hold the name of a column or of a model."""
    return FORMS.sub(MASK, text)


def redacted(value: Value, of_text: Callable[[str], str] | None = None) -> Value:
    """The same for a JSON value: its texts, except paths that exist."""
    mask = of_text or partial(_without, _known())

    def masked(part: object) -> object:
        if isinstance(part, str):
            return part if Path(part).is_absolute() and os.path.exists(part) else mask(part)
        if isinstance(part, dict):
            return {key: masked(inner) for key, inner in part.items()}
        return [masked(inner) for inner in part] if isinstance(part, list | tuple) else part

    return cast(Value, masked(value))


class Redacted:
    """A text stream that removes secrets from what is written to it."""

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


def beneath(stream: TextIO) -> TextIO:
    """The stream below a `Redacted` one, for a JSON document that is already redacted."""
    return stream._stream if isinstance(stream, Redacted) else stream


@functools.cache
def _words() -> frozenset[str]:
    """Names and values of options in the schema: a resume reads them back."""
    words: set[str] = set()

    def see(part: object) -> None:
        if isinstance(part, dict):
            words.update(part.get("properties", ()), (word for word in part.get("enum", ()) if isinstance(word, str)))
            for inner in part.values():
                see(inner)
        elif isinstance(part, list):
            for inner in part:
                see(inner)

    see(read_json(files("dpo_cli.config").joinpath("schema.json")))
    return frozenset(words)


def _known() -> list[str]:
    """The secrets in the environment, as plain text and as escaped in JSON, HTML and addresses; the longest first."""
    values = [
        value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= FEWEST and not value.isdecimal()
    ]
    forms = {
        form
        for value in values
        if not value.startswith(("/", "~")) and value not in _words()  # a path of a key file; a word of the schema
        for form in (
            value,
            json.dumps(value)[1:-1],
            json.dumps(value, ensure_ascii=False)[1:-1],
            html.escape(value),
            quote(value),
        )
    }
    return sorted(forms, key=len, reverse=True)
