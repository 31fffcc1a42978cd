"""Two stages on SmolLM2, `make demo-two-stage`: sft, then dpo on top, and three models judged on the same held-out pairs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import machine_line

from dpo_cli.config.config import load
from dpo_cli.data.dataset import is_held_out_prompt, read

DPO = str(Path(sys.executable).with_name("dpo"))
CONFIG, PLACE = "configs/smollm2-two-stage.json", Path("runs/smollm2-two-stage")


def write_held_out(file: Path) -> None:
    """The pairs that both stages hold out, as rows."""
    config = load(CONFIG).require()
    seed = config.seed if config.split_seed is None else config.split_seed
    pairs = read(config.dataset).load()
    held_out = [pair for pair in pairs if is_held_out_prompt(pair.prompt_key, config.eval_split, seed)]
    lines = Path(config.dataset).read_text(encoding="utf-8").splitlines()
    file.write_text("".join(lines[pair.line - 1] + "\n" for pair in held_out), encoding="utf-8")


def judged(stage: str, *more: str) -> dict[str, Any]:
    done = subprocess.run([DPO, "eval", str(PLACE / stage), "--json", *more], stdout=subprocess.PIPE, text=True, check=True)
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def cell(figure: dict[str, float] | None) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]" if figure else ""


def main() -> None:
    subprocess.run([DPO, "train", CONFIG, "--overwrite", *sys.argv[1:]], check=True)
    file = PLACE / "held-out.jsonl"
    write_held_out(file)
    sft, both = judged("1-sft", "--dataset", str(file)), judged("2-dpo")
    assert (sft["pairs"], sft["prompts"]) == (both["pairs"], both["prompts"])
    names = ("logp_accuracy", "normalized_logp_accuracy", "accuracy", "margin")
    print(f"\n{both['pairs']} held-out pairs of {both['prompts']} prompts; 95 % intervals; rewards against the line above\n")
    print(f"| model | {' | '.join(name.replace('_', ' ') for name in names)} |\n|{'---|' * (len(names) + 1)}")
    models = {
        "base": sft["base"],
        "sft": sft["policy"],
        "sft, as the reference of dpo": both["base"],
        "sft + dpo": both["policy"],
    }
    for model, figures in models.items():
        print(f"| {model} | {' | '.join(cell(figures.get(name)) for name in names)} |")
    print(f"\n{machine_line()}")


if __name__ == "__main__":
    main()
