"""Safe writes: synced data survives a loss of power, and a file is complete or absent."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dpo_cli.errors import RunFailed

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def sync(path: Path) -> None:
    """Sync the content of a file, or the names in a folder, to the disk. Windows syncs only writable files."""
    is_windows = sys.platform == "win32"
    if is_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Sync a folder and everything in it to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def let_others_read(folder: Path) -> None:
    """Give files the default rights of this user: safetensors makes its files readable only by their owner."""
    os.umask(mask := os.umask(0))
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def write_whole(place: Path, write: Callable[[Path], object]) -> None:
    """`write` a temporary file, then rename it to its place: readers see the old or the new file, also after a crash."""
    part = place.with_name(f".{place.name}.part")
    part.unlink(missing_ok=True)  # with a link, its target would be written
    write(part)
    sync(part)
    part.replace(place)
    sync(place.parent)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Within, libraries write below `place`; a write error of safetensors is raised as an `OSError`."""
    try:
        yield
    except SafetensorError as error:
        match = re.search(r"\(os error (\d+)\)", str(error)) if sys.platform != "win32" else None  # Windows has other numbers
        number = int(match[1]) if match is not None else errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(number, os.strerror(number), str(place)) from error


@contextmanager
def trial() -> Iterator[None]:
    """Within, a run tests before its first step what it writes later: `RunFailed` for what a library cannot save.

    A full disk raises the same `OSError` as later.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        message = f"what this run trains cannot be saved ({type(error).__name__}: {error}); no step was trained"
        raise RunFailed(message, "repair the files of the model that this names, or choose another model") from error


def is_full(error: BaseException) -> bool:
    """Whether a write failed because of missing space."""
    return isinstance(error, OSError) and error.errno in FULL


def way_out(error: OSError, path: Path) -> str | None:
    """The fix for a write that failed because of missing space; None for other errors."""
    if not is_full(error):
        return None
    if error.errno == errno.EFBIG:
        return "raise the limit on the size of a file (`ulimit -f unlimited`; a FAT disk cannot hold files of 4 GB)"
    return f"free space on the disk of {path} ({free_bytes(path) / 1e6:,.0f} MB are free)"


def free_bytes(path: Path) -> int:
    """Free bytes for this user at `path`, which need not exist; unlimited if the system does not report them."""
    while not os.path.exists(path):
        path = path.parent
    if sys.platform == "win32":
        return shutil.disk_usage(path).free
    if not hasattr(os, "statvfs"):
        return sys.maxsize
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else sys.maxsize  # /proc has no disk
