"""What an export changes, `make check-gguf`: a short run of the quickstart, in 16 and in 4 bits, as each type of GGUF file."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import baseline
from baseline import EXACT, Column, Table

DPO = str(Path(sys.executable).with_name("dpo"))
PLACE = Path("runs/exports")
STEPS = 10
RUNS = {"16-bit": ("f32", "f16", "bf16", "q8_0"), "4-bit": ("q8_0",)}
COLUMNS = (
    Column("trained on"),
    Column("written in"),
    Column("GGUF"),
    Column("accuracy", "share", "{:.3f} -> {:.3f}", (0, 0.1)),
    Column("margin", "nats", "{:.3f} -> {:.3f}", (0.25, 0.1)),
    Column("log-probs differ by (most)", "nats", "{:.2g} ({:.2g})", (0.5, 0.1)),
    Column("same token", "share", "{:.2%}", (0, 0.02)),
    Column("logits differ by", "logits", "{:.2g}", (1.0, 1e-3)),
    Column("exported", "outcome", "{}"),
)
NOTE = "{steps} steps, {pairs} held-out pairs of {prompts} prompts, before -> after merging."


def exported(run: Path, kind: str) -> dict[str, Any]:
    """export.json, of an export that is refused too (exit 5)."""
    out = PLACE / f"{run.name}-{kind}"
    words = [DPO, "export", str(run), "--out", str(out), "--gguf", kind, "--json"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    made: dict[str, Any] = json.loads(done.stdout)
    if "error" in made:
        sys.exit(made["error"])
    shutil.rmtree(out, ignore_errors=True)
    return made


def measure(table: Table, options: argparse.Namespace) -> None:
    for name, kinds in {"16-bit": ("f16",)}.items() if options.small else RUNS.items():
        run, steps = PLACE / name, 1 if options.small else STEPS
        words = [f"output_dir={run}", f"max_steps={steps}", f"use_4bit={json.dumps(name == '4-bit')}", "--overwrite"]
        subprocess.run([DPO, "train", "configs/quickstart.json", *words], stdout=sys.stderr, check=True)
        for kind in kinds:
            made = exported(run, kind)
            changes = ([made[side][figure]["value"] for side in ("before", "after")] for figure in ("accuracy", "margin"))
            apart, file = made["difference"], made["gguf"] or {}
            figures = [apart["mean"], apart["max"]], file.get("same_argmax"), file.get("max_difference")
            table.add(made["trained_on"], made["dtype"], kind, *changes, *figures, "yes" if file else "refused")
    counts = {"steps": steps, "pairs": made["pairs"], "prompts": made["prompts"]}
    table.note(NOTE, *((Column(name, name, tolerance=EXACT), count) for name, count in counts.items()))


if __name__ == "__main__":
    sys.exit(baseline.main("export", COLUMNS, measure))
