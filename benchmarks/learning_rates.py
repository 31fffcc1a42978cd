"""What a LoRA adapter learns at each learning rate: the quickstart trained once per rate."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import baseline
from baseline import EXACT, Column, Table, cell_of, interval

RATES = ("5e-7", "5e-6", "5e-5", "2e-4", "5e-4", "1e-3")
ROOT = Path(__file__).parent.parent
FIGURES = (("eval", "margin"), ("eval", "accuracy"), ("eval", "kl_token"), ("eval", "kl_sequence"), ("gain", "logp_accuracy"))
COLUMNS = (
    Column("learning_rate"),
    interval("margin", (0.15, 0.05), "nats"),
    interval("reward accuracy", (0, 0.1)),
    interval("KL per token", (0.25, 0.005), "nats"),
    Column("KL per answer", "nats", "{:.1f} [{:.1f}, {:.1f}]", (0.4, 1.0)),
    interval("gain in log-prob accuracy over the base", (0, 0.08)),
)
NOTE = "{train_pairs} pairs, one pass; judged on {eval_pairs} pairs of {eval_prompts} held-out prompts; 95 % intervals."


def measure(table: Table, options: argparse.Namespace) -> None:
    for rate in RATES[-1:] if options.small else RATES:
        with tempfile.TemporaryDirectory() as place:
            words = ["train", "configs/quickstart.json", f"learning_rate={rate}", f"output_dir={place}", "--json"]
            words += ["max_steps=1", "kl_prompts=2", "max_new_tokens=8"] if options.small else []
            dpo = Path(sys.executable).parent / "dpo"
            done = subprocess.run([dpo, *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            summary = json.loads(done.stdout)
            table.add(rate, *(cell_of(summary[group][name]) for group, name in FIGURES))
            counts = json.loads((Path(place) / "plan.json").read_text(encoding="utf-8"))["counts"]
    table.note(NOTE, *((Column(name, "count", tolerance=EXACT), counts[name]) for name in counts if f"{{{name}}}" in NOTE))


if __name__ == "__main__":
    sys.exit(baseline.main("learning-rates", COLUMNS, measure))
