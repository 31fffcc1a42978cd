"""Checkpoints: complete or absent, and used only if every byte is unchanged. No torch.

    checkpoints/step-40/     SHA256SUMS, in the format of `sha256sum`, has the digest of each verified file
    checkpoints/.part/       being written, or being removed: never read

A checkpoint is written in .part, synced, hashed, read back, and then renamed. Its removal has the reverse order.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dpo_cli.storage.atomic import sync, sync_all, trial, writing
from dpo_cli.storage.digests import sha256

SUMS = "SHA256SUMS"
PART = ".part"
KEPT = 2  # the newest, and one more in case it is damaged


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk, complete or damaged."""

    folder: Path
    step: int

    def damage(self) -> str | None:
        """The damage; None for a complete checkpoint."""
        try:
            written = (self.folder / SUMS).read_bytes()
            if written and written == _sums(self.folder):
                return None
            then, now = _by_name(written), _by_name(_sums(self.folder))
        except OSError as error:
            return f"{Path(error.filename or SUMS).name}: {error.strerror}"
        except ValueError:
            return f"{SUMS} is damaged"
        for name in sorted(then.keys() | now.keys()):
            if name not in now:
                return f"{name} is missing"
            if name not in then:
                return f"{name} was not there"
            if then[name] != now[name]:
                return f"{name} has changed"
        return f"{SUMS} is damaged"


class Checkpoints:
    """The checkpoints in a folder; the first one creates it."""

    def __init__(self, place: Path) -> None:
        self.place = place

    @property
    def part(self) -> Path:
        """The folder for a new checkpoint; it is empty when `write` calls `fill`."""
        return self.place / PART

    def all(self) -> list[Checkpoint]:
        """The newest first."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in (self.place.iterdir() if self.place.is_dir() else ()))
        checkpoints = [Checkpoint(self.place / name[0], int(name[1])) for name in names if name is not None]
        return sorted(checkpoints, key=lambda checkpoint: -checkpoint.step)

    def verified(self, skipped: Callable[[Checkpoint, str], None]) -> Iterator[Checkpoint]:
        """The complete ones, the newest first; `skipped` gets the others."""
        for checkpoint in self.all():
            if (damage := checkpoint.damage()) is None:
                yield checkpoint
            else:
                skipped(checkpoint, damage)

    def write(self, step: int, fill: Callable[[Path], Path]) -> Checkpoint:
        """Write a new checkpoint: the folder that `fill` creates in the empty folder that it gets, and returns.

        An error does not change existing checkpoints. Afterwards they are removed, except the newest complete ones before it.
        Those of later steps are damaged, or this one would not be written.
        """
        self._clear()
        self.part.mkdir(parents=True)
        sync(self.place.parent)
        sync(self.place)
        try:
            with writing(self.place):
                folder = fill(self.part)
            (folder / SUMS).write_bytes(_sums(folder))
            sync_all(folder)
        except BaseException:
            self._clear()  # another file may need its space
            raise
        checkpoint = Checkpoint(self.place / f"step-{step}", step)
        others = [other for other in self.all() if other.step != step]
        if checkpoint.folder.exists():  # a damaged one
            self._set_aside(checkpoint)
        folder.rename(checkpoint.folder)
        sync(self.place)
        older = (other for other in others if other.step < step and other.damage() is None)
        kept = list(islice(older, KEPT - 1))
        for other in others:
            if other not in kept:
                self._set_aside(other)
        self._clear()
        return checkpoint

    def try_to_write(self, fill: Callable[[Path], Path]) -> None:
        """A trial of `write` that leaves nothing; raises as `trial` says."""
        self._clear()
        self.part.mkdir(parents=True)
        try:
            with trial(), writing(self.place):
                fill(self.part)
        finally:
            self._clear()
            if not any(self.place.iterdir()):
                self.place.rmdir()

    def clear(self, with_damaged: bool) -> None:
        """Remove all checkpoints; damaged ones can stay for inspection until there are new ones."""
        gone = self.place.with_name(f".{self.place.name}.part")
        if with_damaged and self.place.exists():
            shutil.rmtree(gone, ignore_errors=True)  # left by a process that was killed here
            self.place.rename(gone)
            sync(gone.parent)
        shutil.rmtree(gone, ignore_errors=True)
        self._clear()

    def _set_aside(self, checkpoint: Checkpoint) -> None:
        checkpoint.folder.rename(self.part / checkpoint.folder.name)

    def _clear(self) -> None:
        if self.part.exists():
            shutil.rmtree(self.part)


class FollowedCheckpoints(Checkpoints):
    """Those that another process writes."""

    def write(self, step: int, fill: Callable[[Path], Path]) -> Checkpoint:
        return Checkpoint(self.place / f"step-{step}", step)

    def try_to_write(self, fill: Callable[[Path], Path]) -> None:
        pass


def _sums(folder: Path) -> bytes:
    """The content of SHA256SUMS: a line for each other file below the folder, sorted by name."""
    files = sorted(str(Path(root, name).relative_to(folder)) for root, _, names in os.walk(folder) for name in names)
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in files if name != SUMS).encode()


def _by_name(sums: bytes) -> dict[str, str]:
    """File names and their digests; ValueError for any other content."""
    lines = (line.split("  ", 1) for line in sums.decode().splitlines())
    return {name: digest for digest, name in lines}
