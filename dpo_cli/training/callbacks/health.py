"""Is the training healthy? Rules over its steps and lines, each with what the documentation says to do.

Each rule is one function that looks at the course of a training and returns an event or nothing; `RULES` at the end lists
them in the order of the README. A rule speaks once. What a rule compares is told in its docstring, with the reason for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from transformers import TrainerCallback

from dpo_cli.evaluation.metrics import Scores
from dpo_cli.plan import Plan
from dpo_cli.training.trainer import Totals

Line = dict[str, Any]

RECENT_STEPS, RECENT_PAIRS = 5, 32  # the last steps that a rule looks at are at least so many, and hold so many pairs
MIN_STEPS = 10  # of a training of which "no movement" can be said
RISE = 1.25  # times the loss of the first step
COLLAPSE = 2.0  # times the reference's negative log-prob of the chosen responses
FALL = 0.1  # of the chosen reward, where the margin is larger than that
STILL_NATS = 0.2  # of log-prob, chosen against rejected
EARLY = 0.75  # of all steps
GENERALISES = 0.9  # of the held-out pairs
APART_NATS = {"float32": 1e-3, "bfloat16": 0.02, "float16": 0.02}  # a token, that rounding may cost a policy at step 0


@dataclass(frozen=True)
class Event:
    """What a rule found: shown, kept in metrics.json, and with the action "stop" the end of the training (exit 5)."""

    rule: str
    action: Literal["note", "warn", "stop"]
    step: int
    message: str
    remedy: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def told(self) -> str:
        return f"{self.action} [{self.rule}] {self.message}\n  {self.remedy}"


@dataclass
class Course:
    """A training so far: means over the rows of each optimizer step, and the last lines of metrics.jsonl."""

    plan: Plan
    steps: list[dict[str, float]] = field(default_factory=list)
    line: Line = field(default_factory=dict)
    evaluation: Line = field(default_factory=dict)

    @property
    def is_dpo(self) -> bool:
        return self.plan.config.strategy == "dpo"

    @property
    def rows_a_step(self) -> int:
        return self.plan.config.per_device_train_batch_size * self.plan.config.gradient_accumulation_steps

    @property
    def epoch(self) -> int:
        """Steps of an epoch."""
        assert self.plan.counts is not None
        return math.ceil(self.plan.counts.train_pairs / self.rows_a_step)

    def mean(self, name: str, count: int, before: int = 0) -> float:
        """Of a figure over the last `count` steps, or over those that end `before` steps ago."""
        end = len(self.steps) - before
        return float(np.mean([step[name] for step in self.steps[max(0, end - count) : end]]))

    @property
    def recent(self) -> int | None:
        """How many steps are recent; None while there are fewer."""
        count = max(RECENT_STEPS, math.ceil(RECENT_PAIRS / self.rows_a_step))
        return count if len(self.steps) >= count else None

    def event(self, rule: str, action: Literal["note", "warn", "stop"], message: str, remedy: str) -> Event:
        step = max(len(self.steps), self.line.get("step", 0))
        return Event(rule, "stop" if rule in self.plan.config.stop_on else action, step, message, remedy)


Rule = Callable[[Course], Event | None]


def not_finite(course: Course) -> Event | None:
    """A loss or gradient that is NaN or infinite never recovers: AdamW's moments keep it."""
    told = {"loss": course.steps[-1]["loss"] if course.steps else 0.0, "grad_norm": course.line.get("grad_norm", 0.0)}
    broken = [name for name, value in told.items() if not math.isfinite(value)]
    if not broken:
        return None
    message = f"{' and '.join(broken)} of step {len(course.steps)} are not finite"
    remedy = "lower learning_rate (the documentation says: try 1e-7) or lora_alpha; with fp16, use bf16"
    return course.event("not-finite", "stop", message, remedy)


def loss_oscillates(course: Course) -> Event | None:
    """From a step to the next the loss changes, on average, by more than all of it at the first step."""
    if (count := course.recent) is None or len(course.steps) <= count:
        return None
    losses = [step["loss"] for step in course.steps[-count - 1 :]]
    swing, start = float(np.mean(np.abs(np.diff(losses)))), course.steps[0]["loss"]
    if not swing > abs(start):
        return None
    message = f"the loss oscillates: by {swing:.3g} from a step to the next, and it began at {start:.3g}"
    remedy = "lower learning_rate (the documentation says: try 1e-7), raise warmup_steps, check that the preferences are clear"
    return course.event("loss-oscillates", "warn", message, remedy)


def loss_rises(course: Course) -> Event | None:
    """The loss is a quarter above that of the first step, where the policy was its reference: it unlearns."""
    if (count := course.recent) is None:
        return None
    start, now = course.steps[0]["loss"], course.mean("loss", count)
    if not now > RISE * start > 0:
        return None
    message = f"the loss is {now:.3g} over the last {count} steps, and it began at {start:.3g}"
    if course.is_dpo:
        message += f"; {course.mean('accuracy', count):.0%} of these pairs are preferred as labelled"
    remedy = (
        "lower learning_rate (the documentation says: try 1e-7); check that no part of the data has chosen and rejected swapped"
    )
    return course.event("loss-rises", "warn", message, remedy)


def all_right_early(course: Course) -> Event | None:
    """Every pair of a whole epoch is right, pairs come again, and nothing held out shows that this is more than memory."""
    window = max(RECENT_STEPS, course.epoch)
    if not course.is_dpo or len(course.steps) < course.epoch + window or len(course.steps) > EARLY * course.plan.total_steps:
        return None
    if course.mean("accuracy", window) < 1 or course.evaluation.get("accuracy", 0.0) >= GENERALISES:
        return None
    assert course.plan.counts is not None
    message = f"each of the {course.plan.counts.train_pairs} pairs is preferred as labelled after {len(course.steps)} of"
    message += f" {course.plan.total_steps} steps: they are learned by heart"
    remedy = "add diverse pairs (the documentation says: 500 and more), or lower num_train_epochs or learning_rate"
    return course.event("all-right-early", "warn", message, remedy)


