"""Files of rows to `Pair`s, as a stream: every bad row is named, and none stops the reading.

Memory does not grow with the file, but for a JSON list, which has no lines to read one by one, and where the rows are kept.

A dataset is a file (.jsonl, .json, .csv, .tsv, .parquet; text also in gzip), a folder of such files, or a list of those with
weights.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from dpo_cli.config.schema import names_where
from dpo_cli.data import files, folders, hub_datasets
from dpo_cli.data.column_use import Account
from dpo_cli.data.columns import Columns
from dpo_cli.data.comparisons import start_of
from dpo_cli.data.files import about_rows
from dpo_cli.data.messages import BadRow
from dpo_cli.data.rows import Pair, Read, Row, counted, read_row
from dpo_cli.data.unreadable_files import fault
from dpo_cli.errors import Problem, Severity, invalid
from dpo_cli.strategies.row_kinds import DEMONSTRATIONS, PAIRS

Named = str | Sequence[str | Mapping[str, Any]]  # what a config calls its data: a path, or paths and {"path", "weight"}

TIE = "row-tie"  # the code of rows whose responses are equally good: these are left out, and never stop a training
SMALL_BYTES = 16 << 20  # of files whose rows stay in memory: what looks at them once more reads nothing again
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
    """What a pass over the sources found. `pairs` may count demonstrations."""

    name: str
    sources: tuple[Source, ...]
    columns: Columns | None
    rows: int = 0
    pairs: int = 0
    prompts: int = 0
    problems: tuple[Problem, ...] = ()
    key: str = "dataset"  # of the config, that names it
    demonstrations: bool = False  # as sft reads rows
    read_as: Mapping[str, object] = field(default_factory=dict)  # what its columns are read as, and which are not read
    kept: Sequence[tuple[Source, Row]] | None = None  # the usable rows, where the pass kept them
    states: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # of the files, when the pass began

    def load(self) -> list[Row]:
        """The usable rows in the order of their files, each as often as its weight says."""
        return self.divided(lambda row: False)[0]

    def divided(self, is_held_out: Callable[[Row], bool]) -> tuple[list[Row], list[Row]]:
        """The usable rows in the order of their files: (to train on, held out).

        A pair of weight 2 is trained on twice, of weight 0.5 every second is; each held-out pair stands once, so that a weight
        changes no figure of an evaluation.
        """
        train: list[Row] = []
        held_out: list[Row] = []
        seen: Counter[float] = Counter()  # by weight, so that a folder of small files is weighed as a whole
        for source, row in self._weighed():
            if is_held_out(row):
                held_out.append(row)
            else:
                before = _due(seen[source.weight], source.weight)
                seen[source.weight] += 1
                train += [row] * (_due(seen[source.weight], source.weight) - before)
        return train, held_out

    def require_unchanged(self) -> None:
        """`InvalidInput` where a file is another than when its rows were read: they would not be those that are hashed."""
        for path, state in self.states.items():
            if not Path(path).is_file() or _state(path) != state:
                fix = "start again when nothing writes to it"
                raise invalid("dataset-changed", f"{path} was changed while it was read", fix, self.key)

    def usable(self) -> Iterator[Row]:
        """The usable rows in the order of their files, each once."""
        return (row for _, row in self._weighed())

    def _weighed(self) -> Iterator[tuple[Source, Row]]:
        if self.kept is not None:
            yield from self.kept
            return
        for source, read_as in _rows(self.sources, self.columns, self.demonstrations):
            if not isinstance(read_as, Bad):
                yield from ((source, row) for row in read_as.rows)

    @property
    def noun(self) -> str:
        """What its rows are."""
        return (DEMONSTRATIONS if self.demonstrations else PAIRS).noun

    def to_json(self) -> dict[str, object]:
        counts = {"file": self.name, "rows": self.rows, "pairs": self.pairs, "prompts": self.prompts}
        return {**counts, "columns": dict(self.read_as)}


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
    fix: str = ""  # where another helps than with all rows of the code


class BadRows:
    """The bad rows of a pass by their kind, so that one pass names them all."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        self._details: dict[tuple[str, str, str], dict[str, int]] = defaultdict(dict)  # of the first ones, with their places
        self._fixes: dict[tuple[str, str, str], str] = {}

    def add(self, row: Bad) -> None:
        kind = (row.file, row.code, row.reason)
        self._lines[kind].append(row.line)
        self._fixes[kind] = row.fix
        if row.detail and len(self._details[kind]) < SHOWN:
            self._details[kind].setdefault(row.detail, row.line)

    def problems(self, key: str, skip: bool) -> Iterator[Problem]:
        """A problem for each kind; a warning where such rows are left out."""
        for kind, lines in self._lines.items():
            file, code, reason = kind
            left_out = skip or code == TIE
            severity: Severity = "warning" if left_out else "error"
            fix = "left out of the training" if left_out else 'correct or delete what is named, or set "on_bad_rows": "skip"'
            examples = [f"{files.unit(file)} {line}, {detail}" for detail, line in self._details[kind].items()]
            reason += f" ({'; '.join(examples)})" if examples else ""
            yield about_rows(severity, code, reason, self._fixes[kind] or FIXES.get(code, fix), key, file, lines)


