"""`make house`: how the house stands, counted from its code; with --opens also what the commands open, which takes a minute.

The command fails where a count of `ZERO` is not zero.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_imports import MODULES, PACKAGE, imported, room  # noqa: E402

TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
LONG, SMALL = 60, 60  # lines of a function, and of a module
ZERO = ("imports against the order", "conditionals on strategy outside strategies/")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def functions() -> Iterator[tuple[str, int]]:
    """Each function with its lines."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{name_of(path)}.{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def strategy_conditionals() -> list[str]:
    """Comparisons with the name of a strategy, outside the strategies' own folder and the options' rules."""
    found = []
    for path, tree in TREES.items():
        if path.parent.name == "strategies":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                if re.search(r"strategy|\bis_sft\b", text) and re.search(r"['\"](dpo|sft|rlhf)['\"]", text):
                    found.append(f"{name_of(path)}:{node.lineno}  {text}")
    return found


def figure_lists() -> list[str]:
    """Lists, tuples, sets and keys of dicts with two names of figures or more, outside the strategies' folder."""
    from dpo_cli.strategies.figures import FIGURES, LINE_FIGURES

    names, found = {*FIGURES, *LINE_FIGURES} - {"loss"}, []
    for path, tree in TREES.items():
        if path.parent.name == "strategies":
            continue
        for node in ast.walk(tree):
            parts = (
                node.elts
                if isinstance(node, ast.List | ast.Tuple | ast.Set)
                else node.keys
                if isinstance(node, ast.Dict)
                else []
            )
            words = {part.value for part in parts if isinstance(part, ast.Constant)}
            if len(words & names) > 1:
                found.append(f"{name_of(path)}:{node.lineno}  {ast.unparse(node)[:90]}")
    return found


def counts() -> dict[str, int]:
    imports = {name_of(path): imported(tree) for path, tree in TREES.items()}
    importers = Counter(name for names in imports.values() for name in names)
    small = [
        path
        for path in MODULES
        if importers[name_of(path)] == 1 and len(path.read_text(encoding="utf-8").splitlines()) <= SMALL
    ]
    lines = [size for _, size in functions()]
    return {
        "modules": len(MODULES),
        "folders": len({path.parent for path in MODULES}),
        "modules at the top": sum(path.parent == PACKAGE for path in MODULES),
        "files with one importer": sum(count == 1 for count in importers.values()),
        f"of these, files of up to {SMALL} lines": len(small),
        "imports against the order": sum(room(other) < room(own) for own, names in imports.items() for other in names),
        "conditionals on strategy outside strategies/": len(strategy_conditionals()),
        "hand-kept lists of figures": len(figure_lists()),
        "functions": len(lines),
        f"functions over {LONG} lines": sum(size > LONG for size in lines),
        "Any": sum(len(re.findall(r"\bAny\b", path.read_text(encoding="utf-8"))) for path in MODULES),
        "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES),
    }


WATCHED = """
import collections, json, os, sys
opened = collections.Counter()
place = os.getcwd()
def watch(event, args):
    if event == "open" and isinstance(args[0], str | bytes):
        path = os.path.realpath(os.fsdecode(args[0]))
        if path.startswith((place + "/model/", place + "/pairs")):
            frame = sys._getframe(1)
            ours = False
            while frame is not None and not ours:  # what transformers opens for itself does not count
                name = frame.f_globals.get("__name__", "")
                ours = name.startswith("dpo_cli.")
                if name.startswith(("transformers.", "tokenizers", "safetensors", "huggingface_hub", "peft", "datasets")):
                    return
                frame = frame.f_back
            opened[os.path.relpath(path, place)] += ours
sys.addaudithook(watch)
from dpo_cli.app import app
try:
    app(sys.argv[1:], standalone_mode=False)
except SystemExit:
    pass
print("OPENED", json.dumps(opened), file=sys.__stderr__)
"""


def opens() -> dict[str, int]:
    """How often a command opens the dataset, and the file of the model that it opens most: of a tiny model."""
    from test_contract import lay_out

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        lay_out(place := Path(folder).resolve())
        for words in (["validate", "dpo.json"], ["train", "dpo.json"], ["eval", "runs/dpo"]):
            env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-c", WATCHED, *words]
            done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=True)
            opened = json.loads(done.stderr.rpartition("OPENED")[2])
            found[f"{words[0]}: opens of the dataset"] = opened.pop("pairs.jsonl")
            found[f"{words[0]}: opens of one file of the model, at most"] = max(opened.values())
    return found


def main() -> None:
    found = counts() | (opens() if "--opens" in sys.argv else {})
    if "--json" in sys.argv:
        print(json.dumps(found, indent=2))
    else:
        for name, count in found.items():
            print(f"{count:6}  {name}")
    if "--long" in sys.argv:
        print(*(f"{size:6}  {name}" for name, size in functions() if size > LONG), sep="\n")
        print(*strategy_conditionals(), *figure_lists(), sep="\n")
    sys.exit(any(found[name] for name in ZERO))


if __name__ == "__main__":
    main()
