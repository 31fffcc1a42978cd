"""Early stopping: keeps the weights with the best held-out loss, and ends the training when none is better for long."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from dpo_cli.results.summary import Line


class EarlyState(TypedDict):
    """A `StopEarly` as a checkpoint holds it, without the weights."""

    best_step: int
    best_loss: float
    waited: int


class StopEarly(TrainerCallback):
    """With a `patience`: keeps the weights of the best evaluation in the machine's memory, and ends the training.

    Without one it keeps nothing. A sink of `Record`, which passes evaluations on.
    """

    def __init__(self, model: nn.Module, patience: int | None) -> None:
        self.model, self.patience = model, patience
        self.best_step, self.best_loss, self.waited = 0, math.inf, 0
        self.weights: dict[str, Tensor] = {}  # of the best evaluation, by name in the model

    @property
    def ended(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def see(self, line: Line) -> None:
        """A line of metrics.jsonl, as it is written."""
        if self.patience is None or line.split != "eval":
            return
        loss = line.figures.get(
            "trained_loss", line.figures["loss"]
        )  # there are two keys if the trained loss is not DPO's sigmoid loss
        if loss < self.best_loss:
            self.best_step, self.best_loss, self.waited = line.step, loss, 0
            self.weights = self._copy()
        else:
            self.waited += 1

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.ended:
            control.should_training_stop = control.should_save = True

    def put_best_back(self) -> None:
        """Restore the weights of the best evaluation, if there is one."""
        with torch.no_grad():
            for name, weight in self._trained() if self.weights else ():
                weight.copy_(self.weights[name])

    def _copy(self) -> dict[str, Tensor]:
        return {name: weight.detach().to("cpu", copy=True) for name, weight in self._trained()}

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]

    def state(self) -> EarlyState:
        return {"best_step": self.best_step, "best_loss": self.best_loss, "waited": self.waited}

    def restore(self, state: EarlyState, weights: dict[str, Tensor] | None) -> None:
        """Continue from `state`, with the current patience; without `weights`, the model has the best ones."""
        if self.patience is None:  # as in a training without a patience
            return
        self.best_step, self.best_loss, self.waited = state["best_step"], state["best_loss"], state["waited"]
        self.weights = weights if weights is not None else self._copy() if self.best_step else {}
