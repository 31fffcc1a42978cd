"""Pairs to token ids, the same ids that TRL 1.15's DPOTrainer makes of the same rows (tests/test_tokens.py compares).

They are made here because training, evaluation and the plan's counts must see the same ids, and evaluation has no trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_cli.data.formats import Message, Pair, Text, as_messages
from dpo_cli.errors import InvalidInput, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair. A response is scored after the prompt; it ends with what the template puts after it."""

    pair: Pair
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def shared_length(self) -> int:
        """Tokens of the pair with its prompt counted once."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


def encode(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, use_chat_template: bool | str = "auto"
) -> list[EncodedPair]:
    """Tokenise pairs; plain strings become chat messages when the tokenizer has a chat template ("auto") or must have one.

    Raises `InvalidInput` where a template is needed and there is none.
    """
    has_template = tokenizer.chat_template is not None
    if use_chat_template is True and not has_template:
        fix = 'write "use_chat_template": "auto", or start from an instruct model'
        raise InvalidInput([Problem("error", "no-chat-template", "this model has no chat template", fix, "use_chat_template")])
    as_chat = has_template and use_chat_template is not False
    if not as_chat and (lines := tuple(pair.line for pair in pairs if not isinstance(pair.prompt, str))):
        message = f"{len(lines)} rows are chat messages, which need a chat template"
        why = "use_chat_template is false" if has_template else "this model has none: start from an instruct model"
        raise InvalidInput([Problem("error", "messages-without-template", message, why, "use_chat_template", lines=lines)])
    return [_encode(pair, tokenizer, as_chat) for pair in pairs]


def _encode(pair: Pair, tokenizer: PreTrainedTokenizerBase, as_chat: bool) -> EncodedPair:
    if as_chat:
        prompt = as_messages(pair.prompt, "user")
        prompt_ids = _template(tokenizer, prompt, add_generation_prompt=True)
        chosen_ids = _template(tokenizer, prompt + as_messages(pair.chosen, "assistant"))
        rejected_ids = _template(tokenizer, prompt + as_messages(pair.rejected, "assistant"))
    else:
        prompt_ids = list(tokenizer(pair.prompt)["input_ids"])
        chosen_ids = _plain(tokenizer, pair.prompt, pair.chosen)
        rejected_ids = _plain(tokenizer, pair.prompt, pair.rejected)
    # A token may span the end of the prompt, or the template may render a prompt alone differently: the responses start
    # where the sequences part from the prompt.
    start = min(_common_prefix(prompt_ids, chosen_ids), _common_prefix(prompt_ids, rejected_ids))
    return EncodedPair(pair, prompt_ids[:start], chosen_ids[start:], rejected_ids[start:])


def _template(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: bool) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def _plain(tokenizer: PreTrainedTokenizerBase, prompt: Text, response: Text) -> list[int]:
    text = f"{prompt}{response}"
    end = str(tokenizer.eos_token)
    return list(tokenizer(text if text.endswith(end) else text + end)["input_ids"])


def _common_prefix(ids: Sequence[int], other: Sequence[int]) -> int:
    parting = (i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b)
    return next(parting, min(len(ids), len(other)))
