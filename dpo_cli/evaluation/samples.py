"""Answers of the base model and the adapter to the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_cli.data.tokens import Encoded
from dpo_cli.providers.policy import Policy

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    prompt: str
    base: str
    adapter: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def side_by_side(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], count: int, dtype: torch.dtype
) -> list[Sample]:
    """Greedy answers of at most `MAX_NEW_TOKENS` tokens to the first `count` different prompts."""
    chosen = list({row.row.prompt_key: row for row in reversed(rows) if row.row.prompt}.values())[::-1][:count]
    policy.model.eval()
    device = policy.network.device
    samples = []
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for row in chosen:
            ids = torch.tensor([row.prompt_ids], device=device)
            adapter = _answer(policy.network, tokenizer, ids)
            with policy.as_reference() as reference:
                base = _answer(reference, tokenizer, ids)
            prompt = row.row.prompt
            samples.append(Sample(prompt if isinstance(prompt, str) else prompt[-1]["content"], base, adapter))
    return samples


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> str:
    made: Any = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()
