"""The header of a GGUF file: its metadata, without its tensors.

The `gguf` package reads it too, but imports numpy, and `validate` must start in a fraction of that time. Format:
github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
MAX_LENGTH = 1 << 28  # of a string or array, so that a damaged header cannot ask for all memory


def is_gguf(path: Path) -> bool:
    """Whether the file starts with the GGUF magic."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


@dataclass(frozen=True)
class Header:
    """The metadata of a GGUF file (arrays as lists) and the names of its tensors."""

    metadata: dict[str, Any]
    tensors: frozenset[str]


def read_header(path: Path) -> Header:
    """The header of the file at `path`, read once while the file stays as it is; ValueError when it is damaged."""
    stat = path.stat()
    return _read_header(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _read_header(path: Path, _mtime_ns: int, _size: int) -> Header:
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError("it does not start with GGUF")
        _, tensors, keys = _unpack(file, "<IQQ")
        values = {_string(file): _value(file, _unpack(file, "<I")[0]) for _ in range(keys)}
        return Header(values, frozenset(_tensor_name(file) for _ in range(tensors)))


def _tensor_name(file: BinaryIO) -> str:
    name = _string(file)
    dimensions = _unpack(file, "<I")[0]
    file.seek(8 * dimensions + 4 + 8, 1)  # sizes, type, offset
    return name


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, _read(file, struct.calcsize(layout)))


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ValueError("its header ends early")
    return data


def _length(file: BinaryIO) -> int:
    length: int = _unpack(file, "<Q")[0]
    if length > MAX_LENGTH:
        raise ValueError(f"its header names a length of {length}")
    return length


def _string(file: BinaryIO) -> str:
    return _read(file, _length(file)).decode("utf-8", errors="replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        item = _unpack(file, "<I")[0]
        count = _length(file)
        if item in _SCALARS:
            layout = f"<{count}{_SCALARS[item][1]}"
            return list(_unpack(file, layout))
        return [_value(file, item) for _ in range(count)]
    if kind not in _SCALARS:
        raise ValueError(f"its header holds a value of unknown type {kind}")
    return _unpack(file, _SCALARS[kind])[0]
