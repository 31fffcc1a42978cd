"""Two stages on SmolLM2, `make demo-two-stage`: sft, then dpo on top, and three models judged on the same held-out pairs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import baseline
from baseline import EXACT, Column, Table, cell_of, interval

from dpo_cli.config.config import load
from dpo_cli.data.dataset import is_held_out_prompt, read

DPO = str(Path(sys.executable).with_name("dpo"))
CONFIG, PLACE = "configs/smollm2-two-stage.json", Path("runs/smollm2-two-stage")
COLUMNS = (
    Column("model"),
    interval("logp accuracy", (0, 0.06)),
    interval("normalized logp accuracy", (0, 0.06)),
    interval("accuracy", (0, 0.06)),
    interval("margin", (0.2, 0.1), "nats"),
)


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


def measure(table: Table, options: argparse.Namespace) -> None:
    few = ["max_steps=1", "kl_prompts=2", "max_new_tokens=8"] if options.small else []
    subprocess.run([DPO, "train", CONFIG, "--overwrite", *few], stdout=sys.stderr, check=True)
    file = PLACE / "held-out.jsonl"
    write_held_out(file)
    sft, both = judged("1-sft", "--dataset", str(file)), judged("2-dpo")
    assert (sft["pairs"], sft["prompts"]) == (both["pairs"], both["prompts"])
    models = {
        "base": sft["base"],
        "sft": sft["policy"],
        "sft, as the reference of dpo": both["base"],
        "sft + dpo": both["policy"],
    }
    for model, figures in models.items():
        table.add(model, *(cell_of(figures.get(column.name.replace(" ", "_"))) for column in COLUMNS[1:]))
    counts = [(Column(name, name, tolerance=EXACT), both[name]) for name in ("pairs", "prompts")]
    table.note("{pairs} held-out pairs of {prompts} prompts; 95 % intervals; rewards against the line above.", *counts)


if __name__ == "__main__":
    sys.exit(baseline.main("two-stage", COLUMNS, measure))
