"""A file that is written in parts. After a stop it continues, to the same bytes as without the stop.

FILE.progress exists until FILE is finished: a line with the settings that decide the content, then a line after each part with
the state of FILE. Content of FILE after that state is of an interrupted part, and is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from dpo_cli.errors import UsageError, invalid
from dpo_cli.storage.jsonio import json_text
from dpo_cli.storage.lock import is_locked_now
from dpo_cli.storage.redaction import redacted


class ResumableFile:
    """An open file of this kind. `state` is that of the last `append`, {} at the start.

    `decided` is stored with the settings and not compared: decisions at the start for the whole file.

    Raises `InvalidInput` if the file was started with other settings or has changed since; see `check`.
    """

    def __init__(self, path: Path, settings: Mapping[str, object], decided: Mapping[str, object] | None = None) -> None:
        self.path, self.marks, settings = path, _marks_of(path), redacted(settings)
        self.state: dict[str, Any] = {}
        self.digest = hashlib.sha256()
        with ExitStack() as opened:
            self._marks = opened.enter_context(_opened(self.marks))
            if not is_locked_now(self._marks):
                raise UsageError(f"another process is writing {path}", "wait for it, or name another file")
            lines = _whole_lines(self._marks)
            self.is_resumed = bool(lines)
            size = 0
            if lines:
                fix = f"use the same settings, name another file, or delete it and {self.marks}"
                require_same(path, lines[0]["settings"], settings, fix)
                size = self._check_content(lines[-1])
                self.state = lines[-1].get("state", {})
            else:  # a new file, or one that was stopped before the first write
                _refuse_content(path)
                self._mark({"settings": settings, "decided": decided or {}})
            self._file = opened.enter_context(_opened(path))
            self._file.truncate(size)
            self._file.seek(size)
            self._opened = opened.pop_all()

    @staticmethod
    def decided(path: Path) -> dict[str, Any]:
        """The decisions at the start of an unfinished file; {} without one."""
        try:
            lines = _marks_of(path).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return {}
        return dict(json.loads(lines[0]).get("decided", {})) if lines[1] else {}

    @staticmethod
    def check(path: Path) -> None:
        """Refuse a path with a file that is not an unfinished one of this kind, or that is not writable."""
        if not _marks_of(path).exists():
            _refuse_content(path)
        if not path.parent.is_dir():
            raise UsageError(
                f"cannot write {path}: the folder {path.parent} does not exist", "name a file in a folder that exists"
            )

    @staticmethod
    def remove(path: Path) -> None:
        """Remove a file of this kind, finished or not."""
        path.unlink(missing_ok=True)
        ResumableFile.remove_marks(path)

    @staticmethod
    def remove_marks(path: Path) -> None:
        """The file is known to be complete."""
        _marks_of(path).unlink(missing_ok=True)

    def append(self, rows: Iterable[Mapping[str, object]], state: Mapping[str, object]) -> None:
        """Add rows, one per line. `state` is stored with them, and survives a crash."""
        data = "".join(f"{json_text(redacted(row))}\n" for row in rows).encode()
        self._file.write(data)
        _sync(self._file)
        self.digest.update(data)
        self._mark({"bytes": self._file.tell(), "sha256": self.digest.hexdigest(), "state": state})

    def finish(self) -> None:
        """The file is complete: its progress file is removed."""
        self.close()
        self.marks.unlink()

    def close(self) -> None:
        self._opened.close()

    def _check_content(self, mark: Mapping[str, Any]) -> int:
        """The size of the file at the last mark, after a check that its content is unchanged."""
        size = int(mark.get("bytes", 0))
        data = self.path.read_bytes()[:size] if self.path.exists() else b""
        self.digest.update(data)
        if size and self.digest.hexdigest() != mark["sha256"]:
            message = f"{self.path} has changed since it was written"
            fix = f"name another file, or delete it and {self.marks}"
            raise invalid("out-changed", message, fix)
        return size

    def _mark(self, mark: Mapping[str, object]) -> None:
        self._marks.write(f"{json_text(redacted(mark))}\n".encode())
        _sync(self._marks)


def _marks_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.progress")


def _refuse_content(path: Path) -> None:
    if path.exists() and (path.stat().st_size or not path.is_file()):
        raise UsageError(f"{path} exists already, and is not an unfinished file", "name a new file, or delete it")


def _opened(path: Path) -> BinaryIO:
    """The file for reading and writing; created if it does not exist."""
    try:
        return path.open("r+b" if path.exists() else "w+b")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", "name a file that can be written") from error


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _whole_lines(file: BinaryIO) -> list[dict[str, Any]]:
    """The complete lines; an incomplete last one is cut off."""
    text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    file.truncate(len(whole))
    file.seek(len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def require_same(path: Path, before: Mapping[str, object], now: Mapping[str, object], fix: str) -> None:
    """Refuse to continue a file with other settings, and name those that differ."""
    was, now = _flat(before), _flat(json.loads(json_text(now)))
    differ = sorted(name for name in {*was, *now} if was.get(name) != now.get(name))
    if differ:
        changes = "; ".join(f"{name} was {json_text(was.get(name))} and is now {json_text(now.get(name))}" for name in differ)
        raise invalid("out-other-settings", f"{path} was started with other settings: {changes}", fix)


def _flat(settings: Mapping[str, object], before: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat
