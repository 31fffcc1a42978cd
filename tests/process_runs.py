"""Trainings of several processes, and how two runs are compared."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from fork_server import dpo
from safetensors.torch import load_file

from dpo_cli.storage.run_directory import ADAPTER, EVALUATION, LINES, SUMMARY, WEIGHTS

TIMED = ("tokens_per_second", "peak_memory_gb", "seconds", "measured_gb", "adapter_sha256", "seal")
Config = Callable[..., Path]
MAIN = "\nimport sys\nfrom dpo_cli.__main__ import main\nsys.argv = ['dpo', *sys.argv[1:]]\nmain()\n"


def document(run: Path, name: str) -> Any:
    text = (run / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def leaves(value: Any, place: tuple[object, ...] = ()) -> Iterator[tuple[tuple[object, ...], Any]]:
    """The values in a document, each with its place."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, (*place, key))
    else:
        yield place, value


def is_number(value: object) -> bool:
    return isinstance(value, float)


def apart(one: Path, other: Path) -> float:
    """The difference of two adapters, relative to the update: matrices B start at zero."""
    mine, theirs = (load_file(run / ADAPTER / WEIGHTS) for run in (one, other))
    difference = sum(float((mine[name].double() - theirs[name].double()).pow(2).sum()) for name in mine)
    update = sum(float(weight.double().pow(2).sum()) for name, weight in mine.items() if "lora_B" in name)
    return float((difference / update) ** 0.5)


def trained(config: Path, *words: object, processes: int = 1) -> Path:
    done = dpo("train", config, *words, processes=processes)
    assert done.returncode == 0, done.stderr
    return config.with_suffix("")


def assert_same(one: Path, other: Path) -> None:
    """Both runs have the same lines and figures, but for rounding."""
    assert [list(line) for line in document(one, LINES)] == [list(line) for line in document(other, LINES)]
    for name in (LINES, SUMMARY, EVALUATION):
        ours, theirs = (dict(leaves(document(run, name))) for run in (one, other))
        assert ours.keys() == theirs.keys()
        for place, value in ours.items():
            if place[-1] not in TIMED:
                assert theirs[place] == (pytest.approx(value, rel=1e-5, abs=1e-5) if is_number(value) else value), place


def resumed_as_alone(config: Path, alone: Path) -> None:
    """The run of a config continues in two processes, to the bits and lines of one that was let alone."""
    run = trained(config, "--resume", processes=2)
    assert (run / ADAPTER / WEIGHTS).read_bytes() == (alone / ADAPTER / WEIGHTS).read_bytes()
    both = [[{**line, **dict.fromkeys(TIMED, 0)} for line in document(place, LINES)] for place in (run, alone)]
    assert both[0] == both[1]


def in_two_with(code: str, config: Path) -> tuple[list[int], list[str]]:
    """`dpo train` of a config in two processes that first run this code: their exit codes, and what they printed.

    RANK_OF_TEST is the rank.
    """
    code += MAIN
    ended = in_processes(code, 2, "train", str(config))
    return [one.returncode for one in ended], [one.stdout for one in ended]


def in_processes(code: str, count: int, *words: str) -> list[subprocess.CompletedProcess[str]]:
    """Python code in so many processes that know of each other, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        about = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    nodes = []
    for rank in range(count):
        own = {**os.environ, **about, "RANK": str(rank), "LOCAL_RANK": str(rank), "RANK_OF_TEST": str(rank)}
        command = [sys.executable, "-c", code, *words]
        nodes.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=-1, stderr=subprocess.STDOUT, text=True))
    said = [node.communicate(timeout=90)[0] for node in nodes]
    return [subprocess.CompletedProcess(node.args, node.returncode, text) for node, text in zip(nodes, said, strict=True)]


SIGNAL_IN_AN_EVALUATION = """
import os, signal
from dpo_cli.evaluation import metrics
score, seen = metrics._score, []
def slow(*arguments):
    seen.append(1)
    if len(seen) == 4 and os.environ["RANK_OF_TEST"] == "0":
        os.kill(os.getpid(), signal.SIGINT)
    return score(*arguments)
metrics._score = slow
"""
