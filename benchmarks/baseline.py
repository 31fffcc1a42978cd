"""The table of a benchmark: printed, kept as baselines/NAME.json, and compared with the one that is kept there.

    python benchmarks/NAME.py              prints the table
    python benchmarks/NAME.py --compare    also compares it with the committed baseline: exit 1 beyond the tolerance
    python benchmarks/NAME.py --keep       also writes the baseline
    make baselines                         keeps all of them, one after another; ONLY="torture memory" some

A small run (--small) only shows that the benchmark works: it is kept and compared in runs/baselines.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

from machine import machine, machine_line, versions

ROOT = Path(__file__).parent.parent
BASELINES = ROOT / "benchmarks" / "baselines"
SMALL = ROOT / "runs" / "baselines"
Tolerance = tuple[float, float]
EXACT: Tolerance = (0.0, 0.0)


@dataclass(frozen=True)
class Column:
    """Figures of one unit; a column without a unit names the row.

    A cell is a number, a list of them (`shown` has a place for each, or one for all), counts by name, or None. A later
    figure may differ by relative * |figure| + absolute, which are the two numbers of the tolerance; without one it is not
    compared, as seconds are.
    """

    name: str
    unit: str = ""
    shown: str = "{}"
    tolerance: Tolerance | None = None

    def show(self, cell: Any) -> str:
        if cell is None:
            return ""
        if isinstance(cell, dict):
            return ", ".join(f"{count:,} {name}" for name, count in cell.items())
        cells = cell if isinstance(cell, list) else [cell]
        return self.shown.format(*cells) if self.shown.count("{") > 1 else ", ".join(map(self.shown.format, cells))

    def differs(self, kept: Any, found: Any) -> bool:
        """Whether a cell is outside the tolerance of the one that was kept."""
        if self.tolerance is None or kept is None:
            return False
        relative, absolute = self.tolerance
        pairs = list(_side_by_side(kept, found))
        return any(new is None or not abs(new - old) <= relative * abs(old) + absolute for old, new in pairs)


def _side_by_side(kept: Any, found: Any) -> Iterator[tuple[float, float | None]]:
    """Each figure of a cell with the one in its place, None where there is none."""
    if isinstance(kept, dict):
        yield from ((count, (found or {}).get(name)) for name, count in kept.items())
    elif isinstance(kept, list):
        yield from zip(kept, found or [None] * len(kept), strict=True)
    else:
        yield kept, found


INTERVAL = "{:.3f} [{:.3f}, {:.3f}]"


def interval(name: str, tolerance: Tolerance, unit: str = "share") -> Column:
    return Column(name, unit, INTERVAL, tolerance)


def cell_of(figure: dict[str, float] | None) -> list[float] | None:
    """The cell of a figure with its interval."""
    return [figure["value"], figure["low"], figure["high"]] if figure else None


@dataclass
class Note:
    """A sentence below the table. Its figures have a unit and a tolerance too."""

    text: str
    figures: list[tuple[Column, Any]] = field(default_factory=list)

    def show(self) -> str:
        return self.text.format(**{column.name: column.show(value) for column, value in self.figures})


@dataclass
class Table:
    """Rows in the order of the columns, and notes. Prints itself line by line, unless it is silent."""

    columns: Sequence[Column]
    rows: list[list[Any]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    silent: bool = True

    def add(self, *cells: Any) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append([_short(cell) for cell in cells])
        if not self.silent:
            print("\n".join(self.lines()[0 if len(self.rows) == 1 else -1 :]), flush=True)

    def note(self, text: str, *figures: tuple[Column, Any]) -> None:
        self.notes.append(Note(text, [(column, _short(value)) for column, value in figures]))

    def lines(self) -> list[str]:
        """The rows in Markdown."""
        head = [f"| {' | '.join(column.name for column in self.columns)} |", "|---" * len(self.columns) + "|"]
        shown = ([column.show(cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows)
        return head + [f"| {' | '.join(cells)} |" for cells in shown]

    def named(self, row: list[Any]) -> tuple[str, ...]:
        """What names a row."""
        return tuple(column.show(cell) for column, cell in zip(self.columns, row, strict=True) if not column.unit)


def _short(value: Any) -> Any:
    """Six digits of each number."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_short(one) for one in value]
    return {name: _short(one) for name, one in value.items()} if isinstance(value, dict) else value


