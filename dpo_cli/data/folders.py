"""Folders of data files: the files with rows, and those to train on. For local folders and hub datasets.

The split of a file is in its name (train_prefs-00000-of-00002.parquet), or is the name of its folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")  # of a hub dataset only the first kind that it has is read
GZIP = ".gz"
TRAINING = r"(?i)(?<![a-z])train"
EVALUATION = r"(?i)(?<![a-z])(tests?|val(id(ation)?)?|dev|eval(uation)?|held[-_.]?out|hold[-_.]?out)(?![a-z])"
DESCRIPTION = r"(?i)info|(?<![a-z])(stats|statistics|metadata|schema|config|state)\.json"
_SHARD = r"(?:^|[-_.])\d+(?:-of-\d+(?:-[0-9a-f]+)?)?$"


@dataclass(frozen=True)
class Choice:
    """For a folder: the files to read, the names of other files, and the splits if the config must name one."""

    files: tuple[Path, ...] = ()
    others: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()


def kind(path: str | Path) -> str:
    """The suffix that decides how a file is read, in lower case: for pairs.jsonl.gz it is .jsonl."""
    name = str(path).lower()
    return Path(name.removesuffix(GZIP)).suffix


def holds_rows(file: Path) -> bool:
    """Whether a file of a folder may hold rows: dataset_info.json, train_stats.json and the like do not."""
    return kind(file) in SUFFIXES and not (kind(file) == ".json" and re.search(DESCRIPTION, file.name))


def by_split(files: Iterable[Path], folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by their split; if the same rows are in several kinds of files, one kind."""
    splits: dict[str, list[Path]] = {}
    for file in _once([*files]):
        own = _own(file)
        parent = file.parent.name if file.parent != folder else ""
        is_named_by_folder = not own or (_is_split(parent) and not _is_split(own))
        splits.setdefault(parent if is_named_by_folder and parent else own, []).append(file)
    return splits


def _own(file: Path) -> str:
    """The name of a file without suffixes and shard number."""
    stem = file.name[: -len(GZIP)] if file.suffix.lower() == GZIP else file.name
    return re.sub(_SHARD, "", Path(stem).stem)


def _once(files: Sequence[Path]) -> list[Path]:
    """The files without copies of the same name: train.csv next to train.jsonl, and compressed copies."""
    kinds: dict[tuple[Path, str], int] = {}
    for file in files:
        place = file.parent, _own(file)
        kinds[place] = min(SUFFIXES.index(kind(file)), kinds.get(place, len(SUFFIXES)))
    first = [file for file in files if SUFFIXES.index(kind(file)) == kinds[file.parent, _own(file)]]
    return [file for file in first if file.suffix.lower() != GZIP or file.with_suffix("") not in first]


def to_train_on(splits: Iterable[str]) -> list[str]:
    """The splits with a training name; else those without an evaluation name; else all."""
    names = list(splits)
    training = [name for name in names if re.search(TRAINING, name)]
    return training or [name for name in names if not re.search(EVALUATION, name)] or names


def choice(path: str) -> Choice | None:
    """The files to read of a local folder, or of one of its splits (FOLDER:SPLIT); None if `path` is not a folder.

    Files without a split in their names are read together; if there are several training splits, the config must name one.
    """
    folder, wanted = _folder_and_split(path)
    if folder is None:
        return None
    if was_saved_to_disk(folder):
        return Choice()
    content = _listed(folder)
    files = _with_rows(content)
    if not files:  # a copy of a hub dataset has its files in data/, or in a folder for each split
        content = [file for each in content for file in (_listed(each) if _may_hold_files(each) else [each])]
        files = _with_rows(content)
    splits = by_split(files, folder)
    names = [wanted] if wanted else to_train_on(splits)
    is_open = wanted not in splits if wanted else len(names) > 1 and bool(re.search(TRAINING, names[0]))
    if is_open:
        return Choice(splits=tuple(splits if wanted else names))
    chosen = sorted(file for name in names for file in splits.get(name, ()))
    others = [str(file.relative_to(folder)) + "/" * file.is_dir() for file in content if file not in set(chosen)]
    return Choice(tuple(chosen), tuple(others))


def was_saved_to_disk(folder: Path) -> bool:
    """Whether `save_to_disk` of the library datasets wrote the folder."""
    return any(
        all((folder / name).is_file() for name in names)
        for names in (["state.json", "dataset_info.json"], ["dataset_dict.json"])
    )


def shown(names: Sequence[str], most: int = 10) -> str:
    """The first of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _is_split(name: str) -> bool:
    return bool(re.search(TRAINING, name) or re.search(EVALUATION, name))


def _folder_and_split(path: str) -> tuple[Path | None, str]:
    folder, _, split = path.rpartition(":")
    if os.path.exists(path) or not folder or not split:
        folder, split = path, ""
    # A folder named x.jsonl is an error: it should be a file.
    is_folder = os.path.exists(folder) and Path(folder).is_dir() and kind(folder) not in SUFFIXES
    return (Path(folder) if is_folder else None), split


def _may_hold_files(file: Path) -> bool:
    return (file.name == "data" or _is_split(file.name)) and file.is_dir()


def _with_rows(content: Iterable[Path]) -> list[Path]:
    return [file for file in content if holds_rows(file) and file.is_file()]


def _listed(folder: Path) -> list[Path]:
    """The content of a folder without hidden files; empty if it cannot be read."""
    try:
        return sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError:
        return []
