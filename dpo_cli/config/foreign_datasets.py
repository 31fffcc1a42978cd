"""The datasets of other tools' configs as `dataset`, `eval_dataset` and `columns` of this one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dpo_cli.config.foreign_config import Foreign
from dpo_cli.errors import Problem

# Keys that name datasets or parts of them, in any tool.
KEYS = (
    "dataset", "datasets", "dataset_name", "train_file", "data_path", "dataset_path", "train_dataset", "train_data",
    "dataset_mixer", "dataset_splits", "dataset_train_split", "dataset_test_split", "dataset_config", "dataset_config_name",
    "dataset_dir", "test_datasets", "eval_dataset", "val_dataset", "dataset_mixture",
)  # fmt: skip
# What names of columns mean in Axolotl (field_*), in LLaMA-Factory (dataset_info.json) and in TRL.
COLUMNS = {
    "field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected", "field_system": "system",
    "field_messages": "prompt", "field_completion": "completion", "field_label": "label", "prompt": "prompt",
    "chosen": "chosen", "rejected": "rejected", "system": "system", "messages": "prompt", "tools": "tools", "kto_tag": "label",
    "response": "completion",
}  # fmt: skip
INFO = "dataset_info.json"


@dataclass
class Datasets:
    """What a config says about its data: values of this tool, what each key became, and what is left out or wrong."""

    values: dict[str, object] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def datasets_of(foreign: Foreign) -> Datasets:
    """The data of a config."""
    given = {key: value for key, value in foreign.values.items() if key in KEYS and value not in (None, "", [])}
    found = Datasets()
    split = given.pop("dataset_train_split", None)
    test = given.pop("dataset_test_split", None)
    evaluates = any(foreign.values.get(key) not in (None, False, "no") for key in ("eval_strategy", "evaluation_strategy"))
    if test is None and evaluates and "dataset_name" in given and not Path(str(given["dataset_name"])).suffix:
        test = "test"  # TRL's default
    for key in ("dataset_config", "dataset_config_name"):
        if (subset := given.pop(key, None)) not in (None, "default"):
            found.left_out[key] = f"a part of a dataset ({subset}) is a folder of its repository: name the files"
    folder = given.pop("dataset_dir", None)
    splits = given.pop("dataset_splits", None)
    if isinstance(mixer := given.pop("dataset_mixer", None), dict):
        _mix(mixer, splits if isinstance(splits, list) else [], found)
    if isinstance(mixture := given.pop("dataset_mixture", None), dict):
        given["datasets"] = mixture.get("datasets")
        if mixture.get("test_split_size") is not None:
            found.values["eval_split"] = mixture["test_split_size"]
    for key, value in given.items():
        option = "eval_dataset" if key in ("test_datasets", "eval_dataset", "val_dataset") else "dataset"
        entries = [
            entry
            for part in _parts(value)
            for entry in _entries(part, key, split if option == "dataset" else None, folder, foreign, found)
        ]
        if entries:
            found.values.setdefault(option, entries[0] if len(entries) == 1 and isinstance(entries[0], str) else entries)
    if isinstance(test, str) and isinstance(name := found.values.get("dataset"), str) and evaluates:
        found.values.setdefault("eval_dataset", f"{name.split(':')[0]}:{test}")
    elif test is not None:
        found.left_out["dataset_test_split"] = "nothing is evaluated during this training (eval_strategy)"
    return found


def _mix(mixer: Mapping[str, object], splits: Sequence[object], found: Datasets) -> None:
    """Datasets with their shares, as the alignment handbook writes them; a split for training, one for evaluation."""
    train = next((split for split in splits if "test" not in str(split)), None)
    test = next((split for split in splits if "test" in str(split)), None)
    names = [_with_split(name, train) for name in mixer]
    entries = [
        name if share == 1 else {"path": name, "weight": share} for name, share in zip(names, mixer.values(), strict=True)
    ]
    found.values["dataset"] = entries[0] if len(entries) == 1 and isinstance(entries[0], str) else entries
    if test is not None:
        held_out = [_with_split(name, test) for name in mixer]
        found.values["eval_dataset"] = held_out[0] if len(held_out) == 1 else held_out


def _parts(value: object) -> list[object]:
    """The datasets of one value: a list, or names with commas between them."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value if isinstance(value, list) else [value]


