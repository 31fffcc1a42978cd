"""A simulated optimizer step of 8B and 70B on 8, 64 and 512 cards: balance, efficiency, hours and cost, from cluster.py.

python benchmarks/scaling.py [--rank R] [--share S] [--price P] [--pairs N ...]

Nothing here runs on a card. The pairs of a step are drawn from the token counts of real preference data, and shared out longest
first; the time of a pair is its floating-point operations at a share of the card's peak.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import baseline
import cluster
import floor
from baseline import Column, Table

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))

from dpo_cli.data.dataset import read  # noqa: E402
from dpo_cli.data.tokens import encode_all  # noqa: E402
from dpo_cli.models.model_files import ModelFiles  # noqa: E402
from dpo_cli.models.tokenizer_files import tokenizer_of  # noqa: E402
from dpo_cli.providers.model_cache import dequantised  # noqa: E402

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTHS = {  # the first that is there gives the pairs of the steps; the others only their balance
    "UltraFeedback": SHARED / "ultrafeedback_1k.train.jsonl",
    "TruthfulQA": SHARED / "truthfulqa.train.jsonl",
    "Orca with system prompts": SHARED / "orca_system_prompts.original.jsonl",
    "the sample data of this repository": ROOT / "data-samples" / "assistant-preferences.jsonl",
}
MAX_TOKENS = 2048  # of a sequence, as in configs/high-end.json
PAIRS = (128, 1024, 4096)  # of a step
STEPS = 20  # simulated steps of a row
PASS = 100_000  # pairs of one pass
COMPARED = (64, 8)  # cards, and pairs of each: for the balance of other data

FORMULA = (1e-4, 0.0)  # a later table differs only where an input, a formula or the data does
COLUMNS = (
    Column("model"),
    Column("cards"),
    Column("pairs of a step", shown="{:,}"),
    Column("computing, mean load", "s", "{:.2f}", FORMULA),
    Column("longest load", "s", "{:.2f}", FORMULA),
    Column("balance", "share", "{:.0%}", FORMULA),
    Column("sums on the fastest and the slowest link", "ms", "{:,.0f}, {:,.0f}", FORMULA),
    Column("efficiency on them", "share", "{:.0%}, {:.0%}", FORMULA),
    Column(f"{PASS:,} pairs", "minutes", "{:,.1f} min, {:,.1f} min", FORMULA),
    Column("example cost", "example price", "{:,.0f}, {:,.0f}", FORMULA),
)
INPUTS = (
    "Inputs: rank {rank}, {share} of the peak ({peak}), and an example price of {price} per card and hour, not an offer. "
    "Pairs: {median} tokens in the median, {longest} in the longest. {steps} simulated steps of each row."
)


def steps_of(options: argparse.Namespace) -> int:
    """How many steps of a row are simulated."""
    return 2 if options.small else STEPS


def token_counts(file: Path) -> list[floor.Pair]:
    """The tokens of each pair of a file, with the demo model's tokenizer."""
    tokenizer = tokenizer_of(ModelFiles(dequantised(ModelFiles(MODEL))))
    assert tokenizer is not None
    (encoded,) = encode_all([read(str(file), skip=True).load()], tokenizer, "auto", MAX_TOKENS, skip=True).sides
    return [floor.Pair(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in encoded]


def operations(name: str, rank: int, pair: floor.Pair) -> float:
    """Floating-point operations of a pair in a step, its reference pass included."""
    return floor.operations(floor.Model.of(asdict(cluster.facts(name)), rank), [pair], epochs=1)


def simulated(
    name: str, cards: int, pairs: int, lengths: list[floor.Pair], options: argparse.Namespace, slow: bool
) -> cluster.Step:
    """The mean step: pairs drawn from `lengths`, the same ones for each link."""
    costs = [operations(name, options.rank, pair) for pair in lengths]
    gradients = cluster.gradient_bytes(cluster.facts(name), options.rank)
    link, rate, draw = cluster.link_between(cards, slow), options.share * cluster.PEAK, random.Random(pairs)
    drawn = [draw.choices(costs, k=pairs) for _ in range(steps_of(options))]
    steps = [cluster.step_of(each, cards, rate, gradients, link) for each in drawn]
    return cluster.Step(*(statistics.fmean(getattr(step, part) for step in steps) for part in ("mean", "longest", "sums")))


def add(table: Table, name: str, cards: int, pairs: int, lengths: list[floor.Pair], options: argparse.Namespace) -> None:
    both = [simulated(name, cards, pairs, lengths, options, slow) for slow in (False, True)]
    hours = [cluster.hours(step.longest + step.sums, pairs, PASS) for step in both]
    table.add(
        name,
        cards,
        pairs,
        both[0].mean,
        both[0].longest,
        both[0].balance,
        [step.sums * 1e3 for step in both],
        [step.efficiency for step in both],
        [each * 60 for each in hours],
        [cluster.cost(each, cards, options.price) for each in hours],
    )


def note_balance(table: Table, options: argparse.Namespace) -> None:
    """How equal the loads are with other data."""
    cards, each = COMPARED
    there = [name for name, file in LENGTHS.items() if file.exists()]
    shares = [simulated("8B", cards, cards * each, token_counts(LENGTHS[name]), options, slow=False).balance for name in there]
    columns = [Column(name, "share", "{:.0%}", FORMULA) for name in there]
    text = f"Balance of {each} pairs a card on {cards} cards: " + ", ".join(f"{name} {{{name}}}" for name in there) + "."
    table.note(text, *zip(columns, shares, strict=True))


def measure(table: Table, options: argparse.Namespace) -> None:
    source = next(name for name, file in LENGTHS.items() if file.exists())
    lengths = token_counts(LENGTHS[source])
    for name in cluster.MODELS:
        for cards in cluster.CARDS:
            for pairs in options.pairs[:1] if options.small else options.pairs:
                add(table, name, cards, pairs, lengths, options)
    table.note(
        INPUTS,
        (Column("rank", "rank", "{}", FORMULA), options.rank),
        (Column("share", "share", "{:.0%}", FORMULA), options.share),
        (Column("peak", "TFLOP/s", "{:.1f} TFLOP/s", FORMULA), cluster.PEAK / 1e12),
        (Column("price", "example price", "{:.2f}", FORMULA), options.price),
        (Column("median", "tokens", "{:.0f}", FORMULA), statistics.median(pair.tokens for pair in lengths)),
        (Column("longest", "tokens", "{:,}", FORMULA), max(pair.tokens for pair in lengths)),
        (Column("steps", "steps", "{}", FORMULA), steps_of(options)),
    )
    note_balance(table, options)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--rank", type=int, default=max(cluster.RANKS), help="of the adapter, on all linear layers")
    made.add_argument("--share", type=float, default=cluster.SHARE, help="of the peak that a step reaches")
    made.add_argument("--price", type=float, default=cluster.PRICE, help="of a card for an hour")
    made.add_argument("--pairs", type=int, nargs="+", default=list(PAIRS), help="pairs of a step")
    return made


if __name__ == "__main__":
    sys.exit(baseline.main("scaling", COLUMNS, measure, parser()))
