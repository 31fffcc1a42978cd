"""Logs of requests to a model, in the form of OpenAI's API, to rated answers: prompt, answer, and the feedback of a user.

{"messages": [...], "response": {"choices": [...]}, "feedback": "up"}            a request with its response
{"request": {"body": {...}}, "response": {"body": {...}}, "feedback": {...}}      a proxy's log
{"input": [...], "output": [...], "metadata": {"feedback": 1}}                     stored responses, traces

The feedback is a column with a usual name of a label (data/ratings.py), here or within `feedback`, `metadata` or `response`, or
an entry of `scores` with such a name. Requests without one, and those that failed, say nothing, and are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_cli.data import files
from dpo_cli.data.columns import LABEL, Columns
from dpo_cli.data.messages import BadRow
from dpo_cli.data.ratings import UNRATED, label_column
from dpo_cli.data.row_shapes import as_object
from dpo_cli.data.rows import Rating, read_rating

FAILED, CUT, SEVERAL = "request-failed", "answer-cut", "several-answers"
Log = Mapping[str, Any]
# Where a request has its prompt, its answer and its tools; the first one that there is.
PROMPTS = (
    *(("request", "body", "messages"), ("request", "body", "input"), ("request", "messages"), ("request", "input")),
    *(("body", "messages"), ("body", "input"), ("messages",), ("input", "messages"), ("inputs", "messages")),
    *(("request", "prompt"), ("prompt",), ("input",), ("inputs",)),
)
ANSWERS = (
    *(("response", "body", "choices"), ("response", "body", "output"), ("response", "choices"), ("response", "output")),
    *(("output", "choices"), ("outputs", "choices"), ("choices",), ("output",), ("outputs",), ("response",)),
    *(("completion",), ("answer",)),
)
TOOLS = (("request", "body", "tools"), ("request", "tools"), ("body", "tools"), ("tools",))
FEEDBACK = (("feedback",), ("metadata",), ("response",), ("response", "feedback"), ("metadata", "feedback"))
ERRORS = (("error",), ("response", "error"), ("response", "body", "error"))
STATUS = (("response", "status_code"), ("response", "status"), ("status_code",))
ABOUT = {  # of a request, for its provenance
    "id": (("id",), ("request_id",), ("response", "id"), ("response", "body", "id"), ("custom_id",)),
    "model": (
        ("response", "model"),
        ("response", "body", "model"),
        ("request", "model"),
        ("request", "body", "model"),
        ("model",),
    ),
    "time": (
        ("created",),
        ("timestamp",),
        ("time",),
        ("created_at",),
        ("response", "created"),
        ("response", "body", "created"),
    ),
}
VALUES = ("rating", "value", "score", "thumb", "type")  # of a feedback that is an object


def rated_requests(path: str, columns: Columns) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Each request of a log, with its line: a rated answer as a row of a dataset with its provenance, or why it is none.

    `columns` may name the column of the feedback ("label") and its values ("labels").
    """

    def read_one(row: object, line: int) -> dict[str, Any]:
        return rated(as_object(row), line, path, columns)

    yield from files.read_rows(path, read_one)


def rated(log: Log, line: int, file: str, columns: Columns) -> dict[str, Any]:
    """The row of one request, or `BadRow`."""
    if any(_at(log, ERRORS)) or any(isinstance(code, int) and code >= 400 for code in _at(log, STATUS)):
        raise BadRow(FAILED, "the request failed")
    prompt = next((value for value in _at(log, PROMPTS) if value), None)
    if prompt is None:
        raise BadRow("row-missing-key", "the request has no messages, prompt or input", f"it has {', '.join(log)[:200]}")
    answer, is_cut = _answer(next((value for value in _at(log, ANSWERS) if value), None), log)
    row: dict[str, Any] = {"prompt": _messages(prompt), "completion": answer}
    if tools := next((value for value in _at(log, TOOLS) if value), None):
        row["tools"] = tools
    stated = {name: value for name, value in columns.items() if name == "labels"}
    read = read_rating({**row, **_feedback(log, columns)}, line, file, stated)
    rating = read.rows[0] if read is not None else None
    if not isinstance(rating, Rating):
        raise BadRow("row-missing-key", "the request has no prompt, answer or feedback")
    if is_cut and rating.is_good:
        raise BadRow(CUT, "the answer was cut at the limit of tokens, so it is not a good example of where to stop")
    about = {name: found for name, places in ABOUT.items() if (found := next(_at(log, places), None)) is not None}
    return {**row, LABEL: rating.is_good, "provenance": {"source": f"{file}:{line}", **about}}


def _at(log: Log, places: Sequence[Sequence[str]]) -> Iterator[Any]:
    """What a request has at these places, without nulls."""
    for place in places:
        value: Any = log
        for key in place:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            yield value


def _messages(prompt: Any) -> Any:
    """A prompt as messages: OpenAI's Responses API has items, and parts called input_text."""
    items = (
        prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [prompt]
    )
    return [_message(item) if isinstance(item, Mapping) else item for item in items]


def _message(item: Log) -> dict[str, Any]:
    return {
        **{key: value for key, value in item.items() if key not in ("type", "id", "status")},
        "content": _text(item.get("content")),
    }


def _text(content: Any) -> Any:
    """The text of parts that hold only text; anything else as it is."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    return content


def _answer(value: Any, log: Log) -> tuple[list[Any], bool]:
    """The answer as a list of one message, and whether it was cut at the limit of tokens."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        messages = [item for item in value if item.get("type") == "message" or "role" in item]
        choices = [item for item in value if "message" in item or "text" in item]
        if len(choices) > 1:
            raise BadRow(SEVERAL, "the response has several answers, and one feedback")
        if choices:
            own = choices[0].get("message") or {"content": choices[0].get("text")}
            return [{"role": "assistant", **_message(own)}], choices[0].get("finish_reason") == "length"
        if messages:
            cut = any(reason == "max_output_tokens" for reason in _at(log, (("response", "incomplete_details", "reason"),)))
            return [{"role": "assistant", **_message(messages[-1])}], cut
    if isinstance(value, Mapping) and ("content" in value or "text" in value):
        return [{"role": "assistant", "content": _text(value.get("content", value.get("text")))}], False
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}], False
    raise BadRow("row-missing-key", "the request has no answer", f"it has {', '.join(log)[:200]}")


def _feedback(log: Log, columns: Columns) -> dict[str, object]:
    """The feedback as a column of a rated row; `BadRow` without one."""
    stated = columns.get(LABEL)
    for place in (log, *_at(log, FEEDBACK)):
        if not isinstance(place, Mapping):
            continue
        name: str | None = label_column(place) if stated is None else stated
        if name is not None and name in place and not isinstance(place[name], Mapping | list):
            return {LABEL if stated else name: place[name]}
    for value in _at(log, (("feedback",), ("metadata", "feedback"), ("response", "feedback"))):
        inner = [value[name] for name in VALUES if name in value] if isinstance(value, Mapping) else []
        if inner:
            return {LABEL: inner[0]}
    for score in (score for scores in _at(log, (("scores",),)) if isinstance(scores, list) for score in scores):
        name = str(score.get("name")).replace("-", "_") if isinstance(score, Mapping) else ""
        if name == str(stated).replace("-", "_") or "feedback" in name.lower():
            return {LABEL: score.get("value")}
        if label_column({name: 1}):
            return {name: score.get("value")}
    raise BadRow(UNRATED, "the request has no feedback")