def sources_of(value: Named) -> tuple[Source, ...]:
    """The files that a config's value names: a path or a list of paths and {"path", "weight"}; a folder is its files."""
    return tuple(Source(file, weight) for path, weight in _entries(value) for file in _files(path))


def _entries(value: Named) -> list[tuple[str, float]]:
    """(path, weight) of each entry, its ~ expanded."""
    entries = [value] if isinstance(value, str) else value
    given = [(entry, 1.0) if isinstance(entry, str) else (entry["path"], entry.get("weight", 1.0)) for entry in entries]
    return [(str(Path(path).expanduser()) if path.startswith("~/") else path, weight) for path, weight in given]


def hub_ids(values: Mapping[str, Any]) -> list[str]:
    """The datasets of a valid config that are on the hub."""
    given = [values[key] for key in names_where(lambda option: option.place == "data") if values.get(key)]
    return [path for value in given for path, _ in _entries(value) if hub_datasets.is_hub_id(path)]


def holds_pairs(path: str) -> bool:
    """Whether the first usable row of a dataset is a preference pair."""
    return next((True for row in stream(sources_of(path)) if isinstance(row, Pair)), False)


def unreadable(value: Named, key: str) -> list[Problem]:
    """Why what `key` of a config names cannot be read at all; such a problem has its place in the config."""
    faults = (fault(Path(source.path), key) for source in sources_of(value))
    return [problem for problem in faults if problem is not None]


def read(
    value: Named,
    skip: bool = False,
    key: str = "dataset",
    columns: Columns | None = None,
    observers: Sequence[Observer] = (),
    demonstrations: bool = False,
    keep: bool = False,
) -> Dataset:
    """One pass over what `key` of a config names. Problems are returned, never raised; bad rows are warnings with `skip`.

    A problem of a file as a whole has no place: it belongs to the config that names it. With `demonstrations` the rows are
    those of sft. With `keep`, and from small files, they stay in memory, so that nothing is read again.
    """
    sources = sources_of(value)
    name = sources[0].path if len(sources) == 1 else f"{len(sources)} files"
    data = Dataset(name, sources, columns, key=key, demonstrations=demonstrations)
    faults = {source.path: fault(Path(source.path), key) for source in sources}
    whole = [problem for source in sources if (problem := faults[source.path]) is not None]
    readable = [source for source in sources if faults[source.path] is None]
    states = {source.path: _state(source.path) for source in readable}
    is_small = sum(size for size, _ in states.values()) <= SMALL_BYTES
    kept: list[tuple[Source, Row]] | None = [] if keep or is_small else None
    bad, account = BadRows(), Account(columns or {}, demonstrations)
    prompts: set[int] = set()
    rows = pairs = 0
    for source, read_as in _rows(readable, columns, demonstrations):
        rows += 1
        if isinstance(read_as, Bad):
            bad.add(read_as)
            continue
        account.see(read_as)
        pairs += len(read_as.rows)
        for row in read_as.rows:
            if kept is not None:
                kept.append((source, row))
            prompt_key = row.prompt_key
            prompts.add(hash(prompt_key))
            for observer in observers:
                observer.see(row, prompt_key)
    problems = [*whole, *bad.problems(key, skip)]
    if not pairs and readable and not any(problem.severity == "error" for problem in problems):
        problems.append(Problem("error", "dataset-empty", f"{name} holds no usable row", f"add {data.noun}", key, name))
    problems += account.problems(key) if pairs else []
    problems += _choices(value, key)
    for says, count in account.shapes.items():
        fix = 'say what the columns are called with "columns" if that is not meant'
        problems.append(Problem("hint", "rows-read-as", f"{count} rows are read as {says}", fix, key, name))
    said = account.to_json()
    data = replace(data, rows=rows, pairs=pairs, prompts=len(prompts), kept=kept, states=states)
    return replace(data, problems=tuple(problems), read_as=said)


