"""What a checkpoint holds beside what Trainer writes, and how a training goes on from it to the same bits.

    Trainer's          adapter_model.safetensors or model.safetensors, trainer_state.json, optimizer, schedule, random
    the run's          plan.json, manifest.json, metrics.jsonl, as they were
    progress.json      what only this process knows: rows that no line tells of yet, the course that health looks at, ...
    best.safetensors   the weights of the best evaluation, where early stopping keeps others than the last

Two things Trainer (transformers 5.17) does not restore, and this does. An epoch's order may come from torch's random state as
it was when the epoch began (group_by_length), so that is kept too. The loss since the last logged step is in its memory only.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from dpo_cli.storage.checkpoints import Checkpoint
from dpo_cli.storage.jsonio import read_json
from dpo_cli.storage.run_directory import LINES, MANIFEST, PLAN, RunDirectory
from dpo_cli.training.callbacks.early_stopping import StopEarly
from dpo_cli.training.callbacks.health import Health
from dpo_cli.training.callbacks.signals import StopOnSignal

PROGRESS, BEST, STATE = "progress.json", "best.safetensors", "trainer_state.json"


class Keep(TrainerCallback):
    """Fills the checkpoints of a training, and brings a training back to one."""

    def __init__(self, run: RunDirectory, trainer: Any, health: Health, early: StopEarly, stop: StopOnSignal) -> None:
        self.run, self.trainer, self.health, self.early, self.stop = run, trainer, health, early, stop
        self.begun = time.monotonic()  # of the training, were it one piece
        self._from: Checkpoint | None = None
        self._progress: dict[str, Any] = {}
        self._order: list[int] = []  # torch's random state when the epoch began
        trainer.write_checkpoint = self.write

    def write(self, write_trainers: Callable[[], None]) -> None:
        """A checkpoint of the step that has ended; before the first step, a trial of which nothing stays."""
        step = self.trainer.state.global_step

        def fill(part: Path) -> Path:
            return self._fill(part, write_trainers)

        if step:
            self.run.checkpoints.write(step, fill)
        else:
            self.run.checkpoints.try_to_write(fill)

    def _fill(self, part: Path, write_trainers: Callable[[], None]) -> Path:
        write_trainers()
        (folder,) = part.glob("checkpoint-*")
        for name in (PLAN, MANIFEST, LINES):
            if self.run.has(name):
                shutil.copyfile(self.run.path / name, folder / name)
        progress = {
            "missed_evaluation": self.stop.missed_evaluation or self.trainer.missed_evaluation,
            "threads": torch.get_num_threads(),
            "seconds": time.monotonic() - self.begun,
            "run_name": self.trainer.args.run_name,
            "loss": float(self.trainer._tr_loss),
            "logged": self.trainer._globalstep_last_logged,
            "order": self._order,
            "totals": self.trainer.totals.state(),
            "health": self.health.state(),
            "early": self.early.state(),
        }
        (folder / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        if self.early.weights and self.early.best_step != self.trainer.state.global_step:
            save_file(self.early.weights, folder / BEST)
        _read_back(folder)
        return folder

    def go_back_to(self, checkpoint: Checkpoint) -> None:
        """Bring the trainer, and all that has seen its course, to where they were. Its `train` does the rest."""
        trainer, folder = self.trainer, checkpoint.folder
        self._from = checkpoint
        self._progress = progress = read_json(folder / PROGRESS)
        torch.set_num_threads(progress["threads"])  # sums of other lengths are rounded otherwise
        self.begun = time.monotonic() - progress["seconds"]
        trainer.args.run_name = progress["run_name"]
        trainer._load_from_checkpoint(str(folder))
        trainer.state = TrainerState.load_from_json(str(folder / STATE))
        trainer.totals.restore(progress["totals"])
        self.health.restore(progress["health"])
        has_best = (folder / BEST).is_file()
        self.early.restore(progress["early"], load_file(folder / BEST) if has_best else None)

    @property
    def missed_evaluation(self) -> bool:
        """Whether the checkpoint that was gone back to is of a step whose evaluation is still to come."""
        return bool(self._progress.get("missed_evaluation"))

    def train(self) -> None:
        self.trainer.train(resume_from_checkpoint=str(self._from.folder) if self._from else None)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._from is None:  # what cannot be saved is known now, and not hours later
            self.trainer._save_checkpoint(self.trainer.model, None)
            return
        self.trainer._tr_loss += self._progress["loss"]
        self.trainer._globalstep_last_logged = self._progress["logged"]

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._from is not None and state.epoch == int(state.epoch):  # where Trainer restores it, but after this
            self.trainer._load_rng_state(str(self._from.folder))
        elif self._from is not None:
            torch.set_rng_state(torch.tensor(self._progress["order"], dtype=torch.uint8))
        self._from = None
        self._order = torch.get_rng_state().tolist()


def _read_back(folder: Path) -> None:
    """Read what libraries wrote: some of them do not tell when the disk refuses the end of a file."""
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt"):
            pass
    for path in folder.rglob("*.json"):
        read_json(path)
