"""Stored conversations to messages of one form: {"role", "content"} and other keys of a message.

A null key is dropped. `tool_calls` are {"type", "function": {"name", "arguments"}}. Text parts are joined.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, TypeVar

from dpo_cli.data.text_features import compiled, visible

Value = TypeVar("Value")


class Function(TypedDict):
    name: str
    arguments: str | Mapping[str, object]  # JSON text if it is stored as text


class ToolCall(TypedDict):
    id: NotRequired[str]
    type: str
    function: Function


class Message(TypedDict):
    """What every message has. Other keys stay in it, for templates that read them."""

    role: str
    content: str
    tool_calls: NotRequired[list[ToolCall]]


Text = str | list[Message]
Tool = Mapping[str, object]

KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALL_ROLES = ("function_call", "tool_call")  # roles of messages whose text is the call
REASONING = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
UNTYPED_PARTS = ("text", "image", "image_url", "audio")  # keys that show the kind of a part
SCHEMA_VALUES = ("default", "const", "enum")  # keys of a JSON schema whose value may be null
MESSAGE_KEYS = frozenset(("content", "value", "tool_calls", "function_call"))
DEEPEST = 100  # levels of a row: far more than data has, and few enough for recursive functions
LARGEST_NUMBER = int(sys.float_info.max)
LARGEST_LITERAL = 1 << 20  # characters of Python text that are parsed

# Messages stored as text: the quoted words in them, and how they begin.
SPEAKS = rf"""(?i)["'](?:role|from|messages|conversations|{"|".join([*KNOWN_ROLES, *ROLES])})\\?["']"""
BEGINS = (
    r"(?i)"
    rf"""(?:"|array\()?(?:\[?\s*\{{\s*\\?["'](?:role|from)\\?["']\s*:\s*\\?["'](?:{"|".join([*KNOWN_ROLES, *ROLES])})\\?["']"""
    r"""|\[\s*\{\s*\\?["'](?:content|value)\\?["']\s*:)"""
)
WRAPPER = (
    "<tool_response>",
    "</tool_response>",
)  # Hermes stores them around a tool's result, and its template writes them again


class BadRow(Exception):
    """Why a row cannot be used: a stable code, the reason in words, details of this row, and its own fix."""

    def __init__(self, code: str, reason: str, detail: str = "", fix: str = "") -> None:
        super().__init__(reason)
        self.fix = fix
        self.code = code
        self.reason = reason
        self.detail = detail


def text_of(value: object, key: str) -> Text:
    """A value of a row as text or as messages, or `BadRow`."""
    if isinstance(value, str):
        return sound(value, key)
    if isinstance(value, Mapping):  # ShareGPT stores a response as one message
        return [message_of(value, key)]
    if not isinstance(value, list):
        raise BadRow("row-wrong-type", f"{key} is {type(value).__name__}, not a string or a list of messages")
    if not value:
        raise BadRow("row-empty", f"{key} is empty")
    said = [message for message in value if not _is_empty_system(message)]
    return [message_of(message, key) for message in said or value]


def message_of(value: object, key: str) -> Message:
    """One message of a conversation in the common form, or `BadRow`."""
    if not isinstance(value, Mapping):
        raise BadRow("row-wrong-type", f"{key} holds a {type(value).__name__} instead of a message")
    message = {name: part for name, part in value.items() if part is not None and part != []}
    theirs = message.pop("from", None) if "role" not in message else message.pop("role")
    content = message.pop("value", None) if "content" not in message else message.pop("content")
    if not isinstance(theirs, str):
        raise BadRow("row-wrong-type", f'{key} holds a message without a "role"')
    role = role_of(value)
    if role not in KNOWN_ROLES:
        known = ", ".join(KNOWN_ROLES)
        raise BadRow("row-role", f"{key} holds a message with an unknown role; known roles are {known}", f"{theirs[:40]!r}")
    calls = _calls(message, content if theirs.lower() in CALL_ROLES else None, key)
    if calls:
        message["tool_calls"] = calls
        content = "" if content is None or theirs.lower() in CALL_ROLES else content
    content = _content(content, role, key)
    if role == "tool":
        content = _unwrapped(content)
    can_be_empty = calls or role == "tool" or any(isinstance(message.get(name), str) for name in REASONING)
    if content or not can_be_empty:
        content = sound(content, key)
    return as_message({"role": role, "content": content, **message})


def as_message(keys: Any) -> Message:
    """An object with the keys of a message, typed as one: a TypedDict cannot declare other keys."""
    message: Message = keys
    return message


def role_of(message: Mapping[str, object]) -> str:
    """The role of a message under its usual name; empty if it has none."""
    role = message.get("role")
    role = message.get("from") if role is None else role
    return ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else ""


def tools_of(value: object) -> tuple[Tool, ...]:
    """The tools of a row, also from JSON text, without null keys; or `BadRow`."""
    if isinstance(value, str):  # TRL reads JSON text too, because columns of objects need one type
        try:
            value = bounded(_value_of(value)) if value.strip() else []
        except ValueError as error:
            raise BadRow("row-tools", "tools is text, but not JSON") from error
    if value is None:
        return ()
    if isinstance(value, list):  # some datasets store each tool as JSON text
        value = [_object(tool) if isinstance(tool, str) else tool for tool in value]
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow("row-tools", "tools is not a list of objects")
    return tuple(without_nulls(tool, keep=SCHEMA_VALUES) for tool in value)


def parsed(text: str) -> object:
    """Messages, or one message, stored as JSON or Python text; any other text as it is.

    `BadRow` if it begins like messages but cannot be parsed.
    """
    start = text[:200].lstrip()
    if not start.startswith(("[", "{", '"', "array(")) or not compiled(SPEAKS).search(text):
        return text
    try:
        messages = _messages_in(_value_of(text))
    except ValueError as error:
        if compiled(BEGINS).match(start) and not _begins_with_json(text):
            reason = "a text begins like a list of messages, but is neither valid JSON nor a valid Python list"
            raise BadRow("row-wrong-type", reason, f"{start[:40]!r}") from error
        return text
    return text if messages is None else bounded(messages)


def list_in(value: object) -> object:
    """A list stored as JSON or Python text; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "array(")):
        return value
    try:
        stored = _value_of(value)
    except ValueError:
        return value
    return bounded(stored) if isinstance(stored, list) else value


def _value_of(text: str) -> object:
    """The value of JSON or Python text; `ValueError` if it is neither."""
    for parse in (json.loads, _literal):
        try:
            return parse(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # not this notation
            continue
    raise ValueError("neither JSON nor Python")


def _literal(text: str) -> object:
    """The value of Python text; numpy lists, as pandas writes them, have no comma between two objects."""
    if len(text) > LARGEST_LITERAL:
        raise ValueError("too long")
    with warnings.catch_warnings(action="ignore"):  # about invalid escapes in a text that may not be Python
        tree = ast.parse(re.sub(r"\}[^\S\n]*\n\s*\{", "}, {", text.strip()), mode="eval")
    return ast.literal_eval(_Plain().visit(tree))


class _Plain(ast.NodeTransformer):
    """Python text with arrays as lists, nan as None, and dates and the like as text."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = ast.unparse(node.func)
        return self.visit(node.args[0]) if name in ("array", "np.array") and node.args else ast.Constant(ast.unparse(node))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(None) if node.id.lower() == "nan" else node


def _begins_with_json(text: str) -> bool:
    """Whether a text starts with a JSON value, so that the rest is prose about it."""
    try:
        json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return False
    return True


def _messages_in(value: object) -> object:
    """The messages, or the message, of a parsed text; None if it is something else."""
    if isinstance(value, str):  # encoded twice
        try:
            value = _value_of(value)
        except ValueError:
            return None
    if isinstance(value, Mapping) and len(value) == 1 and not {"messages", "conversations"}.isdisjoint(value):
        value = next(iter(value.values()))
    if isinstance(value, list) and value and all(map(_is_said, value)):
        return [{"role": role, "content": text} for role, text in value]
    messages = value if isinstance(value, list) else [value]
    roles = [role_of(part) for part in messages if isinstance(part, Mapping) and not MESSAGE_KEYS.isdisjoint(part)]
    are_messages = len(roles) == len(messages) and all(roles)
    return value if are_messages and any(role in KNOWN_ROLES for role in roles) else None


def _is_said(turn: object) -> bool:
    """Whether a value is [role, text]."""
    return (
        isinstance(turn, list | tuple)
        and len(turn) == 2
        and all(isinstance(part, str) for part in turn)
        and role_of({"role": turn[0]}) in KNOWN_ROLES
    )


def bounded(value: Value) -> Value:
    """The value of a row, or `BadRow` if it is nested too deep, or holds an integer too large for a float."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for part in level:
            kind = type(part)  # exact types are enough for parsed values, and fast, because this runs for every row
            if kind is dict:
                inner += part.values()
            elif kind is list:
                inner += part
            elif kind is int and abs(part) > LARGEST_NUMBER:
                raise BadRow("row-unreadable", "a number is too large")
        if not inner:
            return value
        level = inner
    raise BadRow("row-unreadable", f"values are nested more than {DEEPEST} levels deep")


def without_nulls(value: object, keep: Sequence[str] = ()) -> Any:
    """The value without null keys of objects, at every depth; keys in `keep` stay."""
    if isinstance(value, Mapping):
        return {name: without_nulls(part, keep) for name, part in value.items() if part is not None or name in keep}
    return [without_nulls(part, keep) for part in value] if isinstance(value, list) else value


def without_padding(value: object) -> object:
    """A value of an Arrow table without the nulls that fill its structs, because these have the keys of all rows.

    `"default": null` and similar keys stay in a JSON schema that accepts null.
    """
    if isinstance(value, Mapping):
        kept = SCHEMA_VALUES[:2] if _takes_null(value) else ()
        return {name: without_padding(part) for name, part in value.items() if part is not None or name in kept}
    return [without_padding(part) for part in value] if isinstance(value, list) else value


def _takes_null(schema: Mapping[str, object]) -> bool:
    kinds, values = schema.get("type"), schema.get("enum")
    has_null = "null" in kinds if isinstance(kinds, list) else kinds == "null"
    return has_null or schema.get("nullable") is True or (isinstance(values, list) and None in values)


def _content(value: object, role: str, key: str) -> str:
    """The text of a message: its joined text parts; for a tool's result also any object, as JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, str) or _kind(part) for part in value):
        return "".join(part if isinstance(part, str) else _part_text(part, key) for part in value)
    if role == "tool" and isinstance(value, Mapping | list):
        return json.dumps(without_nulls(value), ensure_ascii=False)
    raise BadRow("row-wrong-type", f'{key} holds a message whose "content" is {type(value).__name__}, not a string')


def _unwrapped(result: str) -> str:
    """The result of a tool without a wrapper around the whole text."""
    start, end = WRAPPER
    text = result.strip()
    is_wrapped = text.startswith(start) and text.endswith(end) and text.count(start) == text.count(end) == 1
    return text[len(start) : -len(end)].strip() if is_wrapped else result


def _kind(part: object) -> str:
    """The kind of a part of a message: its "type", or the key that shows it."""
    if not isinstance(part, Mapping):
        return ""
    kind = part.get("type")
    return kind if isinstance(kind, str) else next((name for name in UNTYPED_PARTS if part.get(name)), "")


def _part_text(part: Mapping[str, object], key: str) -> str:
    kind, text = _kind(part), part.get("text")
    if kind not in TEXT_PARTS or not isinstance(text, str):
        reason = f"{key} holds a part that is not text, but only text is supported"
        raise BadRow("row-part", reason, f'its type is "{kind[:40]}"')
    return text


def _calls(message: dict[str, object], text: object, key: str) -> list[ToolCall]:
    """Remove and return the tool calls of a message: `tool_calls`, the older `function_call`, or ShareGPT's text of a call."""
    calls = _stored_calls(message, text)
    for name in ("tool_calls", "function_call"):
        message.pop(name, None)
    if not all(isinstance(call, Mapping) for call in calls):
        raise BadRow("row-call", f"{key} holds tool calls that are not objects")
    return [_call(without_nulls(call), key) for call in calls]


def _stored_calls(message: Mapping[str, object], text: object) -> list[object]:
    """The tool calls of a message in their stored form."""
    calls = next((message[name] for name in ("tool_calls", "function_call") if message.get(name) is not None), text)
    if calls is None:
        return []
    calls = _object(calls) if isinstance(calls, str) else calls
    return calls if isinstance(calls, list) else [calls]


def _arguments(call: Mapping[str, object]) -> object:
    function = call.get("function", call)
    return function.get("arguments", function.get("parameters", {})) if isinstance(function, Mapping) else {}


def _call(call: Mapping[str, object], key: str) -> ToolCall:
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow("row-call", f'{key} holds a tool call without a "name"')
    arguments = _arguments(call)
    if isinstance(arguments, str):
        given = _object(arguments or "{}")
        if not isinstance(given, Mapping):
            reason = f"{key} holds a tool call whose arguments are text, but not a JSON object"
            raise BadRow("row-call", reason, f"{arguments[:40]!r}")
        kept = without_nulls(given)  # like arguments that are an object; a text without nulls stays as written
        arguments = arguments if kept == given else kept
    if not isinstance(arguments, str | Mapping):
        raise BadRow("row-call", f"{key} holds a tool call whose arguments are {type(arguments).__name__}, not an object")
    called: Function = {"name": function["name"], "arguments": arguments}
    if isinstance(number := call.get("id"), str):
        return {"id": number, "type": "function", "function": called}
    return {"type": "function", "function": called}


def has_null_arguments(value: object) -> bool:
    """Whether messages of a row hold a tool call with a null argument, which is omitted."""
    if isinstance(value, list):
        return any(map(has_null_arguments, value))
    if not isinstance(value, Mapping):
        return False
    is_call = str(value.get("from") or value.get("role")).lower() in CALL_ROLES
    calls = _stored_calls(value, value.get("content", value.get("value")) if is_call else None)
    given = [_arguments(call) for call in calls if isinstance(call, Mapping)]
    given = [_object(arguments) if isinstance(arguments, str) else arguments for arguments in given]
    inner = [part for part in value.values() if isinstance(part, list)]
    return any(without_nulls(arguments) != arguments for arguments in given) or has_null_arguments(inner)


def _object(text: str) -> object:
    """The value of JSON text; None if it is invalid."""
    try:
        return bounded(json.loads(text))
    except (ValueError, RecursionError):
        return None


def with_arguments(message: Message, as_text: bool) -> Message:
    """The message with the arguments of its tool calls as JSON text, or as objects."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [call_with_arguments(call, as_text) for call in message["tool_calls"]]}


def call_with_arguments(call: ToolCall, as_text: bool) -> ToolCall:
    """The same for one call."""
    given = call["function"]["arguments"]
    if as_text and not isinstance(given, str):
        given = json.dumps(given, ensure_ascii=False)
    if not as_text and isinstance(given, str):
        given = json.loads(given or "{}")
    return {**call, "function": {**call["function"], "arguments": given}}


def without_key(message: Message, key: str) -> Message:
    """The message without one of its keys."""
    return as_message({name: value for name, value in message.items() if name != key})


def looks(text: Text) -> object:
    """The visible part of a text or of messages, to compare two of them."""
    return visible(text) if isinstance(text, str) else [{**turn, "content": visible(turn["content"])} for turn in text]


def sound(text: str, key: str) -> str:
    """The text, or `BadRow` if it cannot be tokenised."""
    if not visible(text).strip():
        raise BadRow("row-empty", f"{key} is empty")
    if "\0" in text:
        raise BadRow("row-nul", f"{key} holds a NUL character")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise BadRow("row-surrogate", f"{key} holds half of a surrogate pair, which is not a valid character")
    return text


def system_of(value: object) -> str:
    """The text of a row's "system": a text, a message, or a list of texts, parts or messages; empty if there is none."""
    if isinstance(value, Mapping) and not _kind(value):
        value = value.get("content", value.get("value"))
    if isinstance(value, list) and not all(map(_kind, value)):
        return "\n".join(filter(None, map(system_of, value)))
    text = _content([value] if isinstance(value, Mapping) else value, "system", "system")
    return sound(text, "system") if visible(text).strip() else ""


def _is_empty_system(message: object) -> bool:
    """Whether a message is a system message without text: many datasets have one in every row."""
    return (
        isinstance(message, Mapping)
        and role_of(message) == "system"
        and not visible(str(message.get("content") or message.get("value") or "")).strip()
    )


def said(text: Text) -> str:
    """The whole content of a response: its text, reasoning and tool calls."""
    if isinstance(text, str):
        return text
    parts = [
        [*(message.get(key) for key in REASONING), message["content"], *map(str, message.get("tool_calls") or ())]
        for message in text
    ]
    return "\n".join(part for message in parts for part in message if isinstance(part, str) and part)


def flat(text: Text) -> str:
    """A text as it is, or the joined text of all messages."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)
