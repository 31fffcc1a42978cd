"""Is the training healthy? Rules over its steps and lines, each with the documented remedy.

A rule reads the course of a training and returns a message and its remedy, or nothing. `RULES` at the end
names the rules with their actions, and a strategy says which of them apply. A rule is reported once. Batches differ by chance:
a rule compares means over many pairs, and only differences that chance does not explain.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypedDict

import numpy as np

from dpo_cli.evaluation.evaluation import ACCURACY_LOW
from dpo_cli.evaluation.metrics import Scores
from dpo_cli.plan.plan import Plan
from dpo_cli.results.codec import JsonObject
from dpo_cli.results.compared import compared
from dpo_cli.results.intervals import Interval
from dpo_cli.results.summary import Action, Event, Line
from dpo_cli.strategies.figures import share
from dpo_cli.strategies.reward import CHANCE
from dpo_cli.strategies.strategy import Strategy

StepFigures = dict[str, float]  # means over the rows of a step

RECENT_STEPS, RECENT_PAIRS = 8, 64  # the minimum of last steps, and of pairs in them, that a rule looks at
ERRORS = 5.0  # standard errors (of few steps) that are not chance
SWING_STEPS, SWING = 16, 2.0  # mean change per step over this many steps, relative to the first loss
RISE = 1.25  # times the loss of the first steps
TURNED_NATS = 1.0  # of log-prob, rejected against chosen
COLLAPSE, COLLAPSE_NATS = 2.0, 10.0  # relative to the reference's negative log-prob of chosen, and nats above it
FALL = 0.1  # of the chosen reward, while the margin is larger than this
STILL_NATS = 0.5  # of log-prob: more than the rounding of 16 bits
HEART_STEPS, EARLY = 5, 0.75  # steps in a row with every pair right, and the share of all steps that counts as early
NO_WARMUP = "remove warmup_steps and warmup_ratio, or train more steps"
GENERALISES = 0.9  # of the held-out pairs
STILL_KL = 1e-3  # nats per sampled answer
FALL_ERRORS = 3.0  # of the rewards of held-out prompts: there are at least 16
SAME_REWARD = 1e-6  # standard deviation within the samples of a prompt
FOLLOWS, LONGER = 0.8, 0.2  # correlation, and relative change of length
NEARLY_ALL = 0.9  # of the pairs of a first and a recent step: 1.4 % by chance with 4 and 8
COLLAPSED = 0.3  # of the entropy of the first steps
APART_NATS = {"float32": 1e-3, "bfloat16": 0.02, "float16": 0.02}  # per token: the rounding that is allowed at step 0


class CourseState(TypedDict):
    """A `Course` as a checkpoint holds it."""

    first: list[StepFigures]
    last: list[StepFigures]
    done: int
    all_right: int
    line: JsonObject  # {} where there is none
    evaluation: JsonObject
    rewards: list[list[float]]


class Course:
    """A training so far: means over the rows of its first and last optimizer steps, and the last lines of metrics.jsonl."""

    def __init__(self, plan: Plan, steps: Sequence[StepFigures] = (), evaluation: Line | None = None) -> None:
        assert plan.counts is not None
        self.plan, self.pairs = plan, plan.counts.train_pairs
        self.rows_a_step = plan.pairs_a_step
        self.epoch = math.ceil(self.pairs / self.rows_a_step)  # steps
        self.recent = max(RECENT_STEPS, math.ceil(RECENT_PAIRS / self.rows_a_step))
        self.swing = max(SWING_STEPS, self.recent)
        self.first: list[StepFigures] = []
        self.last: deque[StepFigures] = deque(maxlen=2 * self.swing)
        self.done = self.all_right = 0  # steps, and the last steps in a row with every pair right
        self.line: Line | None = None
        self.evaluation = evaluation
        self.rewards: list[list[float]] = []  # of answers to held-out prompts, in the best evaluation and in the last
        self.reward_accuracy: Interval | None = None  # of what scores the samples, on held-out pairs; until it is reported
        for step in steps:
            self.add(step)

    def add(self, step: StepFigures) -> None:
        if len(self.first) < self.recent:
            self.first.append(step)
        self.last.append(step)
        self.done += 1
        self.all_right = self.all_right + 1 if step.get("accuracy") == 1 else 0

    def see(self, line: Line) -> None:
        """A line of metrics.jsonl."""
        self.line = line
        if line.split == "eval":
            self.evaluation = line

    def see_held_out(self, rewards: list[float]) -> None:
        """The rewards of an answer to each held-out prompt, in the order of the prompts, in an evaluation."""
        best = max(self.rewards, key=lambda one: float(np.mean(one)), default=rewards)
        self.rewards = [best, rewards] if rewards else []

    @property
    def never_moved(self) -> bool:
        """Whether every reward is exactly 0, including one after a step that can move the policy.

        A step is measured before its update, and the first one of a warm-up has the learning rate 0.
        """
        seen = [*self.first, *self.last]
        evaluation = self.evaluation
        if evaluation is not None and evaluation.step == self.done and "reward_chosen" in evaluation.figures:
            seen.append(evaluation.figures)
        elif self.done < (3 if self.plan.warmup_over(self.plan.total_steps) else 2):
            return False
        return all(figures.get(name, 0) == 0 for figures in seen for name in ("reward_chosen", "reward_rejected"))

    def held_out(self, name: str) -> float | None:
        """A figure of the last evaluation, if there is one."""
        return self.evaluation.figures.get(name) if self.evaluation else None

    def state(self) -> CourseState:
        """The state for a checkpoint."""
        line, evaluation = (one.to_json() if one else {} for one in (self.line, self.evaluation))
        return {
            "first": self.first,
            "last": list(self.last),
            "done": self.done,
            "all_right": self.all_right,
            "line": line,
            "evaluation": evaluation,
            "rewards": self.rewards,
        }

    def restore(self, state: CourseState) -> None:
        self.first, self.last = state["first"], deque(state["last"], maxlen=self.last.maxlen)
        self.done, self.all_right = state["done"], state["all_right"]
        self.line, self.evaluation = (Line.of_json(state[name]) if state[name] else None for name in ("line", "evaluation"))
        self.rewards = state.get("rewards", [])  # older checkpoints have none

    def values(self, name: str, count: int, before: int = 0) -> list[float]:
        """A figure of the last `count` steps, or of as many that end `before` steps ago; not of steps that lack it."""
        end = len(self.last) - before
        return [step[name] for step in islice(self.last, max(0, end - count), end) if name in step]

    def moved(self, name: str) -> tuple[float, float, float]:
        """The means of a figure over the first steps and over the recent ones, and the share of pairs of both in which the
        recent one is larger: U of Mann and Whitney over its maximum, which holds for steps that change while they are the
        first. Of the first only a few count: a policy may learn in ten steps."""
        first, recent = [step[name] for step in self.first[: self.recent // 2]], self.values(name, self.recent)
        above = np.sign(np.subtract.outer(recent, first)) / 2 + 0.5
        return float(np.mean(first)), float(np.mean(recent)), float(np.mean(above))

    def mean(self, name: str, before: int = 0) -> float:
        """Over the recent steps, or over as many that end `before` steps ago."""
        return float(np.mean(self.values(name, self.recent, before)))

    @property
    def rounding(self) -> float:
        """The rounding of a mean reward or margin over the recent steps; 0 in float32."""
        plan = self.plan
        return plan.rounding.of_mean(self.recent * self.rows_a_step, plan.config.beta) if plan.rounding else 0.0

    def error(self, values: Sequence[float]) -> float:
        """The standard error of the mean of steps."""
        return float(np.std(values, ddof=1)) / math.sqrt(len(values))


Found = tuple[str, str] | None  # a message and its remedy
Rule = Callable[[Course], Found]


def not_finite(course: Course) -> Found:
    """A loss or gradient that is NaN or infinite never recovers: AdamW's moments keep it.

    With fp16, an infinite gradient is how the scaler finds its scale: that step is skipped.
    """
    figures = {"loss": course.last[-1]["loss"] if course.last else 0.0}
    if not course.plan.config.fp16:
        figures["grad_norm"] = course.line.figures.get("grad_norm", 0.0) if course.line else 0.0
    broken = [name for name, value in figures.items() if not math.isfinite(value)]
    if not broken:
        return None
    message = f"{' and '.join(broken)} of step {course.done} {'are' if len(broken) > 1 else 'is'} not finite"
    return message, "lower learning_rate (the documentation says: try 1e-7) or lora_alpha; with fp16, use bf16"


def too_far(course: Course) -> Found:
    """kl_sequence of the last evaluation is over `max_kl`; the documentation says that below 10 is reasonable."""
    kl, limit = course.held_out("kl_sequence"), course.plan.config.max_kl
    if kl is None or limit is None or not kl > limit:
        return None
    reached, allowed = compared(kl, limit, 3, "g")
    message = f"the KL per sampled answer is {reached} nats, and max_kl is {allowed}"
    return message, "raise beta, or lower learning_rate or num_train_epochs"


def loss_oscillates(course: Course) -> Found:
    """The mean change of the loss per step is more than twice the loss of the first step."""
    losses = course.values("loss", course.swing + 1)
    if len(losses) <= course.swing:
        return None
    swing, start = float(np.mean(np.abs(np.diff(losses)))), course.first[0]["loss"]
    if not swing > SWING * abs(start):
        return None
    message = f"the loss oscillates: it changes by {swing:.3g} per step, and started at {start:.3g}"
    return (
        message,
        "lower learning_rate (the documentation says: try 1e-7), raise warmup_steps, check that the preferences are clear",
    )


def loss_rises(course: Course) -> Found:
    """The recent loss is a quarter above that of the first steps, and by more than chance."""
    if course.done < 2 * course.recent:
        return None
    first, recent = [step["loss"] for step in course.first], course.values("loss", course.recent)
    start, now = float(np.mean(first)), float(np.mean(recent))
    if not (now > RISE * start and now - start > ERRORS * math.hypot(course.error(first), course.error(recent))):
        return None
    message = f"the loss is {now:.3g} over the last {course.recent} steps, and it started at {start:.3g}"
    return message, "lower learning_rate; check that the data is of one kind"


def prefers_rejected(course: Course) -> Found:
    """The recent margin is below 0, by more than a nat and by more than chance: the policy unlearns, whatever the loss is."""
    if course.done < course.recent:
        return None
    margins = course.values("margin", course.recent)
    margin, limit = float(np.mean(margins)), TURNED_NATS * course.plan.config.beta
    if not margin < -max(limit, ERRORS * course.error(margins), ERRORS * course.rounding):
        return None
    message = f"the margin is {margin:.3g} over the last {course.recent} steps: the policy prefers the rejected responses"
    return (
        message,
        "check that chosen and rejected are not swapped in the data; lower learning_rate (the documentation says: try 1e-7)",
    )


def all_right_early(course: Course) -> Found:
    """Pairs repeat, all of them are right, and no held-out figure shows that this is more than memorisation."""
    if (course.held_out("accuracy") or 0.0) >= GENERALISES:
        return None
    # A dataset that fits into one step is always memorised.
    window = max(HEART_STEPS, course.epoch) if course.epoch > 1 else 2
    is_early = course.epoch == 1 or course.done <= EARLY * course.plan.total_steps
    if not is_early or course.all_right < window or course.done < course.epoch + window:
        return None
    pairs = "the one pair" if course.pairs == 1 else f"each of the {course.pairs} pairs"
    message = f"{pairs} is preferred as labelled after {course.done} of {course.plan.total_steps} steps: they are memorised"
    return message, "add diverse pairs (the documentation says: 500 or more), or lower num_train_epochs or learning_rate"


def chosen_collapses(course: Course) -> Found:
    """The chosen responses are twice as unlikely, in nats, as under the reference: a sign of repetition and gibberish."""
    if course.done < course.recent:
        return None
    policy = course.mean("logp_chosen")
    reference = policy - course.mean("reward_chosen") / course.plan.config.beta
    if not (policy < COLLAPSE * reference and policy < reference - COLLAPSE_NATS):
        return None
    message = f"the log-prob of a chosen response has fallen from {reference:.0f} to {policy:.0f} nats"
    return message, 'lower learning_rate, raise beta, or add the SFT loss: "loss_type": ["sigmoid", "sft"]'


def chosen_falls(course: Course) -> Found:
    """The chosen reward falls below 0 and the margin grows. Common: the loss is of the difference alone (arXiv:2402.13228)."""
    if course.done < 2 * course.recent:
        return None
    chosen, margin = course.mean("reward_chosen"), course.mean("margin")
    noise = ERRORS * course.rounding
    is_falling = chosen < course.mean("reward_chosen", before=course.recent) - noise
    is_growing = margin > course.mean("margin", before=course.recent) + noise
    if not (is_falling and is_growing and chosen < -FALL and margin > FALL):
        return None
    message = f"the chosen reward falls to {chosen:.2f} while the margin grows to {margin:.2f}: common in DPO,"
    message += " which trains only their difference"
    return message, 'check the KL and the answers; to keep the reward up: "loss_type": ["sigmoid", "sft"], or a larger beta'


def chance_level(course: Course) -> Found:
    """At the end the interval of the held-out accuracy of a reward model contains 1/2 or lies below: it may guess."""
    evaluation = course.evaluation
    if course.done < course.plan.total_steps or evaluation is None or evaluation.step != course.done:
        return None
    accuracy, low = (evaluation.figures.get(name) for name in ("accuracy", ACCURACY_LOW))
    if accuracy is None or low is None or low > CHANCE:
        return None
    message = f"the accuracy on held-out pairs is {accuracy:.0%}, and its interval starts at {low:.0%}: it may be chance"
    return message, "add pairs that differ clearly, hold out more prompts, train more steps, or raise learning_rate"


def no_movement(course: Course) -> Found:
    """At the end, the log-probs of chosen and rejected responses are still those of the reference, step for step.

    Few steps may be too few to move this far, so they are checked only if the warm-up did not end before them. A single step is
    measured before its update: its learning rate decides.
    """
    if course.done < course.plan.total_steps:
        return None
    in_warmup = course.plan.ends_in_warmup
    if course.done == 1 and in_warmup:
        return "the only step was the first of the warm-up, whose learning rate is 0: nothing was learned", NO_WARMUP
    if course.plan.strategy.generates:
        return _samples_unmoved(course)
    if not course.plan.strategy.refers:  # only the step rules
        return None
    remedy = "raise learning_rate (a LoRA adapter learns at 5e-5 and above), train 2-4 epochs, check that chosen and"
    remedy = NO_WARMUP if in_warmup else f"{remedy} rejected differ clearly"
    if course.never_moved:
        message = f"after {course.done} steps every reward is exactly 0: the training changes no answer"
        return message, f"{remedy}, and that the model's weights are not all 0"
    if course.done < (2 if in_warmup else course.recent):
        return None
    sizes = [
        float(np.sqrt(np.mean(np.square(course.values(name, course.recent))))) for name in ("reward_chosen", "reward_rejected")
    ]
    rounding = course.plan.rounding
    if rounding is not None and rounding.response >= STILL_NATS:  # rewards of this size may be rounding: they say nothing
        return None
    if not max(sizes) < STILL_NATS * course.plan.config.beta:
        return None
    message = f"after {course.done} steps the rewards are about {max(sizes):.2g}: the policy has hardly moved"
    return message, remedy


def _samples_unmoved(course: Course) -> Found:
    """`no_movement` of sampled answers: after the first step they have the log-probs of the reference."""
    moved = [abs(kl) for kl in course.values("kl_sampled", course.done - 1)]
    least = STILL_KL if course.done >= course.recent else 0.0  # few steps may be too few to move this far
    if not moved or max(moved) > least or max(course.values("reward_spread", course.done)) <= SAME_REWARD:
        return None
    message = f"after {course.done} steps the KL of the samples is about {max(moved):.2g} nats: the policy has hardly moved"
    return message, "raise learning_rate (a LoRA adapter learns at 1e-5 and above), or train more steps"


def reward_is_wrong(course: Course) -> Found:
    """A reward model does not clearly prefer the chosen responses of held-out pairs, or rules prefer the rejected ones."""
    accuracy = course.reward_accuracy
    if accuracy is None or accuracy.low > 0.5:
        return None
    prefers = f"prefers the chosen response in {share(accuracy)} of held-out pairs"
    if course.plan.config.reward_model is not None:
        return (
            f"the reward {prefers}, which is not clearly above chance",
            "use a reward model that is right on such pairs, or check that they show what is wanted",
        )
    if accuracy.high >= 0.5:  # a rule may say nothing about most pairs
        return None
    return f"the reward {prefers}: the rules reward what the pairs do not prefer", "check reward_functions, or the pairs"


def no_variance(course: Course) -> Found:
    """The samples of a prompt have the same reward: no advantage, nothing to learn."""
    if course.done < course.recent or max(course.values("reward_spread", course.recent)) > SAME_REWARD:
        return None
    message = f"in the last {course.recent} steps all samples of a prompt have the same reward: there is nothing to learn"
    return message, "use a reward with more than a few values, raise temperature or num_generations, or use harder prompts"


def reward_hacks_length(course: Course) -> Found:
    """Rewards follow length within the samples of a prompt, and the length of answers follows them, by more than chance."""
    if course.done < 2 * course.recent:
        return None
    steps = [*course.first, *islice(course.last, max(0, len(course.last) - course.recent), None)]
    known = [step["length_correlation"] for step in steps if step["reward_spread"] > SAME_REWARD]  # others say nothing
    correlation = float(np.mean(known)) if known else 0.0
    start, now, above = course.moved("sample_tokens")
    change, above = (now - start, above) if correlation > 0 else (start - now, 1 - above)
    if abs(correlation) < FOLLOWS or change < LONGER * start or above < NEARLY_ALL:
        return None
    message = f"the reward follows the length of answers (correlation {correlation:.2f}),"
    message += f" which goes from {start:.0f} to {now:.0f} tokens"
    return (
        message,
        "reward something else too, or train the reward model on pairs of equal lengths; a larger beta slows it down",
    )


def entropy_collapses(course: Course) -> Found:
    """The entropy over sampled answers is a small part of what it was, by more than chance: answers become alike."""
    if course.done < 2 * course.recent:
        return None
    start, now, above = course.moved("entropy")
    if not (now < COLLAPSED * start and above <= 1 - NEARLY_ALL):
        return None
    message = f"the entropy has fallen from {start:.2g} to {now:.2g} nats per token: the answers become alike"
    return message, "raise beta or temperature, or lower learning_rate"


def reward_against_kl(course: Course) -> Found:
    """The reward of the samples rises, and their KL is above `max_kl`: the policy leaves the reference for the reward."""
    limit = course.plan.config.max_kl
    if limit is None or course.done < 2 * course.recent:
        return None
    kl, reward, start = (
        course.mean("kl_sampled"),
        course.mean("reward"),
        float(np.mean([one["reward"] for one in course.first])),
    )
    if not (kl > limit and reward > start):
        return None
    reached, allowed = compared(kl, limit, 3, "g")
    message = f"the reward rises from {start:.3g} to {reward:.3g} while the KL of the samples is {reached} nats,"
    message += f" and max_kl is {allowed}"
    return message, "read sampled answers: they may only please the reward; raise beta, or lower learning_rate"


def held_out_reward_falls(course: Course) -> Found:
    """The reward of answers to held-out prompts falls from its best, by more than chance, while that of samples rises.

    Both evaluations draw with the same seed for the same prompts, so their differences are compared prompt by prompt.
    """
    if len(course.rewards) < 2 or len(course.rewards[0]) != len(course.rewards[1]) or course.done < 2 * course.recent:
        return None
    falls = np.array(course.rewards[0]) - np.array(course.rewards[1])
    rises = course.mean("reward") > float(np.mean([one["reward"] for one in course.first]))
    if len(falls) < 2 or not rises or not float(np.mean(falls)) > FALL_ERRORS * course.error(falls.tolist()):
        return None
    best, last = (float(np.mean(rewards)) for rewards in course.rewards)
    message = f"the reward of answers to held-out prompts falls from {best:.3g} to {last:.3g}, while that of the samples rises"
    return message, "train fewer steps, or add diverse prompts"


NOT_FINITE, NOT_AT_REFERENCE = "not-finite", "not-at-reference"  # after these, a policy is not evaluated
RULES: dict[str, tuple[Action, Rule]] = {
    NOT_FINITE: ("stop", not_finite),
    "kl": ("warn", too_far),
    "loss-oscillates": ("warn", loss_oscillates),
    "loss-rises": ("warn", loss_rises),
    "prefers-rejected": ("warn", prefers_rejected),
    "all-right-early": ("warn", all_right_early),
    "chosen-collapses": ("warn", chosen_collapses),
    "chosen-falls": ("note", chosen_falls),
    "chance-level": ("warn", chance_level),
    "no-movement": ("warn", no_movement),
    "reward-is-wrong": ("warn", reward_is_wrong),
    "no-variance": ("warn", no_variance),
    "reward-hacks-length": ("warn", reward_hacks_length),
    "entropy-collapses": ("warn", entropy_collapses),
    "reward-against-kl": ("warn", reward_against_kl),
    "held-out-reward-falls": ("warn", held_out_reward_falls),
}


def wrong_start(scores: Scores, plan: Plan) -> Event | None:
    """Before step 1 the policy equals its reference: margin 0, KL 0, loss ln 2. A larger difference means a wrong reference.

    Unless the reference is the model with the adapter off, from which the adapter was trained away before.
    """
    apart = float(np.mean(np.abs(scores.policy - scores.reference) / scores.tokens))
    if not math.isfinite(apart):
        remedy = (
            "this model overflows in 16 bits: use bf16" if plan.config.fp16 else "choose another model: its weights are damaged"
        )
        return Event(NOT_FINITE, "stop", 0, "before the first step log-probs are not finite", remedy)
    if apart <= APART_NATS[plan.dtype] or not plan.starts_at_reference:
        return None
    message = f"before the first step the policy differs from its reference by {apart:.2g} nats per token; they must be equal"
    remedy = "use another model_name or reference, and please report this: the figures would be meaningless"
    return Event(NOT_AT_REFERENCE, "stop", 0, message, remedy)


def watching(strategy: Strategy) -> dict[str, tuple[Action, Rule]]:
    """The rules of a training with this strategy, in order."""
    return {name: RULES[name] for name in strategy.health}
