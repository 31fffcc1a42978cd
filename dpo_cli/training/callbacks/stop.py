"""Ends training after the current step when SIGINT or SIGTERM arrives."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from transformers import TrainerCallback


class StopOnSignal(TrainerCallback):
    """While used as a context, the first signal asks for a stop, and a second one acts as it would without us."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        self.tell(f"{self.received.name}: stopping after this step; once more to leave at once, without saving")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.received is not None:
            control.should_log = True  # so that the last step has a line
            control.should_training_stop = True
            control.should_evaluate = False

    on_substep_end = on_step_end
    on_epoch_end = on_step_end
