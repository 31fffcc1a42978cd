"""The header of a GGUF file: its metadata, without its tensors.

The `gguf` package reads it too, but imports numpy, which takes longer than `validate` may need. Format:
github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


class NoGguf(ValueError):
    """A file that does not start with the GGUF magic."""


@dataclass(frozen=True)
class Header:
    """The metadata of a GGUF file and the names of its tensors. A list of strings is given as its length."""

    metadata: dict[str, Any]
    tensors: frozenset[str]


def read_header(path: Path) -> Header:
    """The header of the file at `path`; `NoGguf` for another kind of file, ValueError for a damaged one."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise NoGguf("it does not start with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            cursor.bytes(len(MAGIC))
            _, tensors, keys = cursor.unpack("<IQQ")  # version, tensors, keys
            values = {cursor.string(): cursor.value(cursor.unpack("<I")[0]) for _ in range(keys)}
            return Header(values, frozenset(cursor.tensor_name() for _ in range(tensors)))


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.end = data, 0, len(data)

    def bytes(self, size: int) -> bytes:
        self.at += size
        if self.at > self.end:
            raise ValueError("its header ends early")
        return self.data[self.at - size : self.at]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.bytes(struct.calcsize(layout)))

    def string(self) -> str:
        return self.bytes(self.unpack("<Q")[0]).decode("utf-8", errors="replace")

    def value(self, kind: int) -> object:
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"its header holds a value of unknown type {kind}")
        item, count = self.unpack("<IQ")
        if item == _STRING:
            return self.skip_strings(count)
        if item not in _SCALARS or count > self.end:
            raise ValueError(f"its header holds a list of {count} values of type {item}")
        return list(self.unpack(f"<{count}{_SCALARS[item][1]}"))

    def skip_strings(self, count: int) -> int:
        """Skip a vocabulary of 100,000 tokens without creating a string for each."""
        at, end, data, length = self.at, self.end - 8, self.data, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > end:
                raise ValueError("its header ends early")
            at += 8 + length(data, at)[0]
        self.at = at
        return count

    def tensor_name(self) -> str:
        name = self.string()
        self.bytes(8 * self.unpack("<I")[0] + 4 + 8)  # sizes, type, offset
        return name
