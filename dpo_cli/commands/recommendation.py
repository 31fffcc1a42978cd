"""The input of `dpo recommend`: a card (default: this machine's) and the lengths of a dataset. No torch."""

from __future__ import annotations

from dataclasses import replace

from dpo_cli.errors import UsageError
from dpo_cli.hardware.machine import probe
from dpo_cli.hardware.recommend import Request
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.preflight import lengths_of
from dpo_cli.strategies.strategies import STRATEGIES
from dpo_cli.ui.console import Console


def request_of(console: Console, vram: float | None, model: str | None, dataset: str | None, strategy: str) -> Request:
    """The request; `UsageError` for an unknown strategy, and without a card to plan for."""
    if strategy not in STRATEGIES:
        raise UsageError(f"unknown strategy {strategy}", f"name one of {', '.join(STRATEGIES)}")
    asked = Request(vram or 0.0, model, dataset, strategy)
    if vram is None:
        machine = probe()
        if machine.card is None:
            raise UsageError("this machine has no GPU", "give the memory to plan for, for example --vram 12")
        total_gb, free_gb, what = machine.card
        console.line(f"this machine: {what}")
        is_apple = machine.is_apple and not machine.gpus
        asked = replace(asked, vram_gb=total_gb, free_gb=free_gb, is_apple=is_apple, has_bf16=machine.has_bf16)
    if dataset is None:
        return asked
    lengths = lengths_of(dataset, ModelSource.of(model) if model else None)
    if lengths.most_tokens is None:
        console.line(f"{dataset} is not on this machine yet, so its lengths are not used")
    return replace(asked, longest=lengths.most_tokens, share_over=lengths.share_over)
