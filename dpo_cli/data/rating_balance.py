"""Findings about how many answers of a set are rated good, and how many bad."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from dpo_cli.data.ratings import BAD, GOOD
from dpo_cli.errors import Problem

# desirable_weight * n_good / (undesirable_weight * n_bad): arXiv:2402.01306, equation 8.
LEAST, MOST = 1.0, 4 / 3
REPORTED = 3 / 4  # a little fewer good answers than bad ones are not reported
NEVER_FAR = 0.01  # of a bound: weights that are written with few digits


def one_rating(counts: Mapping[bool, int], which: str, key: str) -> Iterator[Problem]:
    """An error for a set whose answers all have the same rating; `counts` are of good (true) and of bad answers."""
    if not counts[True] + counts[False] or (counts[True] and counts[False]):
        return
    there, missing = (GOOD, BAD) if counts[True] else (BAD, GOOD)
    message = f"all {counts[True] + counts[False]} answers {which} are rated {there}: there is nothing to tell them from"
    advice = {"dataset": "; to train on good answers alone, use strategy sft" if counts[True] else "", "eval_split": ", or "}
    fix = f"add answers that are rated {missing}{advice.get(key, '')}"
    fix += "another eval_split or split_seed" if key == "eval_split" else ""
    yield Problem("error", "one-rating", message, fix, key)


def unbalanced(counts: Mapping[bool, int], desirable: float, undesirable: float) -> Iterator[Problem]:
    """A warning where the weights do not balance good and bad answers, with the weight that does."""
    good, bad = counts[True], counts[False]
    if not good or not bad or REPORTED - NEVER_FAR <= desirable * good / (undesirable * bad) <= MOST + NEVER_FAR:
        return
    middle = math.sqrt(LEAST * MOST)
    # The smaller group gets the larger weight, so that the other one keeps its own.
    if good > bad:
        name, low, high, value = "undesirable_weight", good / bad / MOST, good / bad / LEAST, good / bad / middle
    else:
        name, low, high, value = "desirable_weight", bad / good * LEAST, bad / good * MOST, bad / good * middle
    other = "desirable_weight" if good > bad else "undesirable_weight"
    message = f"{good} answers are rated good and {bad} bad, and desirable_weight {desirable:g} with undesirable_weight "
    message += f"{undesirable:g} does not balance them: the larger group decides what is learned"
    fix = f'write "{name}": {value:.3g} (from {low:.3g} to {high:.3g}), with {other} at 1'
    yield Problem("warning", "ratings-unbalanced", message, fix, name)
