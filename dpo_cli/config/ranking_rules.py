"""Rules between the parts of a way to rank answers, which `augment` and `reward_functions` share."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dpo_cli.errors import Problem

# The parts that only this rank needs.
RANK_PARTS = {"regex": ("pattern",), "reward": ("reward_model",), "judge": ("judge_url", "judge_model", "criterion")}
PLAIN_URL = r"https?://[\w.:\[\]-]+(/[\w./~%-]*)?"


def rank_problems(parts: Mapping[str, Any], written: Collection[str], key: str) -> Iterator[Problem]:
    """What is wrong with the parts of the rank of option `key`; `written` are the names of those that the user wrote."""
    rank = parts["rank"]
    if missing := [name for name in RANK_PARTS.get(rank, ()) if parts[name] is None]:
        message = f'"{key}": the rank {rank} needs {" and ".join(missing)}'
        yield Problem("error", "rank-incomplete", message, f'add "{missing[0]}": "..." to "{key}"', key)
    for other, names in RANK_PARTS.items():
        for name in {*written} & {*names} if other != rank else ():
            message, fix = f'"{key}": "{name}" has no effect: it belongs to the rank {other}', f'write "rank": "{other}"'
            yield Problem("warning", "no-effect", message, f'{fix}, or remove "{name}"', key)
    try:
        re.compile(parts["pattern"] or "")
    except re.error as error:
        message = f'"{key}": the pattern is not a regular expression: {error}'
        yield Problem("error", "bad-regex", message, "write a regular expression of Python's re module", key)
    yield from address_problems(parts["judge_url"], "judge_url", "judge-url", key)


def address_problems(address: str | None, name: str, code: str, key: str) -> Iterator[Problem]:
    """An address is written into files, so it must not hold a secret."""
    if address and not re.fullmatch(PLAIN_URL, address, re.ASCII):
        message = f'"{key}": {name} is not http(s)://HOST/PATH without a user and a query'
        fix = f'for example "{name}": "http://localhost:8000/v1"; put a key into the environment variable OPENAI_API_KEY'
        yield Problem("error", code, message, fix, key)
