"""GGUF headers, written by hand from the format's description."""

from __future__ import annotations

import struct
from pathlib import Path


def write_gguf(path: Path, metadata: dict[str, object], tensors: tuple[str, ...] = ()) -> Path:
    """A GGUF header with string, integer and string-array values, written by hand from the format's description."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += string(key)
        if isinstance(value, str):
            out += struct.pack("<I", 8) + string(value)
        elif isinstance(value, int):
            out += struct.pack("<II", 4, value)
        elif isinstance(value, list):
            out += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    for name in tensors:
        out += string(name) + struct.pack("<IQIQ", 1, 8, 0, 0)
    path.write_bytes(out)
    return path
