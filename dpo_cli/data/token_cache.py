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
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_cli.data.encoded import Growing, check_columns, read_columns
from dpo_cli.data.tokens import Encodings
from dpo_cli.errors import DpoError, problem_of_json
from dpo_cli.storage.jsonio import read_json
from dpo_cli.storage.log import Tell
from dpo_cli.storage.progress import working
from dpo_cli.storage.user_cache import SOURCE, TOKENS, cache_dir, filling

PARTS = "parts.json"
Make = Callable[[Sequence[Growing]], Encodings]


def key_of(decides: Mapping[str, object]) -> str:
    """The name of what these JSON values decide."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


def known_or_made(key: str, source: str, sides: int, make: Make, tell: Tell) -> Encodings:
    """The tokens of so many sides from the cache, or else made, and kept there. `source` is for people."""
    try:
        folder = cache_dir() / TOKENS / key
    except DpoError:  # no home folder
        return make([Growing() for _ in range(sides)])
    try:
        if (known := _known(folder)) is not None:
            return known
        with filling(folder) as work:
            (work / SOURCE).write_text(source, encoding="utf-8")
            places = [work / str(side) for side in range(sides)]
            for place in places:
                place.mkdir()
            made = make([Growing(place) for place in places])
            parts = {"sides": [side.digests for side in made.sides], "refused": made.refused, "dropped": made.dropped}
            parts |= {"problems": [asdict(problem) for problem in made.problems]}
            (work / PARTS).write_text(json.dumps(parts), encoding="utf-8")
            del made  # Windows renames no folder with open files
        return _read(folder, parts)
    except (OSError, TypeError) as error:  # no room, no right to write, or a row that JSON does not have
        tell(f"note: the tokens are not kept for later starts: {error}")
        return make([Growing() for _ in range(sides)])


def _known(folder: Path) -> Encodings | None:
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
        shutil.rmtree(folder)
        return None
    with suppress(OSError):  # a cache that can only be read
        os.utime(folder)  # the last use, for `dpo cache`
    return known


def _read(folder: Path, parts: Mapping[str, Any]) -> Encodings:
    sides = [read_columns(folder / str(side), digests) for side, digests in enumerate(parts["sides"])]
    problems = tuple(problem_of_json(problem) for problem in parts["problems"])
    return Encodings(sides, parts["refused"], problems, parts["dropped"])
