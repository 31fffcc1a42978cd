"""What several processes of a training decide together: the first one decides, after each step, and the others follow."""

from __future__ import annotations

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from dpo_cli.storage.world import World
from dpo_cli.training.callbacks.signals import StopOnSignal


class Agreement(TrainerCallback):
    """The last callback of a step. Each process has a clock and signals of its own; what else decides is the same in all."""

    def __init__(self, world: World, stop: StopOnSignal) -> None:
        self.world, self.stop = world, stop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        decided, received, missed = self.world.same(
            lambda: (dict(vars(control)), self.stop.received, self.stop.missed_evaluation)
        )
        vars(control).update(decided)
        self.stop.received, self.stop.missed_evaluation = received, missed
