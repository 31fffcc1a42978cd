"""Answers of a model that a server has loaded, for `dpo augment`: over the OpenAI API, several requests at once."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dpo_cli.data.rows import Question
from dpo_cli.data.transcripts import as_messages
from dpo_cli.errors import RunFailed
from dpo_cli.evaluation.generation import Answer
from dpo_cli.preferences.endpoint import AT_ONCE, Endpoint

TIMEOUT_SECONDS = 600.0  # an answer may have thousands of tokens
ENDED = ("stop", "eos", "tool_calls")  # reasons to finish; the others say that the answer was cut


class ServedAnswers:
    """Samples answers at `answers_url`. The same prompt and seed ask for the same answer; the server may give another one."""

    def __init__(self, options: Mapping[str, Any], seed: int) -> None:
        """Asks for one token first: so a wrong address is told before any work, and the name that the server gives is known."""
        self.options, self.seed = options, seed
        self.endpoint = Endpoint(options["answers_url"], "answers", "the server", TIMEOUT_SECONDS)
        probe = {"model": options["answers_model"], "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        self.served = _served(self.endpoint.complete(probe)[0])

    @property
    def identity(self) -> dict[str, object]:
        """The model for the provenance of a row: its name, the name that the server gives it, and the address."""
        return {"name": self.options["answers_model"], "served_as": self.served, "url": self.options["answers_url"]}

    def __call__(self, questions: Sequence[Question], start: int) -> list[list[Answer]]:
        """`responses` answers to each question; the first question has number `start`."""
        count = self.options["responses"]
        asked = [(question, start + place, number) for place, question in enumerate(questions) for number in range(count)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(lambda one: self._answer(*one), asked))
        return [answers[begin : begin + count] for begin in range(0, len(answers), count)]

    def _answer(self, question: Question, place: int, number: int) -> Answer:
        body = {
            "model": self.options["answers_model"],
            "messages": as_messages(question.prompt, "user"),
            "temperature": self.options["temperature"],
            "top_p": self.options["top_p"],
            "max_tokens": self.options["max_new_tokens"],
            "seed": random.Random(f"{self.seed}/{place}/{number}").getrandbits(31),
        }
        if question.tools:
            body["tools"] = [dict(tool) for tool in question.tools]
        reply, choice = self.endpoint.complete(body)
        if (served := _served(reply)) != self.served:
            message = f"{self.endpoint.url} answered as {served}, and before as {self.served}"
            raise RunFailed(message, "let the server keep one model, then run the same command to continue")
        text = str(choice["message"]["content"] or "").strip()
        tokens = (reply.get("usage") or {}).get("completion_tokens")
        if not isinstance(tokens, int):
            message = f"{self.endpoint.url} does not say how many tokens an answer has"
            raise RunFailed(message, "use a server whose replies have usage.completion_tokens")
        return Answer(text, tokens, finished=choice.get("finish_reason") in ENDED)


def _served(reply: Mapping[str, Any]) -> str:
    return str(reply.get("model") or "unknown")
