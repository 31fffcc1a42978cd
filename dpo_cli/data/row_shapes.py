"""Shapes of rows with pairs. The keys of a row show its shape; any shape but the first is reported:

prompt  chosen  rejected                 strings, or lists of {"role", "content"} messages: the documented shape
prompt  chosen  rejected                 conversations: the responses repeat the prompt as messages
        chosen  rejected                 implicit prompt: both start with it
conversations  chosen  rejected          ShareGPT: {"from", "value"}; or messages
[system]  question  chosen  rejected     or instruction [input], or query
response_a  response_b  chosen  rejected names of two responses: {"chosen": "response_b", "rejected": "response_a"}
messages  rejected_response              ms-swift: the last message is chosen; or rejected_messages
input  preferred_output  ...             preference files of OpenAI

Rows with several responses are in comparisons.py, records of annotation tools in annotation_exports.py, and names of columns
in columns.py. A row may make several pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TypeGuard

from dpo_cli.data.columns import CONVERSATIONS, OURS, QUESTIONS, SCORES, Columns, Row, answered, asked
from dpo_cli.data.comparisons import LISTS, Layout, layout_of, members_named
from dpo_cli.data.messages import BadRow, list_in, parsed, role_of, text_of
from dpo_cli.data.transcripts import answer_to, parted

Parts = tuple[object, object, object]  # prompt, chosen, rejected, not checked yet

KEYS = ("prompt", "chosen", "rejected")
LIST_COLUMNS = (*LISTS, *SCORES, "history")  # lists that a table stores as text
RESPONSE_ROLES = ("assistant", "tool")  # anything else in a response would put part of a prompt into the loss


@dataclass(frozen=True)
class Shape:
    """A shape of rows: its description for the user, which rows have it, and the pairs of a row in the documented form."""

    says: str | None
    fits: Callable[[Row], bool]
    rows: Callable[[Row], Iterable[Row]]  # each with prompt, chosen and rejected
    reads: Callable[[Row], Mapping[str, str]]  # its columns and their meanings


def as_object(row: object) -> Row:
    """A parsed row, or `BadRow` if it is not an object."""
    if isinstance(row, list):
        raise BadRow("row-not-object", "a list, not an object: rename a file that is one list of rows to .json")
    if not isinstance(row, Mapping):
        raise BadRow("row-not-object", "not a JSON object")
    return row


def renamed(row: Row, columns: Columns) -> Row:
    """The row without nulls, with its `columns` renamed, and with lists that are stored as text."""
    known: Row = {name: parsed(value) if isinstance(value, str) else value for name, value in row.items() if value is not None}
    lists = {*LIST_COLUMNS, *_each(columns.get("responses")), *_each(columns.get("scores"))}
    known = {name: list_in(value) if name in lists else value for name, value in known.items()}
    theirs = {name: column for name, column in columns.items() if name not in OURS and column in known}
    if not theirs:
        return known
    taken = set(theirs.values())
    return {**{name: value for name, value in known.items() if name not in taken}, **{n: known[c] for n, c in theirs.items()}}


def fitting(row: Row, columns: Columns, labels: tuple[str, ...] = ()) -> Shape | None:
    """The shape of a row; a comparison if no listed shape fits. `labels` are columns that may be its label."""
    if any(name in columns and name not in row for name in KEYS):
        return None
    if (shape := shape_of(row, columns)) is not None:
        return shape
    layout = layout_of(row, columns, labels)
    return _of_layout(layout) if layout is not None else None


def shape_of(row: Row, columns: Columns) -> Shape | None:
    """The shape of a row that is not a comparison; None if `columns` says that it is one."""
    return next((shape for shape in SHAPES if shape.fits(row)), None) if "responses" not in columns else None


def _of_layout(layout: Layout) -> Shape:
    def rows(row: Row) -> Iterator[Row]:
        for pair in layout.rows(row):
            yield pair if "prompt" in pair else {**pair, **dict(zip(KEYS, _common_start(pair), strict=True))}

    return Shape(layout.says, lambda row: True, rows, lambda row: layout.reads)


def _are_messages(value: object) -> TypeGuard[list[Mapping[str, object]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)


def _repeats_prompt(row: Mapping[str, object]) -> bool:
    """Whether both responses are conversations that start with a user or system message."""
    both = [row[name] for name in answered(row) or ()]
    if "prompt" not in row and any(name in row for name in CONVERSATIONS):
        return False
    roles = [[role_of(message) for message in value] for value in both if _are_messages(value)]
    return len(roles) == len(both) and all(said[0] not in RESPONSE_ROLES and "assistant" in said for said in roles)


def _common_start(row: Mapping[str, object]) -> Parts:
    """Split both responses into their common start, the prompt, and the rest; strings are split at a space, as TRL does.

    For transcripts ("Human:", "Assistant:" and the like) the prompt ends where the differing answer starts.
    """
    chosen, rejected = (text_of(row[name], name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadRow("row-identical", "chosen and rejected are identical")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("row-mixed-types", "chosen and rejected must both be strings or both be lists of messages")
    parting = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    start = next(parting, min(len(chosen), len(rejected)))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if (parts := parted(chosen, rejected, start)) is not None:
            return parts
        start -= start > 0 and chosen[start - 1] == " "
        is_turn = "\n" in chosen[:start] or chosen[:start].rstrip().endswith((":", "?"))
        start = start if is_turn else 0  # else two answers with the same first words
    if start == 0:
        raise BadRow("row-no-prompt", "there is no prompt, and chosen and rejected have no common start")
    return chosen[:start], chosen[start:], rejected[start:]


def _plain(row: Row) -> Iterator[Row]:
    """The pairs of a row with a prompt, a better and a worse response; a list of texts means several responses."""
    better, worse = answered(row) or KEYS[1:]
    prompt, used = asked(row) or ("", ())
    chosen, rejected = row[better], row[worse]
    if isinstance(chosen, str) and isinstance(rejected, str) and (*used, better, worse) == KEYS:
        yield row  # nearly every row: not copied
        return
    for one, other in product(_each(chosen), _each(rejected)):
        yield {**row, "prompt": prompt, "chosen": one, "rejected": other}


def _each(value: object) -> list[object]:
    """The texts of a list of texts; any other value is one response."""
    return value if isinstance(value, list) and value and all(isinstance(text, str) for text in value) else [value]


def _plain_reads(row: Row) -> dict[str, str]:
    better, worse = answered(row) or KEYS[1:]
    _, used = asked(row) or ("", ())
    return {**dict.fromkeys(used, "prompt"), better: "chosen", worse: "rejected"}


def _implicit(row: Row) -> Iterator[Row]:
    """The pair of a row whose responses start with the prompt."""
    better, worse = answered(row) or KEYS[1:]
    parts = _common_start({**row, "chosen": row[better], "rejected": row[worse]})
    yield {**row, **dict(zip(KEYS, parts, strict=True))}


def _implicit_reads(row: Row) -> dict[str, str]:
    better, worse = answered(row) or KEYS[1:]
    repeated = {"prompt": "prompt, repeated"} if "prompt" in row else {}
    return {**repeated, better: "prompt and chosen", worse: "prompt and rejected"}


def _rejected_of(row: Row) -> str | None:
    """The column of the rejected response of an ms-swift row."""
    return next((name for name in ("rejected_response", "rejected_messages", "rejected") if name in row), None)


def is_swift(row: Row) -> bool:
    """Whether a conversation ends with the chosen response, and another column holds the rejected one."""
    return _rejected_of(row) is not None and "chosen" not in row and any(name in row for name in CONVERSATIONS)


def _conversation_of(row: Row) -> str:
    return next(name for name in CONVERSATIONS if name in row)


def _swift(row: Row) -> Iterator[Row]:
    name = _conversation_of(row)
    messages = text_of(row[name], name)
    rejected = row[_rejected_of(row) or ""]
    base = {key: value for key, value in row.items() if key not in CONVERSATIONS}
    if isinstance(messages, str) or messages[-1]["role"] != "assistant":
        raise BadRow("row-role", f"{name} does not end with an assistant message, which would be the chosen response")
    if _are_messages(rejected) and role_of(rejected[0]) != "assistant":
        parts = _common_start({"chosen": messages, "rejected": rejected})
        yield {**base, **dict(zip(KEYS, parts, strict=True))}
        return
    for other in _each(rejected):
        yield {**base, "prompt": messages[:-1], "chosen": messages[-1:], "rejected": answer_to("", text_of(other, "rejected"))}


def _openai(row: Row) -> Iterator[Row]:
    asking = row["input"]
    tools: dict[str, object] = {}
    if isinstance(asking, Mapping) and "messages" in asking:
        tools = {"tools": asking["tools"]} if asking.get("tools") else {}
        asking = asking["messages"]
    yield {**row, **tools, "prompt": asking, "chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}


def _can_be_implicit(row: Row) -> bool:
    """Whether only the responses can hold the prompt: no other column is text."""
    pair = answered(row)
    if pair is None or not isinstance(row[pair[0]], str):
        return pair is not None
    return not any(isinstance(value, str) and value.strip() for key, value in row.items() if key not in (*pair, "prompt"))


def _members(row: Row) -> tuple[str, ...] | None:
    """The columns of the two responses, if chosen and rejected are names of columns."""
    if len(row) < 4 or "chosen" not in row or "rejected" not in row:  # such a row has two more columns, unlike nearly all rows
        return None
    return members_named(row, [row["chosen"], row["rejected"]])


def _by_name(row: Row) -> Iterator[Row]:
    """The pair of a row where chosen and rejected name two of its responses."""
    members = _members(row) or ()
    base = {name: value for name, value in row.items() if name not in members}
    pair = {**base, "chosen": row[members[0]], "rejected": row[members[1]]}
    shape = shape_of(pair, {})
    if shape is None:
        raise BadRow("row-no-prompt", "there is no prompt, and the responses have no common start")
    yield from shape.rows(pair)


def _by_name_reads(row: Row) -> dict[str, str]:
    members = _members(row) or ()
    asking = dict.fromkeys((asked(row) or ("", ()))[1], "prompt")
    return {**asking, **dict.fromkeys(members, "response"), "chosen": "label", "rejected": "label"}


SHAPES = (
    Shape(
        "names: chosen and rejected name two of the responses",
        lambda row: _members(row) is not None,
        _by_name,
        _by_name_reads,
    ),
    Shape(
        "conversations: the prompt is the common start of chosen and rejected",
        lambda row: isinstance(row.get("chosen"), list) and "rejected" in row and _repeats_prompt(row),
        _implicit,
        _implicit_reads,
    ),
    Shape(
        "prompt and input: the prompt is prompt, followed by input (or context)",
        lambda row: (
            "prompt" in row
            and ("input" in row or "context" in row)
            and answered(row) is not None
            and len((asked(row) or ("", ()))[1]) > 1
        ),
        _plain,
        _plain_reads,
    ),
    Shape(None, lambda row: "prompt" in row and answered(row) is not None, _plain, _plain_reads),
    Shape(
        "ShareGPT: the prompt is conversations (or messages); human is user, gpt is assistant",
        lambda row: answered(row) is not None and any(name in row for name in CONVERSATIONS),
        _plain,
        _plain_reads,
    ),
    Shape(
        "question: the prompt is system (if given), question (or instruction, query, input), and input (if given)",
        lambda row: answered(row) is not None and any(name in row for name in QUESTIONS),
        _plain,
        _plain_reads,
    ),
    Shape(
        "implicit prompt: the prompt is the common start of chosen and rejected",
        _can_be_implicit,
        _implicit,
        _implicit_reads,
    ),
    Shape(
        "ms-swift: the last of messages is chosen, rejected_response (or rejected_messages) is rejected",
        is_swift,
        _swift,
        lambda row: {_conversation_of(row): "prompt and chosen", _rejected_of(row) or "": "rejected"},
    ),
    Shape(
        "OpenAI preferences: preferred_output is chosen, non_preferred_output is rejected",
        lambda row: "input" in row and "preferred_output" in row and "non_preferred_output" in row,
        _openai,
        lambda row: {"input": "prompt", "preferred_output": "chosen", "non_preferred_output": "rejected"},
    ),
)
