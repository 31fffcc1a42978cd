"""The story of `dpo lint`: data -> findings -> with --write the sound rows, the removed ones, and a card. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import dpo_cli
from dpo_cli.config import documents
from dpo_cli.config.config import Loaded, load
from dpo_cli.data.cleaning import divided, line_of, reasons_of
from dpo_cli.data.dataset import sources_of
from dpo_cli.errors import Exit, InvalidInput, Problem, UsageError, invalid
from dpo_cli.plan.examination import Data, Examined, examine
from dpo_cli.results.codec import JsonObject
from dpo_cli.runs.dataset_card import dataset_card
from dpo_cli.storage.atomic import write_whole
from dpo_cli.ui.console import Console

REMOVED, CARD = ".removed.jsonl", ".md"  # next to the file that is written


def lint(named: str, overrides: Sequence[str], out: Path | None, console: Console) -> tuple[JsonObject, Exit]:
    """Examine a dataset, or that of a config, and write its sound rows to `out`: what `lint --json` prints, and the exit code.

    `InvalidInput` where the data cannot be read, or no row would be left.
    """
    if out is not None:
        _require_new(out)
    loaded = load(named if _is_config(named) else {"dataset": named}, overrides)
    examined = _examined(loaded)
    assert examined.data is not None
    console.problems(examined.problems)
    if examined.data.train.pairs:
        _show(examined.data, console)
    written = _written(examined, loaded, out, console) if out is not None else None
    errors = [problem for problem in examined.problems if problem.severity == "error"]
    found = {"problems": [problem.to_json() for problem in examined.problems], "data": examined.data.to_json()}
    code = Exit.INVALID if errors and written is None else Exit.DONE
    return {"ok": code is Exit.DONE, **found, "written": written}, code


def _is_config(named: str) -> bool:
    """Whether a file is a config, and not data: a .json file of data is a list."""
    path = Path(named)
    if path.suffix.lower() in documents.SUFFIXES:
        return True
    return path.suffix.lower() == ".json" and path.is_file() and not path.read_bytes().lstrip().startswith(b"[")


def _require_new(out: Path) -> None:
    if out.suffix != ".jsonl":
        raise UsageError(f"{out} does not end in .jsonl", "name a .jsonl file: it gets one row per line")
    for path in _files(out):
        if path.exists():
            raise UsageError(f"{path} already exists", "name another file, or delete it")
    if not out.parent.is_dir():
        raise UsageError(f"the folder {out.parent} does not exist", "name a file in a folder that exists")


def _files(out: Path) -> tuple[Path, Path, Path]:
    return out, out.with_suffix(REMOVED), out.with_suffix(CARD)


def _examined(loaded: Loaded) -> Examined:
    """What the pass over the data found; of the config only what the data needs has to be right."""
    about_data = ("dataset", "eval_dataset", "columns", "strategy", "quality", "on_bad_rows", "eval_split", "split_seed")
    wrong = [problem for problem in loaded.problems if problem.severity == "error" and problem.key in (*about_data, None)]
    if wrong:
        raise InvalidInput(wrong)
    examined = examine(loaded, None, {problem.key for problem in loaded.problems if problem.severity == "error"}, 0)
    if examined.data is None or not examined.data.train.rows:
        raise InvalidInput(examined.problems or [Problem("error", "missing-key", "no dataset is named", "name one", "dataset")])
    return examined


def _show(data: Data, console: Console) -> None:
    train = data.train
    console.line(f"data: {train.pairs} {train.noun} of {train.prompts} prompts in {train.rows} rows")
    console.columns(train.read_as)
    console.lengths(data.said)


def _written(examined: Examined, loaded: Loaded, out: Path, console: Console) -> JsonObject:
    """Write the sound rows, the removed ones, and the card; returns the counts."""
    data = examined.data
    assert data is not None
    data.require_unchanged()
    rows = [*divided([source.path for source in data.train.sources], reasons_of(examined.problems))]
    kept, gone = ([row for stays, row in rows if stays is side] for side in (True, False))
    if not kept:
        raise invalid("nothing-to-train", f"all {len(rows)} rows are bad or doubtful", "correct the rows", "dataset")
    clean, removed, card = _files(out)
    write_whole(clean, lambda part: part.write_text("".join(map(line_of, kept)), encoding="utf-8"))
    write_whole(removed, lambda part: part.write_text("".join(map(line_of, gone)), encoding="utf-8"))
    again = _examined(_with_data(loaded, clean))
    names = [Path(source.path).name for source in sources_of(loaded.values["dataset"])]
    counts = Counter(reason["code"] for row in gone for reason in row["reasons"])
    assert again.data is not None
    text = dataset_card(clean.name, names, again.data, again.problems, counts, len(rows), date.today(), dpo_cli.__version__)
    write_whole(card, lambda part: part.write_text(text, encoding="utf-8"))
    for code, count in counts.most_common():
        console.line(f"removed for {code}: {count} rows")
    console.line(f"{clean}: {len(kept)} of {len(rows)} rows; {len(gone)} removed rows are in {removed.name}, with reasons")
    console.line(f"card: {card}")
    if len(data.train.sources) > 1:
        console.line("note: the files are one now, and each row is there once: weights of a config are not in it")
    about: dict[str, Any] = {"out": str(clean), "rows": len(kept), "removed": len(gone), "reasons": dict(counts)}
    return {**about, "removed_file": str(removed), "card": str(card)}


def _with_data(loaded: Loaded, path: Path) -> Loaded:
    """The same settings for another file."""
    own = {key: loaded.values[key] for key in ("strategy", "columns", "quality") if loaded.values.get(key) is not None}
    return load({**own, "dataset": str(path)})