@dataclass
class Baseline:
    """A table with what it was measured on. What was not written down at the time is None."""

    name: str
    command: str
    date: str
    seconds: float | None
    machine: dict[str, Any]
    versions: dict[str, str | None]
    table: Table

    def below(self) -> str:
        """The lines below the table."""
        took = "" if self.seconds is None else f", {_duration(self.seconds)}"
        on = f"{machine_line(self.machine, self.versions)}; {self.date}{took}."
        return "\n".join([*(note.show() for note in self.table.notes), on])

    def markdown(self) -> str:
        return "\n".join([*self.table.lines(), "", self.below()])

    def text(self) -> str:
        """JSON with a line for each key, column, row and note."""
        about = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "table"}
        lists = {
            "columns": [asdict(column) for column in self.table.columns],
            "rows": self.table.rows,
            "notes": [
                {"text": note.text, "figures": [{**asdict(column), "value": value} for column, value in note.figures]}
                for note in self.table.notes
            ],
        }
        parts = [f"{_json(key)}: {_json(value)}" for key, value in about.items()]
        parts += [f"{_json(key)}: [\n  " + ",\n  ".join(map(_json, lines)) + "\n ]" for key, lines in lists.items()]
        return "{\n " + ",\n ".join(parts) + "\n}\n"

    @classmethod
    def read(cls, file: Path) -> Baseline:
        kept = json.loads(file.read_text(encoding="utf-8"))
        table = Table([_column(column) for column in kept.pop("columns")], kept.pop("rows"))
        for note in kept.pop("notes"):
            table.note(note["text"], *((_column(figure), figure["value"]) for figure in note["figures"]))
        return cls(**kept, table=table)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _column(kept: dict[str, Any]) -> Column:
    tolerance = kept["tolerance"]
    return Column(kept["name"], kept["unit"], kept["shown"], None if tolerance is None else (tolerance[0], tolerance[1]))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s in all" if seconds < 100 else f"{seconds / 60:.0f} minutes in all"


def compare(kept: Table, found: Table) -> list[str]:
    """What of a table is not as it was kept: columns, rows, and figures outside the tolerance of their columns."""
    if [column.name for column in kept.columns] != [column.name for column in found.columns]:
        return ["the columns are other ones: keep it again"]
    before, after = ({table.named(row): row for row in table.rows} for table in (kept, found))
    apart = [
        f"{', '.join(name)}: this row is {'missing' if name in before else 'new'}" for name in before.keys() ^ after.keys()
    ]
    for name in [name for name in before if name in after]:
        for column, old, new in zip(kept.columns, before[name], after[name], strict=True):
            if column.differs(old, new):
                apart.append(f"{', '.join(name)}: {column.name} is {column.show(new)}, kept {column.show(old)}")
    values = {column.name: value for note in found.notes for column, value in note.figures}
    for column, old in [figure for note in kept.notes for figure in note.figures]:
        if column.differs(old, new := values.get(column.name)):
            apart.append(f"{column.name} is {column.show(new)}, kept {column.show(old)}")
    return apart


Measure = Callable[[Table, argparse.Namespace], int | None]


def main(name: str, columns: Sequence[Column], measure: Measure, parser: argparse.ArgumentParser | None = None) -> int:
    """Run a benchmark, whose `measure` fills the table and returns 1 where it found a fault; a table with one is not kept."""
    parser = parser or argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--keep", action="store_true", help="write the table as the baseline")
    parser.add_argument("--compare", action="store_true", help="exit 1 where the table is beyond the baseline's tolerance")
    parser.add_argument("--small", action="store_true", help="a small run, kept and compared in runs/baselines")
    parser.add_argument("--json", action="store_true", help="print the baseline instead of the table")
    options = parser.parse_args()
    table = Table(columns, silent=options.json)
    started = time.monotonic()
    failed = measure(table, options) or 0
    words = [word for word in sys.argv[1:] if word not in ("--keep", "--compare", "--json")]
    script = Path(sys.argv[0]).resolve()
    script = script.parent if script.name == "__main__.py" else script
    command = shlex.join(["python", script.relative_to(ROOT).as_posix(), *words])
    today = date.today().isoformat()
    made = Baseline(name, command, today, round(time.monotonic() - started, 1), machine(), versions(), table)
    print(made.text() if options.json else f"\n{made.below()}", flush=True)
    return failed or keep_or_compare(made, options)


def keep_or_compare(made: Baseline, options: argparse.Namespace) -> int:
    file = (SMALL if options.small else BASELINES) / f"{made.name}.json"
    apart = compare(Baseline.read(file).table, made.table) if options.compare else []
    print("".join(f"beyond the tolerance: {line}\n" for line in apart), end="", file=sys.stderr)
    if options.keep:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(made.text(), encoding="utf-8")
        print(f"wrote {file.relative_to(ROOT)}", file=sys.stderr)
    return int(bool(apart))


def block(name: str) -> str:
    """What a page shows of a baseline."""
    file = BASELINES / f"{name}.json"
    return Baseline.read(file).markdown() if file.exists() else f"Not measured yet: `make baselines ONLY={name}`."