def chosen_collapses(course: Course) -> Event | None:
    """The chosen responses have become twice as unlikely, in nats, as they are to the reference: repetition and gibberish."""
    if not course.is_dpo or (count := course.recent) is None:
        return None
    policy, reward = course.mean("logp_chosen", count), course.mean("reward_chosen", count)
    reference = policy - reward / course.plan.config.beta
    if not policy < COLLAPSE * reference:
        return None
    message = f"the log-prob of a chosen response has fallen from {reference:.0f} to {policy:.0f} nats"
    remedy = 'lower learning_rate, raise beta, or hold it with "loss_type": ["sigmoid", "sft"]'
    return course.event("chosen-collapses", "warn", message, remedy)


def chosen_falls(course: Course) -> Event | None:
    """The chosen reward falls below 0 and the margin grows. Common: the loss is of the difference alone (arXiv:2402.13228)."""
    if not course.is_dpo or (count := course.recent) is None or len(course.steps) < 2 * count:
        return None
    chosen, margin = (course.mean(name, count) for name in ("reward_chosen", "margin"))
    chosen_before, margin_before = (course.mean(name, count, before=count) for name in ("reward_chosen", "margin"))
    if not (chosen < -FALL < 0 < FALL < margin and chosen < chosen_before and margin > margin_before):
        return None
    message = f"the chosen reward falls, to {chosen:.2f}, while the margin grows, to {margin:.2f}: common in DPO, whose loss is"
    message += " of their difference"
    remedy = 'judge by KL and by the answers; to hold it: "loss_type": ["sigmoid", "sft"], or a larger beta'
    return course.event("chosen-falls", "note", message, remedy)


def too_far(course: Course) -> Event | None:
    """kl_sequence of the last evaluation is over `max_kl`; the documentation says that below 10 is reasonable."""
    kl, limit = course.evaluation.get("kl_sequence"), course.plan.config.max_kl
    if kl is None or limit is None or not kl > limit:
        return None
    message = f"the policy is {kl:.1f} nats from its reference over an answer it samples, and max_kl is {limit:g}"
    return course.event("kl", "warn", message, "raise beta, or lower learning_rate or num_train_epochs")


def no_movement(course: Course) -> Event | None:
    """Half-way, and at the end, the policy prefers chosen over rejected by next to nothing more than its reference does."""
    done, total = len(course.steps), course.plan.total_steps
    if not course.is_dpo or done not in (total // 2, total) or done < MIN_STEPS:
        return None
    margin = course.mean("margin", done // 2)
    if not abs(margin) < STILL_NATS * course.plan.config.beta:
        return None
    message = f"the margin is {margin:.3g} after {done} of {total} steps: the policy has hardly moved"
    remedy = "raise learning_rate (a LoRA adapter learns at 5e-5 and above: README), train 2-4 epochs, check that chosen and"
    remedy += " rejected differ clearly"
    return course.event("no-movement", "warn", message, remedy)


RULES: Sequence[Rule] = (
    not_finite,
    too_far,
    loss_oscillates,
    loss_rises,
    all_right_early,
    chosen_collapses,
    chosen_falls,
    no_movement,
)


def not_at_reference(scores: Scores, plan: Plan) -> Event | None:
    """Before step 1 the policy is its reference: margin 0, KL 0, loss ln 2. More than rounding: it has a wrong one."""
    apart = float(np.mean(np.abs(scores.policy - scores.reference) / scores.tokens))
    if apart <= APART_NATS[plan.dtype]:
        return None
    message = f"before the first step the policy differs from its reference by {apart:.2g} nats a token, and must be the same"
    remedy = "train on another model_name or reference, and please report this: the figures would mean nothing"
    return Event("not-at-reference", "stop", 0, message, remedy)


class Health(TrainerCallback):
    """Puts the course of a training to every rule. A sink of `Record`, and a callback before it that ends the training."""

    def __init__(self, plan: Plan, totals: Totals, tell: Callable[[Event], None]) -> None:
        self.totals, self.tell = totals, tell
        self.events: list[Event] = []
        self.course = Course(plan)

    @property
    def stopped(self) -> bool:
        return any(event.action == "stop" for event in self.events)

    @property
    def can_be_judged(self) -> bool:
        """Whether there is a policy whose figures mean something."""
        return not {"not-finite", "not-at-reference"} & {event.rule for event in self.events}

    def see_start(self, scores: Scores) -> None:
        """Scores of some rows under the policy and under its reference, before the first step."""
        self._raise(not_at_reference(scores, self.course.plan))

    def see(self, line: Line) -> None:
        """A line of metrics.jsonl, as it is written."""
        self.course.line = line
        if line["split"] == "eval":
            self.course.evaluation = line
        self._ask()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.course.steps.append(self.totals.of_step())
        self._ask()
        self.on_log(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopped:
            control.should_training_stop = True
            control.should_evaluate = False

    on_evaluate = on_log
    on_epoch_end = on_log  # where transformers asks for an evaluation

    def _ask(self) -> None:
        told = {event.rule for event in self.events}
        for event in filter(None, (rule(self.course) for rule in RULES)):
            if event.rule not in told:
                self._raise(event)

    def _raise(self, event: Event | None) -> None:
        if event is not None:
            self.events.append(event)
            self.tell(event)
