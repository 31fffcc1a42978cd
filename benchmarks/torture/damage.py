"""Checkpoints that are not as they were written: each bit and each length counts."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import Bench, Outcome, train
from forks import SECONDS, each

from dpo_cli.storage.checkpoints import Checkpoint
from dpo_cli.storage.run_directory import RunDirectory

NAME = "evaluations"
Damage = Callable[[Path], None]


def flipped(position: float, path: Path) -> None:
    """One bit is another one."""
    content = bytearray(path.read_bytes())
    bit = int(position * 8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def cut(position: float, path: Path) -> None:
    """The end is missing."""
    os.truncate(path, int(position * path.stat().st_size))


def added(path: Path) -> None:
    """There is a file more."""
    path.with_name("another.bin").write_bytes(b"")


KINDS: dict[str, Callable[[float], Damage]] = {
    "flipped": lambda position: partial(flipped, position),
    "cut": lambda position: partial(cut, position),
    "deleted": lambda _: Path.unlink,
    "added": lambda _: added,
}


def detection(bench: Bench, count: int, seed: int = 0) -> Outcome:
    """`count` bits and lengths, drawn from all files of a checkpoint; each file deleted; one added."""
    done = Outcome("a bit flipped, a file cut, deleted or added: a checkpoint is not believed")
    (checkpoint, *_) = RunDirectory(bench.place / "alone" / "early stopping").checkpoints.all()  # it has all kinds of files
    files = sorted(path for path in checkpoint.folder.rglob("*") if path.is_file())
    draw = random.Random(f"damage {seed}")
    cases = [(draw.choice(("flipped", "cut")), draw.choice(files), draw.random()) for _ in range(count)]
    cases += [("deleted", path, 0.0) for path in files] + [("added", files[0], 0.0)]
    if damage := checkpoint.damage():
        done.faults.append(f"{checkpoint.folder} is whole, and {damage}")
    for kind, path, position in cases:
        done.add(_unseen(checkpoint, path, kind, KINDS[kind](position)))
    if damage := checkpoint.damage():
        done.faults.append(f"{checkpoint.folder} is whole again, and {damage}")
    done.counts = {"files": len(files)}
    return done


def _unseen(checkpoint: Checkpoint, path: Path, kind: str, damage: Damage) -> str | None:
    content = path.read_bytes()
    damage(path)
    found = checkpoint.damage()
    path.write_bytes(content)
    path.with_name("another.bin").unlink(missing_ok=True)
    return None if found else f"{path} was {kind}, and nothing was seen"


def falling_back(bench: Bench, count: int, seed: int = 0) -> Outcome:
    """The newest checkpoint of an interrupted run is damaged, in every fifth try all of them: what is left is resumed."""
    done = Outcome("the newest checkpoint, or all, damaged; then --resume")
    run = _interrupted(bench)
    for fault in each(partial(_fell, bench, run), [(seed, number) for number in range(count)]):
        done.add(fault)
    return done


def _interrupted(bench: Bench) -> Path:
    """A run that was killed when its third checkpoint was there."""
    run = bench.place / "to-be-damaged"
    child = train(bench.place / f"{NAME}.json", run)
    while not (run / "checkpoints" / "step-3").exists():
        time.sleep(0.001)
        if time.monotonic() - child.started > SECONDS:
            raise TimeoutError(f"no third checkpoint: {child.said()}")
    child.kill()
    return run


def _fell(bench: Bench, interrupted: Path, case: tuple[int, int]) -> str | None:
    seed, number = case
    draw = random.Random(f"fall {seed} {number}")
    run = bench.place / f"damaged-{number}"
    shutil.copytree(interrupted, run)
    newest, *older = RunDirectory(run).checkpoints.all()
    broken = [newest, *older] if number % 5 == 4 else [newest]
    for checkpoint in broken:
        path = draw.choice(sorted(path for path in checkpoint.folder.rglob("*") if path.is_file()))
        KINDS[list(KINDS)[number % len(KINDS)]](draw.random())(path)
    reasons = [f"checkpoint {checkpoint.folder.name} is skipped: {checkpoint.damage()}" for checkpoint in broken]
    if fault := bench.goes_on(NAME, run):
        return fault
    said = run.with_name(f"{run.name}.log").read_text(encoding="utf-8")
    wanted = reasons if len(broken) > 1 else [*reasons, f"resuming from {older[0].folder.name}"]
    silent = [text for text in wanted if text not in " ".join(said.split())]
    return f"{run} does not say {silent}: {said}" if silent else None
