"""What an export changes, `make check-gguf`: a short run of the quickstart, in 16 and in 4 bits, as each type of GGUF file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import machine_line

DPO = str(Path(sys.executable).with_name("dpo"))
PLACE = Path("runs/exports")
STEPS = 10
RUNS = {"16-bit": ("f32", "f16", "bf16", "q8_0"), "4-bit": ("q8_0",)}


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


def main() -> None:
    rows = []
    for name, kinds in RUNS.items():
        run = PLACE / name
        words = [f"output_dir={run}", f"max_steps={STEPS}", f"use_4bit={json.dumps(name == '4-bit')}", "--overwrite"]
        subprocess.run([DPO, "train", "configs/quickstart.json", *words], check=True)
        rows += [(kind, exported(run, kind)) for kind in kinds]
    print(
        f"\n{rows[0][1]['pairs']} held-out pairs of {rows[0][1]['prompts']} prompts, {STEPS} steps; before -> after merging\n"
    )
    print("| trained on | written in | accuracy | margin | log-probs differ by (most) | GGUF | same token | logits differ by |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, made in rows:
        change = {name: [made[side][name]["value"] for side in ("before", "after")] for name in ("accuracy", "margin")}
        figures = " | ".join(f"{before:.3f} -> {after:.3f}" for before, after in change.values())
        apart = f"{made['difference']['mean']:.2g} ({made['difference']['max']:.2g}) nats"
        found = made["gguf"]
        file = f"{found['same_argmax']:.2%} of {found['positions']} | {found['max_difference']:.2g}" if found else "refused |"
        print(f"| {made['trained_on']} | {made['dtype']} | {figures} | {apart} | {kind} | {file} |")
    print(f"\n{machine_line()}")


if __name__ == "__main__":
    main()
