"""Token ids that earlier starts made: folders in the user's cache, so that the next start reads them. No torch.

A folder has the name of what decides the tokens (rows, tokenizer, template, day, options, code), so it cannot be stale. The
SHA-256 of each file is in `parts.json`: a damaged folder is made again. No training depends on the cache: without room in
it, all tokens stay in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_cli.data.encoded import Growing, NotKept, check_columns, keeping, read_columns
from dpo_cli.data.tokens import Encodings
from dpo_cli.errors import DpoError, problem_of_json
from dpo_cli.storage.digests import sha256_of_package
from dpo_cli.storage.jsonio import read_json
from dpo_cli.storage.log import Tell
from dpo_cli.storage.progress import working
from dpo_cli.storage.user_cache import SOURCE, TOKENS, cache_dir, filling

PARTS = "parts.json"
PACKAGES = ("jinja2", "pyarrow", "rapidfuzz", "rensa", "tokenizers", "transformers")  # that decide tokens or findings
Make = Callable[[Sequence[Growing]], Encodings]


def key_of(decides: Mapping[str, object]) -> str:
    """The name of what these JSON values decide, with the code of dpo and of the packages that handle texts."""
    from importlib.metadata import version

    whole = {**decides, "code": sha256_of_package(), "versions": [version(package) for package in PACKAGES]}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]


def known_or_made(key: str, source: str, sides: int, make: Make, tell: Tell) -> Encodings:
    """The tokens of so many sides from the cache, or else made, and kept there. `source` is for people."""
    try:
        folder = cache_dir() / TOKENS / key
    except DpoError:  # no home folder
        return make([Growing() for _ in range(sides)])
    if (known := _known(folder, tell)) is not None:
        tell("tokens: those of an earlier start, from the cache")
        return known
    why = "a damaged folder cannot be removed"
    try:
        if not folder.is_dir():
            return _made(folder, source, sides, make)
    except NotKept as error:
        why = str(error)
    tell(f"note: the tokens are not kept in {folder.parent} for later starts: {why}")
    return make([Growing() for _ in range(sides)])


def _made(folder: Path, source: str, sides: int, make: Make) -> Encodings:
    """Make the tokens in a folder; `NotKept` if it cannot be written."""
    with ExitStack() as opened:
        with keeping():
            work = opened.enter_context(filling(folder))
            (work / SOURCE).write_text(source, encoding="utf-8", errors="backslashreplace")
            places = [work / str(side) for side in range(sides)]
            for place in places:
                place.mkdir()
            growing = [Growing(place) for place in places]
        made = make(growing)
        parts = {"sides": [side.digests for side in made.sides], "refused": made.refused, "dropped": made.dropped}
        parts |= {"problems": [asdict(problem) for problem in made.problems]}
        del made, growing  # Windows renames no folder with open files
        with keeping():
            (work / PARTS).write_text(json.dumps(parts), encoding="utf-8")
            opened.close()
            return _read(folder, parts)


def _known(folder: Path, tell: Tell) -> Encodings | None:
    """What a folder holds; None if there is none, or if it is damaged: then it is removed."""
    if not folder.is_dir():
        return None
    try:
        with working("reading the tokens of an earlier start"):
            parts = read_json(folder / PARTS)
            for side, digests in enumerate(parts["sides"]):
                check_columns(folder / str(side), digests)
            known = _read(folder, parts)
    except (OSError, ValueError, LookupError, TypeError):
        tell(f"note: the tokens in {folder} are damaged: they are made again")
        shutil.rmtree(folder, ignore_errors=True)
        return None
    with suppress(OSError):  # a cache that can only be read
        os.utime(folder)  # the last use, for `dpo cache`
    return known


def _read(folder: Path, parts: Mapping[str, Any]) -> Encodings:
    sides = [read_columns(folder / str(side), digests) for side, digests in enumerate(parts["sides"])]
    problems = tuple(problem_of_json(problem) for problem in parts["problems"])
    return Encodings(sides, parts["refused"], problems, parts["dropped"])
