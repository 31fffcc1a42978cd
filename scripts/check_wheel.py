"""`make check-wheel`: builds the wheel, installs it in clean environments, and trains four steps with each.

newest   what pip chooses within the ranges of pyproject.toml
lowest   the lower end of every range

torch is installed at the tested version in both: other builds are gigabytes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
KINDS = ("newest", "lowest")


def main(kinds: list[str]) -> int:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        wheel = built(place / "dist")
        data = place / "data"
        data.mkdir()
        lay_out_data(data)
        for kind in kinds or KINDS:
            bin_folder = installed(wheel, place / kind, kind)
            tried(bin_folder, data, kind)
    return 0


def built(folder: Path) -> Path:
    """The wheel of the committed and uncommitted files here."""
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def installed(wheel: Path, place: Path, kind: str) -> Path:
    """The folder of programs of a new environment with the wheel; its versions are printed."""
    venv.create(place, with_pip=True)
    bin_folder = place / ("Scripts" if os.name == "nt" else "bin")
    constraints = place / "constraints.txt"
    torch = next(
        line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line.startswith("torch==")
    )
    constraints.write_text("\n".join([torch, *(lowest() if kind == "lowest" else [])]) + "\n", encoding="utf-8")
    run(bin_folder / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", constraints, wheel)
    frozen = run(bin_folder / "python", "-m", "pip", "freeze").splitlines()
    names = ("torch==", "transformers==", "trl==", "peft==", "datasets==", "numpy==", "pyarrow==", "typer==", "rich==")
    print(f"{kind}: {', '.join(line for line in frozen if line.startswith(names))}", flush=True)
    return bin_folder


def lowest() -> list[str]:
    """The lower end of each range but torch's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = (re.match(r"([\w-]+)>=([\d.]+)", text) for text in project["dependencies"])
    return [f"{found[1]}=={found[2]}" for found in ranges if found is not None and found[1] != "torch"]


def lay_out_data(place: Path) -> None:
    """A tiny model, pairs and a config, made with the environment that runs this script."""
    from test_contract import lay_out

    lay_out(place)
    config = json.loads((place / "dpo.json").read_text(encoding="utf-8"))
    (place / "four.json").write_text(json.dumps({**config, "max_steps": 4, "output_dir": "run"}), encoding="utf-8")


def tried(bin_folder: Path, data: Path, kind: str) -> None:
    """What a new user does first."""
    dpo = bin_folder / "dpo"
    for words in (
        ["--version"],
        ["validate", "four.json"],
        ["recommend", "--vram", "12"],
        ["train", "four.json", "--overwrite"],
        ["eval", "run", "--json"],
        ["report", "run"],
    ):
        run(dpo, *words, cwd=data)
        print(f"{kind}: dpo {' '.join(words)}", flush=True)


def run(*words: object, cwd: Path | None = None) -> str:
    """What a program prints; its messages, and the end of this one, where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\nexit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
