"""Ends training when SIGINT or SIGTERM arrives: after the current step, with a checkpoint of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from dpo_cli.storage.world import World
from dpo_cli.training.trainer import Stopped

Handler = Callable[[int, FrameType | None], object] | int | None  # as in the module signal


class StopOnSignal(TrainerCallback):
    """Within the context, the first signal requests a stop, and a second one has its default effect.

    Before and after the steps, when no step is half done, it raises `Stopped` at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, listens: bool = True) -> None:
        """Without `listens` the stop comes from another process, by `Agreement`."""
        self._listens = listens
        self.received: signal.Signals | None = None
        self.missed_evaluation = False  # the stop came at a step that is due for evaluation
        self._is_training = self._may_interrupt = self._only_in_parts = self._waits = False
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> StopOnSignal:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS if self._listens}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within it, a signal raises `Stopped` at once: an evaluation takes minutes, and can be repeated."""
        self._may_interrupt = True
        try:
            if self.received is not None:
                raise Stopped(128 + self.received)
            yield
        finally:
            self._may_interrupt = False

    @contextmanager
    def evaluating(self, world: World) -> Iterator[None]:
        """An evaluation, which a signal ends at once; of several processes only within their parts, so that all end there.

        Not within those of a model that is divided: the others would wait in a run of it.
        """
        self._only_in_parts, self._waits = world.size > 1, world.steps is not None
        try:
            with world.guarded(self.interruptible if world.steps is None else nullcontext):
                yield
        finally:
            self._only_in_parts = self._waits = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        if not (self._is_training or self._only_in_parts):
            raise Stopped(128 + self.received)
        # Not through Python's streams: the signal may have interrupted a write to one.
        when = " after this evaluation" if self._waits else ""
        message = f"\n{self.received.name}: stopping with a checkpoint{when}; repeat to stop at once without one\n"
        with suppress(OSError):  # the reader may be gone
            os.write(2, message.encode())
        if self._may_interrupt:
            raise Stopped(128 + self.received)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._is_training = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._is_training = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Not between the micro-batches of a step, which could not be saved."""
        if self.received is not None:
            self.missed_evaluation = control.should_evaluate
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False


class Agreement(TrainerCallback):
    """What several processes decide together: the first one decides, after each step, and the others follow.

    The last callback of a step. Each process has a clock and signals of its own; what else decides is the same in all.
    """

    def __init__(self, world: World, stop: StopOnSignal) -> None:
        self.world, self.stop = world, stop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        decided, received, missed = self.world.same(
            lambda: (dict(vars(control)), self.stop.received, self.stop.missed_evaluation)
        )
        vars(control).update(decided)
        self.stop.received, self.stop.missed_evaluation = received, missed
