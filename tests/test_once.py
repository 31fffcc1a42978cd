"""A file is read once while it stays as it is, and again after any change."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo_cli.storage import once
from dpo_cli.storage.once import KEPT, YOUNG_NS, once_per_file


def test_a_file_is_read_once_while_it_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a change leaves its size and sets its time back, as rsync does."""
    seen = []

    @once_per_file
    def read(path: Path) -> str:
        seen.append(path.name)
        return path.read_text(encoding="utf-8")

    def now(file: Path, age: int) -> None:
        monkeypatch.setattr(once, "time", SimpleNamespace(time_ns=lambda: file.stat().st_ctime_ns + age))

    file = tmp_path / "a"
    file.write_text("one", encoding="utf-8")
    then = file.stat().st_mtime_ns
    now(file, 2 * YOUNG_NS)
    assert [read(file), read(tmp_path / "." / "a"), seen] == ["one", "one", ["a"]]
    file.write_text("two", encoding="utf-8")
    os.utime(file, ns=(then, then))
    now(file, 2 * YOUNG_NS)
    assert [read(file), read(file), seen] == ["two", "two", ["a", "a"]]
    file.write_text("new", encoding="utf-8")
    now(file, 0)  # so young that its time may not tell it from the next
    assert [read(file), read(file), len(seen)] == ["new", "new", 4]
    for number in range(KEPT + 1):
        (tmp_path / str(number)).write_text(str(number), encoding="utf-8")
        now(tmp_path / str(number), 2 * YOUNG_NS)
        assert read(tmp_path / str(number)) == str(number)
    now(tmp_path / "0", 2 * YOUNG_NS)
    assert read(tmp_path / "0") == "0" and seen.count("0") == 2
