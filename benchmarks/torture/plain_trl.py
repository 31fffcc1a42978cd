"""`make torture-trl`: the same torture on TRL's DPOTrainer with PEFT and its own checkpoints, as its documentation has it.

TRL's head is a Triton kernel that cannot run on a CPU; ours stands in its place. All else is TRL's and transformers'.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["HF_HUB_OFFLINE"] = "1"  # before torch is there
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "benchmarks/torture", "benchmarks", "tests")]

import baseline  # noqa: E402
import torch  # noqa: E402
from baseline import Column, Table  # noqa: E402
from bench import Bench  # noqa: E402
from damage import KINDS  # noqa: E402
from datasets import Dataset  # noqa: E402
from disk import can_mount, disk, fill  # noqa: E402
from forks import SECONDS, Child, each, start  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

from dpo_cli.scoring import forward  # noqa: E402
from dpo_cli.storage.digests import sha256_of_all  # noqa: E402

KILLS, DAMAGES, DISKS, STARTS = 80, 60, 20, 20
SAME, FAILED, OTHER = "the same adapter", "failed", "another adapter, silently"
CHANCE = (0.3, 8.0)  # the moments are random
COLUMNS = (
    Column("check"),
    Column("tries", "tries", "{}", CHANCE),
    *(Column(end, "tries", "{}", CHANCE) for end in (SAME, FAILED, OTHER)),
)


@dataclass(frozen=True)
class TrlBench:
    """A folder with a model and pairs, and what a run that was let alone leaves."""

    place: Path
    sha256: str = ""
    seconds: float = 0.0

    def train(self, run: Path) -> Child:
        """A run that continues from its last checkpoint, if there is one."""
        return start(partial(_train, self.place, run), run.with_name(f"{run.name}.log"))

    def outcome(self, run: Path) -> str:
        """What going on with a run comes to."""
        return self.judged(run, [self.train(run)])

    def judged(self, run: Path, children: list[Child]) -> str:
        """What one or several runs in a directory came to; of one that failed, with the error."""
        if failed := [child for child in children if child.end()]:
            (*_, error) = [line for line in failed[0].said().splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
            return f"{FAILED}: {error.split(':')[0].rpartition('.')[2]}"
        return SAME if sha256_of_all(run / "adapter") == self.sha256 else OTHER


def _train(place: Path, run: Path) -> None:
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    arguments = DPOConfig(
        output_dir=str(run), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to="none",
        save_strategy="steps", save_steps=1, save_total_limit=2, use_cpu=True, bf16=False, disable_dropout=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(place / "model"),
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    forward.attach(trainer.model.get_base_model(), forward.plain_states)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run)) if run.is_dir() else None)
    trainer.save_model(str(run / "adapter"))


def killed(bench: TrlBench, number: int) -> str | None:
    draw, run = random.Random(f"kill {number}"), bench.place / f"killed-{number}"
    child = bench.train(run)
    if child.wait_until(draw.uniform(0, 1.1 * bench.seconds)) is not None:
        return None
    child.kill()
    return bench.outcome(run)


def damaged(bench: TrlBench, number: int) -> str:
    """A file of the newest of two checkpoints is damaged; the files in turns."""
    draw, run = random.Random(f"damage {number}"), bench.place / f"damaged-{number}"
    shutil.copytree(bench.place / "interrupted", run)
    newest = Path(str(get_last_checkpoint(str(run))))
    files = sorted(path for path in newest.iterdir() if path.name not in ("README.md", "training_args.bin"))  # read by nobody
    KINDS[("flipped", "cut", "deleted")[number // len(files) % 3]](draw.random())(files[number % len(files)])
    return bench.outcome(run)


def filled(bench: TrlBench, number: int) -> str | None:
    """The disk is filled at a random moment, and room is made when the run has ended."""
    draw, place = random.Random(f"disk {number}"), bench.place / f"disk-{number}"
    with disk(place):
        run = place / "run"
        child = bench.train(run)
        if child.wait_until(draw.uniform(0, bench.seconds)) is not None:
            return None
        fill(place / "filler", draw.randrange(100_000))
        if child.end() == 0:
            return None
        (place / "filler").unlink()
        return bench.outcome(run)


def started(bench: TrlBench, number: int) -> str:
    """Two to four at once in one directory. All of them run; what they leave is judged, and each has to end well."""
    draw, run = random.Random(f"starts {number}"), bench.place / f"starts-{number}"
    children = [bench.train(run) for _ in range(draw.randint(2, 4))]
    return bench.judged(run, children)


def tried(work: Callable[[int], str | None], count: int, at_once: int = 2) -> Counter[str]:
    """`count` tries in which `work` came to something."""
    found: Counter[str] = Counter()
    number = 0
    while (missing := count - found.total()) > 0:
        found.update(filter(None, each(work, range(number, number + missing), at_once)))
        number += missing
    return found


def prepared(place: Path) -> TrlBench:
    """Let one run alone, and interrupt another when it has its third checkpoint."""
    Bench.make(place)
    child = TrlBench(place).train(place / "alone")
    if child.end():
        raise RuntimeError(child.said())
    bench = TrlBench(place, sha256_of_all(place / "alone" / "adapter"), time.monotonic() - child.started)
    child = bench.train(place / "interrupted")
    while not (place / "interrupted" / "checkpoint-4").exists():  # so that the third is whole
        time.sleep(0.001)
        if time.monotonic() - child.started > SECONDS:
            raise TimeoutError(child.said())
    child.kill()
    shutil.rmtree(place / "interrupted" / "checkpoint-4")
    return bench


def measure(table: Table, options: argparse.Namespace) -> None:
    def many(count: int) -> int:
        return 2 if options.small else count

    with tempfile.TemporaryDirectory() as folder:
        bench = prepared(Path(folder))
        errors: Counter[str] = Counter()
        lines = [
            ("SIGKILL at a random moment; then resume_from_checkpoint", partial(killed, bench), KILLS, 2),
            ("a file of the newest checkpoint damaged; then resume_from_checkpoint", partial(damaged, bench), DAMAGES, 2),
            ("2 to 4 starts at once in one directory", partial(started, bench), STARTS, 1),
        ]
        if can_mount(bench.place):
            lines.append(
                ("a disk that fills up; then room is made, and resume_from_checkpoint", partial(filled, bench), DISKS, 2)
            )
        for check, work, count, at_once in lines:
            found = tried(work, many(count), at_once)
            errors.update({what.removeprefix(f"{FAILED}: "): n for what, n in found.items() if what.startswith(FAILED)})
            table.add(check, found.total(), found[SAME], found.total() - found[SAME] - found[OTHER], found[OTHER])
    table.note("It failed with: {errors}.", (Column("errors", "tries"), dict(errors.most_common())))


if __name__ == "__main__":
    sys.exit(baseline.main("torture-trl", COLUMNS, measure))
