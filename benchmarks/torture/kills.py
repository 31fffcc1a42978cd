"""SIGKILL at random moments of a run, and of the runs that resume it; then the run is resumed to its end."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench import SHAPES, Bench, Outcome, train
from forks import SECONDS, each

from dpo_cli.storage.run_directory import RunDirectory

MOST_IN_A_ROW = 3


def kills(bench: Bench, count: int, shapes: Sequence[str], seed: int = 0) -> Outcome:
    """`count` kills or a few more, over these shapes in turns."""
    done = Outcome("SIGKILL at a random moment, once to three times in a row; then --resume")
    found: Counter[str] = Counter()
    while (missing := count - done.counted) > 0:
        batch = [(shapes[(done.tries + i) % len(shapes)], seed, done.tries + i) for i in range(max(2, missing // 2))]
        for fault, moments in each(partial(_killed, bench), batch):
            done.add(fault, len(moments))
            found.update(moments)
    done.counts = {"kills": done.counted, **dict(found.most_common())}
    return done


def _killed(bench: Bench, case: tuple[str, int, int]) -> tuple[str | None, list[str]]:
    """What is wrong with a run that was killed a few times, and in which moments it was."""
    name, seed, number = case
    draw = random.Random(f"kill {seed} {number}")
    run, moments = bench.place / f"killed-{number}", []
    words: list[str] = []
    for _ in range(draw.randint(1, MOST_IN_A_ROW)):
        child = train(bench.place / f"{name}.json", run, *words)
        if child.wait_until(draw.uniform(0, 1.1 * bench.seconds[name])) is not None:
            break  # it came to its end before; what is left must be that
        child.kill()
        moments.append(moment_of(run))
        words = ["--resume"]
        if run.exists() and (torn := bench.torn(run)):
            return torn, moments
    return bench.goes_on(name, run), moments


def moment_of(run: Path) -> str:
    """In what a run was interrupted, by the files that it left."""
    directory = RunDirectory(run)
    if directory.checkpoints.part.exists():
        return "while a checkpoint was written"
    if any(run.glob(".*.part")):
        return "while a file of the run was written"
    if directory.trained.exists():
        return "after the adapter was written"
    return "between two checkpoints" if directory.checkpoints.all() else "before the first checkpoint"


def whole_kills(bench: Bench, count: int, seed: int = 0) -> Outcome:
    """The same with processes of their own, from the first import on, which share nothing with each other."""
    done = Outcome("the same, each run a process of its own")
    for fault in each(partial(_killed_process, bench), [(seed, number) for number in range(count)]):
        done.add(fault)
    return done


def _killed_process(bench: Bench, case: tuple[int, int]) -> str | None:
    seed, number = case
    draw = random.Random(f"process {seed} {number}")
    name = draw.choice(list(SHAPES))
    run = bench.place / f"process-{number}"
    command = [sys.executable, "-m", "dpo_cli", "train", str(bench.place / f"{name}.json"), f"output_dir={run}"]
    with (bench.place / f"process-{number}.log").open("a", encoding="utf-8") as log:
        started = time.monotonic()
        child = subprocess.Popen(command, stdout=log, stderr=log)
        while not run.exists():  # the imports take most of the time, and write nothing
            time.sleep(0.01)
            if time.monotonic() - started > SECONDS or child.poll() is not None:
                return f"{' '.join(command)} never began"
        time.sleep(draw.uniform(0, bench.seconds[name]))
        child.send_signal(signal.SIGKILL)
        child.wait()
        code = subprocess.run([*command, "--resume"], stdout=log, stderr=log, check=False, timeout=SECONDS).returncode
    if code:
        return f"--resume ended with {code}"
    return bench.other(name, run)
