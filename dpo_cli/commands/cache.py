"""The story of `dpo cache`: list what is kept for later runs, and remove what no run has used for a while. No torch."""

from __future__ import annotations

import time
from datetime import datetime

from dpo_cli.results.codec import JsonObject
from dpo_cli.scoring import reference_cache
from dpo_cli.storage import user_cache
from dpo_cli.storage.user_cache import Entry
from dpo_cli.ui.console import Console

DAY_SECONDS = 24 * 3600
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"))


def cache(prune_days: float | None, console: Console) -> JsonObject:
    """What the cache holds, after everything that was not used for `prune_days` days is removed."""
    removed: list[Entry] = []
    if prune_days is not None:
        before = time.time() - prune_days * DAY_SECONDS
        removed = [*user_cache.prune(before), *reference_cache.prune(before)]
        nothing = f"nothing was unused for {prune_days:g} days"
        console.line(f"removed: {len(removed)}, {_size(removed)}" if removed else nothing)
    entries = [*user_cache.entries(), *reference_cache.entries()]
    folder = user_cache.cache_dir()
    if entries:
        rows = [(entry.name, entry.kind, _pairs(entry), _size([entry]), f"{_day(entry):%Y-%m-%d}") for entry in entries]
        console.table(f"cache in {folder}", rows, ("made from", "kind", "pairs", "size", "last use"))
        console.line(f"total: {_size(entries)}")
    else:
        console.line(f"the cache in {folder} is empty")
    lists = {"entries": [_json(entry) for entry in entries], "removed": [_json(entry) for entry in removed]}
    return {"folder": str(folder), "bytes": sum(entry.size for entry in entries), **lists}


def _pairs(entry: Entry) -> str:
    return "" if entry.pairs is None else str(entry.pairs)


def _size(entries: list[Entry]) -> str:
    size = sum(entry.size for entry in entries)
    unit, name = next(((unit, name) for unit, name in UNITS if size >= unit), (1.0, "bytes"))
    return f"{size / unit:.1f} {name}" if unit > 1 else f"{size} bytes"


def _day(entry: Entry) -> datetime:
    return datetime.fromtimestamp(entry.used)


def _json(entry: Entry) -> JsonObject:
    used = _day(entry).isoformat(timespec="seconds")
    return {"kind": entry.kind, "name": entry.name, "bytes": entry.size, "used": used, "pairs": entry.pairs}
