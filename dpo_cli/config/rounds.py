"""The configs of the rounds of iterative DPO: each is a plain dpo config, which starts from the run of the round before.

The policy of a round answers the training prompts, and the round trains on pairs of these answers (arXiv:2312.16682,
arXiv:2401.10020). Round 1 starts with the model as it is: it does not train on the given pairs, whose prompts it answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dpo_cli.config.config import Loaded, Source
from dpo_cli.config.schema import inner_defaults, options
from dpo_cli.config.stages import default_folder, run_of_round

SEEDS = 1 << 32  # as many as the option `seed` has
FIRST = "first"  # the reference of every round is the model before round 1


def rounds_of(loaded: Loaded) -> list[Loaded]:
    """The rounds of a config; one without rounds, or that is not valid, is returned as it is."""
    config = loaded.config
    if config is None or not config.rounds or config.strategy not in options()["rounds"].strategies:
        return [loaded]
    folder = config.output_dir or str(default_folder(loaded.file))
    rounds: list[Loaded] = []
    for number in range(1, config.rounds + 1):
        values: dict[str, object] = {"rounds": None, "output_dir": run_of_round(folder, number)}
        if number > 1:
            values["model_name"] = run_of_round(folder, number - 1)
        elif config.reference == FIRST:
            values["reference"] = "base"  # an adapter is merged, so that the model before round 1 is one without an adapter
        foundation = loaded.foundation if number == 1 else loaded.foundation or config.model_name
        before = rounds[-1] if rounds else loaded.before
        place = replace(loaded, round=number, rounds=config.rounds, foundation=foundation, before=before)
        rounds.append(_with(place, values))
    return rounds


def on_pairs(loaded: Loaded, pairs: Path, held_out: Path | None, note: str) -> Loaded:
    """A round as it trains: on its own pairs, judged on the held-out pairs of all rounds. `note` is kept in its plan."""
    values = {"dataset": str(pairs), "eval_dataset": held_out and str(held_out), "eval_split": 0.0, "columns": None}
    return replace(_with(loaded, values), notes=(note,))


def _with(loaded: Loaded, values: Mapping[str, object]) -> Loaded:
    """The config with other values, as if they were written in it."""
    sources: dict[str, Source] = {**loaded.sources, **dict.fromkeys(values, "config")}
    return replace(loaded, values={**loaded.values, **values}, sources=sources, config=loaded.require().replaced(values))


def sampling_seed(seed: int, number: int) -> int:
    """The seed of the samples of a round: each round has other draws, and those of round 1 are the ones of `dpo augment`."""
    return (seed + number - 1) % SEEDS


def notes_of(loaded: Loaded) -> list[str]:
    """What the rounds of a valid config do, in a sentence, and the notes of a round."""
    config, notes = loaded.require(), [*loaded.notes]
    if not config.rounds or config.strategy not in options()["rounds"].strategies:
        return notes
    augment = {**inner_defaults("augment"), **config.augment}
    reference = "the model before round 1" if config.reference == FIRST else "the policy of the round before"
    words = (
        f"{config.rounds} rounds: in each the policy gives {augment['responses']} answers to every training prompt, "
        f'and trains on pairs of them that the rank "{augment["rank"]}" makes; the reference of a round is {reference}'
    )
    return [words, *notes]
