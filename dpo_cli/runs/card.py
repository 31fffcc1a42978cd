"""The model cards of a run and of an exported model."""

from __future__ import annotations

from pathlib import Path

from dpo_cli.data.dataset import sources_of
from dpo_cli.data.hub_datasets import is_hub_id
from dpo_cli.plan.plan import Plan
from dpo_cli.results.codec import to_json
from dpo_cli.results.intervals import required
from dpo_cli.results.judgement import Judged
from dpo_cli.results.merge import GgufCheck, Merge
from dpo_cli.strategies.figures import FIGURES

_TEMPLATE = """\
---
library_name: {library}
tags: [{tags}]
{base}---
# {name}

{what} `{model}`, trained with {method} on {rows} {noun} of `{dataset}`:
{beta}learning rate {rate:g}, {steps} steps of {per_step} {noun}.

{figures}

{use}
"""
LOAD = """\
```python
from {module} import {loader}
model = {loader}.from_pretrained("path/to/this/folder"{options})
```"""
PEFT = {"module": "peft", "loader": "AutoPeftModelForCausalLM", "options": ""}
OF_REWARDS = {"module": "peft", "loader": "AutoPeftModelForSequenceClassification", "options": ", num_labels=1"}
REWARD = """

The reward of a response is the score of its last token that is not the padding token: set `model.config.pad_token_id`."""
TRANSFORMERS = {"module": "transformers", "loader": "AutoModelForCausalLM", "options": ""}
MERGE = """\
Trained on {trained} weights and written in {dtype}. The same rows, evaluated with the run's model and with these files:

| figure | run | these files |
|---|---|---|
{rows}

The log-probability of a response differs by {mean:.3g} nats on average, by {max:.3g} at most.

"""
GGUF_TITLE = "\n## GGUF\n\n"
GGUF = """\
`{file}` has the same most likely token as these files at {same_argmax:.2%} of {positions} positions of held-out responses;
its logits differ by {max_difference:.3g} at most.
"""
MERGED = "Its base is the run `{model}`, merged; `dpo export` makes one model of both."


def card(plan: Plan, steps: int, judged: Judged) -> str:
    """The text of README.md for what was trained; `judged` has the figures on held-out prompts, if there are any."""
    assert plan.counts is not None
    is_peft = plan.config.lora_r > 0
    what = f"A LoRA adapter (rank {plan.config.lora_r}) for" if is_peft else "All weights of"
    load = LOAD.format(**(PEFT if is_peft else TRANSFORMERS))
    if plan.strategy.gives_rewards:
        load = LOAD.format(**OF_REWARDS) + REWARD
    use = MERGED.format(model=_plain(plan.model_label)) if plan.merges else load
    return _card(plan, plan.run_dir.name, what, plan.counts.train_pairs, steps, judged, use, is_peft)


def export_card(plan: Plan, name: str, train_rows: int, steps: int, judged: Judged, merge: Merge) -> str:
    """The text of README.md for an exported model."""
    rank = plan.config.lora_r
    what = f"A LoRA adapter (rank {rank}) merged into" if rank else "All weights of"
    rows = "\n".join(
        f"| {name} | {required(merge.before, name).value:.3f} | {required(merge.after, name).value:.3f} |"
        for name in merge.before
    )
    apart = merge.difference
    text = MERGE.format(rows=rows, trained=merge.trained_on, dtype=merge.dtype, mean=apart.mean, max=apart.max)
    return _card(plan, name, what, train_rows, steps, judged, text + LOAD.format(**TRANSFORMERS), is_peft=False)


def with_gguf(card: str, check: GgufCheck) -> str:
    """The card with a last section about the GGUF file, instead of one that an export wrote before it was stopped."""
    return card.partition(GGUF_TITLE)[0] + GGUF_TITLE + GGUF.format(**to_json(check))


def _plain(name: str) -> str:
    """A file name, which is not trusted, without line ends, quotes and tags that would change a card."""
    return "".join(char if char.isprintable() and char not in "`<>[]" else "\N{REPLACEMENT CHARACTER}" for char in name)


def _card(plan: Plan, name: str, what: str, train_rows: int, steps: int, judged: Judged, use: str, is_peft: bool) -> str:
    config, base = plan.config, plan.model.foundation
    figures = "It was not evaluated, so there are no figures."
    if sides := judged.sides:
        rows = [(FIGURES[name].label, required(sides.policy, name)) for name in plan.strategy.shown]
        rows += [(f"gain in {FIGURES[name].label} over the base", required(sides.gain, name)) for name in plan.strategy.gains]
        table = "\n".join(f"| {words} | {f.value:.3f} | {f.low:.3f} to {f.high:.3f} |" for words, f in rows)
        held_out = f"On {judged.count} held-out {plan.noun}"
        figures = f"{held_out}:\n\n| figure | value | 95 % interval |\n|---|---|---|\n{table}"
    return _TEMPLATE.format(
        library="peft" if is_peft else "transformers",
        tags=", ".join([config.strategy, *(["lora"] if is_peft else [])]),
        base=f"base_model: {base}\n" if is_hub_id(base) else "",
        name=_plain(name),
        what=what,
        model=_plain(plan.model_label),
        method=plan.strategy.method,
        rows=train_rows,
        noun=plan.noun,
        dataset=", ".join(_plain(Path(source.path).name) for source in sources_of(config.dataset)),
        beta=f"beta {config.beta:g}, " if plan.takes("beta") else "",
        rate=config.learning_rate,
        steps=steps,
        per_step=config.per_device_train_batch_size * config.gradient_accumulation_steps,
        figures=figures,
        use=use,
    )