def _entries(part: object, key: str, split: object, folder: object, foreign: Foreign, found: Datasets) -> Iterator[object]:
    """The datasets that a part of a value names."""
    tool = foreign.tool.name if foreign.tool else ""
    if isinstance(part, dict) and set(part) <= {"path", "weight"}:
        yield part
    elif isinstance(part, dict):
        yield from _described(part, key, split, found)
    elif not isinstance(part, str):
        found.left_out[key] = "it names no dataset"
    elif tool == "LLaMA-Factory" and not Path(part).suffix:
        yield from _registered(part, key, folder, foreign.file, found)
    elif tool == "ms-swift":
        name, _, rows = re.sub(r"^(hf|ms)::", "", part).partition("#")
        if rows:
            found.left_out[f"{key} (#{rows})"] = "put fewer rows into the file, or give the dataset a weight"
        yield name
    else:
        yield _with_split(part, split)


def _described(part: Mapping[str, object], key: str, split: object, found: Datasets) -> Iterator[object]:
    """A dataset as Axolotl, TRL and load_dataset describe it: path, split, files, names of columns."""
    path = part.get("path") or part.get("name")
    files = _parts(part["data_files"]) if part.get("data_files") else []
    about = part.get("type")
    fields = {**part, **(about if isinstance(about, dict) else {})}
    columns = {
        COLUMNS[name]: value for name, value in fields.items() if name in COLUMNS and name.startswith("field_") and value
    }
    if columns:
        found.values["columns"] = {meaning: name for meaning, name in columns.items() if meaning != name} or None
        found.values = {name: value for name, value in found.values.items() if value is not None}
    known = {"path", "split", "data_files", "type", "ds_type", "weight", "name", *COLUMNS}
    for name, value in part.items():
        if name not in known and value not in (None, False):
            found.left_out[f"{key}.{name}"] = "the format is detected from the rows; see columns"
    if part.get("name") and part.get("path"):
        found.left_out[f"{key}.name"] = f"a part of a dataset ({part['name']}) is a folder of its repository: name the files"
    if isinstance(about, str):
        found.left_out[f"{key}.type"] = (
            f"the format is detected from the rows, and the chat template is the model's own ({about})"
        )
    is_hub = isinstance(path, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not Path(path).suffix
    if path in ("json", "csv", "parquet") or (files and not is_hub):
        yield from files
    elif files:
        found.left_out[f"{key}.data_files"] = (
            "a hub dataset is read whole, or one split of it: download these files, and name them"
        )
        yield str(path)
    elif path is not None:
        weight = part.get("weight")
        named = _with_split(str(path), part.get("split") or split)
        yield {"path": named, "weight": weight} if weight not in (None, 1) else named


def _registered(name: str, key: str, folder: object, file: Path, found: Datasets) -> Iterator[object]:
    """A name in LLaMA-Factory's dataset_info.json: its file or hub dataset, and its columns."""
    place = str(folder or "data")
    homes = [Path(place), *(parent / place for parent in file.resolve().parents)]
    info = next((home / INFO for home in homes if (home / INFO).is_file()), None)
    entry = None
    if info is not None:
        try:
            entry = json.loads(info.read_text(encoding="utf-8")).get(name)
        except (ValueError, AttributeError) as error:
            found.problems.append(Problem("error", "import-unreadable", f"not JSON: {error}", "correct it", key, str(info)))
            return
    if not isinstance(entry, dict) or not any(
        entry.get(part) for part in ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url")
    ):
        where = f"{info} names no file or hub dataset for it" if info else f"there is no {place}/{INFO} near this file"
        fix = "add the dataset to the written config: a file, or owner/name of the hub"
        found.problems.append(
            Problem("error", "import-dataset", f'"{name}" is a name in {INFO}, and {where}', fix, key, str(file))
        )
        return
    assert info is not None
    given = entry.get("columns")
    named = {COLUMNS[part]: column for part, column in given.items() if part in COLUMNS} if isinstance(given, dict) else {}
    if columns := {meaning: column for meaning, column in named.items() if meaning != column}:
        found.values["columns"] = columns
    if entry.get("file_name"):
        yield str(info.parent / str(entry["file_name"]))
    else:
        hub = entry.get("hf_hub_url") or entry.get("ms_hub_url") or entry.get("om_hub_url")
        yield _with_split(str(hub), entry.get("split"))


def _with_split(name: str, split: object) -> str:
    """A hub dataset with one of its splits; train is the default one."""
    plain = str(split) if split not in (None, "train") else ""
    return f"{name}:{plain}" if plain and ":" not in name else name
