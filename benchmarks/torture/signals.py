"""SIGINT and SIGTERM at random moments, also twice."""

from __future__ import annotations

import random
import signal
from functools import partial

from bench import Bench, Outcome, train
from forks import each
from writes import newest

from dpo_cli.storage.run_directory import SUMMARY, RunDirectory

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def signals(bench: Bench, count: int, seed: int = 0) -> Outcome:
    """A run that has no checkpoints but that of its stop; every other one is told a second time."""
    done = Outcome("SIGINT or SIGTERM at a random moment, every other time twice; then --resume")
    number = 0
    while done.tries < count:
        cases = [(seed, number + i) for i in range(max(2, count - done.tries))]
        number += len(cases)
        for fault, was_stopped in each(partial(_stopped, bench), cases):
            if was_stopped or fault:
                done.add(fault)
    return done


def _stopped(bench: Bench, case: tuple[int, int]) -> tuple[str | None, bool]:
    """What is wrong with a run that was stopped, and whether it was: it may have come to its end before."""
    seed, number = case
    draw = random.Random(f"signal {seed} {number}")
    run, chosen, is_twice = bench.place / f"stopped-{number}", NUMBERS[number // 2 % 2], number % 2 == 1
    child = train(bench.place / "stopped.json", run)
    code = child.wait_until(draw.uniform(0, 1.1 * bench.seconds["stopped"]))
    if code is None:
        child.send(chosen)
        code = child.wait(draw.uniform(0, 0.05)) if is_twice else child.end()
        if code is None:
            child.send(chosen)
            code = child.end()
    if code == 0:
        return bench.other("stopped", run), False
    if code != 128 + chosen or "Traceback" in child.said():
        return f"{run}: {chosen.name}, exit {code}: {child.said()[-3000:]}", True
    directory = RunDirectory(run)
    if directory.has(SUMMARY) and (steps := directory.read_json(SUMMARY)["steps"]) != newest(run) and not is_twice:
        return f"{run}: stopped after step {steps}, with a checkpoint of step {newest(run)}", True
    return bench.torn(run) or bench.goes_on("stopped", run), True
