"""Files of rows to `Pair`s, as a stream: every bad row is named, and none stops the reading.

Memory does not grow with the file, but for a JSON list, which has no lines to read one by one.

A dataset is a file (.jsonl, .json, .csv, .tsv, .parquet; text also in gzip), a folder of such files, or a list of those with
weights.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from dpo_cli.data import files, folders, hub
from dpo_cli.data.faults import fault
from dpo_cli.data.files import about_rows
from dpo_cli.data.formats import Pair, Row, pair_of, shape_of, to_demonstration
from dpo_cli.data.messages import BadRow
from dpo_cli.errors import Problem, Severity

SHOWN = 3  # of a group of bad rows, those whose own fault is told
# What helps where no row can be deleted or left out.
FIXES = {
    "dataset-not-list": "write the rows between [ and ], with commas, or one a line into a file named .jsonl",
    "row-not-gzip": "download the file, or pack it again",
}


@dataclass(frozen=True)
class Source:
    """A file, and how often each of its pairs is seen in an epoch of training; below 1, that share of them."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Dataset:
    """What a pass over the sources found; `load` makes another that keeps the rows. `pairs` may count demonstrations."""

    name: str
    sources: tuple[Source, ...]
    columns: Mapping[str, str] | None
    rows: int = 0
    pairs: int = 0
    prompts: int = 0
    problems: tuple[Problem, ...] = ()
    key: str = "dataset"  # of the config, that names it
    demonstrations: bool = False  # as sft reads rows

    def load(self) -> list[Row]:
        """The usable rows in the order of their files, each as often as its weight says."""
        return self.divided(lambda row: False)[0]

    def divided(self, is_held_out: Callable[[Row], bool]) -> tuple[list[Row], list[Row]]:
        """The usable rows in the order of their files: (to train on, held out).

        A pair of weight 2 is trained on twice, of weight 0.5 every second is; each held-out pair stands once, so that a weight
        changes no figure of an evaluation.
        """
        kept: list[Row] = []
        held_out: list[Row] = []
        seen: Counter[float] = Counter()  # by weight, so that a folder of small files is weighed as a whole
        for source in self.sources:
            rows = _demonstrations([source], self.columns) if self.demonstrations else stream([source], self.columns)
            for row in rows:
                if isinstance(row, Bad):
                    continue
                if is_held_out(row):
                    held_out.append(row)
                else:
                    before = _due(seen[source.weight], source.weight)
                    seen[source.weight] += 1
                    kept += [row] * (_due(seen[source.weight], source.weight) - before)
        return kept, held_out

    @property
    def noun(self) -> str:
        """What its rows are."""
        return "demonstrations" if self.demonstrations else "pairs"

    def to_json(self) -> dict[str, Any]:
        return {"file": self.name, "rows": self.rows, "pairs": self.pairs, "prompts": self.prompts}


def _due(pairs: int, weight: float) -> int:
    """How many of so many pairs stand in an epoch; 10 of weight 0.1 are 1, although ten tenths add up to less."""
    return math.floor(pairs * weight + 1e-9)


def epoch_pairs(pairs: Mapping[str, int], sources: Sequence[Source]) -> int:
    """How many pairs an epoch sees, of so many in each file; a file that is named twice is counted twice there."""
    named, by_weight = Counter(source.path for source in sources), Counter[float]()
    for source in sources:
        by_weight[source.weight] += pairs.get(source.path, 0) // named[source.path]
    return sum(_due(count, weight) for weight, count in by_weight.items())


class Observer(Protocol):
    """Looks at every usable row of a pass, and says at its end what it found."""

    def see(self, row: Any, prompt_key: str) -> None: ...


@dataclass(frozen=True)
class Bad:
    """A row that is no pair."""

    file: str
    line: int
    code: str
    reason: str
    detail: str  # what is particular to this row


def sources_of(value: str | Sequence[str | Mapping[str, Any]]) -> tuple[Source, ...]:
    """The files that a config's value names: a path or a list of paths and {"path", "weight"}; a folder is its files."""
    return tuple(Source(file, weight) for path, weight in _entries(value) for file in _files(path))


def _entries(value: str | Sequence[str | Mapping[str, Any]]) -> list[tuple[str, float]]:
    """(path, weight) of each entry, its ~ expanded."""
    entries = [value] if isinstance(value, str) else value
    given = [(entry, 1.0) if isinstance(entry, str) else (entry["path"], entry.get("weight", 1.0)) for entry in entries]
    return [(str(Path(path).expanduser()) if path.startswith("~/") else path, weight) for path, weight in given]


def hub_ids(values: Mapping[str, Any]) -> list[str]:
    """The datasets of a valid config that are on the hub."""
    named = [values[key] for key in ("dataset", "eval_dataset") if values.get(key)]
    return [path for value in named for path, _ in _entries(value) if hub.is_hub_id(path)]


def holds_pairs(path: str) -> bool:
    """Whether the first usable row of a dataset is a preference pair."""
    return next((True for row in stream(sources_of(path)) if isinstance(row, Pair)), False)


def unreadable(value: str | Sequence[str | Mapping[str, Any]], key: str) -> list[Problem]:
    """Why what `key` of a config names cannot be read at all; such a problem has its place in the config."""
    found = (fault(Path(source.path), key) for source in sources_of(value))
    return [problem for problem in found if problem is not None]


