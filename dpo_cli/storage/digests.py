"""SHA-256 of files, of the weights in a folder, and of the settings for these weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import dpo_cli

SAFE = "*.safetensors"
SETTINGS = ("adapter_config.json", "config.json")  # of an adapter, of a whole model
# What may change in them: the place of the base, the writer of the file, what only training reads, and names of code, which is
# checked separately (models/remote_code.py).
OPEN = frozenset(
    {"base_model_name_or_path", "revision", "_name_or_path", "peft_version", "transformers_version", "inference_mode"}
    | {"lora_dropout", "auto_mapping", "auto_map", "megatron_core", "megatron_config"}
)


def sha256_of_all(folder: Path) -> str:
    """The SHA-256 of the folder's weights; for several files, that of their digests in order of names."""
    digests = [sha256(file) for file in sorted(folder.glob(SAFE))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def sha256_of_settings(folder: Path) -> str:
    """The SHA-256 of the settings files that decide how the folder's weights are used."""
    settings = {name: _settings(folder / name) for name in SETTINGS if (folder / name).is_file()}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _settings(file: Path) -> dict[str, object] | str:
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        return {key: value for key, value in json.loads(text).items() if key not in OPEN}
    except (ValueError, AttributeError):  # damaged: the reader of the file reports it; here it counts as changed
        return text


def sha256_of_package(*folders: str) -> str:
    """The SHA-256 of the code of dpo, or of these folders of it."""
    package = Path(dpo_cli.__file__).parent
    digest = hashlib.sha256()
    for place in [package / folder for folder in folders] or [package]:
        for file in sorted(file for file in place.rglob("*") if file.suffix in (".py", ".json")):
            digest.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def state_of_files(place: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file: as in git's index, since all weights of a model take long to hash."""
    files = sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place]
    return [(file.name, (state := file.stat()).st_size, state.st_mtime_ns) for file in files]


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
