"""Files of rows to `Pair`s, as a stream. Every bad row is reported, and none stops the reading.

Memory does not grow with the file, except for a JSON list, and for the rows of small files.

A dataset is a file (.jsonl, .json, .csv, .tsv, .parquet; text also as gzip), a folder of such files, or a list of these with
weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from dpo_cli.config.schema import names_where
from dpo_cli.data import files, folders, hub_datasets
from dpo_cli.data.column_guess import guessed_columns, has_header, names_of
from dpo_cli.data.column_use import Account
from dpo_cli.data.columns import Columns
from dpo_cli.data.comparisons import start_of
from dpo_cli.data.files import about_rows
from dpo_cli.data.messages import BadRow
from dpo_cli.data.rating_pairs import UNPAIRED, paired, rates
from dpo_cli.data.ratings import UNRATED
from dpo_cli.data.rows import Pair, Read, Row, counted, read_row
from dpo_cli.data.unreadable_files import fault
from dpo_cli.errors import Problem, Severity, invalid
from dpo_cli.storage.progress import working
from dpo_cli.strategies.row_kinds import PAIRS, Rows

Named = str | Sequence[str | Mapping[str, Any]]  # a config's data: a path, or paths and {"path", "weight"}

NO_COLUMN = "row-missing-key"
# Rows that say nothing about which answer is better: they are skipped, and never stop a training.
SKIPPED = ("row-tie", UNRATED, UNPAIRED)
SMALL_BYTES = 16 << 20  # the rows of smaller data stay in memory, so that a second look does not read the files again
SHOWN = 3  # the number of bad rows of a group whose details are shown
# Fixes for faults that are not in a single row.
FIXES = {
    "dataset-not-list": "write the rows between [ and ], with commas, or one per line into a .jsonl file",
    "row-not-utf8": "save the file as UTF-8",
    "row-not-gzip": "download or compress the file again",
}


@dataclass(frozen=True)
class Source:
    """A file, and how often each of its pairs is used in an epoch of training; below 1, the share of pairs that is used."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Dataset:
    """The result of a pass over the sources. `pairs` counts rows of its kind."""

    name: str
    sources: tuple[Source, ...]
    columns: Columns | None
    rows: int = 0
    pairs: int = 0
    prompts: int = 0
    unusable: int = 0  # rows that are bad, or say nothing
    problems: tuple[Problem, ...] = ()
    key: str = "dataset"  # the key of the config that names it
    kind: Rows = PAIRS  # what its rows are read as
    read_as: Mapping[str, object] = field(default_factory=dict)  # the meanings of its columns
    kept: Sequence[tuple[Source, Row]] | None = None  # the usable rows, if the pass kept them
    states: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # size and time of the files at the start of the pass

    def load(self) -> list[Row]:
        """The usable rows in the order of their files, repeated or dropped by weight."""
        return [row for _, row in self.divided(lambda row: False)]

    def divided(self, is_held_out: Callable[[Row], bool]) -> Iterator[tuple[bool, Row]]:
        """Whether it is held out, and the row: all usable rows in the order of their files.

        A pair with weight 2 appears twice, and with weight 0.5 every second pair does. Each held-out pair appears once, so that
        weights do not change the figures of an evaluation.
        """
        seen: Counter[float] = Counter()  # by weight, so that a folder of small files is weighted as a whole
        for source, row in self._weighed():
            if is_held_out(row):
                yield True, row
            else:
                before = _due(seen[source.weight], source.weight)
                seen[source.weight] += 1
                yield from [(False, row)] * (_due(seen[source.weight], source.weight) - before)

    def require_unchanged(self) -> None:
        """`InvalidInput` if a file changed after its rows were read: the hash would be of other rows."""
        for path, state in self.states.items():
            if not Path(path).is_file() or state_of(path) != state:
                fix = "start again when no program writes to it"
                raise invalid("dataset-changed", f"{path} changed while it was read", fix, self.key)

    def usable(self, lines: Mapping[str, Container[int]] | None = None) -> Iterator[Row]:
        """The usable rows in the order of their files, each once; with `lines` only those on these lines of a file."""
        return (row for _, row in self._weighed(lines) if lines is None or row.line in lines.get(row.file, ()))

    def _weighed(self, lines: Mapping[str, Container[int]] | None = None) -> Iterator[tuple[Source, Row]]:
        if self.kept is not None:
            yield from self.kept
            return
        for source, read_as in _rows(self.sources, self.columns, self.kind, lines):
            if not isinstance(read_as, Bad):
                yield from ((source, row) for row in read_as.rows)

    @property
    def noun(self) -> str:
        """The word for its rows."""
        return self.kind.noun

    def to_json(self) -> dict[str, object]:
        counts = {"file": self.name, "rows": self.rows, "pairs": self.pairs, "prompts": self.prompts}
        return {**counts, "columns": dict(self.read_as)}


def _due(pairs: int, weight: float) -> int:
    """The number of these pairs in an epoch; 10 pairs with weight 0.1 are 1, although floats add up to less."""
    return math.floor(pairs * weight + 1e-9)


