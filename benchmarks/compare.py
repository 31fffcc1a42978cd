"""`make compare`: SFT, DPO and RLHF on SmolLM2 by `dpo compare`, and what the documentation's table says of them.

Every method of configs/compare.json trains on the same tokens with the same seeds. A row is a figure; where the documentation
ranks the methods by it, `documented` has its words, and `reading` says which of its ranks the figures show at this size. A
difference counts if its corrected p-value is below 5 %, or, for what a run takes, if the ranges over the seeds do not meet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import baseline
from baseline import EXACT, Column, Table, cell_of

from dpo_cli.config.config import load_methods

CONFIG, RUNS = "configs/compare.json", "runs/compare"
SMALL = ("max_new_tokens=8", "kl_prompts=2", 'compare={"methods": ["sft", "dpo", "rlhf"], "seeds": 2, "budget_value": 2000}')
METHODS = [method.name for method, _ in load_methods(CONFIG)[1]]
CELL = "{:.4g} [{:.4g}, {:.4g}]"
COLUMNS = (
    Column("figure"),
    Column("unit"),
    *(Column(name, "as named", CELL, (0.5, 0.1)) for name in ("base", *METHODS)),
    Column("documented"),
    Column("reading", "words"),
)
Method = Mapping[str, Any]  # of compare.json
Words = Mapping[str, str]
RANKS = {"simple": 1, "medium": 2, "high": 3, "very stable": 3, "stable": 2, "less stable": 1, "very high": 4} | {
    "fast": 1,
    "slow": 3,
    "low": 1,
}


def documented(sft: str, dpo: str, rlhf: str) -> Words:
    return {"sft": sft, "dpo": dpo, "rlhf": rlhf}


@dataclass(frozen=True)
class Figure:
    """A row: its name and unit, where compare.json has it, and the documentation's words for the methods, if it ranks them."""

    name: str
    unit: str
    key: str
    says: Words | None = None
    of_run: Callable[[Mapping[str, Any]], float | None] | None = None  # a value of each run, not a figure of the method


def of_run(key: str, unit: float = 1.0) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda run: None if run[key] is None else run[key] / unit


FIGURES = (
    Figure("own config keys", "keys", "keys", documented("simple", "medium", "high")),
    Figure("ended healthy", "share of seeds", "healthy", documented("very stable", "stable", "less stable")),
    Figure("log-prob accuracy", "share of pairs", "logp_accuracy", documented("high", "very high", "very high")),
    Figure(
        *("log-prob accuracy by length", "share of pairs", "normalized_logp_accuracy"),
        documented("high", "very high", "very high"),
    ),
    Figure("gain over the base", "share of pairs", "gain"),
    Figure("wins, reward model", "share of prompts", "win_rate", documented("high", "very high", "very high")),
    Figure("KL", "nats a token", "kl_token"),
    Figure("KL", "nats an answer", "kl_sequence"),
    Figure("tokens an answer", "tokens", "answer_tokens"),
    Figure("training", "seconds", "seconds", documented("fast", "medium", "slow"), of_run("seconds")),
    Figure("trained on", "thousand tokens", "tokens", None, of_run("tokens", 1000.0)),
    Figure("peak memory", "GB", "peak_memory_gb", documented("low", "medium", "high"), of_run("peak_memory_gb")),
)


def compared(small: bool) -> dict[str, Any]:
    """What `dpo compare` says; a benchmark measures again, so that no run of an earlier call is in it."""
    words = [str(Path(sys.executable).with_name("dpo")), "compare", CONFIG, "--overwrite", "--json", *(SMALL if small else ())]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:
        raise SystemExit(f"dpo compare ended with {done.returncode}")
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def cell(figure: Figure, method: Method) -> list[float] | None:
    """The figure of a method with its interval, or with its least and its most over the seeds."""
    if figure.of_run is not None:
        values = [value for run in method["runs"] if (value := figure.of_run(run)) is not None]
        return [sum(values) / len(values), min(values), max(values)] if values else None
    if figure.key in ("keys", "healthy"):
        value = len(method["config"]) if figure.key == "keys" else method["healthy"]
        return [value] * 3
    return cell_of(method["figures"].get(figure.key))


def reading(figure: Figure, cells: Mapping[str, list[float] | None], tests: list[Mapping[str, Any]]) -> str:
    """Which ranks of the documentation the figures show."""
    if figure.says is None:
        return ""
    named = [name for name in figure.says if cells.get(name) is not None]
    return "; ".join(_ranked(figure, one, other, cells, tests) for one, other in combinations(named, 2))


def _ranked(
    figure: Figure, one: str, other: str, cells: Mapping[str, list[float] | None], tests: list[Mapping[str, Any]]
) -> str:
    assert figure.says is not None
    expected = _sign(RANKS[figure.says[one]] - RANKS[figure.says[other]])
    test = next((t for t in tests if t["figure"] == figure.key and {t["first"], t["second"]} == {one, other}), None)
    if test is not None:
        found = {"better": 1, "worse": -1}.get(test["result"], 0) * (1 if test["first"] == one else -1)
    else:
        (_, low, high), (_, least, most) = cells[one] or [0.0] * 3, cells[other] or [0.0] * 3
        found = 1 if low > most else -1 if high < least else 0
    signs = {1: ">", 0: "=", -1: "<"}
    shown = f"{one} {signs[found]} {other}"
    return f"{shown}, as documented" if found == expected else f"{shown}, documented {one} {signs[expected]} {other}"


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def measure(table: Table, options: argparse.Namespace) -> int:
    made = compared(options.small)
    methods = {method["name"]: method for method in made["methods"]}
    for figure in FIGURES:
        cells = {name: cell(figure, method) for name, method in methods.items()}
        if any(cells.values()):
            says = figure.says or {}
            words = ", ".join(f"{name} {says[name]}" for name in METHODS if name in says)
            own = [cells.get(name) for name in METHODS]
            base = cell_of(made["base"].get(figure.key))
            table.add(figure.name, figure.unit, base, *own, words, reading(figure, cells, made["tests"]))
    for test in made["tests"]:
        table.note(f"{test['sentence']}.")
    counts = [(Column(name, name, tolerance=EXACT), made[name]) for name in ("pairs", "prompts")]
    seeds = (Column("seeds", "seeds", tolerance=EXACT), len(made["seeds"]))
    table.note(
        "{pairs} held-out pairs of {prompts} prompts, {seeds} seeds. In brackets: 95 % intervals over seeds and prompts; for "
        "seconds, tokens and memory the least and the most of the seeds.",
        *counts,
        seeds,
    )
    return int(any(run["status"] == "failed" for method in made["methods"] for run in method["runs"]))


if __name__ == "__main__":
    sys.exit(baseline.main("compare", COLUMNS, measure))
