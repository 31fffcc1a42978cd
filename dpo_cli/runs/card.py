"""The model card of what a run trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_cli.data.reader import sources_of
from dpo_cli.plan import Plan

_TEMPLATE = """\
---
library_name: {library}
tags: [{tags}]
---
# {name}

{what} `{model}`, trained with {method} on {rows} {noun} of `{dataset}`:
{beta}learning rate {rate:g}, {steps} steps of {per_step} {noun}.

{figures}

{use}
"""
METHODS = {"dpo": "Direct Preference Optimization", "sft": "supervised fine-tuning"}
LOAD = """\
```python
from {module} import {loader}
model = {loader}.from_pretrained("path/to/this/folder")
```"""
MERGED = "It stands on the run `{model}`, merged; `dpo export` makes one model of all."
# The figures of a card: its words, the group of `judged` and the name in it.
ROWS = {
    "dpo": [
        ("reward accuracy", "policy", "accuracy"),
        ("margin", "policy", "margin"),
        ("loss", "policy", "loss"),
        ("gain in log-prob accuracy over the base", "gain", "logp_accuracy"),
    ],
    "sft": [
        ("loss (nats a token)", "policy", "loss"),
        ("token accuracy", "policy", "token_accuracy"),
        ("gain in token accuracy over the base", "gain", "token_accuracy"),
    ],
}


def card(plan: Plan, steps: int, judged: dict[str, Any]) -> str:
    """The text of README.md; `judged` are the figures on held-out prompts, null when nothing is."""
    config = plan.config
    assert plan.counts is not None
    figures = "Nothing was held out, so there are no figures."
    if judged["policy"] is not None:
        rows = [(words, judged[group][name]) for words, group, name in ROWS[config.strategy]]
        table = "\n".join(f"| {words} | {f['value']:.3f} | {f['low']:.3f} to {f['high']:.3f} |" for words, f in rows)
        held_out = f"On {plan.counts.eval_pairs} held-out {plan.noun}"
        figures = f"{held_out}:\n\n| figure | value | 95 % interval |\n|---|---|---|\n{table}"
    has_adapter = config.lora_r > 0
    load = {"module": "peft", "loader": "AutoPeftModelForCausalLM"}
    if not has_adapter:
        load = {"module": "transformers", "loader": "AutoModelForCausalLM"}
    return _TEMPLATE.format(
        library="peft" if has_adapter else "transformers",
        tags=", ".join([config.strategy, *(["lora"] if has_adapter else [])]),
        name=plan.run_dir.name,
        what=f"A LoRA adapter (rank {config.lora_r}) for" if has_adapter else "All weights of",
        model=plan.model_label,
        method=METHODS[config.strategy],
        rows=plan.counts.train_pairs,
        noun=plan.noun,
        dataset=", ".join(Path(source.path).name for source in sources_of(config.dataset)),
        beta=f"beta {config.beta:g}, " if config.strategy == "dpo" else "",
        rate=config.learning_rate,
        steps=steps,
        per_step=config.per_device_train_batch_size * config.gradient_accumulation_steps,
        figures=figures,
        use=MERGED.format(model=plan.model_label) if plan.merges else LOAD.format(**load),
    )
