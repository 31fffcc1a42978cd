"""The arithmetic of a training on many cards: all inputs in one place, and formulas as functions of numbers. No torch.

`collectives.py` and `scaling.py` make their tables from it. Bytes are decimal (1 MB is 10^6), as links are rated. A process
has one card and the whole base model; once per optimizer step the gradients of the adapter are summed over all processes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_cli.hardware.memory_inputs import Settings
from dpo_cli.hardware.weights import block_bytes
from dpo_cli.models.shape import ModelFacts, known_models


@dataclass(frozen=True)
class Link:
    """What joins two neighbours of a ring: bytes per second in one direction, and seconds until a message arrives."""

    name: str
    rate: float
    latency: float
    source: str = ""  # of the rate, in Markdown


H100 = "[H100](https://glennklockwood.com/garden/processors/h100) by G. Lockwood, after NVIDIA's papers"
PCIE = "[PCI Express bus](https://hpc-notes.pages.dev/reference/pcie), after the specifications"
PORT = "[ConnectX-7](https://docs.nvidia.com/networking/display/ConnectX7VPI/Introduction) by NVIDIA; one port per machine"
TUNING = "https://github.com/NVIDIA/nccl/blob/01afd20a77b5804e0ecf1042509dd9d20ebf9e93/src/graph/tuning.cc"

# Inputs.
GBIT = 1e9 / 8
SLOT = 16 / 8 * 128 / 130  # bytes of data per transfer: 16 lanes of a bit each, of which 128 in 130 are data
NVLINK_S, PCIE_S, NETWORK_S = 3.4e-6, 5.7e-6, 9.6e-6  # latencies of a ring (hwLat in NCCL's table)
IN_A_MACHINE = (
    Link("NVLink 4", 900e9 / 2, NVLINK_S, f"{H100}; half of the rate of both directions"),
    Link("PCIe 5.0", 32e9 * SLOT, PCIE_S, f"{PCIE}; 16 lanes of 32 GT/s"),
    Link("PCIe 4.0", 16e9 * SLOT, PCIE_S, f"{PCIE}; 16 lanes of 16 GT/s"),
)
BETWEEN_MACHINES = (
    Link("NDR 400 Gb/s", 400 * GBIT, NETWORK_S, PORT),
    Link("100 GbE", 100 * GBIT, NETWORK_S, PORT),
    Link("25 GbE", 25 * GBIT, NETWORK_S, PORT),
)
LINKS = (*IN_A_MACHINE, *BETWEEN_MACHINES)
CARDS_OF_A_MACHINE = 8
CARDS = (8, 64, 512)
PEAK = 989.4e12  # floating-point operations per second: H100 SXM, bf16, dense
SHARE = 0.4  # of the peak that a step reaches: an assumption
PRICE = 2.5  # of a card for an hour: an example
MODELS = {"8B": "meta-llama/Llama-3.1-8B-Instruct", "70B": "meta-llama/Llama-3.1-70B-Instruct"}
RANKS = (16, 64)
FLOAT32, BF16 = 4, 2  # bytes
FIGURES = 64  # bytes of the figures of a pair, which are gathered once per step


def inputs() -> str:
    """The table of the inputs in docs/explanation/scaling.md."""
    rows = [(link.name, f"{link.rate / 1e9:.4g} GB/s", link.source) for link in LINKS]
    latencies = ", ".join(f"{seconds * 1e6:.1f}" for seconds in (NVLINK_S, PCIE_S, NETWORK_S))
    rows.append(("latency of NVLink, PCIe, network", f"{latencies} µs", f"[NCCL's table]({TUNING}) for rings"))
    rows.append(("peak of a card, bf16, dense", f"{PEAK / 1e12:,.1f} TFLOP/s", H100))
    rows.append(("share of the peak", f"{SHARE:.0%}", "an assumption: `make gpu` measures a card, as the share of the floor"))
    rows.append(("price of a card and hour", f"{PRICE:.2f}", "an example in any currency, not an offer"))
    rows.append(("bytes of the figures of a pair", f"{FIGURES}", "an assumption"))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [("input", "value", "source"), ("---",) * 3, *rows])


def facts(name: str) -> ModelFacts:
    """The shape of "8B" or "70B"."""
    return known_models()[MODELS[name]]


def ring_all_reduce(size: float, cards: int, link: Link) -> float:
    """Seconds to sum `size` bytes over a ring: a reduce-scatter and an all-gather of n - 1 rounds each, of 1/n of the bytes.

    2 (n - 1) / n * size / rate + 2 (n - 1) * latency (Patarasuk and Yuan 2009, who show that no algorithm sends less).
    """
    return 2 * ring_all_gather(size, cards, link)


def ring_all_gather(size: float, cards: int, link: Link) -> float:
    """Seconds until each card has all `size` bytes, of which it has 1/n: (n - 1) / n * size / rate + (n - 1) * latency."""
    return (cards - 1) / cards * size / link.rate + (cards - 1) * link.latency


def gradient_bytes(model: ModelFacts, rank: int) -> int:
    """Bytes of the gradients of an adapter on all linear layers, in float32: rank * (inputs + outputs) of each layer."""
    return FLOAT32 * rank * model.num_hidden_layers * sum(linear.inputs + linear.outputs for linear in model.linears)


def base_bytes(model: ModelFacts) -> float:
    """Bytes of the blocks of the base model in bf16, which fsdp divides; embeddings and head stay whole."""
    return block_bytes(model, Settings(batch=1, length=1, rank=1, bytes_per_value=BF16, checkpointing=True))


def tokens_that_hide(link: Link, rate: float) -> float:
    """Tokens of a micro-batch whose computation takes as long as the two gathers of a sharded bf16 base, on many cards.

    A weight is 2 bytes, gathered twice, and takes 2 operations per token forward and 2 backward: 4 / link = 4 tokens / rate.
    """
    return rate / link.rate


def link_between(cards: int, slow: bool) -> Link:
    """The fastest or the slowest link of the tables that joins so many cards."""
    links = IN_A_MACHINE if cards <= CARDS_OF_A_MACHINE else BETWEEN_MACHINES
    return links[-1 if slow else 0]


def longest_first(costs: Sequence[float], cards: int) -> list[float]:
    """The load of each card, when the most expensive pair goes first and each one to the card with the least (Graham 1969)."""
    loads = [0.0] * cards
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(loads, loads[0] + cost)
    return loads


@dataclass(frozen=True)
class Step:
    """The seconds of an optimizer step."""

    mean: float  # computing, if all cards had the same load
    longest: float  # computing, of the card with the most
    sums: float  # the all-reduce of the gradients, and the gather of the figures

    @property
    def balance(self) -> float:
        """The mean load as a share of the longest."""
        return self.mean / self.longest

    @property
    def efficiency(self) -> float:
        """The share of the step in which the cards compute. Nothing is overlapped: the sum waits for the last gradient."""
        return self.mean / (self.longest + self.sums)


def step_of(operations: Sequence[float], cards: int, rate: float, gradients: float, link: Link) -> Step:
    """The step of pairs with these operations, on cards that compute `rate` operations per second."""
    loads = longest_first(operations, cards)
    sums = ring_all_reduce(gradients, cards, link) + ring_all_gather(FIGURES * len(operations), cards, link)
    return Step(sum(loads) / cards / rate, max(loads) / rate, sums)


def hours(seconds_of_a_step: float, pairs_of_a_step: int, pairs: int) -> float:
    """Hours for one pass over `pairs`."""
    return seconds_of_a_step * pairs / pairs_of_a_step / 3600


def cost(hours_of_all: float, cards: int, price: float) -> float:
    """What all cards cost for so many hours."""
    return hours_of_all * cards * price
