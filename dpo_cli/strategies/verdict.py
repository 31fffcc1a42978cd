"""The result of a run in one sentence: a pure function of its figures.

An accuracy is never reported without the margin, the loss and the gain: it reaches 1 long before a model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dpo_cli.results.compared import compared
from dpo_cli.results.intervals import FEW_PROMPTS, Sides, required

if TYPE_CHECKING:
    from dpo_cli.results.summary import Event

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


Tone = Literal["good", "doubtful", "bad", "open"]


@dataclass(frozen=True)
class Outcome:
    """The facts for a verdict. `judged` are the figures on held-out rows, or None."""

    status: str  # completed, interrupted, unhealthy, unfinished
    steps: int
    judged: Sides | None
    rows: int  # held-out rows, and their different prompts
    prompts: int
    health: Sequence[Event] = ()
    max_kl: float | None = None
    whole: bool = False  # all weights were trained, not an adapter
    base: str = "base"  # name of what it is compared with

    @property
    def who(self) -> str:
        return "the model" if self.whole else "the adapter"

    @property
    def warnings(self) -> int:
        return sum(event.action == "warn" for event in self.health)


@dataclass(frozen=True)
class Verdict:
    """`title` is the short form of the sentence; the tone is its colour."""

    tone: Tone
    title: str
    sentence: str


def verdict(outcome: Outcome, read: Callable[[Outcome], Verdict]) -> Verdict:
    """The verdict on a run, including what was not measured; `read` is how its strategy reads the figures."""
    if outcome.judged is None:
        return _unjudged(outcome)
    if not required(outcome.judged.policy, "loss").is_finite:
        sentence = f"{_ending(outcome)}; on held-out rows its loss is not finite, so {outcome.who} is broken."
        return Verdict("bad", "Broken", sentence)
    result = read(outcome)
    if outcome.prompts < FEW_PROMPTS:
        few = "only one prompt" if outcome.prompts == 1 else f"only {outcome.prompts} prompts"
        sentence = f"{result.sentence[:-1]}; these figures are of {few}, too few for a conclusion (use {FEW_PROMPTS} or more)."
        result = Verdict("doubtful", "Too few held-out prompts", sentence)
    if outcome.status == "completed":
        return result
    tone: Tone = "bad" if result.tone == "bad" or outcome.status == "unhealthy" else "doubtful"
    return Verdict(tone, TITLES[outcome.status], f"{_ending(outcome)}; {result.sentence[0].lower()}{result.sentence[1:]}")


TITLES = {"completed": "Not evaluated", "interrupted": "Interrupted", "unhealthy": "Unhealthy", "unfinished": "Not finished"}
ENDINGS = {
    "completed": "The training finished all of its {steps} steps",
    "interrupted": "The training was interrupted after step {steps}",
    "unhealthy": "The training was stopped as unhealthy after step {steps}",
    "unfinished": "The training has not finished; its last step is {steps}",
}


def _ending(outcome: Outcome) -> str:
    """How the training ended, and the reason."""
    stops = [event.message for event in outcome.health if event.action == "stop"]
    ending = ENDINGS[outcome.status].format(steps=outcome.steps)
    return f"{ending}: {stops[-1]}" if outcome.status == "unhealthy" and stops else ending


def _unjudged(outcome: Outcome) -> Verdict:
    """A run without figures on held-out rows: the training figures show only the fit."""
    missed = "its evaluation did not finish (dpo eval repeats it)" if outcome.rows else "there are no held-out rows"
    rest = {
        "completed": f", but {missed}, so it is unknown whether {outcome.who} is better than its {outcome.base}",
        "interrupted": f"; {outcome.who} is saved and not evaluated",
        "unhealthy": f"; {outcome.who} is saved and not evaluated",
        "unfinished": ", so it is not evaluated yet",
    }
    tone: Tone = "bad" if outcome.status == "unhealthy" else "open"
    return Verdict(tone, TITLES[outcome.status], f"{_ending(outcome)}{rest[outcome.status]}.")


def of_gain(outcome: Outcome, is_far: bool) -> tuple[Tone, str]:
    """The tone and the title for a clear gain."""
    if is_far:
        return "doubtful", f"Clear gain, but far from its {outcome.base}"
    if outcome.warnings:
        return "doubtful", "Clear gain, with a warning"
    return "good", f"Clear gain over its {outcome.base}"


def distance(outcome: Outcome) -> tuple[str, bool]:
    """How far the policy is from its reference, and whether that is over the limit, which applies only to sampled answers."""
    assert outcome.judged is not None
    policy = outcome.judged.policy
    if sampled := policy.get("kl_sequence"):
        is_far = outcome.max_kl is not None and sampled.value > outcome.max_kl
        reached, allowed = compared(sampled.value, outcome.max_kl or 0.0, 3, "g")
        limit = f" ({'over the limit of' if is_far else 'limit'} {allowed})" if outcome.max_kl is not None else ""
        return f"it is {reached} nats per answer from the {outcome.base}{limit}", is_far
    return f"it is {required(policy, 'kl_token').value:.2g} nats per token from the {outcome.base}", False


def warned(outcome: Outcome) -> str:
    count = outcome.warnings
    words = NUMBERS[count] if count < len(NUMBERS) else str(count)
    return f"; {words} warning{' was' if count == 1 else 's were'} raised" if count else ""


def sentence_case(text: str) -> str:
    return text[0].upper() + text[1:]
