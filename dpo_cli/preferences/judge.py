"""A judge: a language model behind an OpenAI-compatible endpoint that compares two answers.

Judges favour a position, so two answers are shown in both orders, and verdicts that disagree are a tie.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Literal

from dpo_cli.data.messages import flat
from dpo_cli.data.rows import Question
from dpo_cli.evaluation.generation import Answer
from dpo_cli.preferences.endpoint import AT_ONCE, Endpoint

TIMEOUT_SECONDS = 60.0

Verdict = Literal["A", "B", "T"]

ASK = """\
Two answers to the same prompt follow. Which is {criterion}?

[Prompt]
{prompt}
[End of the prompt]

[Answer A]
{one}
[End of answer A]

[Answer B]
{other}
[End of answer B]

Reply with one letter alone: A, B, or T if neither is better."""


class Judge:
    """Ranks answers by wins minus losses when each is compared with each other."""

    def __init__(self, url: str, model: str, criterion: str) -> None:
        self.model, self.criterion = model, criterion
        self.endpoint = Endpoint(url, "judge", "the judge", TIMEOUT_SECONDS)

    def __call__(self, question: Question, answers: Sequence[Answer]) -> list[float]:
        """One score per answer. Raises `RunFailed` if the endpoint cannot be reached, or does not speak the API."""
        duels = list(combinations(range(len(answers)), 2))
        orders = [order for one, other in duels for order in ((one, other), (other, one))]
        prompt = flat(question.prompt)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            verdicts = list(pool.map(lambda order: self.compare(prompt, *(answers[place].text for place in order)), orders))
        scores = [0.0] * len(answers)
        for i, (one, other) in enumerate(duels):
            won = settled(*(said or "T" for said in verdicts[2 * i : 2 * i + 2]))  # no verdict is a tie here
            scores[one] += won
            scores[other] -= won
        return scores

    def better(self, prompt: str, one: str, other: str) -> float | None:
        """1 if the judge prefers the first in both orders, -1 if it prefers the second, else 0; None without a verdict."""
        first, second = self.compare(prompt, one, other), self.compare(prompt, other, one)
        return settled(first, second) if first and second else None

    def compare(self, prompt: str, one: str, other: str) -> Verdict | None:
        """The verdict on two answers in this order; None for a reply that is not a verdict."""
        question = ASK.format(criterion=self.criterion, prompt=prompt, one=one, other=other)
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        _, choice = self.endpoint.complete(body)
        return verdict(str(choice["message"]["content"]))


def settled(first: Verdict, second: Verdict) -> float:
    """The result of the verdicts on two answers in both orders; verdicts that disagree are a tie."""
    return {("A", "B"): 1.0, ("B", "A"): -1.0}.get((first, second), 0.0)


def verdict(reply: str) -> Verdict | None:
    """The letter in the last line of a reply; None for anything except one letter."""
    last = next((line for line in reversed(reply.splitlines()) if line.strip()), "")
    match = re.fullmatch(r"\W*(?:answer|verdict)?\W*([ABT])\W*", last, re.IGNORECASE)
    return match[1].upper() if match else None  # type: ignore[return-value]
