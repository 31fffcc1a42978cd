"""Rows to token ids, the same ids that TRL 1.15's DPOTrainer makes from the same pairs (tests/test_tokens.py compares).

This module makes them because training, evaluation and the plan's counts need the same ids, and evaluation has no trainer.
Two things differ. TRL keeps the start of a pair and cuts its responses; here the oldest tokens of the prompt go first. If a
template renders a prompt differently before a response, TRL's response starts where they differ, with the rest of the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from dpo_cli.data.chat_template import ChatTemplate, TemplateFailed
from dpo_cli.data.cuts import NEAR, Cut, least_cut
from dpo_cli.data.encoded import Chunk, Encoded, EncodedRows, Growing
from dpo_cli.data.files import about_rows
from dpo_cli.data.messages import Message, Text, Tool, without_key
from dpo_cli.data.omissions import Part, cause, fails, left_out, parts_of
from dpo_cli.data.rows import Question, Row
from dpo_cli.data.tokenizer import Tokenizer
from dpo_cli.data.transcripts import as_messages
from dpo_cli.errors import InvalidInput, Problem, Severity, invalid
from dpo_cli.storage.processes import in_order
from dpo_cli.storage.progress import working

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MOST_CHARACTERS = 5  # of a token, in most texts
AT_ONCE = 128  # rows whose texts are encoded together
FEW = 8  # chunks of so many rows are encoded in this process


@dataclass(frozen=True)
class Encodings:
    """The usable rows as token ids, and the problems of all rows."""

    sides: list[EncodedRows]  # in the order of the given rows
    refused: int  # number of skipped rows
    problems: tuple[Problem, ...]
    dropped: list[list[int]]  # the lengths of the rows of each side that are left out because they are too long

    def require(self) -> Encodings:
        """The same, or `InvalidInput` if rows are refused and must not be skipped."""
        if any(problem.severity == "error" for problem in self.problems):
            raise InvalidInput(self.problems)
        return self


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    use_chat_template: bool | str = "auto",
    max_length: int | None = None,
) -> EncodedRows:
    """Like `encode_all` for one side with a loaded tokenizer; every row must be usable."""
    return encode_all([rows], Tokenizer.loaded(tokenizer), use_chat_template, max_length).require().sides[0]


def encode_all(
    sides: Sequence[Sequence[Row]],
    tokenizer: Tokenizer,
    use_chat_template: bool | str = "auto",
    max_length: int | None = None,
    token_rows: int | None = None,
    skip: bool = False,
) -> Encodings:
    """Tokenise the rows of each side (to train on, held out), as an `Encoder` does, and keep all of them in memory.

    Rows that cannot be used are errors, or skipped with `skip`. Raises `InvalidInput` if a template is needed and missing.
    """
    encoder = Encoder.of(tokenizer, use_chat_template, max_length, token_rows)
    rows = ((number, row) for number, side in enumerate(sides) for row in side)
    return encoded_into([Growing() for _ in sides], rows, encoder, sum(map(len, sides)), skip, math.inf)


def encode_questions(
    questions: Sequence[Question], tokenizer: Tokenizer, use_chat_template: bool | str, room: int, token_rows: int | None
) -> tuple[list[tuple[Question, list[int]]], dict[str, int]]:
    """Each question with its token ids as in training, cut to `room` tokens so that an answer has place; and the counts of
    cuts and of questions that cannot be cut so far, which are left out."""
    pairs = [question.with_answers("A", "B") for question in questions]  # the answers do not matter
    (encoded,) = encode_all([pairs], tokenizer, use_chat_template, room, token_rows).require().sides
    fitting = [(question, pair) for question, pair in zip(questions, encoded, strict=True) if pair.length <= room]
    counts = {"cut": sum(pair.is_cut for _, pair in fitting), "too_long": len(questions) - len(fitting)}
    return [(question, pair.prompt_ids) for question, pair in fitting], counts


def encoded_into(
    sides: Sequence[Growing], rows: Iterable[tuple[int, Row]], encoder: Encoder, total: int | None, skip: bool, longest: float
) -> Encodings:
    """Tokenise rows, each with the number of its side; those with more than `longest` tokens are left out.

    Many rows are tokenised in processes of their own.
    """
    findings, dropped = _Findings(), [list[int]() for _ in sides]
    with working("tokenising", total, "rows") as work:
        for chunk, (encoded, found) in in_order(encoder, rows, AT_ONCE, FEW, lambda item: item[1].characters):
            work.add(len(chunk))
            findings.add(found)
            in_chunk = [row for _, row in chunk]
            for number, side in enumerate(sides):
                of_side = [(at, size) for at, size in enumerate(encoded.row_sizes()) if chunk[encoded.kept[at]][0] == number]
                dropped[number] += (size.length for _, size in of_side if size.length > longest)
                side.add(encoded.taken([at for at, size in of_side if size.length <= longest]), in_chunk)
    findings.require_template(encoder)
    return Encodings([side.done() for side in sides], findings.refused, tuple(findings.problems(skip)), dropped)


@dataclass(frozen=True)
class Encoder:
    """Makes token ids of rows.

    Plain strings become chat messages if the tokenizer has a chat template ("auto") or must have one. A row longer than
    `max_length` tokens loses the oldest tokens of its prompt. If its responses alone are longer, it stays uncut, but a text
    without a prompt is cut. A row with a token beyond the `token_rows` of the model's embedding cannot be used.
    """

    tokenizer: Tokenizer
    as_chat: bool
    max_length: int | None
    token_rows: int | None

    @classmethod
    def of(cls, tokenizer: Tokenizer, use_chat_template: bool | str, max_length: int | None, token_rows: int | None) -> Encoder:
        """`InvalidInput` if rows must go through a chat template, and there is none."""
        if use_chat_template is True and tokenizer.template is None:
            fix = 'write "use_chat_template": "auto", or start from an instruct model'
            raise invalid("no-chat-template", "this model has no chat template", fix, "use_chat_template")
        as_chat = tokenizer.template is not None and use_chat_template is not False
        return cls(tokenizer, as_chat, max_length, token_rows)

    def __call__(self, rows: Sequence[tuple[int, Row]]) -> tuple[Chunk, _Findings]:
        """The usable ones of some rows, and what was found in all of them."""
        findings = _Findings()
        drafts = [_Draft.of(row, self.tokenizer, self.as_chat) for _, row in rows]
        ids = iter(self.tokenizer.pieces.ids([text for draft in drafts for text in draft.texts]))
        chunk = Chunk.of([self._usable(draft, list(islice(ids, len(draft.texts))), findings) for draft in drafts])
        return chunk, findings

    def _usable(self, draft: _Draft, ids: list[list[int]], findings: _Findings) -> Encoded | None:
        """The row as token ids; None, with a finding, for a row that cannot be used."""
        try:
            if draft.error is not None:
                raise draft.error
            whole = _of_ids(draft.rendered or draft.row, ids, self.tokenizer)
            findings.check(whole, draft.rendered, self)
            is_short = self.max_length is None or whole.length <= self.max_length
            kept = whole if is_short else _cut(whole, self.tokenizer, draft.rendered, self.max_length or 0)
            return replace(kept, row=draft.row)
        except TemplateError as error:
            findings.see_error(draft.row, error, self.tokenizer)
            return None


@dataclass(frozen=True)
class _Draft:
    """A row before its texts are token ids: as a template renders it, or as plain text; or why neither is possible."""

    row: Row
    rendered: Rendered | None = None  # None for plain text
    texts: tuple[str, ...] = ()  # the prompt, and the prompt with each response
    error: TemplateError | None = None

    @classmethod
    def of(cls, row: Row, tokenizer: Tokenizer, as_chat: bool) -> _Draft:
        is_chat = as_chat and row.prompt != ""  # a whole text is not an answer
        try:
            if not as_chat and not isinstance(row.responses[0], str):
                raise _NeedsTemplate
            rendered = Rendered.of(row.as_turns(), tokenizer.template) if is_chat and tokenizer.template else None
            return cls(row, rendered, _texts(rendered or row, tokenizer))
        except TemplateError as error:  # collected, so that one pass reports all rows that the template rejects
            return cls(row, error=error)
        except UnicodeEncodeError:
            return cls(row, error=_Refused(*SURROGATE))


REFUSES = (
    "template-refuses",
    "the model's chat template rejects these rows",
    "delete these rows, or write them in the form that the template accepts",
)
FAILS = (
    "template-fails",
    "the model's chat template fails on these rows",
    "write that part in the form that the template reads, or delete these rows",
)
SAME = "row-identical", "chosen and rejected have the same tokens", "delete these rows: the model cannot learn from them"
NOTHING = "template-leaves-out", "the chat template omits the whole response", "use a model whose template includes it"
LEAVES_OUT = (
    "template-leaves-out",
    "the chat template omits",
    "the model does not see it: use a model whose template includes it, or delete it",
)
EARLIER = (
    "earlier-reasoning",
    "the chat template omits",
    "no change is needed: the model does not see earlier reasoning in use either",
)
TOOLS = (
    "template-refuses",
    "the model's chat template does not support tools, and would omit them",
    "use a model whose template supports tools, or delete them from these rows",
)
CALLS = (
    "template-refuses",
    "the model's chat template does not support tool calls, and would omit them",
    "use a model whose template supports tool calls, or delete these rows",
)
SURROGATE = (
    "row-surrogate",
    "the row holds half of a surrogate pair, which is not a valid character",
    "correct it, or delete these rows",
)
NO_EOS = (
    "no-eos",
    "a response does not end with EOS",
    "the model does not learn where to stop: use a chat template that ends a turn with EOS",
)


class _Refused(TemplateError):
    """A row whose tokens cannot be trained on."""

    def __init__(self, code: str, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.parts = (code, reason, fix)


class _NeedsTemplate(TemplateError):
    """A row of chat messages without a template for them."""


About = tuple[str, str, str, str]  # file, code, reason, fix


@dataclass
class _Findings:
    """The problems of rows as a template renders them, by file."""

    refused: int = 0
    errors: dict[tuple[*About, str], list[int]] = field(default_factory=dict)  # and the text of a template's failure
    notes: dict[About, list[int]] = field(default_factory=dict)  # problems of rows that are still trained on
    causes: dict[str, str] = field(default_factory=dict)  # by the text of a failure, the part of the first row that causes it
    unrendered: dict[str, list[int]] = field(default_factory=dict)  # rows that need a template, by file

    def add(self, later: _Findings) -> None:
        """Add what was found in later rows."""
        self.refused += later.refused
        both: Any = (self.errors, later.errors), (self.notes, later.notes), (self.unrendered, later.unrendered)
        for mine, theirs in both:
            for about, lines in theirs.items():
                mine.setdefault(about, []).extend(lines)
        self.causes = {**later.causes, **self.causes}

    def check(self, row: Encoded, rendered: Rendered | None, encoder: Encoder) -> None:
        """Check a row and its rendering; raises `_Refused` if it cannot be trained on."""
        file, line, tokenizer, token_rows = row.row.file, row.row.line, encoder.tokenizer, encoder.token_rows
        highest = max((max(ids, default=0) for ids in (row.prompt_ids, *row.responses)), default=0)
        if token_rows is not None and highest >= token_rows:
            reason = f"{tokenizer.decode([highest])} ({highest}) is outside the embedding: {tokenizer.against(token_rows)}"
            raise _Refused("tokens-outside", reason, f"delete the token from these rows, or {tokenizer.resize}")
        for part, where, is_all in rendered.omissions() if rendered else ():
            if is_all:
                raise _Refused(*NOTHING)
            code, reason, fix = EARLIER if part.is_reasoning and where == "the prompt" else LEAVES_OUT
            self.notes.setdefault((file, code, f"{reason} {part.what}, in {where}", fix), []).append(line)
        if len(row.responses) == 2 and row.chosen_ids == row.rejected_ids:
            raise _Refused(*SAME)
        if any(tokenizer.ends.isdisjoint(ids) for ids in row.responses):
            code, reason, fix = NO_EOS
            self.notes.setdefault((file, code, f"{reason} ({tokenizer.eos!r})", fix), []).append(line)

    def see_error(self, row: Row, error: TemplateError, tokenizer: Tokenizer) -> None:
        if isinstance(error, _NeedsTemplate):
            self.unrendered.setdefault(row.file, []).append(row.line)
            return
        self.refused += 1
        failure = ""
        if isinstance(error, _Refused):
            code, reason, fix = error.parts
        else:
            code, reason, fix = FAILS if isinstance(error, TemplateFailed) else REFUSES
            reason = f"{reason}: {error}"
            if isinstance(error, TemplateFailed) and tokenizer.template:
                failure = str(error)
                if failure not in self.causes:
                    self.causes[failure] = _cause(row.as_turns(), tokenizer.template)
        self.errors.setdefault((row.file, code, reason, fix, failure), []).append(row.line)

    def require_template(self, encoder: Encoder) -> None:
        """`InvalidInput` for rows that need a template that does not exist, or is not used."""
        reason = "the rows are chat messages, which need a chat template"
        is_there = encoder.tokenizer.template is not None
        why = "use_chat_template is false" if is_there else "the model has no chat template: start from an instruct model"
        code, key = "messages-without-template", "use_chat_template"
        if found := [about_rows("error", code, reason, why, key, *place) for place in self.unrendered.items()]:
            raise InvalidInput(found)

    def problems(self, skip: bool) -> Iterator[Problem]:
        for (file, code, reason, fix, failure), lines in self.errors.items():
            reason += f", at {self.causes[failure]}" if failure else ""
            severity: Severity = "warning" if skip else "error"
            yield about_rows(
                severity, code, reason, "these rows are skipped" if skip else fix, "dataset", file, sorted(set(lines))
            )
        for (file, code, reason, fix), lines in self.notes.items():
            severity = "hint" if code == EARLIER[0] else "warning"
            yield about_rows(severity, code, reason, fix, "dataset", file, sorted(set(lines)))


def _conversations(row: Row) -> tuple[list[Message], list[list[Message]], list[Tool] | None]:
    """(the prompt's messages, those of each response, tools) as arguments of a template."""
    responses = [as_messages(response, "assistant") for response in row.responses]
    return as_messages(row.prompt, "user"), responses, [dict(tool) for tool in row.tools] or None


@dataclass(frozen=True)
class Rendered:
    """A row as a chat template renders it: the prompt alone, with each response, and the trained text.

    A template may render a prompt differently before a response. If it only ends sooner (no "<think>"), their common start is
    the prompt. If they differ earlier (Mistral moves the system message), the prompt is rendered as in use, and the responses
    follow it; else a part of the prompt would be in the loss.
    """

    row: Row
    template: ChatTemplate
    prompt: str
    whole: tuple[str, ...]  # the prompt and a response
    trained: tuple[str, ...]
    is_changed: bool  # whether the template renders the prompt differently before a response

    @staticmethod
    def prompt_of(row: Row, template: ChatTemplate) -> str:
        """The prompt alone."""
        messages, _, tools = _conversations(row)
        return template.render(messages, tools, add_generation_prompt=True)

    @classmethod
    def of(cls, row: Row, template: ChatTemplate) -> Rendered:
        """`TemplateError` if the template rejects the row, or omits its tools or tool calls."""
        messages, responses, tools = _conversations(row)
        prompt = template.render(messages, tools, add_generation_prompt=True)
        if tools and prompt == template.render(messages, None, add_generation_prompt=True):
            raise _Refused(*TOOLS)
        whole = tuple(template.render([*messages, *response], tools) for response in responses)
        for response, text in zip(responses, whole, strict=True):
            _require_calls(template, messages, response, tools, text)
        if all(text.startswith(prompt) for text in whole):
            return cls(row, template, prompt, whole, whole, False)
        one, other = (template.render([*messages, {"role": "assistant", "content": text}], tools) for text in "AB")
        before = one[: common(one, other)]
        if not prompt.startswith(before) and all(text.startswith(before) for text in whole):
            return cls(row, template, prompt, whole, tuple(prompt + text.removeprefix(before) for text in whole), True)
        return cls(row, template, prompt, whole, whole, True)

    def omissions(self) -> Iterator[tuple[Part, str, bool]]:
        """The parts that the template omits: (the part, where it is, whether it is a whole response)."""
        prompt, responses, tools = _conversations(self.row)
        for part in left_out(self.template, prompt, range(len(prompt)), tools, self.prompt, add_generation_prompt=True):
            yield part, "the prompt", False
        for response, text in zip(responses, self.whole, strict=True):
            said, start = [*prompt, *response], common(self.prompt, text)
            omitted = left_out(self.template, said, range(len(prompt), len(said)), tools, text, start)
            parts = [part for message in response for part in parts_of(message, self.template.source)]
            is_all = bool(omitted) and len(omitted) == len(parts)
            for part in omitted:
                yield part, "a response", is_all


def _require_calls(
    template: ChatTemplate, prompt: list[Message], response: list[Message], tools: Sequence[Tool] | None, rendered: str
) -> None:
    """Refuse a response if the template omits its tool calls: the model would learn an empty answer."""
    if any(message.get("tool_calls") for message in response):
        without = [without_key(message, "tool_calls") for message in response]
        if rendered == template.render([*prompt, *without], tools):
            raise _Refused(*CALLS)


def _cause(row: Row, template: ChatTemplate) -> str:
    """The part of a row that a template fails on."""
    prompt, responses, tools = _conversations(row)
    if fails(template, prompt, tools, add_generation_prompt=True):
        return f"{cause(template, prompt, tools, add_generation_prompt=True)} of the prompt"
    said = next(whole for response in responses if fails(template, whole := [*prompt, *response], tools))
    return cause(template, said, tools)


def _encode(row: Row | Rendered, tokenizer: Tokenizer) -> Encoded:
    """A rendered row, or one of plain text, as token ids."""
    return _of_ids(row, tokenizer.pieces.ids(_texts(row, tokenizer)), tokenizer)


def _texts(row: Row | Rendered, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The prompt, and the prompt with each response; `UnicodeEncodeError` for half a surrogate pair, perhaps in a tool."""
    if isinstance(row, Rendered):
        texts = (row.prompt, *row.trained)
    else:
        assert isinstance(row.prompt, str)  # messages need a template
        texts = (row.prompt, *(_ended(f"{row.prompt}{response}", tokenizer.eos) for response in row.responses))
    for text in texts:
        text.encode()
    return texts


def _of_ids(row: Row | Rendered, ids: Sequence[list[int]], tokenizer: Tokenizer) -> Encoded:
    """The row, from the ids of its `_texts`."""
    is_changed = isinstance(row, Rendered) and row.is_changed
    if isinstance(row, Rendered):
        row = row.row
    else:
        ids = [tokenizer.plain(of_text) for of_text in ids]
    prompt_ids, *sequences = ids
    # A token may span the end of the prompt: the responses start where the sequences differ from the prompt.
    start = min(common(prompt_ids, sequence) for sequence in sequences)
    parts = is_changed or start < len(prompt_ids)
    return Encoded(row, prompt_ids[:start], tuple(sequence[start:] for sequence in sequences), parts_early=parts)


def _ended(text: str, eos: str) -> str:
    """The text with EOS at its end, unless it has one already (perhaps before a line break)."""
    return text if text.rstrip().endswith(eos) else text + eos


def _cut(whole: Encoded, tokenizer: Tokenizer, rendered: Rendered | None, max_length: int) -> Encoded:
    """The row with as much of its prompt as fits: the oldest turns go first, then the oldest text, then the system message.

    Markers of the template, BOS and the generation prompt stay, and so do both responses.
    """

    def with_prompt(prompt: Text) -> Encoded:
        row = replace(whole.row, prompt=prompt)
        shorter = Rendered.of(row, rendered.template) if rendered else row
        return replace(_encode(shorter, tokenizer), row=whole.row, is_cut=True)

    def about(text: str, tokens: int) -> int:
        """About as many characters as the first tokens of a text have."""
        for some in (text[: MOST_CHARACTERS * (tokens + NEAR)], text):
            ids = tokenizer.pieces.ids_of(some)
            if len(ids) > tokens + NEAR:
                break
        return len(tokenizer.decode(ids[:tokens]))

    def count(prompt: Text, tail: str) -> int:
        """The tokens of a prompt before its tail, from the last special token on."""
        shorter = replace(whole.row, prompt=prompt)
        text = Rendered.prompt_of(shorter, rendered.template) if rendered else str(prompt)
        return len(tokenizer.pieces.ids_of(tokenizer.pieces.last(text.rpartition(tail)[0] if tail else text)))

    prompt, excess = whole.row.prompt, whole.length - max_length
    if not prompt:
        start = whole.responses[0][: max_length - len(whole.prompt_ids)]
        return replace(whole, responses=(start,), is_cut=True)
    if isinstance(prompt, str):
        cut = Cut(prompt, lambda text: text, with_prompt, count, about(prompt, excess))
        return cut.least(max_length) or whole
    system, turns = _turns(prompt)
    if shorter := least_cut(len(turns) - 1, lambda turn: with_prompt(_joined(system, turns[turn:])), max_length):
        return shorter
    # The last turn alone is too long: cut its text, and keep the system message if that is enough.
    first, *after = turns[-1]
    text = str(first["content"])
    for before in (system, []):
        shortened = partial(lambda before, text: [*before, {**first, "content": text}, *after], before)
        last = whole if len(turns) == 1 and before == system else with_prompt(shortened(text))
        guess = about(text, excess - (whole.length - last.length))
        if shorter := Cut(text, shortened, with_prompt, count, guess).least(max_length):
            return shorter
    return whole


def _turns(prompt: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """(leading system messages, turns); a turn is a user message and everything up to the next one."""
    system = [message for i, message in enumerate(prompt) if all(earlier["role"] == "system" for earlier in prompt[: i + 1])]
    turns: list[list[Message]] = []
    for message in prompt[len(system) :]:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return system, turns or [[]]


def _joined(system: list[Message], turns: Sequence[list[Message]]) -> list[Message]:
    return [*system, *(message for turn in turns for message in turn)]


def common(one: Sequence[object], other: Sequence[object]) -> int:
    """The number of equal elements at the start of two sequences. By halves: slices are compared at once."""
    equal, unequal = 0, min(len(one), len(other))  # so many are equal, and perhaps so many
    if one[:unequal] == other[:unequal]:
        return unequal
    while unequal - equal > 1:
        middle = (equal + unequal) // 2
        equal, unequal = (middle, unequal) if one[equal:middle] == other[equal:middle] else (equal, middle)
    return equal