def epoch_pairs(pairs: Mapping[str, int], sources: Sequence[Source]) -> int:
    """The number of pairs in an epoch, by the pairs of each file; `pairs` counts a file that is named twice twice."""
    named, by_weight = Counter(source.path for source in sources), Counter[float]()
    for source in sources:
        by_weight[source.weight] += pairs.get(source.path, 0) // named[source.path]
    return sum(_due(count, weight) for weight, count in by_weight.items())


class Observer(Protocol):
    """Looks at every usable row of a pass."""

    def see(self, row: Any, prompt_key: str) -> None: ...


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used."""

    file: str
    line: int
    code: str
    reason: str
    detail: str  # the details of this row
    fix: str = ""  # its own fix, if the fix of its code does not apply


class BadRows:
    """The bad rows of a pass by their kind, so that one pass reports them all."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        self._details: dict[tuple[str, str, str], dict[str, int]] = defaultdict(
            dict
        )  # details of the first rows, with their places
        self._fixes: dict[tuple[str, str, str], str] = {}

    def add(self, row: Bad) -> None:
        kind = (row.file, row.code, row.reason)
        self._lines[kind].append(row.line)
        self._fixes[kind] = row.fix
        if row.detail and len(self._details[kind]) < SHOWN:
            self._details[kind].setdefault(row.detail, row.line)

    def problems(self, key: str, skip: bool) -> Iterator[Problem]:
        """A problem for each kind; a warning if such rows are skipped."""
        for kind, lines in self._lines.items():
            file, code, reason = kind
            is_skipped = skip or code in SKIPPED
            severity: Severity = "warning" if is_skipped else "error"
            fix = "these rows are skipped" if is_skipped else 'correct or delete these rows, or write "on_bad_rows": "skip"'
            examples = [f"{files.unit(file)} {line}, {detail}" for detail, line in self._details[kind].items()]
            reason += f" ({'; '.join(examples)})" if examples else ""
            yield about_rows(severity, code, reason, self._fixes[kind] or FIXES.get(code, fix), key, file, lines)


def sources_of(value: Named) -> tuple[Source, ...]:
    """The files of a config's value: a path or a list of paths and {"path", "weight"}; a folder stands for its files."""
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
    """Problems of data that cannot be read at all; they have their place in the config, at `key`."""
    faults = (fault(Path(source.path), key) for source in sources_of(value))
    return [problem for problem in faults if problem is not None]


def read(
    value: Named,
    skip: bool = False,
    key: str = "dataset",
    columns: Columns | None = None,
    observers: Sequence[Observer] = (),
    kind: Rows = PAIRS,
) -> Dataset:
    """One pass over the data of a config's `key`. Problems are returned, never raised; with `skip` bad rows are warnings.

    A problem of a whole file has no place in it: it belongs to the config that names it. The rows are read as `kind`. Those of
    small files stay in memory, so that nothing is read again.
    """
    sources = sources_of(value)
    name = sources[0].path if len(sources) == 1 else f"{len(sources)} files"
    data = Dataset(name, sources, columns, key=key, kind=kind)
    faults = {source.path: fault(Path(source.path), key) for source in sources}
    whole = [problem for source in sources if (problem := faults[source.path]) is not None]
    readable = [source for source in sources if faults[source.path] is None]
    states = {source.path: state_of(source.path) for source in readable}
    is_small = sum(size for size, _ in states.values()) <= SMALL_BYTES
    kept: list[tuple[Source, Row]] | None = [] if is_small else None
    bad, account = BadRows(), Account(columns or {}, kind)
    prompts: set[int] = set()
    rows = pairs = unusable = 0
    with working(f"reading {name}", None, "rows") as work:
        for source, read_as in _rows(readable, columns, kind):
            work.add()
            rows += 1 if isinstance(read_as, Bad) else read_as.of_rows
            if isinstance(read_as, Bad):
                bad.add(read_as)
                unusable += 1
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
    if not pairs:
        problems = [
            _with_columns(problem, columns or {}, kind.keys) if problem.code == NO_COLUMN else problem for problem in problems
        ]
    if not pairs and readable and not any(problem.severity == "error" for problem in problems):
        problems.append(Problem("error", "dataset-empty", _emptiness(readable, rows), f"add {data.noun}", key, name))
    problems += account.problems(key) if pairs else []
    problems += choices(value, key)
    for says, count in account.shapes.items():
        fix = 'if this is wrong, set the names of the columns with "columns"'
        problems.append(Problem("hint", "rows-read-as", f"{count} rows are read as {says}", fix, key, name))
    data = replace(data, rows=rows, pairs=pairs, prompts=len(prompts), unusable=unusable, kept=kept, states=states)
    return replace(data, problems=tuple(problems), read_as=account.to_json())


