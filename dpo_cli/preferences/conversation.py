"""A conversation with what was trained, and with its base: the prompts of a training, and the answers of an evaluation."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Literal

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dpo_cli.data.messages import Message, Text
from dpo_cli.data.rows import Question
from dpo_cli.data.tokenizer import Tokenizer
from dpo_cli.data.tokens import Encoder, encode_questions
from dpo_cli.errors import UsageError, invalid
from dpo_cli.evaluation.decoding import points_for
from dpo_cli.evaluation.generation import Answer, Sampling, Watch, generate
from dpo_cli.plan.plan import Plan
from dpo_cli.preferences.votes import Side
from dpo_cli.providers.policy import Policy
from dpo_cli.runs.open_run import Opened

DEFAULT_TOKENS = 512  # of an answer; fewer where the model's context is small
Finish = Literal["end", "length", "stopped"]


class Stop:
    """Whether the user has asked to end an answer."""

    def __init__(self) -> None:
        self.is_requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, the first Ctrl-C is a request, and a second one interrupts at once."""

        def note(number: int, frame: FrameType | None) -> None:
            self.is_requested = True
            signal.signal(signal.SIGINT, before)

        self.is_requested = False
        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class Spoken:
    """An answer of one side, how it ended, and the seconds that it took."""

    side: Side
    answer: Answer
    finish: Finish
    seconds: float


class TextOfTokens:
    """The text of an answer as its tokens come: each piece goes to `show` once its characters are whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int], show: Callable[[str], object]) -> None:
        self._tokenizer, self._ends, self._show = tokenizer, ends, show
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token: int) -> None:
        if token in self._ends:
            return
        self._ids.append(token)
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).strip()  # as the whole answer is
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and text.startswith(self._shown):
            self.end(text)

    def end(self, text: str) -> None:
        """Show what is left of the whole text."""
        if len(text) > len(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text


@dataclass
class Conversation:
    """Messages so far, and the way from them to token ids: that of the run's rows, with its chat template and day.

    A model without a chat template continues each text by itself, without the earlier ones.
    """

    encoder: Encoder
    label: str  # of the model, for messages
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    @classmethod
    def of(cls, opened: Opened, system: str | None) -> Conversation:
        """`InvalidInput` if the chat template takes no system message, and one is given."""
        plan = opened.plan
        tokenizer = Tokenizer.loaded(opened.tokenizer, plan.day, plan.model.generation)
        encoder = Encoder.of(tokenizer, plan.config.use_chat_template, None, opened.provider.token_rows())
        conversation = cls(encoder, plan.model_label)
        conversation.restart(system)
        return conversation

    @property
    def has_template(self) -> bool:
        return self.encoder.as_chat

    def restart(self, system: str | None) -> None:
        """Forget all messages, and start with this system message."""
        if system is not None:
            self._require_system(system)
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system is not None else []

    def _require_system(self, system: str) -> None:
        fix = "write the instruction into the first message instead"
        template = self.encoder.tokenizer.template
        if template is None or not self.has_template:
            raise invalid("no-system-role", f"{self.label} is used without a chat template, so it has no system role", fix)
        asked: list[Message] = [{"role": "user", "content": "Hello"}]
        plain = template.render(asked, None, add_generation_prompt=True)
        try:
            text = template.render([{"role": "system", "content": system}, *asked], None, add_generation_prompt=True)
        except TemplateError as error:
            raise invalid("no-system-role", f"the chat template of {self.label} has no system role: {error}", fix) from error
        if text == plain:
            raise invalid("no-system-role", f"the chat template of {self.label} omits the system message", fix)

    def asked(self, text: str) -> Text:
        """The prompt of one more message of the user, which the conversation does not have yet."""
        return [*self.messages, {"role": "user", "content": text}] if self.has_template else text

    def ids(self, prompt: Text, room: int) -> tuple[list[int], bool]:
        """The token ids of a prompt within `room` tokens, and whether its oldest turns are left out for that.

        `InvalidInput` if the chat template rejects the prompt, or if it cannot be cut so far.
        """
        encoder, question = self.encoder, Question(prompt, None, 1, "the conversation")
        encoded, counts = encode_questions([question], encoder.tokenizer, encoder.as_chat or False, room, encoder.token_rows)
        if not encoded:
            message = f"the markers of the chat template alone leave no room for a message in {room} tokens"
            raise invalid("no-room-to-answer", message, "ask for a shorter answer: --max-new-tokens")
        return encoded[0][1], bool(counts["cut"])

    def add(self, text: str, answer: str) -> None:
        """The turn is over: the next prompt holds it."""
        if self.has_template:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def undo(self) -> bool:
        """Remove the last question and its answer; False without one."""
        if not self.messages or self.messages[-1]["role"] == "system":
            return False
        del self.messages[-2:]
        return True


@dataclass(frozen=True)
class Speakers:
    """The policy and its reference as they answer a prompt: one model in memory, and the same sampling and seed for both."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    plan: Plan
    sampling: Sampling
    context: int | None  # tokens of a prompt and its answer; None if the model sets no limit
    seed: int

    @classmethod
    def of(
        cls,
        policy: Policy,
        opened: Opened,
        conversation: Conversation,
        max_new_tokens: int | None,
        temperature: float | None,
        seed: int | None,
    ) -> Speakers:
        """`UsageError` if an answer of so many tokens leaves no room for a prompt."""
        context = getattr(policy.network.config.get_text_config(), "max_position_embeddings", None)
        if max_new_tokens is not None and context is not None and max_new_tokens >= context:
            message = f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in the model's {context} tokens"
            raise UsageError(message, f"--max-new-tokens {context // 2}")
        tokens = max_new_tokens or min(DEFAULT_TOKENS, context // 2 if context is not None else DEFAULT_TOKENS)
        plan, ends = opened.plan, conversation.encoder.tokenizer.ends
        seed = plan.config.seed if seed is None else seed
        return cls(policy, opened.tokenizer, ends, plan, Sampling(tokens, temperature or None), context, seed)

    @property
    def room(self) -> int:
        """Tokens of a prompt that leave room for an answer."""
        limit = self.context if self.context is not None else 1 << 30
        return limit - self.sampling.max_new_tokens

    def answer(
        self, side: Side, prompt: list[int], turn: int, show: Callable[[str], object], stop: Stop | None = None
    ) -> Spoken:
        """The answer of one side to a prompt (token ids): greedy as an evaluation's, or drawn by the seed and the turn.

        `show` gets its text piece by piece. A stopped answer has the tokens until then.
        """
        text = TextOfTokens(self.tokenizer, self.ends, show)

        def see(token: int) -> bool:
            text.add(token)
            return stop is not None and stop.is_requested

        start, dtype = time.monotonic(), getattr(torch, self.plan.dtype)
        points = None
        if self.sampling.temperature is not None:
            torch.manual_seed(self.seed + turn)
            points = points_for(1, self.sampling.max_new_tokens)
        room = self.plan.evaluation_room(dtype.itemsize)
        with self.policy.as_reference() if side == "base" else nullcontext(self.policy.network) as model:
            ((answer,),) = generate(
                model, self.tokenizer, [prompt], self.sampling, dtype, memory=room, points=points, watch=Watch(see)
            )
        text.end(answer.text)
        is_stopped = stop is not None and stop.is_requested
        finish: Finish = "end" if answer.finished else "stopped" if is_stopped else "length"
        return Spoken(side, answer, finish, time.monotonic() - start)
