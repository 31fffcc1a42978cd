"""Each room imports only from rooms before it on the way of the data, and validate stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "dpo_cli"
# The way of the data. A module may import from its own room and from what stands before it.
ORDER = [
    "errors",
    "redaction",
    "console",
    "live",
    "hub",
    "config",
    "data",
    "runs.digests",
    "runs.durable",
    "runs.lock",
    "runs.checkpoint",
    "runs.directory",
    "hardware",
    "plan",
    "trackers",
    "demands",
    "inspection",
    "validation",
    "providers",
    "training",
    "evaluation",
    "runs",
    "report",
    "publish",
    "judge",
    "evaluation.opening",
    "evaluation.contest",
    "evaluation.evaluate",
    "training.callbacks",
    "training.run",
    "ranking",
    "augment",
    "export",
    "session",
    "cli",
    "__main__",
]
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "numpy", "pandas", "pyarrow")
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def room(module: str) -> int:
    """The position of the most specific room that a module belongs to."""
    fitting = [name for name in ORDER if module == name or module.startswith(name + ".")]
    return ORDER.index(max(fitting, key=len))


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
    tree = ast.parse("import dpo_cli.plan\nfrom dpo_cli import cli\nfrom dpo_cli.data.reader import read\nimport json")
    assert imported(tree) == {"plan", "cli", "data.reader"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_up_the_stream(path: object) -> None:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)  # type: ignore[attr-defined]
    tree = ast.parse(path.read_text(encoding="utf-8"))  # type: ignore[attr-defined]
    wrong = {name for name in imported(tree) if room(name) > room(module)}
    assert not wrong


def test_the_readme_maps_every_module_and_its_links_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not (ROOT / link).exists()]
    assert not [path for path in MODULES if f"`{path.relative_to(ROOT)}`" not in text]


@pytest.mark.parametrize(
    "command", ["validate configs/quickstart.json", "recommend --vram 12", "train --help", "augment --help"]
)
def test_light_commands_load_no_heavy_module(command: str) -> None:
    code = (
        "import sys\n"
        "from dpo_cli.cli import app\n"
        f"app({command.split()!r}, standalone_mode=False)\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip().endswith("HEAVY []"), done.stdout + done.stderr
