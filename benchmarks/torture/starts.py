"""Several starts at once in one directory."""

from __future__ import annotations

import random
from functools import partial

from bench import Bench, Outcome, train
from forks import each

from dpo_cli.errors import Exit

WORDS = ((), ("--resume",), ("--overwrite",))


def starts(bench: Bench, count: int, seed: int = 0) -> Outcome:
    """Two to four, with nothing, --resume or --overwrite: one runs, and it runs as if it were alone."""
    done = Outcome("2 to 4 starts at once in one directory: exactly one runs")
    for fault in each(partial(_started, bench), [(seed, number) for number in range(count)], at_once=1):
        done.add(fault)
    return done


def _started(bench: Bench, case: tuple[int, int]) -> str | None:
    seed, number = case
    draw = random.Random(f"starts {seed} {number}")
    run = bench.place / f"starts-{number}"
    config = bench.place / "evaluations.json"
    children = [train(config, run, *draw.choice(WORDS)) for _ in range(draw.randint(2, 4))]
    ends = [(child.end(), child.said()) for child in children]
    codes = sorted(code for code, _ in ends)
    if codes != [Exit.DONE, *[Exit.INVALID] * (len(children) - 1)]:
        odd = [said[-2000:] for code, said in ends if code not in (Exit.DONE, Exit.INVALID)] or [ends[0][1][-2000:]]
        return f"{run}: exit codes {codes}: {odd[0]}"
    return bench.torn(run) or bench.other("evaluations", run)
