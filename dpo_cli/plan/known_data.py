"""What the pass over a dataset found, kept in the user's cache for the next command. No torch.

A file of its own, so that examination.py reads no cache and catches no error.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from dpo_cli.errors import DpoError
from dpo_cli.storage.jsonio import read_json
from dpo_cli.storage.user_cache import FINDINGS, SOURCE, cache_dir, filling

FOUND = "found.json"


def recalled(key: str) -> dict[str, Any] | None:
    """What an earlier command kept; None if nothing, or if it cannot be read."""
    try:
        folder = cache_dir() / FINDINGS / key
        kept = read_json(folder / FOUND)
        found: dict[str, Any] = kept["found"]
        if kept["sha256"] != _digest(found):
            return None
    except (OSError, ValueError, LookupError, TypeError, DpoError):
        return None
    with suppress(OSError):  # a cache that can only be read
        os.utime(folder)  # the last use, for `dpo cache`
    return found


def keep(key: str, source: str, found: Mapping[str, Any]) -> None:
    """Keep it, where the cache can be written. `source` is for people."""
    with suppress(OSError, DpoError):  # the next command looks at all rows again
        folder = cache_dir() / FINDINGS / key
        shutil.rmtree(folder, ignore_errors=True)
        with filling(folder) as work:
            (work / SOURCE).write_text(source, encoding="utf-8", errors="backslashreplace")
            (work / FOUND).write_text(json.dumps({"found": found, "sha256": _digest(found)}), encoding="utf-8")


def _digest(found: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