def _emptiness(sources: Sequence[Source], rows: int) -> str:
    """Why these files have no usable row, though no row is at fault."""
    if rows:
        return "no row is usable"
    holds_text = any(state_of(source.path)[0] for source in sources)
    is_table = all(folders.kind(source.path) in (".csv", ".tsv") for source in sources)
    is_one = len(sources) == 1
    if is_table and holds_text:
        return "the file has only a header" if is_one else "the files have only headers"
    return "the file is empty" if is_one else "the files are empty"


def _with_columns(problem: Problem, columns: Columns, keys: Sequence[str]) -> Problem:
    """A problem of rows without the named columns, of which none is usable, with what to write into the config or the file."""
    if problem.file and not has_header(problem.file):
        names = ",".join(str(columns.get(key, key)) for key in keys)
        return replace(problem, fix=f"the first line looks like data: add a header line before it, for example {names}")
    if columns and problem.file:
        return replace(problem, fix=f'correct "columns": the file has {", ".join(names_of(problem.file))}')
    guess = guessed_columns(problem.file) if problem.file else None
    line = f'"columns": {json.dumps(guess or dict.fromkeys(keys, "..."), ensure_ascii=False)}'
    return replace(problem, fix=f"write {line}{'' if guess else ', with the names of your columns,'} into the config")


def state_of(path: str) -> tuple[int, int]:
    """Size and time of a file, which differ after a change."""
    stat = Path(path).stat()
    return stat.st_size, stat.st_mtime_ns


def stream(sources: Sequence[Source], columns: Columns | None = None, kind: Rows = PAIRS) -> Iterator[Row | Bad]:
    """The rows of the sources in order, and the bad ones."""
    for _, row in _rows(sources, columns, kind):
        if isinstance(row, Bad):
            yield row
        else:
            yield from row.rows


def _rows(
    sources: Sequence[Source],
    columns: Columns | None,
    kind: Rows,
    lines: Mapping[str, Container[int]] | None = None,
) -> Iterator[tuple[Source, Read | Bad]]:
    """The rows of the sources; with `lines` only those on these lines of a file."""
    for source in sources:
        only = None if lines is None else lines.get(source.path, ())
        known: Columns | None = columns if columns and "labels" in columns else None
        if known is None and only is not None:  # of the first row, as when all are read
            rows = files.read_rows(source.path, lambda row, _: row)
            first = next((row for _, row in rows if not isinstance(row, BadRow)), None)
            known = None if first is None else _with_start(first, source.path, columns or {})

        def read_one(row: object, line: int, path: str = source.path) -> Read:
            nonlocal known
            if known is None:
                known = _with_start(row, path, columns or {})
            return read_row(row, line, path, known, kind)

        read_rows = files.read_rows(source.path, read_one, only=only)
        if kind is PAIRS and rates(source.path, columns or {}):
            read_rows = paired(source.path, columns or {}, only)
        for line, read in read_rows:
            if isinstance(read, BadRow):
                yield source, Bad(source.path, line, read.code, read.reason, read.detail, read.fix)
            else:
                yield source, read


def _with_start(first: object, path: str, columns: Columns) -> Columns:
    """`columns` with the number that means the first response, if the first row of a file has a numbered label.

    Only all labels of the file together show it, so only then the file is read once more.
    """
    if counted(first, columns) is None:
        return columns
    rows = files.read_rows(path, lambda row, _: counted(row, columns))
    layouts = (row for _, row in rows if row is not None and not isinstance(row, BadRow))  # reported when the rows are read
    start = start_of(layouts)
    return columns if start is None else {**columns, "start": start}


def _files(path: str) -> list[str]:
    """The files of a folder in the order of their names, those of a hub dataset, or the file itself."""
    if hub_datasets.is_hub_id(path):
        return hub_datasets.cached(path)[1] or [path]
    content = folders.choice(path)
    return [str(file) for file in content.files] if content is not None and content.files else [path]


def choices(value: Named, key: str) -> Iterator[Problem]:
    """Hints that say which files of a hub dataset or a folder are read."""
    for path, _ in _entries(value):
        if hub_datasets.is_hub_id(path):
            split, its_files = hub_datasets.cached(path)
            if its_files:
                message = f"split {split} of {path} is read: {len(its_files)} {folders.kind(its_files[0])} files"
                yield Problem("hint", "hub-split", message, f'"{path.partition(":")[0]}:SPLIT" names another split', key)
        elif (content := folders.choice(path)) is not None and content.files:
            read = folders.shown([file.name for file in content.files])
            rest = f"; not read: {folders.shown(content.others)}" if content.others else ""
            message = f"{len(content.files)} files of {path} are read: {read}{rest}"
            fix = 'to read others, name a file, a list of files, or "FOLDER:SPLIT" (a split is a part of the file names)'
            yield Problem("hint", "folder-files", message, fix, key)


def is_held_out_prompt(prompt_key: str, share: float, seed: int) -> bool:
    """Whether a prompt is held out: by its own hash, so that appended rows do not move other rows.

    The expected share of held-out prompts is `share`.
    """
    return share > 0 and _position(prompt_key, seed) < share


def _position(prompt: str, seed: int) -> float:
    """A point in [0, 1) that depends only on the prompt and the seed."""
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
