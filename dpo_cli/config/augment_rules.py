"""Rules between the parts of the option `augment`, written like those of rules.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dpo_cli.config.ranking_rules import address_problems, rank_problems
from dpo_cli.config.schema import Values, inner_defaults
from dpo_cli.errors import Problem

RANK_FIX = 'write for example "augment": {"rank": "shorter"}; docs/guides/augmentation.md lists all ranks'


def _augment(values: Values, given: Values) -> Values | None:
    """The parts of `augment` with their defaults, None where it is not used."""
    return {**inner_defaults("augment"), **values["augment"]} if "augment" in given and "augment" in values else None


def rank_has_its_parts(values: Values, given: Values) -> Iterator[Problem]:
    if (augment := _augment(values, given)) is None:
        return
    yield from rank_problems(augment, values["augment"].keys(), "augment")
    yield from address_problems(augment["answers_url"], "answers_url", "answers-url", "augment")


def a_server_has_a_model(values: Values, given: Values) -> Iterator[Problem]:
    augment = _augment(values, given)
    if augment and augment["answers_url"] and not augment["answers_model"]:
        message, fix = '"augment": answers_url needs answers_model', 'add "answers_model": "...", as the server names it'
        yield Problem("error", "answers-model", message, fix, "augment")
    if augment and augment["answers_model"] and not augment["answers_url"]:
        message = '"augment": answers_model needs answers_url'
        fix = 'add "answers_url": "http://localhost:8000/v1", the address of the server, or remove answers_model'
        yield Problem("error", "answers-model", message, fix, "augment")


def answers_make_pairs(values: Values, given: Values) -> Iterator[Problem]:
    if (augment := _augment(values, given)) is None:
        return
    responses, pairs, longest = augment["responses"], augment["pairs_per_prompt"], values.get("max_seq_length")
    if pairs > math.comb(responses, 2):
        message = f'"augment": {responses} responses make {math.comb(responses, 2)} pairs, not {pairs}'
        yield Problem(
            "error", "too-few-responses", message, f'raise "responses", or lower "pairs_per_prompt" {pairs}', "augment"
        )
    if longest is not None and augment["max_new_tokens"] >= longest:
        message = (
            f'"augment": max_new_tokens {augment["max_new_tokens"]} leaves no room for a prompt in max_seq_length {longest}'
        )
        yield Problem("error", "augment-too-long", message, 'raise "max_seq_length", or lower "max_new_tokens"', "augment")


def rounds_sample_and_rank(values: Values, given: Values) -> Iterator[Problem]:
    if not values.get("rounds") or "augment" not in values:
        return
    augment = {**inner_defaults("augment"), **values["augment"]}
    if augment["rank"] is None:
        message = '"rounds" ranks the answers of each round, but "augment" has no "rank"'
        yield Problem("error", "rank-missing", message, RANK_FIX, "rounds")
    if augment["answers_url"]:
        message = '"rounds" samples the answers of the model that it trains, but "augment" names a server for them'
        fix = 'write "answers_url": null, "answers_model": null in "augment"'
        yield Problem("error", "rounds-served", message, fix, "augment")


RULES = (
    rounds_sample_and_rank,
    rank_has_its_parts,
    a_server_has_a_model,
    answers_make_pairs,
)
