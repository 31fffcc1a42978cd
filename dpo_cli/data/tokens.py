"""Rows to token ids, the same ids that TRL 1.15's DPOTrainer makes of the same pairs (tests/test_tokens.py compares).

They are made here because training, evaluation and the plan's counts must see the same ids, and evaluation has no trainer.
Two things differ. TRL keeps the start of a pair and cuts its responses; here the oldest of the prompt goes first. Where a
template renders a prompt otherwise before a response, TRL's response starts where they part, with the rest of the prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from dpo_cli.data.formats import Row
from dpo_cli.data.messages import Message, Text, as_messages
from dpo_cli.data.rendering import render
from dpo_cli.errors import InvalidInput, Problem, about_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row. A response is scored after the prompt; it ends with what the template puts after it.

    A pair has two responses, chosen and rejected; a demonstration has one.
    """

    row: Row
    prompt_ids: list[int]
    responses: tuple[list[int], ...]
    is_cut: bool = False  # whether the prompt lost its beginning, or a text without a prompt its end
    parts_early: bool = False  # whether the prompt is rendered otherwise alone than before a response

    @property
    def chosen_ids(self) -> list[int]:
        return self.responses[0]

    @property
    def rejected_ids(self) -> list[int]:
        return self.responses[1]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.prompt_ids) + max(map(len, self.responses))

    @property
    def response_length(self) -> int:
        """Tokens of all responses."""
        return sum(map(len, self.responses))

    @property
    def shared_length(self) -> int:
        """Tokens of the row with its prompt counted once."""
        return len(self.prompt_ids) + self.response_length


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    use_chat_template: bool | str = "auto",
    max_length: int | None = None,
) -> list[Encoded]:
    """Tokenise rows; plain strings become chat messages when the tokenizer has a chat template ("auto") or must have one.

    A row longer than `max_length` tokens loses the oldest of its prompt; one that is still longer, because its responses
    are, is returned as long as it is, but a text without a prompt ends there. Raises `InvalidInput` where a template is needed
    and there is none.
    """
    has_template = tokenizer.chat_template is not None
    if use_chat_template is True and not has_template:
        fix = 'write "use_chat_template": "auto", or start from an instruct model'
        raise InvalidInput([Problem("error", "no-chat-template", "this model has no chat template", fix, "use_chat_template")])
    as_chat = has_template and use_chat_template is not False
    if not as_chat and (lines := tuple(row.line for row in rows if not isinstance(row.responses[0], str))):
        message = f"{len(lines)} rows are chat messages, which need a chat template"
        why = "use_chat_template is false" if has_template else "this model has none: start from an instruct model"
        raise InvalidInput([Problem("error", "messages-without-template", message, why, "use_chat_template", lines=lines)])
    encoded: list[Encoded] = []
    refused: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in rows:
        try:
            is_chat = as_chat and row.prompt != ""  # a text as a whole is no answer to anything
            whole = _encode(row, tokenizer, is_chat)
            encoded.append(whole if max_length is None else _cut(whole, tokenizer, is_chat, max_length))
        except TemplateError as error:  # kept, so that one pass names all rows that the template does not take
            refused[row.file, str(error)].append(row.line)
    if refused:
        fix = "delete these rows, or change their roles to what the model knows"
        raise InvalidInput(
            [
                about_rows(
                    "error", "template-refuses", f"the model's chat template refuses them: {why}", fix, "dataset", file, lines
                )
                for (file, why), lines in refused.items()
            ]
        )
    return encoded


def _encode(row: Row, tokenizer: PreTrainedTokenizerBase, as_chat: bool) -> Encoded:
    if as_chat:
        prompt, followed, is_changed = _rendered(row, tokenizer)
        prompt_ids, *sequences = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, *followed))
    else:
        is_changed = False
        prompt_ids = list(tokenizer(row.prompt)["input_ids"])
        sequences = [_plain(tokenizer, row.prompt, response) for response in row.responses]
    # A token may span the end of the prompt: the responses start where the sequences part from the prompt.
    start = min(_common(prompt_ids, sequence) for sequence in sequences)
    parts = is_changed or start < len(prompt_ids)
    return Encoded(row, prompt_ids[:start], tuple(sequence[start:] for sequence in sequences), parts_early=parts)


