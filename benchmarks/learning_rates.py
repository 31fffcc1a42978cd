"""What a LoRA adapter learns at each learning rate: the quickstart trained once per rate, as a Markdown table."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import machine_line

RATES = ("5e-7", "5e-6", "5e-5", "2e-4", "5e-4", "1e-3")
ROOT = Path(__file__).parent.parent
COLUMNS = (("policy", "margin"), ("policy", "accuracy"), ("policy", "kl_token"), ("gain", "logp_accuracy"))


def main() -> None:
    print("| learning_rate | margin | reward accuracy | KL per token | gain in log-prob accuracy over the base |")
    print("|---|---|---|---|---|")
    for rate in RATES:
        with tempfile.TemporaryDirectory() as place:
            words = ["train", "configs/quickstart.json", f"learning_rate={rate}", f"output_dir={place}", "--json"]
            dpo = Path(sys.executable).parent / "dpo"
            done = subprocess.run([dpo, *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            summary = json.loads(done.stdout)
            groups = {"policy": summary["eval"], "gain": summary["gain"]}
            cells = [groups[group][name] for group, name in COLUMNS]
            shown = [f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" for cell in cells]
            print(f"| {rate} | {' | '.join(shown)} |", flush=True)
            pairs = json.loads((Path(place) / "plan.json").read_text(encoding="utf-8"))["counts"]
    trained, judged = f"{pairs['train_pairs']} pairs, one pass", f"{pairs['eval_pairs']} pairs of {pairs['eval_prompts']}"
    print(f"\n{trained}; judged on {judged} held-out prompts. {machine_line()}.")


if __name__ == "__main__":
    main()
