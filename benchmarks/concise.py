"""The demo of `make demo-concise` as a table: SmolLM2 trained on pairs that it made itself, and judged against its base."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import baseline
from baseline import EXACT, Column, Table, cell_of

DPO = str(Path(sys.executable).with_name("dpo"))
CONFIG, RUN = "configs/concise.json", Path("runs/concise")
PROMPTS, PAIRS = Path("data-samples/concise-prompts.txt"), Path("data-samples/concise-preferences.jsonl")
# Each figure with its unit, and whether the base has it too.
FIGURES = (
    ("answer_tokens", "tokens", True),
    ("accuracy", "share", False),
    ("margin", "nats", False),
    ("kl_token", "nats a token", False),
    ("normalized_logp_accuracy", "share", True),
)
COLUMNS = (
    Column("figure"),
    Column("unit"),
    *(Column(model, "as named", "{:.3g} [{:.3g}, {:.3g}]", (0.25, 0.06)) for model in ("adapter", "base")),
    Column("gain", "as named", "{:.3g} [{:.3g}, {:.3g}]", (0.5, 0.06)),
)
NOTE = (
    "{made} pairs of {kept} of our {prompts} prompts. {trained} of them are trained on, one pass at 5e-5; judged on {judged} "
    "pairs of {held_out} held-out prompts; 95 % intervals."
)


def dpo(*words: str) -> dict[str, Any]:
    done = subprocess.run([DPO, *words, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(table: Table, options: argparse.Namespace) -> None:
    dpo("train", CONFIG, "--overwrite", *(["max_steps=1", "kl_prompts=2", "max_new_tokens=8"] if options.small else []))
    judged = dpo("eval", str(RUN))
    for name, unit, is_of_base in FIGURES:
        if name == "answer_tokens":
            models = [judged[name][model] for model in ("policy", "base", "gain")]
        else:
            models = [
                judged[model].get(name) if model == "policy" or is_of_base else None for model in ("policy", "base", "gain")
            ]
        table.add(name, unit, *map(cell_of, models))
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    plan = json.loads((RUN / "plan.json").read_text(encoding="utf-8"))["counts"]
    counts = {
        "made": len(rows),
        "kept": len({row["prompt"] for row in rows}),
        "prompts": len(PROMPTS.read_text(encoding="utf-8").splitlines()),
        "trained": plan["train_pairs"],
        "judged": judged["pairs"],
        "held_out": judged["prompts"],
    }
    table.note(NOTE, *((Column(name, "count", tolerance=EXACT), count) for name, count in counts.items()))


if __name__ == "__main__":
    sys.exit(baseline.main("concise", COLUMNS, measure))
