"""Token ids against those of TRL's own preparation, and what the loss covers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_cli.data.formats import Pair
from dpo_cli.data.tokens import as_messages, encode

PAIRS = [
    Pair("the cat", "sat on the mat", "the", 1),
    Pair(
        [{"role": "system", "content": "answer"}, {"role": "user", "content": "the mat?\n"}],
        [{"role": "assistant", "content": "é the answer is <b>"}],
        [{"role": "assistant", "content": "é the cat"}],
        2,
    ),
    Pair("two\nlines ", " leading space", "trailing space ", 3),
]


def by_trl(rows: list[dict[str, object]], tokenizer: PreTrainedTokenizerFast, tmp_path: object) -> Dataset:
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = DPOConfig(str(tmp_path), max_length=None, use_cpu=True, bf16=False)
    return DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")


@pytest.mark.parametrize("chat", [True, False])
def test_ids_are_trls(tokenizer: PreTrainedTokenizerFast, tmp_path: object, chat: bool) -> None:
    template = tokenizer.chat_template
    pairs = PAIRS if chat else [PAIRS[0], PAIRS[2]]
    try:
        tokenizer.chat_template = template if chat else None
        ours = encode(pairs, tokenizer)
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows = [
            {key: as_messages(getattr(pair, key), role) if chat else getattr(pair, key) for key, role in roles.items()}
            for pair in pairs
        ]
        theirs = by_trl(rows, tokenizer, tmp_path)
    finally:
        tokenizer.chat_template = template
    for mine, row in zip(ours, theirs, strict=True):
        assert (mine.prompt_ids, mine.chosen_ids, mine.rejected_ids) == (
            row["prompt_ids"],
            row["chosen_ids"],
            row["rejected_ids"],
        )


def test_loss_covers_the_response_and_its_eos_only(tokenizer: PreTrainedTokenizerFast) -> None:
    """pad = eos here, so a mask made from ids instead of lengths would lose the EOS."""
    encoded = encode(PAIRS, tokenizer)
    rows = [{"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids} for p in encoded]
    batch = DataCollatorForPreference(tokenizer.pad_token_id)(rows)
    for index, pair in enumerate(encoded):
        for row, response in ((index, pair.chosen_ids), (index + len(encoded), pair.rejected_ids)):
            scored = batch["input_ids"][row][batch["completion_mask"][row] == 1].tolist()
            assert scored == response
            assert response.count(tokenizer.eos_token_id) == 1
            text = tokenizer.decode(scored)
            assert text.endswith("<|im_end|>\n")
            assert "<|im_start|>" not in text


def test_the_prompt_ends_with_the_generation_prompt_and_has_one_start(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = tokenizer.decode(encode(PAIRS[:1], tokenizer)[0].prompt_ids)
    assert prompt == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
