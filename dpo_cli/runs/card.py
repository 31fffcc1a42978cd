"""The model card of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_cli.data.reader import sources_of
from dpo_cli.plan import Plan

_TEMPLATE = """\
---
library_name: peft
tags: [dpo, lora]
---
# {name}

A LoRA adapter (rank {rank}) for `{model}`, trained with Direct Preference Optimization on {pairs} pairs of `{dataset}`:
beta {beta:g}, learning rate {rate:g}, {steps} steps of {per_step} pairs.

{figures}

```python
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""


def card(plan: Plan, steps: int, judged: dict[str, Any]) -> str:
    """The text of README.md; `judged` are the figures on held-out prompts, null when nothing is."""
    config = plan.config
    assert plan.counts is not None
    figures = "Nothing was held out, so there are no figures."
    if judged["policy"] is not None:
        policy, gain = judged["policy"], judged["gain"]
        rows = [("reward accuracy", policy["accuracy"]), ("margin", policy["margin"]), ("loss", policy["loss"])]
        rows.append(("gain in log-prob accuracy over the base", gain["logp_accuracy"]))
        table = "\n".join(f"| {name} | {f['value']:.3f} | {f['low']:.3f} to {f['high']:.3f} |" for name, f in rows)
        figures = f"On {plan.counts.eval_pairs} held-out pairs:\n\n| figure | value | 95 % interval |\n|---|---|---|\n{table}"
    return _TEMPLATE.format(
        name=plan.run_dir.name,
        rank=config.lora_r,
        model=plan.model_label,
        pairs=plan.counts.train_pairs,
        dataset=", ".join(Path(source.path).name for source in sources_of(config.dataset)),
        beta=config.beta,
        rate=config.learning_rate,
        steps=steps,
        per_step=config.per_device_train_batch_size * config.gradient_accumulation_steps,
        figures=figures,
    )
