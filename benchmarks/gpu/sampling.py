"""Part `sampling`: tokens a second of answers, by dpo's `answers` and by transformers' own `generate`, in turns."""

from __future__ import annotations

import logging
from typing import Any

import torch
from baseline import Column
from transformers import GenerationConfig

from dpo_cli.evaluation.generation import Sampling, answers
from gpu.bill import BASE, MODELS, facts_of, model_of
from gpu.runner import CannotRun, Check, Part, Setting
from gpu.speed import now

PROMPTS, TOKENS, LENGTH = 32, 128, 256
ROUNDS = 2


def rate(setting: Setting) -> None:
    """`_rate`, where the model fits."""
    try:
        _rate(setting)
    except torch.OutOfMemoryError as error:
        raise CannotRun(str(error).splitlines()[0]) from error


def _rate(setting: Setting) -> None:
    """Greedy answers to 32 prompts at once, 8B in bf16; in the rehearsal a tiny float32 model, whose answers are compared."""
    from builders import tiny_tokenizer

    logging.disable(logging.WARNING)
    dtype = torch.float32 if setting.is_small else torch.bfloat16
    tokens, length = (TOKENS // 8, LENGTH // 8) if setting.is_small else (TOKENS, LENGTH)
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = model_of(facts_of(setting, MODELS["8B"]), BASE, setting.device).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 300, (PROMPTS, length), generator=generator)
    seconds: dict[str, list[float]] = {"dpo": [], "transformers": []}
    for _ in range(1 + ROUNDS):  # the first is not counted
        began = now()
        own = [list(answer.ids) for answer in answers(model, tokenizer, prompts.tolist(), Sampling(tokens), dtype)]
        seconds["dpo"].append(now() - began)
        began = now()
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, **ends)
        inputs = prompts.to(setting.device)
        with torch.no_grad():
            theirs = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
        seconds["transformers"].append(now() - began)
    counted = sum(map(len, own))
    figures: dict[str, Any] = {name: counted / min(values[1:]) for name, values in seconds.items()}
    figures["same"] = sum(row == other[: len(row)] for row, other in zip(own, theirs[:, length:].tolist(), strict=True))
    figures["not the same"] = PROMPTS - figures["same"]
    case = f"{PROMPTS} prompts of {length} tokens, {counted} tokens"
    if setting.is_small:
        setting.agrees(case, figures, {"not the same": 0})
    else:  # batches of other shapes round differently in bf16, and random weights decide by small differences
        setting.measured(case, figures)


PART = Part(
    "sampling",
    "gpu-sampling",
    0.1,
    (Check("sampling/8B", rate, 45),),
    (
        Column("transformers", "tokens/s", "{:,.0f}"),
        Column("dpo", "tokens/s", "{:,.0f}", (0.25, 0)),
        Column("same", "prompts"),
    ),
)
