"""Rows to `Pair`s, `Demonstration`s, `Rating`s and `Question`s, and the checks of each.

The shapes of rows are in row_shapes.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from dpo_cli.data.annotation_exports import Export, export_of
from dpo_cli.data.columns import (
    COMPLETIONS,
    CONVERSATIONS,
    LABEL,
    Columns,
    answered,
    asked,
    system_column,
    tools_column,
    with_history,
)
from dpo_cli.data.comparisons import Layout, layout_of
from dpo_cli.data.messages import (
    BadRow,
    Text,
    Tool,
    flat,
    looks,
    sound,
    system_of,
    text_of,
    tools_of,
)
from dpo_cli.data.ratings import is_good, label_column, unrated
from dpo_cli.data.row_shapes import KEYS, RESPONSE_ROLES, Shape, as_object, fitting, is_swift, renamed, shape_of
from dpo_cli.data.transcripts import answer_to, as_messages, from_last_turn, turns_of
from dpo_cli.strategies.row_kinds import DEMONSTRATIONS, PAIRS, RATINGS, Rows

Written = Mapping[str, object]  # a row of a file
MISSING = {  # by kind: what a row of it has
    DEMONSTRATIONS: "messages, prompt and completion, or text are missing",
    RATINGS: "prompt, completion and label, or a pair, are missing",
}
ALWAYS = {"category": "category", "history": "earlier turns"}  # columns of every shape


class _Texts:
    """What all kinds of rows have in common: a prompt and its responses."""

    __slots__ = ()
    kind: ClassVar[Rows]
    prompt: Text
    tools: tuple[Tool, ...]

    @property
    def responses(self) -> tuple[Text, ...]:
        return tuple(getattr(self, name) for name in self.kind.responses)

    def as_turns(self) -> Self:
        """The row as messages if its prompt is a transcript, else itself."""
        if not isinstance(self.prompt, str) or not (turns := turns_of(self.prompt)):
            return self
        answers = {name: answer_to(self.prompt, getattr(self, name)) for name in self.kind.responses}
        return replace(self, prompt=turns, **answers)  # type: ignore[type-var]

    @property
    def characters(self) -> int:
        """About the length of its texts."""
        return len(flat(self.prompt)) + sum(len(flat(text)) for text in self.responses)

    @property
    def prompt_key(self) -> str:
        """A key that is equal for equal prompts only: a text equals that text as the only message."""
        return _key(self.prompt, self.tools)


@dataclass(frozen=True, slots=True)
class Pair(_Texts):
    """One prompt with its chosen and rejected response; all three strings, or all three lists of messages.

    `line` is its physical line in `file`, from 1 (in Parquet, which has no lines, the number of the row).
    """

    kind = PAIRS
    prompt: Text
    chosen: Text
    rejected: Text
    line: int
    file: str = ""
    tools: tuple[Tool, ...] = ()  # for the chat template
    category: str = ""  # figures are also reported per category


@dataclass(frozen=True, slots=True)
class Demonstration(_Texts):
    """A row of sft: a prompt and its completion, both strings or both lists of messages; places as in `Pair`.

    A whole text is the completion of an empty prompt, and so is a message of an assistant without a prompt.
    """

    kind = DEMONSTRATIONS
    prompt: Text
    completion: Text
    line: int
    file: str = ""
    tools: tuple[Tool, ...] = ()
    category: str = ""

    @property
    def prompt_key(self) -> str:
        """Like that of `Pair`; without a prompt the key is the completion."""
        return _key(self.prompt or self.completion, self.tools)


@dataclass(frozen=True, slots=True)
class Rating(_Texts):
    """A prompt and its answer, which somebody has rated good or bad; texts and places as in `Pair`."""

    kind = RATINGS
    prompt: Text
    completion: Text
    is_good: bool
    line: int
    file: str = ""
    tools: tuple[Tool, ...] = ()
    category: str = ""


Row = Pair | Demonstration | Rating
CLASSES: dict[str, type[Row]] = {PAIRS.noun: Pair, DEMONSTRATIONS.noun: Demonstration, RATINGS.noun: Rating}


def row_to_json(row: Row) -> list[object]:
    """The row as JSON values, with the name of its kind first."""
    return [row.kind.noun, *(getattr(row, name) for name in row.__slots__)]


def row_of_json(value: list[Any]) -> Row:
    """The row of `row_to_json`."""
    kind = CLASSES[value[0]]
    values = dict(zip(kind.__slots__, value[1:], strict=True))
    return kind(**{**values, "tools": tuple(values["tools"])})


def _key(prompt: Text, tools: tuple[Tool, ...]) -> str:
    key: object = prompt
    if isinstance(prompt, list):
        turns = [[message["role"], message["content"], *map(str, message.get("tool_calls") or ())] for message in prompt]
        key = turns[0][1] if len(turns) == 1 and turns[0][0] == "user" else turns
    return json.dumps([key, list(map(str, tools))] if tools else key, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to answer, and a reference answer if its row has one; places and tools as in `Pair`."""

    prompt: Text
    reference: str | None
    line: int
    file: str = ""
    tools: tuple[Tool, ...] = ()

    @property
    def prompt_key(self) -> str:
        """Like `Pair.prompt_key`."""
        return _key(self.prompt, self.tools)

    def with_answers(self, chosen: str, rejected: str) -> Pair:
        """The question as a pair; if the prompt is messages, the answers are too."""
        one, other = ((answer_to(self.prompt, text) if isinstance(self.prompt, list) else text) for text in (chosen, rejected))
        return Pair(self.prompt, one, other, self.line, self.file, self.tools)