def _state(path: str) -> tuple[int, int]:
    """What a change of a file changes: its size, or its time."""
    stat = Path(path).stat()
    return stat.st_size, stat.st_mtime_ns


def stream(sources: Sequence[Source], columns: Columns | None = None, demonstrations: bool = False) -> Iterator[Row | Bad]:
    """The pairs (or demonstrations) of the sources one after the other, and the rows that are none."""
    for _, row in _rows(sources, columns, demonstrations):
        if isinstance(row, Bad):
            yield row
        else:
            yield from row.rows


def _rows(sources: Sequence[Source], columns: Columns | None, demonstrations: bool) -> Iterator[tuple[Source, Read | Bad]]:
    for source in sources:
        known: Columns | None = columns if columns and "labels" in columns else None

        def read_one(row: object, line: int, path: str = source.path) -> Read:
            nonlocal known
            if known is None:
                known = _with_start(row, path, columns or {})
            return read_row(row, line, path, known, demonstrations)

        for line, read in files.read_rows(source.path, read_one):
            if isinstance(read, BadRow):
                yield source, Bad(source.path, line, read.code, read.reason, read.detail, read.fix)
            else:
                yield source, read


def _with_start(first: object, path: str, columns: Columns) -> Columns:
    """`columns` with the number that means the first response, where the first row of a file has a label that counts.

    Only all labels of the file together tell, so it is read once more then, and only then.
    """
    if counted(first, columns) is None:
        return columns
    rows = files.read_rows(path, lambda row, _: counted(row, columns))
    layouts = (row for _, row in rows if row is not None and not isinstance(row, BadRow))  # reported when the rows are read
    start = start_of(layouts)
    return columns if start is None else {**columns, "start": start}


def _files(path: str) -> list[str]:
    """The files of a folder in the order of their names, or of a dataset of the hub; a file itself."""
    if hub_datasets.is_hub_id(path):
        return hub_datasets.cached(path)[1] or [path]
    content = folders.choice(path)
    return [str(file) for file in content.files] if content is not None and content.files else [path]


def _choices(value: Named, key: str) -> Iterator[Problem]:
    """Hints that say which files of a hub dataset or a folder are read."""
    for path, _ in _entries(value):
        if hub_datasets.is_hub_id(path):
            split, its_files = hub_datasets.cached(path)
            if its_files:
                message = f"{path} is read from its split {split}: {len(its_files)} {folders.kind(its_files[0])} files"
                yield Problem("hint", "hub-split", message, f'"{path.partition(":")[0]}:SPLIT" names another', key)
        elif (content := folders.choice(path)) is not None and content.files:
            read = folders.shown([file.name for file in content.files])
            rest = f"; not read: {folders.shown(content.others)}" if content.others else ""
            message = f"files of {path} that are read ({len(content.files)}): {read}{rest}"
            fix = 'name a file, a list of files, or "FOLDER:SPLIT" (the split as in the names of its files) for others'
            yield Problem("hint", "folder-files", message, fix, key)


def is_held_out_prompt(prompt_key: str, share: float, seed: int) -> bool:
    """On which side a prompt falls: by its own hash, so that appended rows move no other row.

    `share` of the prompts are held out in expectation.
    """
    return share > 0 and _position(prompt_key, seed) < share


def _position(prompt: str, seed: int) -> float:
    """A point in [0, 1) that depends on the prompt and the seed alone."""
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
