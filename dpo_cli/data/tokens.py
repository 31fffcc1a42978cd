"""Rows to token ids, the same ids that TRL 1.15's DPOTrainer makes from the same pairs (tests/test_tokens.py compares).

This module makes them because training, evaluation and the plan's counts need the same ids, and evaluation has no trainer.
Two things differ. TRL keeps the start of a pair and cuts its responses; here the oldest tokens of the prompt go first. If a
template renders a prompt differently before a response, TRL's response starts where they differ, with the rest of the prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from dpo_cli.data.chat_template import ChatTemplate, TemplateFailed
from dpo_cli.data.encoded import Encoded, EncodedRows
from dpo_cli.data.files import about_rows
from dpo_cli.data.messages import Message, Text, Tool, without_key
from dpo_cli.data.omissions import Part, cause, fails, left_out, parts_of
from dpo_cli.data.rows import Row
from dpo_cli.data.tokenizer import Tokenizer
from dpo_cli.data.transcripts import as_messages
from dpo_cli.errors import InvalidInput, Problem, Severity, invalid
from dpo_cli.storage.progress import working

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FIRST_STEP = 4  # characters from a guess to the next try
AT_ONCE = 128  # rows whose texts are encoded together


@dataclass(frozen=True)
class Encodings:
    """The usable rows as token ids, and the problems of all rows."""

    sides: list[EncodedRows]  # in the order of the given rows
    refused: int  # number of skipped rows
    problems: tuple[Problem, ...]

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
) -> Sequence[Encoded]:
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
    """Tokenise the rows of each side (to train on, held out).

    Plain strings become chat messages if the tokenizer has a chat template ("auto") or must have one. A row longer than
    `max_length` tokens loses the oldest tokens of its prompt. If its responses alone are longer, it is returned uncut, but a
    text without a prompt is cut. Rows that cannot be used, or have a token beyond the `token_rows` of the model's embedding,
    are errors, or skipped with `skip`. Raises `InvalidInput` if a template is needed and missing.
    """
    as_chat = _require_template([row for side in sides for row in side], tokenizer, use_chat_template)
    findings = _Findings(tokenizer, token_rows, skip)
    encoded = [EncodedRows() for _ in sides]
    with working("tokenising", sum(map(len, sides)), "rows") as work:
        for into, side in zip(encoded, sides, strict=True):
            for draft, ids in _tokenised((_Draft.of(row, tokenizer, as_chat) for row in side), tokenizer):
                work.add()
                if (usable := _usable(draft, ids, tokenizer, max_length, findings)) is not None:
                    into.append(usable)
    return Encodings(encoded, findings.refused, tuple(findings.problems()))


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
            rendered = Rendered.of(row.as_turns(), tokenizer.template) if is_chat and tokenizer.template else None
            return cls(row, rendered, _texts(rendered or row, tokenizer))
        except TemplateError as error:  # collected, so that one pass reports all rows that the template rejects
            return cls(row, error=error)
        except UnicodeEncodeError:
            return cls(row, error=_Refused(*SURROGATE))


def _tokenised(drafts: Iterable[_Draft], tokenizer: Tokenizer) -> Iterator[tuple[_Draft, list[list[int]]]]:
    """Each draft with the token ids of its texts. A thread encodes `AT_ONCE` drafts while the next ones are rendered."""
    drafts = iter(drafts)
    with ThreadPoolExecutor(1) as thread:
        waiting: tuple[list[_Draft], Future[list[list[int]]]] | None = None
        while (batch := list(islice(drafts, AT_ONCE))) or waiting:
            before, waiting = waiting, None
            if batch:
                waiting = batch, thread.submit(tokenizer.pieces.ids, [text for draft in batch for text in draft.texts])
            if before:
                ids = iter(before[1].result())
                yield from ((draft, list(islice(ids, len(draft.texts)))) for draft in before[0])


def _usable(
    draft: _Draft, ids: list[list[int]], tokenizer: Tokenizer, max_length: int | None, findings: _Findings
) -> Encoded | None:
    """The row as token ids; None, with a finding, for a row that cannot be used."""
    try:
        if draft.error is not None:
            raise draft.error
        whole = _of_ids(draft.rendered or draft.row, ids, tokenizer)
        findings.check(whole, draft.rendered)
        kept = whole if max_length is None else _cut(whole, tokenizer, draft.rendered is not None, max_length)
        return replace(kept, row=draft.row)
    except TemplateError as error:
        findings.see_error(draft.row, error)
        return None


def _require_template(rows: Sequence[Row], tokenizer: Tokenizer, use_chat_template: bool | str) -> bool:
    """Whether rows go through the chat template; `InvalidInput` if they must and cannot."""
    has_template = tokenizer.template is not None
    if use_chat_template is True and not has_template:
        fix = 'write "use_chat_template": "auto", or start from an instruct model'
        raise invalid("no-chat-template", "this model has no chat template", fix, "use_chat_template")
    as_chat = has_template and use_chat_template is not False
    places: dict[str, list[int]] = defaultdict(list)
    if not as_chat:
        for row in rows:
            if not isinstance(row.responses[0], str):
                places[row.file].append(row.line)
    if places:
        reason = "the rows are chat messages, which need a chat template"
        why = "use_chat_template is false" if has_template else "the model has no chat template: start from an instruct model"
        code, key = "messages-without-template", "use_chat_template"
        raise InvalidInput([about_rows("error", code, reason, why, key, file, lines) for file, lines in places.items()])
    return as_chat


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


class _Findings:
    """The problems of rows as a template renders them, by file."""

    def __init__(self, tokenizer: Tokenizer, token_rows: int | None, skip: bool) -> None:
        self.tokenizer, self.token_rows, self.skip, self.refused = tokenizer, token_rows, skip, 0
        self.errors: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)  # file, code, reason, fix
        self.notes: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)  # problems of rows that are still trained on
        self._causes: dict[str, str] = {}  # by the text of an error, the part of the first such row that causes it

    def check(self, row: Encoded, rendered: Rendered | None) -> None:
        """Check a row and its rendering; raises `_Refused` if it cannot be trained on."""
        file, line, tokenizer = row.row.file, row.row.line, self.tokenizer
        highest = max((max(ids, default=0) for ids in (row.prompt_ids, *row.responses)), default=0)
        if self.token_rows is not None and highest >= self.token_rows:
            reason = f"{tokenizer.decode([highest])} ({highest}) is outside the embedding: {tokenizer.against(self.token_rows)}"
            raise _Refused("tokens-outside", reason, f"delete the token from these rows, or {tokenizer.resize}")
        for part, where, is_all in rendered.omissions() if rendered else ():
            if is_all:
                raise _Refused(*NOTHING)
            code, reason, fix = EARLIER if part.is_reasoning and where == "the prompt" else LEAVES_OUT
            self.notes[file, code, f"{reason} {part.what}, in {where}", fix].append(line)
        if len(row.responses) == 2 and row.chosen_ids == row.rejected_ids:
            raise _Refused(*SAME)
        if any(tokenizer.ends.isdisjoint(ids) for ids in row.responses):
            code, reason, fix = NO_EOS
            self.notes[file, code, f"{reason} ({tokenizer.eos!r})", fix].append(line)

    def see_error(self, row: Row, error: TemplateError) -> None:
        self.refused += 1
        if isinstance(error, _Refused):
            code, reason, fix = error.parts
        else:
            code, reason, fix = FAILS if isinstance(error, TemplateFailed) else REFUSES
            reason = f"{reason}: {error}"
            if isinstance(error, TemplateFailed) and self.tokenizer.template:
                if str(error) not in self._causes:
                    self._causes[str(error)] = _cause(row.as_turns(), self.tokenizer.template)
                reason += f", at {self._causes[str(error)]}"
        self.errors[row.file, code, reason, fix].append(row.line)

    def problems(self) -> Iterator[Problem]:
        for (file, code, reason, fix), lines in self.errors.items():
            severity: Severity = "warning" if self.skip else "error"
            yield about_rows(
                severity, code, reason, "these rows are skipped" if self.skip else fix, "dataset", file, sorted(set(lines))
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


def _cut(whole: Encoded, tokenizer: Tokenizer, as_chat: bool, max_length: int) -> Encoded:
    """The row with as much of its prompt as fits: the oldest turns go first, then the oldest text, then the system message.

    Markers of the template, BOS and the generation prompt stay, and so do both responses.
    """
    if whole.length <= max_length:
        return whole

    def with_prompt(prompt: Text) -> Encoded:
        row = replace(whole.row, prompt=prompt)
        rendered = Rendered.of(row, tokenizer.template) if as_chat and tokenizer.template else None
        return replace(_encode(rendered or row, tokenizer), row=whole.row, is_cut=True)

    def about(text: str, tokens: int) -> int:
        """About as many characters as the first tokens of a text have."""
        (ids,) = tokenizer.pieces.ids([text])
        return len(tokenizer.decode(ids[:tokens]))

    prompt, excess = whole.row.prompt, whole.length - max_length
    if not prompt:
        start = whole.responses[0][: max_length - len(whole.prompt_ids)]
        return replace(whole, responses=(start,), is_cut=True)
    if isinstance(prompt, str):
        shorter = _least_cut(len(prompt) - 1, lambda count: with_prompt(prompt[count:]), max_length, about(prompt, excess))
        return shorter or whole
    system, turns = _turns(prompt)
    if shorter := _least_cut(len(turns) - 1, lambda count: with_prompt(_joined(system, turns[count:])), max_length):
        return shorter
    # The last turn alone is too long: cut its text, and keep the system message if that is enough.
    first, *after = turns[-1]
    text = str(first["content"])
    for before in (system, []):
        shortened = partial(lambda before, count: with_prompt([*before, {**first, "content": text[count:]}, *after]), before)
        guess = about(text, excess - (whole.length - shortened(0).length))
        if shorter := _least_cut(len(text) - 1, shortened, max_length, guess):
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


def _least_cut(most: int, cut: Callable[[int], Encoded], max_length: int, guess: int | None = None) -> Encoded | None:
    """The row, cut by the smallest count in 0..most that fits (every larger one fits too); None if none does.

    By bisection, of the neighbourhood of the `guess` if there is one.
    """
    tried = cache(cut)

    def fits(count: int) -> bool:
        return tried(count).length <= max_length

    low, high = 0, most + 1  # the smallest count that fits is in low..high; none fits if it is the end
    at, step = most if guess is None else min(guess, most), FIRST_STEP
    while low <= at < high:
        low, high = (low, at) if fits(at) else (at + 1, high)
        at = at - step if high == at else at + step
        step *= 4
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return tried(high) if high <= most else None


def common(one: Sequence[object], other: Sequence[object]) -> int:
    """The number of equal elements at the start of two sequences. By halves: slices are compared at once."""
    equal, unequal = 0, min(len(one), len(other))  # so many are equal, and perhaps so many
    if one[:unequal] == other[:unequal]:
        return unequal
    while unequal - equal > 1:
        middle = (equal + unequal) // 2
        equal, unequal = (middle, unequal) if one[equal:middle] == other[equal:middle] else (equal, middle)
    return equal
