"""Applies the health rules to a training, step by step, and ends the training if a rule says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypedDict

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from dpo_cli.evaluation.metrics import Scores
from dpo_cli.plan.plan import Plan
from dpo_cli.results.codec import JsonObject, from_json, to_json
from dpo_cli.results.intervals import Interval
from dpo_cli.results.summary import Event, Line
from dpo_cli.training.callbacks.health_rules import NOT_AT_REFERENCE, NOT_FINITE, Course, CourseState, watching, wrong_start
from dpo_cli.training.trainer import Totals


class HealthState(TypedDict):
    """A `Health` as a checkpoint holds it."""

    course: CourseState
    events: list[JsonObject]


@dataclass
class Health(TrainerCallback):
    """Applies every rule to the course of a training. A sink of `Record`, and a callback that ends the training."""

    plan: Plan
    totals: Totals
    tell: Callable[[Event], None]
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.course = Course(self.plan)

    @property
    def stopped(self) -> bool:
        return any(event.action == "stop" for event in self.events)

    @property
    def can_be_judged(self) -> bool:
        """Whether the figures of the policy are meaningful."""
        return not {NOT_FINITE, NOT_AT_REFERENCE} & {event.rule for event in self.events}

    def see_start(self, scores: Scores) -> None:
        """Scores of some rows under the policy and under its reference, before the first step."""
        if (event := wrong_start(scores, self.plan)) is not None:
            self._raise(event)

    def see_reward(self, accuracy: Interval | None) -> None:
        """How often what scores the samples prefers the chosen response of held-out pairs; before the first step."""
        self.course.reward_accuracy = accuracy

    def see_held_out(self, rewards: list[float]) -> None:
        """The rewards of an answer to each held-out prompt, in an evaluation; before its line."""
        self.course.see_held_out(rewards)

    def see(self, line: Line) -> None:
        """A line of metrics.jsonl, as it is written."""
        self.course.see(line)
        self._ask()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.course.add(self.totals.of_step())
        self._ask()
        control.should_log = control.should_log or self.stopped  # so that the last step is logged
        self.on_log(args, state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.stopped:
            control.should_training_stop = True
            control.should_evaluate = False

    on_evaluate = on_log

    def forget_stops(self) -> None:
        """The training gets another end than the one that these rules set: they are applied again."""
        self.events = [event for event in self.events if event.action != "stop"]

    def state(self) -> HealthState:
        return {"course": self.course.state(), "events": [to_json(event) for event in self.events]}

    def restore(self, state: HealthState) -> None:
        self.course.restore(state["course"])
        self.events = [from_json(Event, event) for event in state["events"]]

    def _ask(self) -> None:
        reported = {event.rule for event in self.events}
        for name, (action, rule) in watching(self.plan.strategy).items():
            if name not in reported and (finding := rule(self.course)) is not None:
                self._raise(Event(name, "stop" if name in self.plan.config.stop_on else action, self.course.done, *finding))

    def _raise(self, event: Event) -> None:
        self.events.append(event)
        logging.getLogger("dpo").warning("%s", to_json(event))
        self.tell(event)