def question_of(row: Row) -> Question:
    """The prompt of a row, with its first response as the reference answer."""
    return Question(row.prompt, flat(row.responses[0]), row.line, row.file, row.tools)


@dataclass(frozen=True, slots=True)
class Read:
    """A row of a file as it was read, as one row of its kind or several, and the meanings of its columns."""

    rows: tuple[Row, ...]
    says: str | None
    written: Written  # the row with renamed columns, an export as a flat row
    first: Written  # its first pair in the documented form
    reads: Callable[[], Mapping[str, str]]  # columns and their meanings
    origin: Mapping[str, str] = field(default_factory=dict)  # the columns of the file, for the columns of an export
    suggested: Mapping[str, str] = field(default_factory=dict)  # columns that a machine filled in, and which machine
    of_rows: int = 1  # rows of the file that it was made of


def read_row(row: object, line: int, file: str, columns: Columns | None, kind: Rows = PAIRS) -> Read:
    """Read a parsed row, or raise `BadRow`. A row with several responses becomes a demonstration of the best one, or ratings
    of all: the better one is good, the others are bad."""
    row, columns = as_object(row), columns or {}
    if kind is RATINGS and (rated := read_rating(row, line, file, columns)) is not None:
        return rated
    if kind is DEMONSTRATIONS and (shown := _shown(renamed(row, columns), line, file, "text" in columns)) is not None:
        return shown
    try:
        shape, written, export = _shape_of(row, columns)
    except BadRow as error:
        if kind in MISSING and error.code == "row-missing-key":
            raise BadRow("row-missing-key", MISSING[kind], f"it has {_names(row)}") from error
        raise
    documented = [*shape.rows(written)]
    pairs = [pair_of(each, line, file) for each in documented]
    says = f"{export.tool}, {shape.says}" if export is not None and shape.says else shape.says
    origin = (export.origin if export is not None else None) or {}
    suggested = export.suggested if export is not None else {}
    rows: tuple[Row, ...] = tuple(pairs)
    if kind is DEMONSTRATIONS:
        best = pairs[0]
        rows = (Demonstration(best.prompt, best.chosen, line, file, best.tools, best.category),)
    elif kind is RATINGS:
        rows, says = _rated(pairs), f"{says or 'pairs'}: each response is rated, chosen as good and rejected as bad"
    return Read(rows, says, written, documented[0], lambda: {**_common(written), **shape.reads(written)}, origin, suggested)


def _shape_of(row: Written, columns: Columns) -> tuple[Shape, Written, Export | None]:
    """The shape of a parsed row, the row with the names of that shape, and its export; or `BadRow`."""
    written, export, columns = _flat(row, columns)
    shape = fitting(written, columns, export.answers if export is not None else ())
    if shape is not None:
        return shape, written, export
    absent = {key: columns.get(key, key) for key in KEYS if key not in written}
    missing = [*absent.values()]
    words = {name: f"{name} (columns.{key})" if key in columns else name for key, name in absent.items()}
    reason = " and ".join(f"{words[name]} is {'null' if name in row else 'missing'}" for name in missing)
    advice = '; "columns" can give the names' if any(name not in row for name in missing) else ""
    raise BadRow("row-missing-key", reason, f"it has {_names(row)}{advice}")


def _names(row: Written) -> str:
    """The columns of a row as text."""
    return ", ".join(sorted(f"{name} (null)" if row[name] is None else str(name) for name in row))[:200] or "nothing"


