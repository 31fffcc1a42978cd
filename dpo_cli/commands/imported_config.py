"""The story of `dpo import`: a file of another tool -> its settings -> a config of this tool, checked. No torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dpo_cli.config.config import Loaded, load
from dpo_cli.config.documents import Comment, Setting, written
from dpo_cli.config.foreign_config import CONFIGS, Foreign, read
from dpo_cli.config.translation import Translation, translated
from dpo_cli.errors import Exit, Problem, UsageError
from dpo_cli.results.codec import JsonObject
from dpo_cli.storage.atomic import write_whole
from dpo_cli.ui.console import Console

SHOWN = 60  # characters of a value
TITLES = {"same": "taken as they are", "renamed": "other names here", "translated": "other keys or values here"}


def import_config(file: Path, out: Path | None, console: Console) -> tuple[JsonObject, Exit]:
    """Translate a config, show what became of every key, and write it: what `import --json` prints, and the exit code.

    `InvalidInput` where the file cannot be read.
    """
    if out is not None:
        _require_new(out)
    foreign = read(file)
    found = translated(foreign)
    problems = [*found.problems, *_problems(found, load(found.config), str(file))]
    _show(foreign, found, console)
    if out is not None:
        text = written(_lines(foreign, found, problems), str(out))
        write_whole(out, lambda part: part.write_text(text, encoding="utf-8"))
        problems = [*found.problems, *_problems(found, load(str(out)), None)]
    console.problems(problems)
    failed = any(problem.severity == "error" for problem in problems)
    console.line(_next(file, out, failed))
    about: JsonObject = {"ok": not failed, "tool": foreign.tool.name if foreign.tool else None, "config": found.config}
    about["settings"] = [
        {
            "key": part.key or None,
            "value": part.value,
            "group": part.group,
            "becomes": dict(part.becomes),
            "why": part.why or None,
        }
        for part in found.settings
    ]
    about |= {"differs": found.differs, "problems": [problem.to_json() for problem in problems]}
    return {**about, "written": str(out) if out else None}, Exit.INVALID if failed else Exit.DONE


def _problems(found: Translation, checked: Loaded, file: str | None) -> list[Problem]:
    """The errors and warnings of the new config, without a place if it is not written.

    A dataset that could not be found is not reported as missing too.
    """
    said = {"dataset"} if any(problem.code == "import-dataset" for problem in found.problems) else set()
    about = [problem for problem in checked.problems if problem.severity != "hint" and problem.key not in said]
    return [replace(problem, file=file, line=None, column=None) if file else problem for problem in about]


def _next(file: Path, out: Path | None, failed: bool) -> str:
    """What to do now."""
    if out is None:
        return f"next: dpo import {shlex.quote(str(file))} --write my-config.json"
    return f"written: {out}; " + (f"correct it, then: dpo validate {out}" if failed else f"next: dpo validate {out}")


def _require_new(out: Path) -> None:
    if out.suffix.lower() not in CONFIGS:
        raise UsageError(f"{out} is not the name of a config", f"let it end in one of {', '.join(CONFIGS)}")
    if out.exists():
        raise UsageError(f"{out} already exists", "name another file, or delete it")
    if not out.parent.is_dir():
        raise UsageError(f"the folder {out.parent} does not exist", "name a file in a folder that exists")


def _show(foreign: Foreign, found: Translation, console: Console) -> None:
    """What became of each key, on lines that a narrow terminal can break."""
    tool = f"of {foreign.tool.name}" if foreign.tool else "of a tool that dpo does not know"
    console.line(f"{foreign.file.name}: a config {tool}, {len([part for part in found.settings if part.key])} keys")
    if same := found.of("same"):
        console.line(f"\n{TITLES['same']}: {', '.join(part.key for part in same)}")
    for group in ("renamed", "translated"):
        if parts := [part for part in found.settings if part.group == group]:
            console.line(f"\n{TITLES[group]}:")
            for part in parts:
                console.line(f"  {_written({part.key: part.value})} -> {_written(part.becomes) or part.why or 'the default'}")
    if stopping := found.of("stops"):
        console.line(f"\nstops the import: {', '.join(part.key for part in stopping)} (see the errors)")
    if left := found.of("left out"):
        console.line("\nleft out:")
        for why in dict.fromkeys(part.why for part in left):
            keys = [f"{part.key}{'' if part.value is None else f' = {_value(part.value)}'}" for part in left if part.why == why]
            console.line(f"  {', '.join(keys)}: {why}")
    if added := found.of("default"):
        console.line("\ndefaults of the other tool, which are others here:")
        for part in added:
            console.line(f"  {_written(part.becomes)} ({part.why})")
    if found.differs:
        console.line("\nother meaning here:")
        for key, text in found.differs.items():
            console.line(f"  {key}: {text}")
    console.line("")


def _lines(foreign: Foreign, found: Translation, problems: Sequence[Problem]) -> Iterator[Comment | Setting]:
    """The config with comments: where it is from, its differences, and what is missing."""
    yield Comment(f"from {foreign.file.name}{f', a config of {foreign.tool.name}' if foreign.tool else ''}")
    for problem in problems:
        if problem.severity == "error":
            yield Comment(f"to do: {problem.message}".replace("\n", " "))
    added = {key: part.why for part in found.of("default") for key in part.becomes}
    for key, value in found.config.items():
        if key in found.differs:
            yield Comment(found.differs[key])
        if key in added:
            yield Comment(f"not in the file: {added[key]}")
        yield Setting(key, value)
    if "dataset" not in found.config:
        yield Comment("your rows: make this a line of the config, and write the name of the file")
        yield Setting("dataset", "my-pairs.jsonl", is_active=False)


def _written(values: object) -> str:
    assert isinstance(values, dict)
    return ", ".join(f"{key}: {_value(value)}" for key, value in values.items())


def _value(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
