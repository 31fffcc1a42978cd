"""SHA-256 of files, and of the weights in a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

SAFE = "*.safetensors"


def sha256_of_all(folder: Path) -> str:
    """The SHA-256 of the folder's weights; of several files, that of their digests in the order of their names."""
    digests = [sha256(file) for file in sorted(folder.glob(SAFE))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
