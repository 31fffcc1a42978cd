"""Why a file or folder cannot be read at all (missing, compressed, another format), and what to do."""

from __future__ import annotations

import codecs
import difflib
import json
import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from dpo_cli.data import folders, hub_datasets
from dpo_cli.data.files import DAMAGED, GZIPPED, READERS, opened, python_writes
from dpo_cli.errors import Problem

GIT_LFS = b"version https://git-lfs.github.com/spec/"
# Commands that decompress files with these first bytes; text in gzip is read as it is.
UNPACK = {
    GZIPPED: "gunzip",
    b"PK\x03\x04": "unzip",
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "xz -d",
}
PACKED = (".gz", ".zip", ".zst", ".bz2", ".xz")
SPREADSHEETS = (".xlsx", ".xls", ".ods")
TO_PARQUET = 'to_parquet(open(sys.argv[2], "xb"))'
JSONL = 'use a .jsonl file: one {"prompt": ..., "chosen": ..., "rejected": ...} object per line'


def fault(path: Path, key: str, readable: Collection[str] = tuple(READERS)) -> Problem | None:
    """The problem of a file or folder of a config's `key` that cannot be read; `readable` are the supported suffixes."""
    if (content := folders.choice(str(path))) is not None:
        problem = _fault_of_folder(path, content)
    else:
        problem = _fault_of_file(path, readable) if os.path.exists(path) else _fault_of_name(path, key)
    return problem and replace(problem, key=key)


def _error(code: str, message: str, fix: str) -> Problem:
    return Problem("error", code, message, fix)


def _fault_of_name(path: Path, key: str) -> Problem:
    """The problem of a path that does not exist; it may be a hub dataset."""
    repository, _, wanted = str(path).partition(":")
    if hub_datasets.is_hub_id(str(path)) and (splits := hub_datasets.splits(repository)):
        return _split_fault(repository, wanted, list(splits), f"{repository}:SPLIT")
    if hub_datasets.is_hub_id(str(path)):
        message = f"{path} is not in the local cache: `dpo train` downloads it from the hub"
        fix = f"`hf download --repo-type dataset {repository}` downloads it now; a local file needs a suffix"
        return Problem("warning", "dataset-on-hub", message, fix)
    siblings = [file.name for file in path.parent.iterdir()] if os.path.exists(path.parent) and path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, 1, cutoff=0.75)
    fix = f"did you mean {path.parent / near[0]}?" if near else f'check the path in "{key}"'
    return _error("dataset-missing", f"file not found: {path}", fix)


def _split_fault(name: str, wanted: str, splits: Sequence[str], form: str) -> Problem:
    what = f"has no split {wanted}" if wanted else f"has several splits to train on: {folders.shown(splits)}"
    return _error("dataset-split", f"{name} {what}", f'write "{form}" with one of {", ".join(splits)}')


def _fault_of_folder(path: Path, content: folders.Choice) -> Problem | None:
    if content.files:
        return None
    if content.splits:
        folder, _, wanted = (str(path), "", "") if path.is_dir() else str(path).rpartition(":")
        return _split_fault(folder, wanted, content.splits, f"{folder}:SPLIT")
    if folders.was_saved_to_disk(path):
        splits = folders.to_train_on(file.name for file in sorted(path.iterdir()) if (file / "state.json").is_file())
        loaded = "datasets.load_from_disk(sys.argv[1])" + (f"[{json.dumps(splits[0])}]" if splits else "")
        code = f"import sys, datasets; {loaded}.{TO_PARQUET}"
        return _arrow(path, f"{path} was written by save_to_disk", code, f"{path}.parquet")
    if arrows := [name for name in content.others if name.endswith(".arrow")]:
        return _fault_of_file(path / arrows[0], ())
    inner = [name for name in content.others if name.endswith("/")]
    fix = f"name one of its folders ({folders.shown(inner)})" if inner else JSONL
    return _error("dataset-format", f"{path} has no {', '.join(READERS)} file", fix)


def _arrow(path: Path, what: str, code: str, target: str) -> Problem:
    return _error("dataset-arrow", f"{what} as Arrow files, which are not supported", python_writes(target, code, str(path)))


def _fault_of_file(path: Path, readable: Collection[str]) -> Problem | None:
    """The problem of a path that exists."""
    if not path.is_file():  # a folder with the name of a file, or a pipe, which cannot be read twice
        return _error("dataset-unreadable", f"{path} is not a file", "name a readable file")
    try:
        with path.open("rb") as file:
            start = file.read(len(GIT_LFS))
    except OSError as error:
        return _error("dataset-unreadable", f"cannot read {path}: {error.strerror}", "name a readable file")
    if start == GIT_LFS:
        fix = f"`git lfs pull` in {path.parent} downloads the data"
        return _error("dataset-pointer", f"{path} is a Git LFS pointer, not the data", fix)
    kind = folders.kind(path)
    if (unpacking := _unpacking(path, start, readable)) is not None:
        return _error("dataset-packed", f"{path} is compressed", unpacking)
    if path.suffix.lower() == ".arrow":
        target = str(path.with_suffix(".parquet"))
        code = f"import sys, datasets; datasets.Dataset.from_file(sys.argv[1]).{TO_PARQUET}"
        return _arrow(path, f"{path} was written by the datasets library", code, target)
    if kind not in readable:
        fix = "save it as CSV, with the names of the columns in the first line" if kind in SPREADSHEETS else JSONL
        return _error("dataset-format", f"{path} is not a {', '.join(readable)} file", fix)
    if kind == ".parquet":
        damaged = not start.startswith(b"PAR1")
        return _error("dataset-damaged", f"{path} is not a Parquet file", "download or create it again") if damaged else None
    wide = _wide(_unpacked_start(path) if start.startswith(GZIPPED) else start)
    return _error("dataset-utf16", f"{path} is {wide}", "save it as UTF-8") if wide else None


def _wide(start: bytes) -> str | None:
    """UTF-16 or UTF-32, with or without a byte order mark: JSON begins with ASCII, so half of the bytes are 0."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if start[:4] == bytes(4) or start.count(0) * 4 < len(start):
        return None
    encoding = json.detect_encoding(start[:4])
    return None if encoding.startswith("utf-8") else encoding[:6].upper()


def _unpacking(path: Path, start: bytes, readable: Collection[str]) -> str | None:
    """The fix for a compressed file that cannot be read as it is; None for all other files."""
    name, kind, suffix = shlex.quote(str(path)), folders.kind(path), path.suffix.lower()
    if ".tar" in path.suffixes[-2:] or suffix == ".tgz":
        return f"`tar -xf {name}` extracts it: name one of its files"
    command = next((command for magic, command in UNPACK.items() if start.startswith(magic)), None)
    if command is None or (suffix not in PACKED and kind not in readable):  # a spreadsheet is a zip file too
        return None
    if command == "gunzip" and kind != ".parquet" and kind in readable:
        return None
    if command == "gunzip" and not kind:
        return f"rename it with the suffix of its content, for example {path.stem}.jsonl.gz"
    if command == "unzip":
        return f"`unzip {name}` extracts it: name one of its files"
    target = path.with_suffix("") if suffix in PACKED else path.with_name(f"unpacked-{path.name}")
    return f"`{command} < {name} > {shlex.quote(str(target))}` decompresses it: name {target}"


def _unpacked_start(path: Path) -> bytes:
    try:
        with opened(str(path)) as file:
            return file.read(len(GIT_LFS))
    except DAMAGED:  # reported when the rows are read
        return b""
