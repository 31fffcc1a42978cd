"""The user's cache: a folder of what can be computed again, shared by all runs. `dpo cache` lists and prunes it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.errors import RunFailed

CACHE_FIX = "set XDG_CACHE_HOME to a folder that you may write, with room for a model; then run the same command again"
TOKENS, FINDINGS = "tokens", "findings"  # of a dataset
KINDS = ("gguf", "merged", TOKENS, FINDINGS)  # folders of the cache; each of their folders is one entry
KERNELS = "unsloth"  # a folder of the cache
PARTIAL = ".making-"  # start of the name of a folder that is being written
SOURCE = "made-from.txt"  # in a folder: what it was made from
PARTIAL_SECONDS = 3600.0  # without a write: its writer was killed


@dataclass(frozen=True)
class Entry:
    """Something in the cache that can be removed alone."""

    kind: str
    name: str  # what it was made from
    size: int  # bytes
    used: float  # the last use, in seconds since 1970
    pairs: int | None = None  # number of pairs with reference log-probs


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/dpo or ~/.cache/dpo."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "dpo"
    try:
        return Path.home() / ".cache" / "dpo"
    except RuntimeError as error:  # neither HOME nor an account with one
        raise RunFailed("this user has no home folder to keep the cache in", CACHE_FIX) from error


@contextmanager
def filling(target: Path) -> Iterator[Path]:
    """A new folder to fill; at the end it gets the name `target`, or is removed if another process was first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=target.parent))
    try:
        yield work
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def entries() -> list[Entry]:
    """The models, tokens and compiled kernels in the cache, without those that are being written."""
    return [entry for entry, _ in _places()]


def prune(before: float) -> list[Entry]:
    """Remove those that were last used before this time, in seconds since 1970, and return them.

    Raises `RunFailed` for a folder that cannot be removed.
    """
    old = [(entry, place) for entry, place in _places() if entry.used < before]
    for _, place in old:
        try:
            shutil.rmtree(place)
        except OSError as error:
            message = f"cannot remove {place}: {error.strerror}"
            raise RunFailed(message, "make the folder writable, or leave it to the user who owns it") from error
    return [entry for entry, _ in old]


def _places() -> Iterator[tuple[Entry, Path]]:
    """The entries, each with its folder."""
    for kind in KINDS:
        for folder in sorted((cache_dir() / kind).glob("*/")):
            used = folder.stat().st_mtime
            is_partial = folder.name.startswith(PARTIAL)
            if is_partial:
                used = max(place.stat().st_mtime for place in (folder, *folder.rglob("*")))
            if is_partial and time.time() - used < PARTIAL_SECONDS:
                continue
            source = folder / SOURCE
            name = "partly written" if is_partial else source.read_text("utf-8") if source.is_file() else folder.name
            yield Entry(kind, name, _bytes_in(folder), used), folder
    if (folder := cache_dir() / KERNELS).is_dir():
        yield Entry(KERNELS, "compiled kernels", _bytes_in(folder), folder.stat().st_mtime), folder


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