def _flat(row: Written, columns: Columns) -> tuple[Written, Export | None, Columns]:
    """The row with renamed columns, its export, and `columns` with the compared responses of an export."""
    written = renamed(row, columns)
    export = export_of(written) if answered(written) is None else None
    if export is None:
        return written, None, columns
    stated = {"responses": list(export.responses)} if export.responses else {}
    return renamed(export.row, columns), export, {**stated, **columns}


def counted(row: object, columns: Columns) -> tuple[Layout, Written] | None:
    """The comparison of a parsed row if its labels may count from 0 or from 1; else None."""
    written, export, stated = _flat(as_object(row), columns)
    if shape_of(written, stated) is not None:
        return None
    layout = layout_of(written, stated, export.answers if export is not None else ())
    return (layout, written) if layout is not None and layout.counts else None


def to_pairs(row: object, line: int, file: str = "", columns: Columns | None = None) -> tuple[Pair, ...]:
    """A parsed row to its pairs, or `BadRow`."""
    return read_row(row, line, file, columns).rows  # type: ignore[return-value]


def to_pair(row: object, line: int, file: str = "", columns: Columns | None = None) -> Pair:
    """A parsed row to its first pair, or `BadRow`."""
    return to_pairs(row, line, file, columns)[0]


def pair_of(row: Written, line: int, file: str) -> Pair:
    """A row in the documented form to a pair, or `BadRow`."""
    prompt, chosen, rejected = (text_of(row[key], key) for key in KEYS)
    prompt, (chosen, rejected) = from_last_turn(prompt, {"chosen": chosen, "rejected": rejected})
    prompt = _after_start(prompt, row)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("row-mixed-types", "chosen and rejected must both be strings or both be lists of messages")
    if isinstance(prompt, str) != isinstance(chosen, str):  # if one of them is messages, all become messages
        prompt, chosen, rejected = (
            as_messages(prompt, "user"),
            answer_to(prompt, chosen),
            answer_to(prompt, rejected),
        )
    if chosen == rejected or looks(chosen) == looks(rejected):
        raise BadRow("row-identical", "chosen and rejected are identical")
    if isinstance(prompt, list):
        _check_roles(prompt, {"chosen": chosen, "rejected": rejected})
    return Pair(prompt, chosen, rejected, line, file, _tools(row), _category(row))


def to_demonstration(row: object, line: int, file: str = "", columns: Columns | None = None) -> Demonstration:
    """A parsed row for sft to a demonstration, or `BadRow`: messages, prompt and completion, text, or the chosen of a pair."""
    return read_row(row, line, file, columns, DEMONSTRATIONS).rows[0]  # type: ignore[return-value]


def _shown(row: Written, line: int, file: str, is_text: bool) -> Read | None:
    """Read a row that is a demonstration; None for another row. `is_text`: "columns" names a text."""
    learned = _learned(row, is_text)
    if learned is None:
        return None
    asking, answer, reads = learned
    tools, category = _tools(row), _category(row)
    if "text" in reads and isinstance(answer, str):
        shown = Demonstration("", sound(answer, "text"), line, file, category=category)
        return Read((shown,), None, row, row, lambda: {"category": "category", **reads})
    completion = text_of(answer, "completion")
    prompt, (completion,) = from_last_turn(text_of(asking, "prompt") if asking else [], {"completion": completion})
    prompt = _after_start(prompt, row)
    if isinstance(prompt, str) != isinstance(completion, str):
        prompt, completion = as_messages(prompt, "user"), answer_to(prompt, completion)
    if isinstance(completion, list) and "completion" in reads.values():
        _check_roles(prompt, {"completion": completion})
    taken = next(name for name, meaning in reads.items() if meaning != "prompt")
    says = f"demonstrations: {taken} is trained on, and text is not" if isinstance(row.get("text"), str) else None
    return Read((Demonstration(prompt, completion, line, file, tools, category),), says, row, row, lambda: _common(row) | reads)


def read_rating(row: Written, line: int, file: str, columns: Columns) -> Read | None:
    """Read a row with one answer and its label, or raise `BadRow`; None for another row."""
    stated, nulls = columns.get(LABEL), [name for name, value in row.items() if value is None]
    row = renamed(row, columns)
    learned = _learned(row, is_text=False)
    if learned is None or not learned[0]:
        return None
    name = label_column(row)
    if name is None:
        if empty := [one for one in nulls if one == stated or label_column({one: None})]:
            raise unrated(empty[0])
        return None
    shown = _shown(row, line, file, is_text=False)
    assert shown is not None
    (one,) = shown.rows
    rating = Rating(one.prompt, one.responses[0], is_good(row, name, columns), line, file, one.tools, one.category)
    return replace(shown, rows=(rating,), says=None, reads=lambda: {**shown.reads(), name: "rating"})


