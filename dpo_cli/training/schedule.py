"""When a training logs, evaluates and writes a checkpoint: all of it at the end of a step, in this order."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from dpo_cli.plan.plan import Plan

BETWEEN_SECONDS = 600.0  # from a checkpoint to the next, where save_steps does not say


class Schedule(TrainerCallback):
    """Asks Trainer for what is due. Whatever it is asked for at a step, its order is: log, evaluate, save."""

    def __init__(self, plan: Plan, evaluates: bool) -> None:
        self.config, self.evaluates = plan.config, evaluates
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, is_last = state.global_step, state.global_step >= state.max_steps
        control.should_log = is_last or step % self.config.logging_steps == 0
        control.should_evaluate = self.evaluates and (is_last or self._is_judged(step, state.epoch))
        control.should_save = is_last or self._is_saved(step)

    def _is_judged(self, step: int, epoch: float) -> bool:
        return step % self.config.eval_steps == 0 if self.config.eval_steps else epoch == int(epoch)

    def _is_saved(self, step: int) -> bool:
        if self.config.save_steps:
            return step % self.config.save_steps == 0
        return time.monotonic() - self._saved >= BETWEEN_SECONDS

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved = time.monotonic()