def _rendered(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str], bool]:
    """(prompt, prompt with each response, whether the template changes a prompt that a response follows).

    A template may render a prompt otherwise before a response than alone. Where it only ends sooner (no "<think>"), what both
    have in common is the prompt. Where they part before that (Mistral's system message goes), the prompt stays as it is
    when the model is asked, with the responses put after it; else a part of it would be in the loss.
    """
    messages, tools = as_messages(row.prompt, "user"), [dict(tool) for tool in row.tools] or None
    prompt = render(tokenizer, messages, tools, add_generation_prompt=True)
    if tools and prompt == render(tokenizer, messages, None, add_generation_prompt=True):
        raise TemplateError("it does not know tools, and would leave them out")

    def followed_by(response: Text) -> str:
        return render(tokenizer, messages + as_messages(response, "assistant"), tools)

    followed = [followed_by(response) for response in row.responses]
    for response, text in zip(row.responses, followed, strict=True):
        _require_calls(tokenizer, messages, response, tools, text)
    if all(text.startswith(prompt) for text in followed):
        return prompt, followed, False
    one, other = followed_by("A"), followed_by("B")
    before = one[: _common(one, other)]
    if not prompt.startswith(before) and all(text.startswith(before) for text in followed):
        return prompt, [prompt + text.removeprefix(before) for text in followed], True
    return prompt, followed, True


def _require_calls(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], response: Text, tools: list[Any] | None, rendered: str
) -> None:
    """Refuse a response whose tool calls the template leaves out: the model would learn an empty answer."""
    if isinstance(response, list) and any(message.get("tool_calls") for message in response):
        without = [{key: value for key, value in message.items() if key != "tool_calls"} for message in response]
        if rendered == render(tokenizer, prompt + without, tools):
            raise TemplateError("it does not know tool calls, and would leave them out")


def _cut(whole: Encoded, tokenizer: PreTrainedTokenizerBase, as_chat: bool, max_length: int) -> Encoded:
    """The row with as much of its prompt as fits: first the oldest turns go, then the oldest text, last the system message.

    Markers of the template, BOS and the generation prompt stay, and so do both responses.
    """
    if whole.length <= max_length:
        return whole

    def with_prompt(prompt: Text) -> Encoded:
        made = _encode(replace(whole.row, prompt=prompt), tokenizer, as_chat)
        return replace(made, row=whole.row, is_cut=True)

    def fits(prompt: Text) -> bool:
        return with_prompt(prompt).length <= max_length

    prompt = whole.row.prompt
    if not prompt:
        start = whole.responses[0][: max_length - len(whole.prompt_ids)]
        return replace(whole, responses=(start,), is_cut=True)
    if isinstance(prompt, str):
        dropped = _fewest(len(prompt) - 1, lambda count: fits(prompt[count:]))
        return whole if dropped is None else with_prompt(prompt[dropped:])
    system, turns = _turns(prompt)
    kept = _fewest(len(turns) - 1, lambda dropped: fits(_joined(system, turns[dropped:])))
    if kept is not None:
        return with_prompt(_joined(system, turns[kept:]))
    # The last turn alone is too long: text goes, with the system message kept where that is enough.
    first, *after = turns[-1]
    text = str(first["content"])

    def shortened(before: list[Message], count: int) -> list[Message]:
        return [*before, {**first, "content": text[count:]}, *after]

    for before in (system, []):
        shorter = partial(shortened, before)
        dropped = _fewest(len(text) - 1, lambda count: fits(shorter(count)))  # noqa: B023 - called before the next round
        if dropped is not None:
            return with_prompt(shorter(dropped))
    return whole


def _turns(prompt: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """(leading system messages, turns); a turn is a user's message with all that follows until the next one."""
    system = [message for i, message in enumerate(prompt) if all(earlier["role"] == "system" for earlier in prompt[: i + 1])]
    turns: list[list[Message]] = []
    for message in prompt[len(system) :]:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return system, turns or [[]]


def _joined(system: list[Message], turns: Sequence[list[Message]]) -> list[Message]:
    return [*system, *(message for turn in turns for message in turn)]


def _fewest(most: int, fits: Callable[[int], bool]) -> int | None:
    """The smallest count in 0..most for which `fits`, by bisection (what fits goes on fitting); None when none does."""
    if most < 0 or not fits(most):
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


def _plain(tokenizer: PreTrainedTokenizerBase, prompt: Text, response: Text) -> list[int]:
    text = f"{prompt}{response}"
    end = str(tokenizer.eos_token)
    return list(tokenizer(text if text.endswith(end) else text + end)["input_ids"])


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements two sequences start with alike."""
    parting = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(parting, min(len(one), len(other)))
