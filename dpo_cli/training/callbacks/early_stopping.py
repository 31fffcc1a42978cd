"""Early stopping: the best of a training by the loss it minimises, on what is held out, and its end when none has been better
for long."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from dpo_cli.results.summary import Line


class EarlyState(TypedDict):
    """A `StopEarly` as a checkpoint holds it, but for the weights."""

    best_step: int
    best_loss: float
    waited: int


class StopEarly(TrainerCallback):
    """Keeps the weights of the best evaluation, in the machine's memory; with a `patience`, ends the training by it.

    Without one it keeps nothing. A sink of `Record`, which tells it of evaluations.
    """

    def __init__(self, model: nn.Module, patience: int | None) -> None:
        self.model, self.patience = model, patience
        self.best_step, self.best_loss, self.waited = 0, math.inf, 0
        self.weights: dict[str, Tensor] = {}  # of the best evaluation, by their names in the model

    @property
    def ended(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def see(self, line: Line) -> None:
        """A line of metrics.jsonl, as it is written."""
        if self.patience is None or line.split != "eval":
            return
        loss = line.figures.get(
            "trained_loss", line.figures["loss"]
        )  # two keys where another than DPO's sigmoid loss is trained
        if loss < self.best_loss:
            self.best_step, self.best_loss, self.waited = line.step, loss, 0
            self.weights = self._copy()
        else:
            self.waited += 1

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.ended:
            control.should_training_stop = control.should_save = True

    def put_best_back(self) -> None:
        """Give the model the weights of its best evaluation, where there was one."""
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
        """Go on as from `state`, by the patience that is asked for now; without `weights`, the model has the best ones."""
        if self.patience is None:  # as in a training that never had one
            return
        self.best_step, self.best_loss, self.waited = state["best_step"], state["best_loss"], state["waited"]
        self.weights = weights if weights is not None else self._copy() if self.best_step else {}
