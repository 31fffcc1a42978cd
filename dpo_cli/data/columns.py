"""Names of columns: those of the prompt and the responses, and the likely meaning of unread ones."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from dpo_cli.data.messages import BadRow, Message, Text, message_of
from dpo_cli.data.transcripts import as_messages

Row = Mapping[str, object]
Columns = Mapping[str, Any]  # the option "columns", checked by schema.json

SYSTEMS = ("system", "system_prompt", "system_message")
QUESTIONS = ("question", "instruction", "query", "input")
CONVERSATIONS = ("conversations", "messages")
PROMPTS = ("prompt", *CONVERSATIONS, *QUESTIONS)  # the first one in a row is used
JOINED = ("input", "context")  # text that follows an instruction or a question
COMPLETIONS = ("completion", "response", "output", "answer")
RESPONSES = (  # columns of the better and the worse response
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response", "rejected_response"),
    ("response_j", "response_k"),  # as in stack-exchange-paired
)
OURS = ("responses", "preferred", "scores", "labels")  # keys of "columns" that do not rename a single documented column

PROMPT_WORDS = frozenset(
    """prompt prompts context contexts history passage passages background document documents persona input inputs instruction
    instructions question questions query system preamble preface turns conversation conversations messages dialogue""".split()  # noqa: SIM905
)
# Last words of the names of columns with tools, choices or reasoning that nothing reads.
MORE_PROMPT = r"(?i)(.*[ _.-])?(tools?|functions?|choices|thoughts?|thinking|reasoning|cot|reason(ing)?[ _.-]steps?)"
NOTHING = frozenset(["nan", "none", "null"])  # text of empty cells in a table
SYSTEM_START = r"(?i)(system|sys|developer)[ _-]?(prompt|message|msg|instruction)s?"
MEDIA = r"(?i)(.*[ _-])?(image|img|picture|photo|pixel_value|audio|video)s?([ _-](path|file|url|byte)s?)?"
MARKERS = re.compile(r"<\|?(image|audio|video)(?:[_ ]?\d+)?\|?>")
SCORES = ("score", "scores", "rating", "ratings", "reward", "rewards", "rank", "ranks", "votes", "overall", "grade", "winner")
LABEL = "label"  # of a rated answer
RANKS = ("rank", "ranks")  # the lowest value is the best
TEXTS = ("content", "value", "text", "function", "name")  # keys of an object that hold its text
WANTED = frozenset(
    """label labels liked good is_good wanted desirable is_desirable accepted preferred is_preferred approved feedback thumbs
    thumbs_up thumb upvoted kto_tag""".split()  # noqa: SIM905
)
UNWANTED = frozenset("thumbs_down disliked unwanted undesirable is_bad bad downvoted is_rejected".split())  # noqa: SIM905
NO = frozenset(
    """false 0 -1 no bad rejected unwanted undesirable negative thumbs_down down dislike disliked thumbs-down downvote
    downvoted 👎""".split()  # noqa: SIM905
)
YES = frozenset("true 1 yes".split())  # noqa: SIM905


def asked(row: Row, names: tuple[str, ...] = PROMPTS) -> tuple[object, tuple[str, ...]] | None:
    """The prompt of a row, not checked yet, and its columns: an instruction and its input are joined."""
    main = "prompt" if "prompt" in row else next((name for name in names if name in row), None)
    if main is None:
        return None
    if "input" not in row and "context" not in row:
        return row[main], (main,)
    prompt, used = row[main], [main]
    if isinstance(prompt, str) and main != "input":
        for name in JOINED:
            more = row.get(name)
            if name != main and isinstance(more, str) and not says_nothing(more) and more.strip() not in prompt:
                prompt = f"{prompt}\n{more}"
                used.append(name)
    return prompt, tuple(used)


def answered(row: Row) -> tuple[str, str] | None:
    """The columns of the better and the worse response, if a row has both."""
    for pair in RESPONSES:  # a loop, because this runs for every row
        if pair[0] in row and pair[1] in row:
            return pair
    return None


def system_column(row: Row) -> str | None:
    """The column of the system message."""
    return next((name for name in SYSTEMS if name in row and not says_nothing(row[name])), None)


def tools_column(row: Row) -> str | None:
    """The column of the tools; also "functions", their old name at OpenAI, if it holds tools."""
    if "tools" in row:
        return "tools" if not says_nothing(row["tools"]) else None
    functions = row.get("functions")
    if isinstance(functions, str):
        is_list = re.match(r"\[\s*\{", functions.lstrip()) is not None
    else:
        is_list = isinstance(functions, list) and all(isinstance(tool, Mapping) for tool in functions)
    return "functions" if functions and is_list else None


def says_nothing(value: object) -> bool:
    """Whether a cell is empty, also as pandas and Python write it."""
    return isinstance(value, str) and (not value.strip() or value.strip().lower() in NOTHING)


def with_history(prompt: Text, history: object) -> Text:
    """The prompt after the earlier turns of the row: messages, or [question, answer] lists as in LLaMA-Factory."""
    if not history or says_nothing(history):
        return prompt
    if not isinstance(history, list):
        raise BadRow("row-history", '"history" is not a list of earlier turns: write them as messages of the prompt')
    turns: list[Message] = []
    for turn in history:
        if isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
            turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True) if text]
        elif isinstance(turn, Mapping):
            turns.append(message_of(turn, "history"))
        else:
            raise BadRow("row-history", '"history" holds a value that is neither a message nor a [question, answer] list')
    messages = as_messages(prompt, "user")
    systems = [message for message in messages[:1] if message["role"] == "system"]
    return [*systems, *turns, *messages[len(systems) :]]


@functools.cache
def is_prompt_like(name: str) -> bool:
    """Whether a column has a name like a part of a prompt."""
    words = re.split(r"[ _.-]", name.lower())
    return words[-1] in PROMPT_WORDS or any(re.fullmatch(pattern, name) for pattern in (SYSTEM_START, MORE_PROMPT))


@functools.cache
def is_media(name: str) -> bool:
    """Whether a column has a name like images, audio or video."""
    return re.fullmatch(MEDIA, name) is not None


def is_shown(value: object) -> bool:
    """Whether a value of such a column may hold media: numbers and false do not."""
    if isinstance(value, str):
        return re.fullmatch(r"[\d.]*", value.strip()) is None and value.strip().lower() not in ("false", "no")
    return value is True or not isinstance(value, int | float)


def texts_in(value: object) -> list[str]:
    """All texts in a value: a text itself, those of messages, turns and parts, and the names of tools."""
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if isinstance(value, Mapping):
        return texts_in(next((value[key] for key in TEXTS if key in value), None))
    return [text for part in value for text in texts_in(part)] if isinstance(value, list) else []


def says_no(name: str, value: object) -> bool:
    """Whether a label marks its row as unwanted."""
    word = str(value).strip().lower()
    return (name.lower() in WANTED and word in NO) or (name.lower() in UNWANTED and word in YES)
