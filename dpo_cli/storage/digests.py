"""SHA-256 of files, of the weights in a folder, and of the settings that they are computed with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

SAFE = "*.safetensors"
SETTINGS = ("adapter_config.json", "config.json")  # of an adapter, of a whole model
# What of them may change: where the base lies, who wrote the file, what only training reads, and what names code, which is
# looked at by itself (models/remote_code.py).
OPEN = frozenset(
    {"base_model_name_or_path", "revision", "_name_or_path", "peft_version", "transformers_version", "inference_mode"}
    | {"lora_dropout", "auto_mapping", "auto_map", "megatron_core", "megatron_config"}
)


def sha256_of_all(folder: Path) -> str:
    """The SHA-256 of the folder's weights; of several files, that of their digests in the order of their names."""
    digests = [sha256(file) for file in sorted(folder.glob(SAFE))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def sha256_of_settings(folder: Path) -> str:
    """The SHA-256 of what the files beside the folder's weights say of how these are computed with."""
    settings = {name: _settings(folder / name) for name in SETTINGS if (folder / name).is_file()}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _settings(file: Path) -> dict[str, object] | str:
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        return {key: value for key, value in json.loads(text).items() if key not in OPEN}
    except (ValueError, AttributeError):  # damaged, which who reads it tells: here it is other than it was
        return text


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
