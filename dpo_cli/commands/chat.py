"""The story of `dpo chat`: open, load, and answer: one prompt, the lines of a pipe, or a person, whose votes become pairs."""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dpo_cli.commands.requests import ChatRequest
from dpo_cli.data.messages import Text
from dpo_cli.errors import InvalidInput, UsageError
from dpo_cli.preferences.conversation import Conversation, Speakers, Spoken, Stop
from dpo_cli.preferences.voted_pairs import TIES, VotedPairs, pair_row, require_free
from dpo_cli.preferences.votes import AS_MADE, TURNED, Side
from dpo_cli.results.codec import JsonObject
from dpo_cli.runs.open_run import Opened, OpenedRun, load_policy, open_adapter, open_run, require_answers
from dpo_cli.storage.digests import sha256_of_all
from dpo_cli.storage.run_directory import CHAT_PAIRS, MANIFEST, SUMMARY
from dpo_cli.ui.chat_entry import Entry, PipedEntry, TypedEntry, is_terminal
from dpo_cli.ui.chat_view import ChatView
from dpo_cli.ui.console import Console

NAMES: Mapping[Side, str] = {"adapter": "policy", "base": "base"}  # as in the JSON of an evaluation
COMMANDS = {
    "/help": "show this list",
    "/reset": "forget the conversation",
    "/undo": "forget the last message and its answer",
    "/system TEXT": "start again with this system message; without TEXT, with none",
    "/quit": "end the chat, as Ctrl-D does",
}
KEYS = "Enter sends, Alt+Enter starts a new line, Ctrl-C stops an answer"
VOTE_KEYS = "ab=s"
VOTE = "better: a, b, = (no difference), s (skip)? "


def chat(request: ChatRequest, console: Console) -> JsonObject:
    """Answer a prompt, which `chat --prompt --json` prints; or chat until the user ends it."""
    opened = _opened(request, console)
    require_answers(opened.plan, "say in a chat")
    conversation = Conversation.of(opened, request.system)
    if request.prompt is not None:
        conversation.ids(conversation.asked(request.prompt), 1 << 30)  # before a model is loaded
    pairs = _pairs(request, opened) if request.side_by_side and request.prompt is None else None
    policy, _ = load_policy(opened, console)
    speakers = Speakers.of(policy, opened, conversation, request.max_new_tokens, request.temperature, request.seed)
    origin = _origin(opened, speakers)
    one = Chat(conversation, speakers, request.side_by_side, console, ChatView(console), pairs, origin)
    if request.prompt is not None:
        return one.answer_once(request.prompt)
    is_typed = is_terminal() and not console.as_json
    one.hold(TypedEntry() if is_typed else PipedEntry(), is_typed)
    return {}


def _opened(request: ChatRequest, console: Console) -> Opened:
    if request.adapter is not None:
        return open_adapter(request.target, request.adapter, None, request.overrides, console, with_rows=False)
    return open_run(request.target, None, console, request.overrides, with_rows=False)


def _pairs(request: ChatRequest, opened: Opened) -> VotedPairs | None:
    """The file for pairs; none in a pipe, where nobody votes."""
    if not is_terminal():
        if request.out is not None:
            raise UsageError("--out keeps votes, and only a terminal asks for them", "run the command in a terminal")
        return None
    if request.out is None and not isinstance(opened, OpenedRun):
        raise UsageError("an adapter outside a run has no place for the votes", "add --out pairs.jsonl")
    place = request.out or opened.folder.parent / CHAT_PAIRS
    require_free(place, may_exist=True)
    return VotedPairs(place)


def _origin(opened: Opened, speakers: Speakers) -> JsonObject:
    """The part of the provenance that all pairs of a chat share."""
    if isinstance(opened, OpenedRun):
        model, run = opened.run.read_json(MANIFEST)["model"], opened.run.path.resolve().name
        digest = opened.run.read_json(SUMMARY)["adapter_sha256"]
    else:
        model, run, digest = {}, None, sha256_of_all(opened.folder)
    named = {"name": Path(opened.plan.config.model_name).name} | {
        name: model[name] for name in ("sha256", "revision") if model.get(name)
    }
    sampling = speakers.sampling
    return {
        "source": "dpo chat",
        "run": run,
        "adapter_sha256": digest,
        "model": named,
        "rule": {"rank": "vote", "by": "human"},
        "sampling": {name: getattr(sampling, name) for name in ("max_new_tokens", "temperature", "top_p")},
        "seed": speakers.seed,
    }


