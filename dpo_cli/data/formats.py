"""Rows as people write them, to `Pair`s. The shape of a row is known by its keys; any but the first is said aloud:

prompt  chosen  rejected                 strings, or lists of {"role", "content"} messages: the documented one
prompt  chosen  rejected                 conversations: the responses repeat the prompt as messages
        chosen  rejected                 implicit prompt: both start with it
conversations  chosen  rejected          ShareGPT: {"from", "value"}; or messages
[system]  question  chosen  rejected     or instruction [input], or query

Longer than other modules, since a shape, its check and its words belong together: who adds one finds all three here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_cli.data.messages import (
    ROLES,
    TURN,
    BadRow,
    Text,
    answer_to,
    as_messages,
    flat,
    parsed,
    sound,
    system_of,
    text_of,
    tools_of,
    turns_of,
)

Parts = tuple[Any, Any, Any]  # prompt, chosen, rejected, not checked yet

KEYS = ("prompt", "chosen", "rejected")
RESPONSE_ROLES = ("assistant", "tool")  # anything else in a response would put part of a prompt into the loss
QUESTIONS = ("question", "instruction", "query", "input")
CONVERSATIONS = ("conversations", "messages")


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt with its chosen and rejected response; all three strings, or all three lists of messages.

    `line` is the physical line of `file` it stands on, from 1 (in Parquet, which has no lines, the number of the row).
    """

    prompt: Text
    chosen: Text
    rejected: Text
    line: int
    file: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()  # that the chat template is told of
    category: str = ""  # by which figures are told apart

    @property
    def responses(self) -> tuple[Text, ...]:
        return self.chosen, self.rejected

    @property
    def prompt_key(self) -> str:
        """The same for two pairs exactly when their prompts are: a text and that text as the only message are one prompt."""
        return _key(self.prompt, self.tools)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What sft trains on: a prompt and its completion, both strings or both lists of messages; places as in `Pair`.

    A text as a whole is a completion to an empty prompt, and so is what an assistant says unasked.
    """

    prompt: Text
    completion: Text
    line: int
    file: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    category: str = ""

    @property
    def responses(self) -> tuple[Text, ...]:
        return (self.completion,)

    @property
    def prompt_key(self) -> str:
        """As of a pair; what has no prompt is told apart by its text."""
        return _key(self.prompt or self.completion, self.tools)


Row = Pair | Demonstration


def _key(prompt: Any, tools: tuple[Mapping[str, Any], ...]) -> str:
    if isinstance(prompt, list):
        prompt = [[message["role"], message["content"], *map(str, message.get("tool_calls") or ())] for message in prompt]
        prompt = prompt[0][1] if len(prompt) == 1 and prompt[0][0] == "user" else prompt
    return json.dumps([prompt, list(map(str, tools))] if tools else prompt, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to answer, and an answer to compare with where its row has one; places and tools as in `Pair`."""

    prompt: Text
    reference: str | None
    line: int
    file: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    def with_answers(self, chosen: str, rejected: str) -> Pair:
        """The question as a pair: answers to messages are messages."""
        one, other = ((answer_to(self.prompt, text) if isinstance(self.prompt, list) else text) for text in (chosen, rejected))
        return Pair(self.prompt, one, other, self.line, self.file, self.tools)


@dataclass(frozen=True)
class Shape:
    """A way to write a pair: how it is told to the user, which rows are written so, and where their parts are."""

    says: str | None
    fits: Callable[[Mapping[str, Any]], bool]
    parts: Callable[[Mapping[str, Any]], Parts]


def shape_of(row: Any, columns: Mapping[str, str] | None = None) -> tuple[Shape, Mapping[str, Any]]:
    """The shape of a parsed row, and the row with its `columns` under the names of the shape; or `BadRow`."""
    row = _renamed(row, columns := columns or {})
    if all(name in row for name in KEYS if name in columns):
        for shape in SHAPES:
            if shape.fits(row):
                return shape, row
    missing = [columns.get(key, key) for key in KEYS if key not in row]
    found = ", ".join(sorted(map(str, row.keys() - columns.keys())))[:200] or "nothing"
    reason = f"no {' and no '.join(missing)}"
    raise BadRow("row-missing-key", reason, f'which has {found}; "columns" can say what they are called')


