"""A training in two processes, of which one is killed."""

from __future__ import annotations

import os
import random
import socket
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from bench import Bench, Left, Outcome, train
from forks import SECONDS, Child, each
from kills import moment_of

from dpo_cli.errors import Exit

SHARED = "two processes"
OPTIONS = {
    "lora_dropout": 0.1, "save_steps": 1, "max_steps": 40, "eval_split": 0.25, "eval_steps": 10, "kl_prompts": 2,
    "ddp_timeout": 20,
}  # fmt: skip


def rank_kills(bench: Bench, count: int, seed: int = 0) -> Outcome:
    """One of two processes is killed at a random moment: the other ends by itself, and both resume to the bits of a run in two
    processes that was let alone."""
    done, found = Outcome("SIGKILL of one of two processes at a random moment: both end; then --resume"), Counter[str]()
    config, alone = bench.config(SHARED, OPTIONS), bench.place / "alone" / SHARED
    alone.parent.mkdir(exist_ok=True)
    started = time.monotonic()
    if said := _end(_processes(config, alone)):
        raise RuntimeError(said)
    bench.seconds[SHARED], bench.alone[SHARED] = time.monotonic() - started, Left.by(alone)
    number = 0
    while done.tries < count:
        cases = [(seed, number + i) for i in range(max(1, (count - done.tries) // 2))]
        number += len(cases)
        for fault, moment in each(partial(_killed, bench), cases, at_once=1):
            if fault or moment:
                done.add(fault)
                found[moment] += 1
    done.counts = {"kills": done.tries, **dict(found.most_common())}
    return done


def _killed(bench: Bench, case: tuple[int, int]) -> tuple[str | None, str]:
    """What is wrong with a run of which one process was killed, and when that was; no moment if it had ended before."""
    seed, number = case
    draw = random.Random(f"rank {seed} {number}")
    config, run = bench.place / f"{SHARED}.json", bench.place / f"rank-killed-{number}"
    children, rank = _processes(config, run), draw.randrange(2)
    killed, other = children[rank], children[1 - rank]
    if killed.wait_until(draw.uniform(0, 1.1 * bench.seconds[SHARED])) is not None:
        other.end()
        return bench.other(SHARED, run), ""
    killed.kill()
    moment = f"of the {'second' if rank else 'first'}, {moment_of(run)}"
    code = other.end()
    if code not in (Exit.DONE, Exit.FAILED) or "Traceback" in other.said():
        return f"{run}: the other process ended with {code}: {other.said()[-2000:]}", moment
    if run.exists() and (torn := bench.torn(run)):
        return torn, moment
    return _end(_processes(config, run, "--resume")) or bench.other(SHARED, run), moment


def _processes(config: Path, run: Path, *words: str) -> list[Child]:
    """The processes of a training, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        about = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def place(variables: Mapping[str, str]) -> None:
        os.environ.update(variables)

    own = [{**about, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [train(config, run, *words, before=partial(place, variables)) for variables in own]


def _end(children: list[Child]) -> str:
    """What went wrong in them, at their end."""
    codes = [child.wait(SECONDS) for child in children]
    return "" if codes == [0, 0] else f"exit codes {codes}: {children[0].said()[-2000:]}"
