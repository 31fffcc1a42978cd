"""Each room imports only from rooms below it, and validate stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "dpo_cli"
# The rooms, each above those that it may import from.
ROOMS = (
    *("commands", "report", "training", "preferences", "evaluation", "runs", "scoring", "providers", "publish"),
    *("plan", "hardware", "models", "data", "ui", "config", "strategies", "results", "storage"),
)
LIGHT = ROOMS[ROOMS.index("plan") :]  # no torch from here down
ORDER = ("__main__", "app", "api", *ROOMS, "errors")
NAMED = re.compile(r"(?<![\w/.])((?:[a-z_]+/)+[a-z_]+\.py)\b")
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "numpy", "pandas", "pyarrow")
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def room(module: str) -> int:
    """How deep the room of a module lies."""
    return ORDER.index(module.partition(".")[0])


def imported(tree: ast.AST) -> set[str]:
    """The modules of dpo_cli that a file imports, without the package's name; names of `from` imports are resolved."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that a room can be read off them"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    ours = {name.removeprefix("dpo_cli.") for name in names if name.startswith("dpo_cli.")}
    is_module = {name: (PACKAGE / f"{name.replace('.', '/')}.py").exists() for name in ours}
    return {name if is_module[name] else name.rpartition(".")[0] for name in ours} - {""}


def test_every_way_to_import_is_seen() -> None:
    tree = ast.parse("import dpo_cli.plan.plan\nfrom dpo_cli import app\nfrom dpo_cli.data.dataset import read\nimport json")
    assert imported(tree) == {"plan.plan", "app", "data.dataset"}


def test_every_folder_is_a_room() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "api", "app", "errors"}


def test_each_file_has_a_name_of_its_own() -> None:
    names = Counter(path.name for path in MODULES)
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert {name for name in imported(tree) if room(name) < room(module)} == set()
    if module.partition(".")[0] in LIGHT:
        named = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        tops = {alias.name if isinstance(node, ast.Import) else str(node.module) for node in named for alias in node.names}
        assert {name.partition(".")[0] for name in tops}.isdisjoint(HEAVY)


def test_the_links_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_files_that_comments_name_exist() -> None:
    there = [
        path.relative_to(ROOT).as_posix()
        for name in ("dpo_cli", "tests", "benchmarks", "scripts")
        for path in (ROOT / name).rglob("*.py")
    ]
    known = {*there, *(path.partition("/")[2] for path in there)}
    theirs = ("utils/", "tuners/")  # of transformers and PEFT
    named = {(path, name) for path in there for name in NAMED.findall((ROOT / path).read_text(encoding="utf-8"))}
    assert [(path, name) for path, name in named if name not in known and not name.startswith(theirs)] == []


@pytest.mark.parametrize(
    "command",
    [
        "validate configs/quickstart.json",
        "recommend --vram 12",
        "train --help",
        "augment --help",
        "compare --help",
        "sweep --help",
    ],
)
def test_light_commands_load_no_heavy_module(command: str) -> None:
    code = (
        "import sys\n"
        "from dpo_cli.app import app\n"
        f"app({command.split()!r}, standalone_mode=False)\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip().endswith("HEAVY []"), done.stdout + done.stderr