def read(
    value: str | Sequence[str | Mapping[str, Any]],
    skip: bool = False,
    key: str = "dataset",
    columns: Mapping[str, str] | None = None,
    observers: Sequence[Observer] = (),
    demonstrations: bool = False,
) -> Dataset:
    """One pass over what `key` of a config names. Problems are returned, never raised; bad rows are warnings with `skip`.

    A problem of a file as a whole has no place: it belongs to the config that names it. With `demonstrations` the rows are
    those of sft.
    """
    sources = sources_of(value)
    name = sources[0].path if len(sources) == 1 else f"{len(sources)} files"
    data = Dataset(name, sources, columns, key=key, demonstrations=demonstrations)
    whole = unreadable(value, key)
    readable = [source for source in sources if fault(Path(source.path), key) is None]
    bad: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    details: dict[tuple[str, str, str], dict[str, int]] = defaultdict(dict)  # of the first such rows, with their places
    shapes: Counter[str] = Counter()
    met: set[str] = set()  # of the columns that the config names
    prompts: set[int] = set()
    rows = 0
    for row in _demonstrations(readable, columns) if demonstrations else stream(readable, columns, shapes, met):
        rows += 1
        if isinstance(row, Bad):  # kept, so that one pass names them all
            bad[row.file, row.code, row.reason].append(row.line)
            told = details[row.file, row.code, row.reason]
            if row.detail and len(told) < SHOWN:
                told.setdefault(row.detail, row.line)
            continue
        prompt_key = row.prompt_key
        prompts.add(hash(prompt_key))
        for observer in observers:
            observer.see(row, prompt_key)
    severity: Severity = "warning" if skip else "error"
    fix = "left out of the training" if skip else 'correct or delete what is named, or set "on_bad_rows": "skip"'
    problems = []
    for (file, code, reason), lines in bad.items():
        examples = [f"{files.unit(file)} {line}, {detail}" for detail, line in details[file, code, reason].items()]
        reason += f" ({'; '.join(examples)})" if examples else ""
        problems.append(about_rows(severity, code, reason, FIXES.get(code, fix), key, file, lines))
    pairs = rows - sum(map(len, bad.values()))
    problems = [*whole, *problems]
    if not pairs and readable and not any(problem.severity == "error" for problem in problems):
        problems.append(Problem("error", "dataset-empty", f"{name} holds no usable row", f"add {data.noun}", key, name))
    for name, column in (columns or {}).items() if pairs and not demonstrations else ():
        if column not in met:
            message = f'no row has a column "{column}", which "columns" names for {name}'
            problems.append(Problem("warning", "column-missing", message, "correct its name, or leave it out", "columns"))
    problems += _choices(value, key)
    for says, count in shapes.items():
        fix = 'say what the columns are called with "columns" if that is not meant'
        problems.append(Problem("hint", "rows-read-as", f"{count} rows are read as {says}", fix, key, name))
    return replace(data, rows=rows, pairs=pairs, prompts=len(prompts), problems=tuple(problems))


def stream(
    sources: Sequence[Source],
    columns: Mapping[str, str] | None = None,
    shapes: Counter[str] | None = None,
    met: set[str] | None = None,
) -> Iterator[Pair | Bad]:
    """The rows of the sources one after the other.

    `shapes` counts those that are not written as documented, and `met` gathers the `columns` that some row has.
    """
    for source in sources:
        for line, parse_row in files.rows_of(source.path):
            try:
                row = parse_row()
                if columns and met is not None and isinstance(row, Mapping):
                    met.update(row.keys() & columns.values())
                shape, row = shape_of(row, columns)
                pair = pair_of(shape, row, line, source.path)
            except BadRow as error:
                yield Bad(source.path, line, error.code, error.reason, error.detail)
                continue
            if shapes is not None and shape.says:
                shapes[shape.says] += 1
            yield pair


def _demonstrations(sources: Sequence[Source], columns: Mapping[str, str] | None) -> Iterator[Row | Bad]:
    for source in sources:
        for line, parse_row in files.rows_of(source.path):
            try:
                yield to_demonstration(parse_row(), line, source.path, columns)
            except BadRow as error:
                yield Bad(source.path, line, error.code, error.reason, error.detail)


def _files(path: str) -> list[str]:
    """The files of a folder in the order of their names, or of a dataset of the hub; a file itself."""
    if hub.is_hub_id(path):
        return hub.cached(path)[1] or [path]
    content = folders.choice(path)
    return [str(file) for file in content.files] if content is not None and content.files else [path]


def _choices(value: str | Sequence[str | Mapping[str, Any]], key: str) -> Iterator[Problem]:
    """Hints that say which files of a hub dataset or a folder are read."""
    for path, _ in _entries(value):
        if hub.is_hub_id(path):
            split, its_files = hub.cached(path)
            if its_files:
                message = f"{path} is read from its split {split}: {len(its_files)} {folders.kind(its_files[0])} files"
                yield Problem("hint", "hub-split", message, f'"{path.partition(":")[0]}:SPLIT" names another', key)
        elif (content := folders.choice(path)) is not None and content.files:
            read = folders.shown([file.name for file in content.files])
            rest = f"; not read: {folders.shown(content.others)}" if content.others else ""
            message = f"files of {path} that are read ({len(content.files)}): {read}{rest}"
            fix = 'name a file, a list of files, or "FOLDER:SPLIT" (the split as in the names of its files) for others'
            yield Problem("hint", "folder-files", message, fix, key)
