"""Bytes that processes exchange, and the time on published links: formulas of cluster.py, and gloo measured on this machine.

python benchmarks/collectives.py [--share S]

Two processes of this machine sum tensors with gloo. Latency and rate come from a small and a middle size; the formula with both
predicts the largest size, the gradients of an 8B adapter of rank 16, which is measured too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import baseline
import cluster
import torch
import torch.distributed as dist
from baseline import Column, Table
from cluster import BETWEEN_MACHINES, CARDS, CARDS_OF_A_MACHINE, IN_A_MACHINE, LINKS, Link

ROOT = Path(__file__).parent.parent
ONE = "one-of-two"  # the word that makes this script one of the two processes
FORMULA = (1e-5, 0.0)  # a later table differs only where an input or a formula does
MANY = CARDS[1:]
COLUMNS = (
    Column("model"),
    Column("traffic"),
    Column("size", "MB", "{:,.0f} MB", FORMULA),
    *(Column(f"{CARDS_OF_A_MACHINE} cards, {link.name}", "ms", "{:,.1f}", FORMULA) for link in IN_A_MACHINE),
    *(Column(f"{MANY[0]} and {MANY[1]} cards, {link.name}", "ms", "{:,.0f}, {:,.0f}", FORMULA) for link in BETWEEN_MACHINES),
)
HIDDEN_BY = {link.name.partition(".")[0]: link for link in LINKS}  # a place of a text has no dot in its name
HIDE = (
    "fsdp: gathers that run next to the computation are hidden from this many tokens of a row on, at {share} of the "
    "peak: " + "; ".join(f"{link.name} {{{name}}}" for name, link in HIDDEN_BY.items()) + "."
)
GLOO = (
    "Two processes of this machine, gloo, the best of {rounds} rounds: {rate}, {latency}. The formula predicts "
    "{predicted} for {size}; {measured} were measured, {ratio} of it."
)


def milliseconds(size: float, parts: int, cards: int, link: Link) -> float:
    """Of two ring passes, which are an all-reduce or two all-gathers, of so many equal parts."""
    return 1e3 * 2 * parts * cluster.ring_all_gather(size / parts, cards, link)


def add(table: Table, name: str, traffic: str, size: float, parts: int = 1) -> None:
    inside = [milliseconds(size, parts, CARDS_OF_A_MACHINE, link) for link in IN_A_MACHINE]
    across = [[milliseconds(size, parts, cards, link) for cards in MANY] for link in BETWEEN_MACHINES]
    table.add(name, traffic, size / 1e6, *inside, *across)


def one_of_two(rank: int, meeting: str, sizes: list[int], rounds: int) -> None:
    """Process `rank` of two: the least seconds of an all-reduce of each size, printed by the first."""
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=wait)
    best = [float("inf")] * len(sizes)
    tensors = [torch.ones(size // 4) for size in sizes]
    for turn in range(rounds + 1):  # all sizes in turns; the first turn makes the connections
        for place, values in enumerate(tensors):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(values)
            taken = time.perf_counter() - started
            best[place] = min(best[place], taken) if turn else best[place]
            values.fill_(1.0)
    dist.destroy_process_group()
    if rank == 0:
        print(json.dumps(best))


def gloo_seconds(sizes: list[int], rounds: int) -> list[float]:
    """The seconds of an all-reduce of each size between two processes of this machine."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        job = json.dumps([f"{folder}/meeting", sizes, rounds])
        commands = [[sys.executable, __file__, ONE, str(rank), job] for rank in range(2)]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for command in commands]
        outputs = [process.communicate()[0] for process in both]
    if any(process.returncode for process in both):
        raise SystemExit("the two processes of gloo failed")
    best: list[float] = json.loads(outputs[0])
    return best


def fitted(small: tuple[int, float], middle: tuple[int, float]) -> Link:
    """The link between two processes on which the formula takes these seconds for these sizes."""
    (one, seconds), (other, more) = small, middle
    rate = (other - one) / (more - seconds)  # of two processes each sends `size` bytes in all: 2 (n - 1) / n is 1
    return Link("gloo", rate, max(0.0, seconds - one / rate) / 2)


def note_gloo(table: Table, small: bool) -> None:
    largest = cluster.gradient_bytes(cluster.facts("8B"), 16)
    sizes = [4096, 2**20, 2**22] if small else [4096, 2**26, largest]
    rounds = 3 if small else 9
    seconds = gloo_seconds(sizes, rounds)
    link = fitted((sizes[0], seconds[0]), (sizes[1], seconds[1]))
    predicted = cluster.ring_all_reduce(sizes[2], 2, link)
    table.note(
        GLOO,
        (Column("rounds", "rounds", "{}"), rounds),
        (Column("rate", "GB/s", "{:.2f} GB/s"), link.rate / 1e9),
        (Column("latency", "µs", "{:.0f} µs"), link.latency * 1e6),
        (Column("predicted", "ms", "{:.0f} ms"), predicted * 1e3),
        (Column("size", "MB", "{:.0f} MB"), sizes[2] / 1e6),
        (Column("measured", "ms", "{:.0f} ms"), seconds[2] * 1e3),
        (Column("ratio", "ratio", "{:.2f}", (0.5, 0.0)), seconds[2] / predicted),
    )


def predict(table: Table, share: float) -> None:
    """What the formulas say."""
    for name in cluster.MODELS:
        model = cluster.facts(name)
        for rank in cluster.RANKS:
            add(table, name, f"gradients, rank {rank}", cluster.gradient_bytes(model, rank))
        add(table, name, "fsdp: blocks in bf16, gathered twice", cluster.base_bytes(model), model.num_hidden_layers)
    tokens = [cluster.tokens_that_hide(link, share * cluster.PEAK) for link in HIDDEN_BY.values()]
    columns = [Column(name, "tokens", "{:,.0f}", FORMULA) for name in HIDDEN_BY]
    table.note(HIDE, (Column("share", "share", "{:.0%}", FORMULA), share), *zip(columns, tokens, strict=True))


def measure(table: Table, options: argparse.Namespace) -> None:
    predict(table, options.share)
    note_gloo(table, options.small)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--share", type=float, default=cluster.SHARE, help="of the peak that a step reaches")
    return made


if __name__ == "__main__":
    if sys.argv[1:2] == [ONE]:
        one_of_two(int(sys.argv[2]), *json.loads(sys.argv[3]))
        sys.exit()
    sys.exit(baseline.main("collectives", COLUMNS, measure, parser()))
