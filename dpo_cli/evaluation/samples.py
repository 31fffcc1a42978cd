"""Answers of the base model and the adapter to the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from dpo_cli.data.tokens import EncodedPair

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    prompt: str
    base: str
    adapter: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def side_by_side(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[EncodedPair], count: int, dtype: torch.dtype
) -> list[Sample]:
    """Greedy answers of at most `MAX_NEW_TOKENS` tokens to the first `count` different prompts."""
    chosen = list({pair.pair.prompt_key: pair for pair in reversed(pairs)}.values())[::-1][:count]
    model.eval()
    device = model.get_base_model().device
    samples = []
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for pair in chosen:
            ids = torch.tensor([pair.prompt_ids], device=device)
            adapter = _answer(model, tokenizer, ids)
            with model.disable_adapter():
                base = _answer(model, tokenizer, ids)
            prompt = pair.pair.prompt
            samples.append(Sample(prompt if isinstance(prompt, str) else prompt[-1]["content"], base, adapter))
    return samples


def _answer(model: PeftModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> str:
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()