@dataclass
class Chat:
    """A conversation, those who answer, and the place of its votes if there are any."""

    conversation: Conversation
    speakers: Speakers
    side_by_side: bool
    console: Console
    view: ChatView
    pairs: VotedPairs | None
    origin: JsonObject
    turn: int = 0

    def answer_once(self, text: str) -> JsonObject:
        """The answer to one prompt, or both answers with the names of their sides."""
        prompt = self.conversation.asked(text)
        ids, is_cut = self._ids(prompt)
        spoken = self._spoken(ids, AS_MADE, [NAMES[side] for side in AS_MADE], None)
        answers = [
            {
                "model": NAMES[one.side],
                "text": one.answer.text,
                "tokens": one.answer.tokens,
                "finish": one.finish,
                "seconds": one.seconds,
            }
            for one in spoken
        ]
        messages = prompt if isinstance(prompt, list) else None
        shared = {name: self.origin[name] for name in ("run", "adapter_sha256", "model", "sampling", "seed")}
        return {**shared, "prompt": text, "messages": messages, "is_cut": is_cut, "answers": answers}

    def hold(self, entry: Entry, is_typed: bool) -> None:
        """Answer each message until the user ends the chat."""
        if is_typed:
            self.console.line(f"{KEYS}; /help lists the commands")
        if not self.conversation.has_template:
            self.console.line(
                "note: this model is used without a chat template: it continues each text by itself, without the earlier ones"
            )
        while (text := entry.text()) is not None:
            text = text.strip()
            if text.startswith("/") and not text.startswith("//"):
                if not self._obeyed(text):
                    break
            elif text:
                self._turn(text.removeprefix("/") if text.startswith("//") else text, entry, is_typed)
        if self.pairs is not None and self.pairs.counts:
            pairs, ties = self.pairs.counts["pair"], self.pairs.counts["tie"]
            if pairs:
                self.console.line(f"{self.pairs.path}: {pairs} pairs of this chat")
            if ties:
                self.console.line(f"{self.pairs.path}{TIES}: ties of this chat, which are not trained on: {ties}")

    def _obeyed(self, text: str) -> bool:
        """Carry out a command; False for the end of the chat."""
        name, _, rest = text.partition(" ")
        known = {command.partition(" ")[0]: command for command in COMMANDS}
        if name not in known or (rest.strip() and " " not in known[name]):
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]}? " if near and near[0] != name else ""
            self.console.line(f"there is no command {text}: {meant}/help lists them; // starts a message with /")
        elif name == "/help":
            for command, what in COMMANDS.items():
                self.console.line(f"{command:<14}{what}")
            self.console.line(KEYS)
        elif name == "/undo":
            self.console.line("removed the last turn" if self.conversation.undo() else "there is no turn to remove")
        elif name in ("/reset", "/system"):
            self._restart(self.conversation.system if name == "/reset" else rest.strip() or None)
        return name != "/quit"

    def _restart(self, system: str | None) -> None:
        try:
            self.conversation.restart(system)
        except InvalidInput as error:  # the conversation stays as it is
            self.console.problems(error.problems)
            return
        self.console.line("a new conversation" + (", with the system message" if system is not None else ""))

    def _ids(self, prompt: Text) -> tuple[list[int], bool]:
        ids, is_cut = self.conversation.ids(prompt, self.speakers.room)
        if is_cut:
            self.console.line(
                f"note: the oldest part of the conversation is left out, so that an answer fits the model's "
                f"{self.speakers.context} tokens"
            )
        return ids, is_cut

    def _spoken(self, ids: list[int], order: Sequence[Side], titles: Sequence[str], stop: Stop | None) -> list[Spoken]:
        """The answer of the policy, or, side by side, both answers in this order; a request to stop ends both."""
        if not self.side_by_side:
            with self.view.one() as show:
                return [self.speakers.answer("adapter", ids, self.turn, show, stop)]
        with self.view.two(titles) as shows:
            spoken = []
            for side, show in zip(order, shows, strict=True):
                if stop is None or not stop.is_requested:
                    spoken.append(self.speakers.answer(side, ids, self.turn, show, stop))
            return spoken

    def _turn(self, text: str, entry: Entry, is_typed: bool) -> None:
        """Answer one message, ask for a vote where votes are kept, and continue with the better answer."""
        prompt = self.conversation.asked(text)
        try:
            ids, _ = self._ids(prompt)
        except InvalidInput as error:  # the conversation stays as it was, for another message
            self.console.problems(error.problems)
            return
        order = random.choice((AS_MADE, TURNED)) if self.pairs is not None else AS_MADE
        titles = ["A", "B"] if self.pairs is not None else [NAMES[side] for side in order]
        stop = Stop()
        if is_typed:
            with entry.quiet(), stop.listening():
                spoken = self._spoken(ids, order, titles, stop)
        else:
            spoken = self._spoken(ids, order, titles, None)
        for title, one in zip(titles if self.side_by_side else ["the answer"], spoken, strict=False):  # a stop leaves out B
            if one.finish == "length":
                most = self.speakers.sampling.max_new_tokens
                self.console.line(f"note: {title} did not end by itself; {most} tokens are the maximum: --max-new-tokens")
            elif one.finish == "stopped":
                self.console.line(f"note: {title} was stopped")
        better = self._voted(prompt, spoken, entry) if self.pairs is not None else None
        kept = better or next((one for one in spoken if one.side == "adapter"), spoken[0])
        self.conversation.add(text, kept.answer.text)
        self.turn += 1

    def _voted(self, prompt: Text, spoken: Sequence[Spoken], entry: Entry) -> Spoken | None:
        """The answer that the user prefers, kept as a pair if it can be one; None without a preference."""
        assert self.pairs is not None
        if len(spoken) < 2 or any(one.finish == "stopped" for one in spoken):
            return None
        one, other = spoken
        if one.answer.text == other.answer.text:
            self.console.line("no vote: both answers are the same text")
            return None
        key = entry.key(VOTE, VOTE_KEYS)
        sides = f"A was the {_words(one.side)}, B the {_words(other.side)}"
        if key in (None, "s"):
            self.console.line(f"no vote; {sides}")
            return None
        if key == "=":
            self.pairs.add_tie(self._row(prompt, one, other, None))
            self.console.line(f"a tie; {sides}")
            return None
        better, worse = (one, other) if key == "a" else (other, one)
        if fault := _fault(better, worse):
            self.console.line(f"{sides}; not kept as a pair: {fault}")
        else:
            self.pairs.add(self._row(prompt, better, worse, better.side))
            self.console.line(f"{sides}; kept in {self.pairs.path}")
        return better

    def _row(self, prompt: Text, one: Spoken, other: Spoken, chosen: Side | None) -> JsonObject:
        own = {
            "chosen": chosen,
            "rejected": other.side if chosen is not None else None,
            "tokens": (one.answer.tokens, other.answer.tokens),
            "rejected_finished": other.answer.finished,
            "turn": self.turn,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return pair_row(prompt, one.answer.text, other.answer.text, {**self.origin, **own})


def _words(side: Side) -> str:
    return "adapter" if side == "adapter" else "base model"


FAULTS: Sequence[tuple[Callable[[Spoken, Spoken], bool], str]] = (
    (lambda better, worse: not better.answer.finished, "the better answer did not end, and would teach not to end"),
    (lambda better, worse: not (better.answer.text.strip() and worse.answer.text.strip()), "an answer is empty"),
    (lambda better, worse: "\0" in better.answer.text + worse.answer.text, "an answer has a NUL character"),
)


def _fault(better: Spoken, worse: Spoken) -> str | None:
    """Why a training cannot use this pair, as in `dpo augment`."""
    return next((words for holds, words in FAULTS if holds(better, worse)), None)
