"""Writes a line of figures for every logged step and evaluation."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from dpo_cli.hardware.machine import GIB
from dpo_cli.results.summary import Line
from dpo_cli.training.trainer import Totals

Sink = Callable[[Line], None]


class Record(TrainerCallback):
    """Passes each line of metrics.jsonl to the sinks: the file, the screen."""

    def __init__(self, totals: Totals, sinks: list[Sink]) -> None:
        self.totals, self.sinks = totals, sinks
        self.last_train: Line | None = None
        self.peak_gb: float | None = None  # the maximum memory until the last step
        self._tokens, self._time, self._step_end = 0, 0.0, 0.0

    def recall(self, lines: Sequence[Line]) -> None:
        """Continue after these lines of the resumed training."""
        trained = [line for line in lines if line.split == "train"]
        if trained:
            self.last_train, self.peak_gb = trained[-1], max(line.figures["peak_memory_gb"] for line in trained)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._time, self._tokens = time.monotonic(), self.totals.tokens

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._step_end = time.monotonic()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: object
    ) -> None:
        step, epoch = state.global_step, round(state.epoch, 4)
        peak = peak_memory_gb(args.device)
        if "eval_loss" in logs:
            figures = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
            self._emit(Line("eval", step, epoch, {**figures, "peak_memory_gb": peak}))
            self._time += time.monotonic() - max(self._step_end, self._time)  # an evaluation is not training time
        elif "loss" in logs:
            names = (*self.totals.written, "grad_norm", "learning_rate")
            figures = {**{name: logs[name] for name in names if name in logs}, **self._speed(), "peak_memory_gb": peak}
            self.last_train, self.peak_gb = Line("train", step, epoch, figures), max(self.peak_gb or 0.0, peak)
            self._emit(self.last_train)

    def _speed(self) -> dict[str, float]:
        now, tokens = time.monotonic(), self.totals.tokens
        speed = (tokens - self._tokens) / (now - self._time)
        self._tokens, self._time = tokens, now
        return {"tokens": tokens, "tokens_per_second": round(speed, 1)}

    def _emit(self, line: Line) -> None:
        for sink in self.sinks:
            sink(line)


def peak_memory_gb(device: torch.device) -> float:
    """The peak memory so far: of the GPU if training runs on one, else of this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / GIB, 3)
    if device.type == "mps":
        return round(torch.mps.driver_allocated_memory() / GIB, 3)  # the pool of Metal only grows
    return round(_peak_of_process() / GIB, 3)


def _peak_of_process() -> int:
    """The peak memory of this process, in bytes."""
    if sys.platform == "win32":
        import psutil  # a requirement of accelerate

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
