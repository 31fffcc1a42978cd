"""Records of annotation tools as flat rows: the fields of the task and the answers of the annotators, under their own names.

Argilla        {"fields": {...}, "responses": ..., "suggestions": ...}, or flat: X.responses, X.suggestion, or lists of values
Label Studio   {"data": {...}, "annotations": [...]} (JSON), or an answer {"selected": "left"} in a cell (JSON-MIN)
LMSYS          prompt, response_a and response_b hold a list with a text for each turn, which a table stores as JSON text

Answers of several annotators are votes: a list. Without any answer a machine's suggestion is used, and that is reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

from dpo_cli.data.columns import Row
from dpo_cli.data.messages import BadRow, list_in

NOT_GIVEN = ("discarded", "draft", "pending")  # Argilla's states of an unfinished answer
ARENA = ("prompt", "response_a", "response_b")
HELD = ("selected", "value", "choices", "rating", "text")  # keys of an answer that hold it


@dataclass(frozen=True, slots=True)
class Export:
    """A record as a flat row."""

    tool: str
    row: Row
    answers: tuple[str, ...]  # columns that an annotator filled in
    responses: tuple[str, ...] = ()  # the compared columns, if the record names them: the left one first
    origin: Mapping[str, str] | None = None  # by column of this row, the column of the file that holds it
    suggested: Mapping[str, str] = field(default_factory=dict)  # answers that no person gave: their columns, and the machine


def export_of(row: Row) -> Export | None:
    """The flat row of a record, None if it is not from a known tool."""
    if isinstance(row.get("fields"), Mapping) and not {"responses", "suggestions"}.isdisjoint(row):
        return _argilla(row)
    if isinstance(row.get("data"), Mapping) and isinstance(row.get("annotations", row.get("completions")), list):
        return _label_studio(row)
    if any(name.endswith((".responses", ".suggestion", "-suggestion")) for name in row):
        return _argilla_table(row)
    if (arena := _arena(row)) is not None:
        return arena
    chosen = {name: _answer(value) for name, value in row.items() if _is_selection(value)}
    return Export("Label Studio", {**row, **chosen}, tuple(chosen)) if chosen else None


def _argilla(row: Row) -> Export:
    """A record written by rg.Dataset.to_json or FeedbackDataset."""
    given: dict[str, list[object]] = {}
    responses = row.get("responses") or {}
    if isinstance(responses, list):  # Argilla 1: an entry for each annotator
        for response in responses:
            if isinstance(response, Mapping) and response.get("status") not in NOT_GIVEN:
                for question, value in _object(response.get("values")).items():
                    given.setdefault(question, []).append(_answer(value))
    elif isinstance(responses, Mapping):
        for question, values in responses.items():
            given[question] = _votes(values)
    given = {question: votes for question, votes in given.items() if votes}
    origin, suggested = dict.fromkeys(given, "responses"), {}
    suggestions = row.get("suggestions") or {}
    if isinstance(suggestions, list):
        suggestions = {str(s.get("question_name") or ""): s for s in suggestions if isinstance(s, Mapping)}
    for question, suggestion in _object(suggestions).items():
        value = _answer(suggestion["value"] if isinstance(suggestion, Mapping) and "value" in suggestion else suggestion)
        if question and value is not None and question not in given:
            given[question], origin[question] = [value], "suggestions"
            suggested[question] = _by("suggestion", _object(suggestion).get("agent"))
    fields = {name: value for name, value in _object(row["fields"]).items() if value is not None}
    answers = {name: votes[0] if len(votes) == 1 else votes for name, votes in given.items() if name not in fields}
    origin |= dict.fromkeys(fields, "fields")
    return Export("Argilla", _ranked({**fields, **answers}, origin), tuple(answers), origin=origin, suggested=suggested)


def _argilla_table(row: Row) -> Export:
    """A record of an Argilla table: fields under their own names, questions with suffixes."""
    rest = {name: value for name, value in row.items() if "." not in name and not name.endswith(("-suggestion", "-metadata"))}
    questions = [
        name.removesuffix(end) for end in (".responses", ".suggestion", "-suggestion") for name in row if name.endswith(end)
    ]
    answers: dict[str, object] = {}
    origin: dict[str, str] = {}
    suggested: dict[str, str] = {}
    for question in dict.fromkeys(questions):
        for column in (f"{question}.responses", question, f"{question}.suggestion", f"{question}-suggestion"):
            states = row.get(f"{question}.responses.status")
            votes = _votes(row[column], states) if row.get(column) is not None else []
            if votes:
                answers[question], origin[question] = votes[0] if len(votes) == 1 else votes, column
                if column.endswith("suggestion"):
                    metadata = _object(row.get(f"{column}-metadata"))
                    suggested[question] = _by("suggestion", row.get(f"{column}.agent", metadata.get("agent")))
                break
    return Export("Argilla", _ranked({**rest, **answers}, origin), tuple(answers), origin=origin, suggested=suggested)


def _votes(values: object, states: object = None) -> list[object]:
    """The answers of the annotators, without discarded ones."""
    values = values if isinstance(values, list) and not _is_ranking(values) else [values]
    states = states if isinstance(states, list) and len(states) == len(values) else [None] * len(values)
    return [
        _answer(value)
        for value, state in zip(values, states, strict=True)
        if value is not None
        and state not in NOT_GIVEN
        and not (isinstance(value, Mapping) and value.get("status") in NOT_GIVEN)
    ]


def _is_ranking(value: object) -> TypeGuard[list[Mapping[str, object]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(part, Mapping) and "rank" in part for part in value)


def _by(what: str, machine: object) -> str:
    """A suggestion or a prediction with the machine that made it, if the record names one."""
    return f"the {what} of {machine}" if isinstance(machine, str) and machine else f"a {what}"


def _ranked(row: dict[str, object], origin: dict[str, str]) -> Row:
    """The row with a ranking, [{"value": "response_1", "rank": 1}, ...], as a rank for each response that it names."""
    for name, value in list(row.items()):
        if _is_ranking(value):
            ranks = {str(part.get("value")): part["rank"] for part in value}
            columns = {other.replace("-", "_"): other for other in row}
            if all(response.replace("-", "_") in columns for response in ranks):
                del row[name]
                for response, rank in ranks.items():
                    column = f"{columns[response.replace('-', '_')]}_rank"
                    row[column], origin[column] = rank, origin.get(name, name)
    return row


def _label_studio(row: Row) -> Export:
    """A task with its annotations (cancelled ones are skipped), or without annotations its predictions."""
    data = {name: value for name, value in _object(row["data"]).items() if value is not None}
    votes: dict[str, list[object]] = {}
    compared: tuple[str, ...] = ()
    given = [a for a in _objects(row.get("annotations", row.get("completions"))) if not a.get("was_cancelled")]
    machines: dict[str, str] = {}
    for annotation in given or _objects(row.get("predictions")):
        for result in _objects(annotation.get("result")):
            if isinstance(result.get("value"), Mapping):
                votes.setdefault(str(result.get("from_name")), []).append(_answer(result["value"]))
                machines[str(result.get("from_name"))] = _by("prediction", annotation.get("model_version"))
                names = result.get("to_name")
                if isinstance(names, str):
                    names = names.split(",")
                if (
                    isinstance(names, list)
                    and len(names) == 2
                    and all(isinstance(name, str) and name in data for name in names)
                ):
                    compared = tuple(names)
    answers = {name: values[0] if len(values) == 1 else values for name, values in votes.items()}
    asked = "completions" if "annotations" not in row else "annotations"
    origin = {**dict.fromkeys(data, "data"), **dict.fromkeys(answers, asked if given else "predictions")}
    return Export("Label Studio", {**data, **answers}, tuple(answers), compared, origin, {} if given else machines)


def _arena(row: Row) -> Export | None:
    """A conversation with two models: the turns before the last answers are the prompt, if both models share them."""
    questions, *both = (_texts(row.get(name)) for name in ARENA)
    if not questions or not all(answers and len(answers) == len(questions) for answers in both):
        return None
    one, other = both
    if one[:-1] != other[:-1]:
        reason = "the two conversations differ before their last answer, so their prompts differ"
        raise BadRow("row-role", reason)
    asked = [{"role": "user", "content": text} for text in questions]
    answered = [{"role": "assistant", "content": text} for text in one[:-1]]
    turns = [turn for both in zip(asked, answered, strict=False) for turn in both]
    prompt = [*turns, asked[-1]] if turns else questions[0]
    return Export("LMSYS", {**row, **dict(zip(ARENA, (prompt, one[-1], other[-1]), strict=True))}, ())


def _texts(value: object) -> list[str]:
    """The texts of a list, also of a list stored as JSON text; empty for anything else."""
    value = list_in(value)
    if not isinstance(value, list) or not all(text is None or isinstance(text, str) for text in value):
        return []
    return [text or "" for text in value]


def _object(value: object) -> Mapping[str, object]:
    """The value if it is an object, else an empty object."""
    return value if isinstance(value, Mapping) else {}


def _objects(values: object) -> list[Mapping[str, object]]:
    """The objects of a list."""
    return [value for value in values if isinstance(value, Mapping)] if isinstance(values, list) else []


def _unquoted(value: object) -> object:
    """A Label Studio answer that a cell holds as the text of JSON; any other value as it is."""
    if isinstance(value, str) and '"selected"' in value[:40]:
        try:
            return json.loads(value)
        except (ValueError, RecursionError):  # a text that is not JSON
            return value
    return value


def _is_selection(value: object) -> bool:
    """Whether a value is a Label Studio answer to "which is better", as JSON-MIN or as text in a cell."""
    value = _unquoted(value)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return isinstance(value, Mapping) and isinstance(value.get("selected"), str)


def _answer(value: object) -> object:
    """An answer without its wrappers."""
    value = _unquoted(value)
    if isinstance(value, list) and len(value) == 1 and not _is_ranking(value):
        value = value[0]
    if isinstance(value, Mapping):
        held = next((value[key] for key in HELD if value.get(key) is not None), None)
        return _answer(held) if held is not None else value
    return value
