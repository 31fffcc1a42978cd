"""What a checkpoint holds in addition to Trainer's files, and how a training resumes from it with the same bits.

    Trainer's          adapter_model.safetensors or model.safetensors, trainer_state.json, optimizer, schedule, random
    the run's          plan.json, manifest.json, metrics.jsonl, at that step
    progress.json      what only this process knows: rows that are in no line yet, the course for the health rules, ...
    reference          the reference's log-probs of the pairs that were seen, which later epochs use again
    samples            the answers that the next steps of rlhf train on again
    best.safetensors   the weights of the best evaluation, if early stopping keeps other weights than the last

Two things are restored here that Trainer (transformers 5.17) does not restore. The order of an epoch may come from the random
state of torch at the start of the epoch (group_by_length), so that is kept too. The loss since the last logged step is only
in its memory.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from dpo_cli.runs.state_io import load_state, save_state
from dpo_cli.storage.checkpoints import Checkpoint
from dpo_cli.storage.jsonio import read_json
from dpo_cli.storage.progress import working
from dpo_cli.storage.run_directory import LINES, MANIFEST, PLAN, RunDirectory
from dpo_cli.training.callbacks.early_stopping import StopEarly
from dpo_cli.training.callbacks.health import Health
from dpo_cli.training.callbacks.signals import StopOnSignal

PROGRESS, BEST, STATE = "progress.json", "best.safetensors", "trainer_state.json"
REFERENCE, SAMPLES = "reference", "samples"  # files


class Keep(TrainerCallback):
    """Fills the checkpoints of a training, and restores a training from one."""

    def __init__(self, run: RunDirectory, trainer: Any, health: Health, early: StopEarly, stop: StopOnSignal) -> None:
        self.run, self.trainer, self.health, self.early, self.stop = run, trainer, health, early, stop
        self.start = time.monotonic()  # as if the training ran in one piece
        self._from: Checkpoint | None = None
        self._progress: dict[str, Any] = {}
        self._order: list[int] = []  # torch's random state at the start of the epoch
        self._first_step = ExitStack()
        trainer.write_checkpoint = self.write

    def write(self, write_trainers: Callable[[], None]) -> None:
        """A checkpoint of the step that has ended; before the first step, a trial that leaves nothing."""
        step = self.trainer.state.global_step

        def fill(part: Path) -> Path:
            return self._fill(part, write_trainers)

        if step:
            self.run.checkpoints.write(step, fill)
            if self.trainer.reference is not None:
                self.trainer.reference.share()
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
            "processes": self.trainer.world.size,
            "seconds": time.monotonic() - self.start,
            "run_name": self.trainer.args.run_name,
            "loss": float(self.trainer._tr_loss),
            "logged": self.trainer._globalstep_last_logged,
            "order": self._order,
            "row_tokens": self.trainer.row_budget,
            "totals": self.trainer.totals.state(),
            "health": self.health.state(),
            "early": self.early.state(),
        }
        if self.trainer.reference is not None:
            save_state(folder / REFERENCE, self.trainer.reference.state())
        if (samples := self.trainer.samples_state()) is not None:
            save_state(folder / SAMPLES, samples)
        (folder / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        if self.early.weights and self.early.best_step != self.trainer.state.global_step:
            save_file(self.early.weights, folder / BEST)
        _read_back(folder)
        return folder

    def go_back_to(self, checkpoint: Checkpoint) -> None:
        """Restore the trainer and its callbacks to this checkpoint. Its `train` does the rest."""
        trainer, folder = self.trainer, checkpoint.folder
        self._from = checkpoint
        self._progress = progress = read_json(folder / PROGRESS)
        if progress.get("processes", 1) == trainer.world.size:
            torch.set_num_threads(progress["threads"])  # another number of threads rounds sums differently
        self.start = time.monotonic() - progress["seconds"]
        trainer.args.run_name = progress["run_name"]
        trainer._load_from_checkpoint(str(folder))
        trainer.state = TrainerState.load_from_json(str(folder / STATE))
        trainer.row_budget = progress.get("row_tokens", trainer.row_budget)  # smaller if the memory was too small
        trainer.totals.restore(progress["totals"])
        if (folder / REFERENCE).with_suffix(".json").is_file():
            trainer.reference.restore(load_state(folder / REFERENCE))
        if (folder / SAMPLES).with_suffix(".json").is_file():
            trainer.restore_samples(load_state(folder / SAMPLES))
        self.health.restore(progress["health"])
        has_best = (folder / BEST).is_file()
        self.early.restore(progress["early"], load_file(folder / BEST) if has_best else None)

    @property
    def missed_evaluation(self) -> bool:
        """Whether the restored checkpoint is of a step that still has to be evaluated."""
        return bool(self._progress.get("missed_evaluation"))

    def train(self) -> None:
        with self._first_step:  # which no line of metrics shows while it runs
            self._first_step.enter_context(working("the first step"))
            self.trainer.train(resume_from_checkpoint=str(self._from.folder) if self._from else None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._first_step.close()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._from is None:  # a failure to save appears now, and not hours later
            self.trainer._save_checkpoint(self.trainer.model, None)
            return
        self.trainer._tr_loss += self._progress["loss"]
        self.trainer._globalstep_last_logged = self._progress["logged"]

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._from is not None and state.epoch == int(state.epoch):  # Trainer restores it too, but after this
            self.trainer._load_rng_state(str(self._from.folder))
        elif self._from is not None:
            torch.set_rng_state(torch.tensor(self._progress["order"], dtype=torch.uint8))
        self._from = None
        self._order = torch.get_rng_state().tolist()


def _read_back(folder: Path) -> None:
    """Read what libraries wrote: some of them do not report when the disk refuses the end of a file."""
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt"):
            pass
    for path in folder.rglob("*.json"):
        read_json(path)
