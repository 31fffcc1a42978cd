"""Writing that survives: what was synced is on the disk when the machine loses power, and a file is whole or absent."""

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
    """Bring a file's content, or a folder's list of names, to the disk. Windows opens no folder, and syncs a file to write."""
    is_windows = sys.platform == "win32"
    if is_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Bring a folder with all that is in it to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def let_others_read(folder: Path) -> None:
    """Give files the rights that a file has where this user makes one: safetensors keeps its files to their owner."""
    os.umask(mask := os.umask(0))
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def write_whole(place: Path, write: Callable[[Path], object]) -> None:
    """`write` a file beside its place, then put it there: readers see the old one or the new one, and a crash leaves either."""
    part = place.with_name(f".{place.name}.part")
    part.unlink(missing_ok=True)  # through a link, what it leads to would be written
    write(part)
    sync(part)
    part.replace(place)
    sync(place.parent)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Within, libraries write below `place`; what safetensors tells in an error of its own leaves as an `OSError`."""
    try:
        yield
    except SafetensorError as error:
        said = re.search(r"\(os error (\d+)\)", str(error)) if sys.platform != "win32" else None  # whose numbers are others
        number = int(said[1]) if said is not None else errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(number, os.strerror(number), str(place)) from error


@contextmanager
def trial() -> Iterator[None]:
    """Within, a run writes before its first step what it writes later on: `RunFailed` for what a library refuses to save.

    A full disk stays the `OSError` that it is later on.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        message = f"what this run trains cannot be saved ({type(error).__name__}: {error}); no step was trained"
        raise RunFailed(message, "repair the files of the model that this names, or choose another model") from error


def is_full(error: BaseException) -> bool:
    """Whether what failed is a write for which there was no room."""
    return isinstance(error, OSError) and error.errno in FULL


def way_out(error: OSError, path: Path) -> str | None:
    """What lets a write go through for which there was no room; None where another thing failed."""
    if not is_full(error):
        return None
    if error.errno == errno.EFBIG:
        return "raise the limit on the size of a file (`ulimit -f unlimited`; a FAT disk cannot hold files of 4 GB)"
    return f"free space on the disk of {path} ({free_bytes(path) / 1e6:,.0f} MB are free)"


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write where `path` is, or will be; no end of them where the system does not tell."""
    while not os.path.exists(path):
        path = path.parent
    if sys.platform == "win32":
        return shutil.disk_usage(path).free
    if not hasattr(os, "statvfs"):
        return sys.maxsize
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize
