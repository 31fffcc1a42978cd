"""The runs that are tortured: tiny models, short trainings, and what a run that was let alone leaves."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from builders import tiny_tokenizer
from conftest import made_row, tiny_model
from fork_server import ready
from forks import Child, start

from dpo_cli.__main__ import main as dpo
from dpo_cli.errors import InvalidInput
from dpo_cli.storage.digests import sha256_of_all
from dpo_cli.storage.run_directory import SUMMARY, RunDirectory

MEASURED = ("tokens_per_second", "peak_memory_gb")  # the keys of a line that are not the same twice
EXTRA: dict[str, dict[str, Any]] = {
    "short": {"max_steps": 3, "save_steps": 1, "lora_dropout": 0.1, "eval_split": 0.25},
    "stopped": {"max_steps": 8, "lora_dropout": 0.1, "eval_split": 0.25, "eval_steps": 2},  # no checkpoint but that of its end
    "adapter": {"max_steps": 4},  # which another run continues
}
SHAPES: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.3, "save_steps": 1, "max_steps": 10},
    "no dropout, accumulation": {"save_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    "evaluations": {"lora_dropout": 0.1, "save_steps": 1, "eval_split": 0.25, "eval_steps": 2, "kl_prompts": 2},
    "early stopping": {
        "save_steps": 2, "eval_split": 0.25, "eval_steps": 1, "early_stopping_patience": 2, "learning_rate": 0.3,
        "max_steps": 12,
    },
    "group_by_length": {"lora_dropout": 0.1, "save_steps": 1, "group_by_length": True, "logging_steps": 3, "max_steps": 14},
    "sft": {"strategy": "sft", "lora_dropout": 0.1, "save_steps": 2, "eval_split": 0.25},
    "an adapter goes on": {"model_name": "alone/adapter", "lora_dropout": 0.1, "save_steps": 1, "logging_steps": 2},
    "rlhf": {
        "strategy": "rlhf", "reward_functions": ["shorter"], "num_generations": 2, "num_iterations": 2, "lora_dropout": 0.1,
        "save_steps": 1, "eval_split": 0.25, "eval_steps": 8, "kl_prompts": 2, "max_new_tokens": 16, "max_seq_length": 64,
        "max_steps": 40,
    },
    "every weight": {"lora_r": 0, "save_steps": 2, "learning_rate": 1e-3},
}  # fmt: skip


@dataclass(frozen=True)
class Left:
    """What a run left: SHA-256 of its weights, its lines but for what is measured, how it ended, and its figures."""

    sha256: str
    lines: list[dict[str, Any]]
    ended: dict[str, Any]

    @classmethod
    def by(cls, run: Path) -> Left:
        directory = RunDirectory.open(run)
        lines = [{key: value for key, value in line.items() if key not in MEASURED} for line in directory.read_lines()]
        summary = directory.read_json(SUMMARY)
        ended = {name: summary[name] for name in ("status", "steps", "best_step", "eval", "base", "gain", "adapter_sha256")}
        return cls(sha256_of_all(directory.trained), lines, ended)


@dataclass
class Bench:
    """A folder with a model, pairs, and configs; the runs of a config that were let alone, and their seconds."""

    place: Path
    alone: dict[str, Left] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def make(cls, place: Path) -> Bench:
        place.mkdir(parents=True, exist_ok=True)
        tiny_model("llama", torch.float32).save_pretrained(place / "model")
        tiny_tokenizer().save_pretrained(place / "model")
        rows = [made_row(i) for i in range(24)]
        for i, row in enumerate(rows):  # of several lengths
            row["chosen"] = " ".join([str(row["chosen"])] * (1 + i % 4))
        (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        ready()
        return cls(place)

    def config(self, name: str, options: dict[str, Any]) -> Path:
        """The file of a config, by whose name it is remembered."""
        values = {
            "model_name": "model", "dataset": str(self.place / "pairs.jsonl"), "device": "cpu", "bf16": False, "fp16": False,
            "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "lora_r": 4, "kl_prompts": 0,
            "lora_dropout": 0.0, "learning_rate": 1e-2, "max_new_tokens": 4, **options,
        }  # fmt: skip
        values["model_name"] = str(self.place / values["model_name"])
        path = self.place / f"{name}.json"
        path.write_text(json.dumps(values, indent=2), encoding="utf-8")
        return path

    def know(self, name: str) -> None:
        """Let a run come to its end, and remember what it leaves."""
        config, run = self.config(name, {**EXTRA, **SHAPES}[name]), self.place / "alone" / name
        run.parent.mkdir(exist_ok=True)
        child = train(config, run)
        code = child.end()
        if code:
            raise RuntimeError(f"a run of {config} that was let alone ended with {code}: {child.said()}")
        self.seconds[name] = time.monotonic() - child.started
        self.alone[name] = Left.by(run)

    def other(self, name: str, run: Path) -> str | None:
        """Where what a run left is not, bit for bit, what one that was let alone did."""
        try:
            left, alone = Left.by(run), self.alone[name]
        except InvalidInput as error:  # a fault like any other, for the table
            return f"{run} of {name}: {error}"
        apart = [field for field in vars(alone) if getattr(left, field) != getattr(alone, field)]
        return f"{run} of {name}: {' and '.join(apart)} are other ones" if apart else None

    def torn(self, run: Path) -> str | None:
        """A checkpoint that is there and not whole."""
        found = [(checkpoint.folder, checkpoint.damage()) for checkpoint in RunDirectory(run).checkpoints.all()]
        return next((f"{folder}: {damage}" for folder, damage in found if damage), None)

    def goes_on(self, name: str, run: Path) -> str | None:
        """Go on with a run to its end: None where it leaves what it should, else what was seen instead."""
        child = train(self.place / f"{name}.json", run, "--resume")
        code = child.end()
        return f"{run} of {name}: --resume ended with {code}: {child.said()[-2000:]}" if code else self.other(name, run)


@dataclass
class Outcome:
    """A line of the table."""

    check: str
    tries: int = 0
    counted: int = 0  # of what was done to the tries
    faults: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, fault: str | None, counted: int = 1) -> None:
        self.tries += 1
        self.counted += counted
        self.faults += [fault] if fault else []


def train(config: Path, run: Path, *words: str, before: Callable[[], object] = lambda: None) -> Child:
    """`dpo train` of a config in the directory `run`, after the child has done what comes `before`."""

    def work() -> None:
        before()
        os.environ["NO_COLOR"] = "1"
        sys.argv = ["dpo", "train", str(config), f"output_dir={run}", *words]
        dpo()

    return start(work, run.with_name(f"{run.name}.log"))
