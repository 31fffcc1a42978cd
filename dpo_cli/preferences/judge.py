"""A judge: a language model behind an OpenAI-compatible endpoint that compares two answers.

Judges favour a position, so two answers are shown in both orders, and verdicts that disagree are a tie.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any, Literal

import httpx

from dpo_cli.data.messages import flat
from dpo_cli.data.rows import Question
from dpo_cli.errors import RunFailed
from dpo_cli.evaluation.generation import Answer

KEY = "OPENAI_API_KEY"
AT_ONCE = 8  # requests
TIMEOUT_SECONDS = 60.0
PAUSES_SECONDS = (1.0, 4.0, 16.0)  # before a retry

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
        self.url, self.model, self.criterion = f"{url.rstrip('/')}/chat/completions", model, criterion
        self.key = os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.client = httpx.Client(headers=headers, timeout=TIMEOUT_SECONDS)

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
        try:
            reply = self._post(body).json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            what = f"{self.url} does not answer as the OpenAI API does"
            raise RunFailed(what, 'check "judge_url": it is the address before /chat/completions') from error
        return verdict(str(reply))

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        """The response; retried after a pause if the endpoint is busy, slow or unreachable."""
        for pause in (*PAUSES_SECONDS, None):
            try:
                response = self.client.post(self.url, json=body)
            except httpx.TransportError as error:
                why = f"{type(error).__name__}: {error}".rstrip(": ")
            else:
                if response.is_success:
                    return response
                why = f"status {response.status_code}"
                if response.status_code in (401, 403):
                    raise RunFailed(f"{self.url} denies access ({why})", f"set {KEY} to a valid key")
                if response.status_code < 500 and response.status_code not in (408, 429):
                    raise RunFailed(f"{self.url} rejects the request ({why})", 'check "judge_url" and "judge_model"')
            if pause is not None:
                time.sleep(pause)
        raise RunFailed(
            f"the judge cannot be reached: {self.url}: {why}", "check the endpoint; then run the same command to continue"
        )


def settled(first: Verdict, second: Verdict) -> float:
    """The result of the verdicts on two answers in both orders; verdicts that disagree are a tie."""
    return {("A", "B"): 1.0, ("B", "A"): -1.0}.get((first, second), 0.0)


def verdict(reply: str) -> Verdict | None:
    """The letter in the last line of a reply; None for anything except one letter."""
    last = next((line for line in reversed(reply.splitlines()) if line.strip()), "")
    match = re.fullmatch(r"\W*(?:answer|verdict)?\W*([ABT])\W*", last, re.IGNORECASE)
    return match[1].upper() if match else None  # type: ignore[return-value]
