"""A file is read once while it stays as it is, and again after any change."""

from __future__ import annotations

import os
from pathlib import Path

from dpo_cli.storage.once import KEPT, YOUNG_NS, once_per_file


def test_a_file_is_read_once_while_it_stays_as_it_is(tmp_path: Path) -> None:
    seen = []

    @once_per_file
    def read(path: Path) -> str:
        seen.append(path.name)
        return path.read_text(encoding="utf-8")

    def write(path: Path, text: str, age: int) -> None:
        path.write_text(text, encoding="utf-8")
        then = path.stat().st_mtime_ns - age
        os.utime(path, ns=(then, then))

    file = tmp_path / "a"
    write(file, "one", 2 * YOUNG_NS)
    assert [read(file), read(tmp_path / "." / "a"), seen] == ["one", "one", ["a"]]
    write(file, "two", 3 * YOUNG_NS)  # of the same size
    assert [read(file), read(file), seen] == ["two", "two", ["a", "a"]]
    write(file, "new", 0)  # so young that its time may not tell it from the next
    write(file, "now", 0)
    assert [read(file), read(file), len(seen)] == ["now", "now", 4]
    for number in range(KEPT + 1):
        write(tmp_path / str(number), str(number), 2 * YOUNG_NS)
        assert read(tmp_path / str(number)) == str(number)
    assert read(tmp_path / "0") == "0" and seen.count("0") == 2
