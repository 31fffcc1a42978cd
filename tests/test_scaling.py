"""The arithmetic of many cards (benchmarks/cluster.py), on numbers worked by hand."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import cluster
import collectives
import floor
import scaling
from baseline import BASELINES, Baseline, Table, compare
from cluster import Link

from dpo_cli.models.shape import ModelFacts

LINK = Link("1 GB/s", 1e9, 10e-6)
# q and o are 8 x 8, k and v 8 x 4, gate, up and down 8 x 12: inputs and outputs are 2 * 16 + 2 * 12 + 3 * 20 = 116
TINY = ModelFacts(
    hidden_size=8,
    num_hidden_layers=2,
    intermediate_size=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    vocab_size=10,
    tie_word_embeddings=False,
)


def test_the_ring_by_hand() -> None:
    """8 MB on 4 cards: 3 rounds of 2 MB, each 2 ms and 10 microseconds; an all-reduce has twice as many."""
    assert cluster.ring_all_gather(8e6, 4, LINK) == pytest.approx(6.03e-3)
    assert cluster.ring_all_reduce(8e6, 4, LINK) == pytest.approx(12.06e-3)
    assert cluster.ring_all_reduce(8e6, 1, LINK) == 0


def test_the_bytes_of_a_model_by_hand() -> None:
    assert cluster.gradient_bytes(TINY, rank=3) == 4 * 3 * 2 * 116
    # 2 * (64 + 32 + 32 + 64 + 3 * 96) weights of layers, and 5 norms of 8; embedding and head, 2 * 80, stay whole
    assert cluster.base_bytes(TINY) == 2 * (960 + 40)


@pytest.mark.parametrize(("name", "weights"), [("8B", 41_943_040), ("70B", 207_093_760)])
def test_the_weights_of_a_rank_16_adapter(name: str, weights: int) -> None:
    """8B: 32 layers of 16 * (2 * 8192 + 2 * 5120 + 3 * 18432); 70B: 80 of 16 * (2 * 16384 + 2 * 9216 + 3 * 36864)."""
    model = cluster.facts(name)
    assert cluster.gradient_bytes(model, 16) == 4 * weights
    assert floor.Model.of(asdict(model), 16).lora == weights


def test_the_rates_of_links() -> None:
    rates = {link.name: link.rate / 1e9 for link in cluster.LINKS}
    assert rates["PCIe 4.0"] == pytest.approx(31.5, abs=0.01) and rates["PCIe 5.0"] == pytest.approx(63, abs=0.02)
    assert rates["NDR 400 Gb/s"] == 50 and rates["25 GbE"] == 3.125
    assert [cluster.link_between(cards, slow=False).name for cards in cluster.CARDS] == ["NVLink 4", *["NDR 400 Gb/s"] * 2]
    assert [cluster.link_between(cards, slow=True).name for cards in cluster.CARDS] == ["PCIe 4.0", *["25 GbE"] * 2]


def test_pairs_are_shared_out_longest_first() -> None:
    """5 to one card, 4 to the other, then 3, 3, 3 to the one with less each time: 4 + 3, 5 + 3, 7 + 3."""
    assert sorted(cluster.longest_first([3, 5, 3, 4, 3], 2)) == [8, 10]
    assert sorted(cluster.longest_first([2, 1], 3)) == [0, 1, 2]


def test_a_step_by_hand() -> None:
    """6 to one card, 4 and 2 to the other, at 2 per second: 3 s each. 2000 bytes take 2 s, the figures 0.096."""
    step = cluster.step_of([6, 4, 2], 2, rate=2, gradients=2000, link=Link("slow", 1000, 0))
    assert (step.mean, step.longest, step.balance) == (3, 3, 1)
    assert step.sums == pytest.approx(2.096) and step.efficiency == pytest.approx(3 / 5.096)
    uneven = cluster.step_of([6, 2], 2, rate=2, gradients=0, link=Link("fast", 1e30, 0))
    assert uneven.balance == pytest.approx(2 / 3) and uneven.efficiency == pytest.approx(2 / 3)


def test_hours_and_cost_by_hand() -> None:
    """3600 steps of 2 seconds are 2 hours; 8 cards at 3 an hour cost 48."""
    assert cluster.hours(2, 10, 36_000) == 2
    assert cluster.cost(2, cards=8, price=3) == 48


def test_the_tokens_that_hide_the_gathers() -> None:
    """At that many tokens two gathers of the base last as long as its products, when there are many cards."""
    rate, link = 400e12, Link("NDR", 50e9, 0)
    tokens = cluster.tokens_that_hide(link, rate)
    assert tokens == 8000
    weights = 7e9
    gathers = 2 * cluster.ring_all_gather(2 * weights, 100_000, link)
    assert gathers == pytest.approx(4 * weights * tokens / rate, rel=1e-4)


def test_a_link_is_fitted_to_two_measurements() -> None:
    sizes = (1000, 8_000_000)
    one, other = ((size, cluster.ring_all_reduce(size, 2, LINK)) for size in sizes)
    fitted = collectives.fitted(one, other)
    assert (fitted.rate, fitted.latency) == pytest.approx((1e9, 10e-6))


def test_the_kept_bytes_and_times_are_those_of_the_formulas() -> None:
    """So the page is not of other inputs than the code."""
    kept = Baseline.read(BASELINES / "collectives.json").table
    kept.notes.pop()  # measured with gloo
    made = Table(collectives.COLUMNS)
    collectives.predict(made, cluster.SHARE)
    assert compare(kept, made) == []


@pytest.mark.long
@pytest.mark.skipif(not scaling.SHARED.is_dir(), reason=f"{scaling.SHARED} is not there")
def test_the_kept_steps_are_those_of_the_formulas() -> None:
    made = Table(scaling.COLUMNS)
    options = {"rank": max(cluster.RANKS), "share": cluster.SHARE, "price": cluster.PRICE, "pairs": scaling.PAIRS}
    scaling.measure(made, Namespace(**options, small=False))
    assert compare(Baseline.read(BASELINES / "scaling.json").table, made) == []


@pytest.mark.long
def test_two_processes_sum_with_gloo() -> None:
    seconds = collectives.gloo_seconds([4096, 2**20], rounds=2)
    assert len(seconds) == 2 and min(seconds) > 0
