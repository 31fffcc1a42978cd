"""What each variant of DPO's loss does to the quickstart: trained once with each, and with KTO on the same responses."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import baseline
from baseline import EXACT, Column, Table, cell_of, interval

ROOT = Path(__file__).parent.parent
CONFIG = "configs/quickstart.json"
VARIANTS = {
    "DPO": [],
    "ld_alpha 0.5": ["ld_alpha=0.5"],
    "ld_alpha 0": ["ld_alpha=0"],
    "use_weighting": ["use_weighting=true"],
    "forward_kl": ["f_divergence_type=forward_kl"],
    "js_divergence": ["f_divergence_type=js_divergence"],
    "alpha_divergence 0.5": ["f_divergence_type=alpha_divergence"],
    "KTO": ["strategy=kto", "learning_rate=1e-4"],
}
FIGURES = (("policy", "margin"), ("gain", "logp_accuracy"), ("policy", "kl_token"), ("policy", "kl_sequence"))
COLUMNS = (
    Column("variant"),
    interval("margin", (0.3, 0.1), "nats"),
    interval("gain in log-prob accuracy over the base", (0, 0.08)),
    interval("KL per token", (0.4, 0.01), "nats"),
    Column("KL per answer", "nats", "{:.1f} [{:.1f}, {:.1f}]", (0.5, 1.5)),
    Column("tokens per answer", "tokens", "{:.0f} [{:.0f}, {:.0f}]", (0.3, 10)),
)
NOTE = (
    "{train_pairs} pairs, one pass at 2e-4 (KTO: both responses of each as ratings, at 1e-4); judged on {eval_pairs} pairs of "
    "{eval_prompts} held-out prompts; 95 % intervals. One seed: differences within the intervals say nothing."
)


def dpo(*words: str) -> dict[str, Any]:
    program = Path(sys.executable).parent / "dpo"
    done = subprocess.run([program, *words, "--json"], cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(table: Table, options: argparse.Namespace) -> None:
    few = ["max_steps=1", "kl_prompts=2", "max_new_tokens=8"] if options.small else []
    for name, words in [*VARIANTS.items()][-1:] if options.small else VARIANTS.items():
        with tempfile.TemporaryDirectory() as place:
            dpo("train", CONFIG, *words, f"output_dir={place}/run", *few)
            # By the quickstart's config, so that all are judged on the same pairs.
            judged = dpo("eval", CONFIG, "--adapter", f"{place}/run/adapter", *few)
            cells = [cell_of(judged[side][figure]) for side, figure in FIGURES]
            table.add(name, *cells, cell_of(judged["answer_tokens"]["policy"]))
            if name == "DPO" or options.small:
                counts = json.loads((Path(place) / "run" / "plan.json").read_text(encoding="utf-8"))["counts"]
    table.note(NOTE, *((Column(name, "count", tolerance=EXACT), counts[name]) for name in counts if f"{{{name}}}" in NOTE))


if __name__ == "__main__":
    sys.exit(baseline.main("variants", COLUMNS, measure))