def _renamed(row: Any, columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The row as an object without nulls, with its `columns` under our names, and lists of messages that are stored as text."""
    if isinstance(row, list):
        raise BadRow("row-not-object", "a list, not an object: a file that is one list of rows is called .json")
    if not isinstance(row, Mapping):
        raise BadRow("row-not-object", "not a JSON object")
    row = {name: parsed(value) if isinstance(value, str) else value for name, value in row.items() if value is not None}
    return {**row, **{name: row[theirs] for name, theirs in columns.items() if theirs in row}} if columns else row


def to_pair(row: Any, line: int, file: str = "", columns: Mapping[str, str] | None = None) -> Pair:
    """A parsed row to a pair, or `BadRow`."""
    return pair_of(*shape_of(row, columns), line, file)


def pair_of(shape: Shape, row: Mapping[str, Any], line: int, file: str) -> Pair:
    """A row of a known shape to a pair, or `BadRow`."""
    prompt, chosen, rejected = map(text_of, shape.parts(row), KEYS)
    prompt = _with_system(prompt, row.get("system"))
    if row.get("history"):
        raise BadRow("row-history", 'earlier turns stand in "history", which is not read: write them as messages of the prompt')
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("row-mixed-types", "chosen and rejected must both be strings, or both be message lists")
    if isinstance(prompt, str) != isinstance(chosen, str):  # one of them in messages: then all are
        prompt, chosen, rejected = (
            as_messages(prompt, "user"),
            answer_to(prompt, chosen),
            answer_to(prompt, rejected),
        )
    if chosen == rejected:
        raise BadRow("row-identical", "chosen and rejected are identical")
    if isinstance(prompt, list):
        _check_roles(prompt, {"chosen": chosen, "rejected": rejected})
    return Pair(prompt, chosen, rejected, line, file, tools_of(row.get("tools")), _category(row))


def to_demonstration(row: Any, line: int, file: str = "", columns: Mapping[str, str] | None = None) -> Demonstration:
    """A parsed row of an sft set to a demonstration, or `BadRow`: messages, prompt + completion, text, or a pair's chosen."""
    row = _renamed(row, columns or {})
    if _responses(row):
        pair = to_pair(row, line, file)
        return Demonstration(pair.prompt, pair.chosen, line, file, pair.tools, pair.category)
    tools, category = tools_of(row.get("tools")), _category(row)
    if "prompt" in row and "completion" in row:
        prompt, completion = (
            _with_system(text_of(row["prompt"], "prompt"), row.get("system")),
            text_of(row["completion"], "completion"),
        )
        if isinstance(prompt, str) != isinstance(completion, str):
            prompt, completion = as_messages(prompt, "user"), answer_to(prompt, completion)
        if isinstance(completion, list):
            _check_roles(prompt, {"completion": completion})
        return Demonstration(prompt, completion, line, file, tools, category)
    if isinstance(row.get("text"), str):
        return Demonstration("", sound(row["text"], "text"), line, file, category=category)
    conversation = next((row[name] for name in CONVERSATIONS if name in row), None)
    if conversation is None:
        found = ", ".join(sorted(map(str, row)))[:200] or "nothing"
        raise BadRow("row-missing-key", "neither messages, nor prompt and completion, nor text", f"which has {found}")
    messages = text_of(conversation, "messages")
    if isinstance(messages, str) or messages[-1]["role"] != "assistant":
        raise BadRow("row-role", "the messages do not end with the assistant's, so there is nothing to learn")
    return Demonstration(_with_system(messages[:-1], row.get("system")), messages[-1:], line, file, tools, category)


def to_question(row: Any, line: int, file: str = "", columns: Mapping[str, str] | None = None) -> Question:
    """A parsed row to a question, or `BadRow`: a pair's prompt, or "prompt" alone; the reference is "reference" or "chosen"."""
    row = _renamed(row, columns or {})
    reference = row.get("reference")
    if reference is not None:
        reference = flat(text_of(reference, "reference"))
    if _responses(row):
        pair = to_pair(row, line, file)
        return Question(pair.prompt, reference or flat(pair.chosen), line, file, pair.tools)
    if "prompt" not in row:
        found = ", ".join(sorted(map(str, row)))[:200] or "nothing"
        raise BadRow("row-missing-key", "no prompt", f'which has {found}; "columns" can say what it is called')
    prompt = _with_system(text_of(row["prompt"], "prompt"), row.get("system"))
    if isinstance(prompt, list):
        _require_open(prompt)
    return Question(prompt, reference, line, file, tools_of(row.get("tools")))


def _check_roles(prompt: Text, responses: Mapping[str, Any]) -> None:
    for key, messages in responses.items():
        if any(message["role"] not in RESPONSE_ROLES for message in messages):
            raise BadRow("row-role", f"{key} holds a message of another role than {' or '.join(RESPONSE_ROLES)}")
    _require_open(prompt)


def _require_open(prompt: Text) -> None:
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise BadRow("row-role", "the prompt ends with an assistant message, so there is nothing to answer")


def _with_system(prompt: Text, system: Any) -> Text:
    """The prompt after the system message of the row, where it has one and the prompt does not."""
    text = system_of(system)
    if not text or (isinstance(prompt, list) and prompt[:1] and prompt[0]["role"] == "system"):
        return prompt
    return [{"role": "system", "content": text}, *as_messages(prompt, "user")]


def _category(row: Mapping[str, Any]) -> str:
    """A name or a number; anything else that sets call so is no category."""
    value = row.get("category")
    return str(value) if isinstance(value, str | int | float) else ""


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _responses(row: Mapping[str, Any]) -> bool:
    return "chosen" in row and "rejected" in row


def _repeats_prompt(row: Mapping[str, Any]) -> bool:
    """Whether both responses are conversations from their first user or system message on."""
    both = (row["chosen"], row["rejected"])
    if "prompt" not in row and any(name in row for name in CONVERSATIONS):
        return False
    if not all(map(_are_messages, both)):
        return False
    roles = [
        [ROLES.get(role, role) for message in value for role in [message.get("role", message.get("from"))]] for value in both
    ]
    return all(said[0] not in RESPONSE_ROLES and "assistant" in said for said in roles)


def _common_start(row: Mapping[str, Any]) -> Parts:
    """Both responses without what they have in common, which is the prompt; of strings, up to a space (as TRL does).

    Of transcripts ("Human:", "Assistant:") the prompt is all up to the answer in which they part.
    """
    chosen, rejected = (text_of(row[name], name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadRow("row-identical", "chosen and rejected are identical")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("row-mixed-types", "chosen and rejected must both be strings, or both be message lists")
    parting = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    start = next(parting, min(len(chosen), len(rejected)))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if turns_of(chosen) and turns_of(rejected):
            return _parted(chosen, rejected, start)
        start -= start > 0 and chosen[start - 1] == " "
        is_turn = "\n" in chosen[:start] or chosen[:start].rstrip().endswith((":", "?"))
        start = start if is_turn else 0  # else two answers that happen to start alike
    if start == 0:
        raise BadRow("row-no-prompt", "there is no prompt, and chosen and rejected do not start alike")
    return chosen[:start], chosen[start:], rejected[start:]


def _parted(chosen: str, rejected: str, start: int) -> Parts:
    """Two transcripts that part at `start`: the prompt ends with the "Assistant:" of the answers in which they part."""
    turn = next((turn for turn in reversed([*TURN.finditer(chosen, 0, start)])), None)
    answers = (chosen[turn.end(1) + 1 :], rejected[turn.end(1) + 1 :]) if turn else (chosen, rejected)
    if turn is None or turn[1] != "Assistant" or any(TURN.search(answer) for answer in answers):
        raise BadRow("row-role", "the two transcripts part before their last answer, so one of them holds another question")
    return chosen[: turn.end(1) + 1], *answers


def _question(row: Mapping[str, Any]) -> Parts:
    """A question, or an instruction with its input as Alpaca has it."""
    text = next(row[name] for name in QUESTIONS if name in row)
    if text is not row.get("input") and isinstance(text, str) and isinstance(row.get("input"), str) and row["input"].strip():
        text = f"{text}\n{row['input']}"
    return text, row["chosen"], row["rejected"]


def _has_no_other_text(row: Mapping[str, Any]) -> bool:
    """Whether only chosen and rejected are text, so that no other column can be the prompt."""
    return not any(isinstance(value, str) and value.strip() for key, value in row.items() if key not in KEYS)


SHAPES = (
    Shape(
        "conversations: chosen and rejected repeat the prompt, which is what they start with",
        lambda row: isinstance(row.get("chosen"), list) and "rejected" in row and _repeats_prompt(row),
        _common_start,
    ),
    Shape(None, lambda row: _responses(row) and "prompt" in row, lambda row: (row["prompt"], row["chosen"], row["rejected"])),
    Shape(
        "ShareGPT: the prompt is conversations (or messages); human is user, gpt is assistant",
        lambda row: _responses(row) and any(name in row for name in CONVERSATIONS),
        lambda row: (next(row[name] for name in CONVERSATIONS if name in row), row["chosen"], row["rejected"]),
    ),
    Shape(
        "question: the prompt is question (or instruction, query, input), after system where there is one",
        lambda row: _responses(row) and any(name in row for name in QUESTIONS),
        _question,
    ),
    Shape(
        "implicit prompt: the prompt is what chosen and rejected start with",
        lambda row: _responses(row) and (not isinstance(row["chosen"], str) or _has_no_other_text(row)),
        _common_start,
    ),
)