def _rated(pairs: Sequence[Pair]) -> tuple[Row, ...]:
    """The responses of the pairs of a row, each rated once."""
    rated = {
        json.dumps([looks(text), good]): Rating(pair.prompt, text, good, pair.line, pair.file, pair.tools, pair.category)
        for pair in pairs
        for text, good in ((pair.chosen, True), (pair.rejected, False))
    }
    return tuple(rated.values())


def _learned(row: Written, is_text: bool) -> tuple[object, object, dict[str, str]] | None:
    """(prompt, completion, columns) of a demonstration: from prompt and completion, messages (the last is learned), or a text.

    Next to the others, a text usually repeats them after a template, and would put the prompt into the loss.
    """
    if answered(row) is not None or is_swift(row):
        return None
    text = ("", row["text"], {"text": "text"}) if isinstance(row.get("text"), str) else None
    if is_text and text is not None:
        return text
    asking, completion = asked(row), next((name for name in COMPLETIONS if name in row), None)
    prompted = None
    if asking is not None and completion is not None and asking[1][0] not in CONVERSATIONS:
        prompted = asking[0], row[completion], {**dict.fromkeys(asking[1], "prompt"), completion: "completion"}
    if prompted is not None and "prompt" in row:
        return prompted
    conversation = next((name for name in CONVERSATIONS if name in row), None)
    if conversation is None:
        return prompted or text
    messages = text_of(row[conversation], "messages")
    if isinstance(messages, str) or messages[-1]["role"] != "assistant":
        raise BadRow("row-role", "the messages do not end with an assistant message, so there is nothing to train on")
    return messages[:-1], messages[-1:], {conversation: "messages"}


def to_question(row: object, line: int, file: str = "", columns: Columns | None = None) -> Question:
    """A parsed row to a question, or `BadRow`: a pair's prompt, or a prompt alone; the reference is "reference" or "chosen"."""
    row = renamed(as_object(row), columns or {})
    reference = row.get("reference")
    if reference is not None:
        reference = flat(text_of(reference, "reference"))
    if answered(row) is not None:
        pair = to_pair(row, line, file)
        return Question(pair.prompt, reference or flat(pair.chosen), line, file, pair.tools)
    asking = asked(row)
    if asking is None:
        raise BadRow("row-missing-key", "prompt is missing", f'it has {_names(row)}; "columns" can give the name')
    prompt = _after_start(text_of(asking[0], "prompt"), row)
    if isinstance(prompt, list):
        _require_open(prompt)
    return Question(prompt, reference, line, file, _tools(row))


def _after_start(prompt: Text, row: Written) -> Text:
    """The prompt with the system message and the earlier turns of the row before it, if there are any."""
    prompt = with_history(prompt, row.get("history"))
    system = system_column(row)
    return _with_system(prompt, row[system]) if system is not None else prompt


def _common(row: Written) -> dict[str, str]:
    """The columns that a row of any shape may have, and their meanings."""
    named = {system_column(row): "system", tools_column(row): "tools"}
    return ALWAYS | {name: meaning for name, meaning in named.items() if name is not None}


def _tools(row: Written) -> tuple[Tool, ...]:
    column = tools_column(row)
    return tools_of(row[column]) if column is not None else ()


def _check_roles(prompt: Text, responses: Mapping[str, Any]) -> None:
    for key, messages in responses.items():
        if any(message["role"] not in RESPONSE_ROLES for message in messages):
            raise BadRow("row-role", f"{key} holds a message of another role than {' or '.join(RESPONSE_ROLES)}")
    _require_open(prompt)


def _require_open(prompt: Text) -> None:
    if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        raise BadRow("row-role", "the prompt ends with an assistant message, not with a question")


def _with_system(prompt: Text, system: object) -> Text:
    """The prompt with the system message of the row before it, unless the prompt has its own."""
    text = system_of(system)
    if not text or (isinstance(prompt, list) and prompt[:1] and prompt[0]["role"] == "system"):
        return prompt
    return [{"role": "system", "content": text}, *as_messages(prompt, "user")]


def _category(row: Mapping[str, object]) -> str:
    """A category: a name or a number; any other value of that column is ignored."""
    value = row.get("category")
    return str(value) if isinstance(value, str | int | float) else ""
