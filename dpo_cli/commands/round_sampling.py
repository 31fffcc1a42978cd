"""A round of iterative DPO before its training: its policy answers the training prompts, and the answers become pairs.

A round has these files in its run directory, in addition to those of every run:

pairs.jsonl      its pairs with their provenance, as `dpo augment` writes them
held-out.jsonl   the held-out pairs of the config's dataset: the same bytes in every round
sampled.json     what was asked and what was sampled; it is there when the pairs are complete
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_cli.config.config import Loaded
from dpo_cli.config.rounds import on_pairs, sampling_seed
from dpo_cli.config.schema import inner_defaults, names_where
from dpo_cli.data.messages import flat
from dpo_cli.data.prompts import Prompts
from dpo_cli.data.rows import Pair, Question
from dpo_cli.errors import NoPairs, invalid
from dpo_cli.plan.plan import Plan
from dpo_cli.plan.preflight import Inspection
from dpo_cli.results.codec import JsonObject, from_json
from dpo_cli.results.intervals import Interval
from dpo_cli.runs.resume import RESTART_FIX, resumable
from dpo_cli.storage.digests import sha256
from dpo_cli.storage.jsonio import json_text
from dpo_cli.storage.redaction import redacted
from dpo_cli.storage.resumable_file import ResumableFile, require_same
from dpo_cli.storage.run_directory import HELD_OUT, PAIRS, SAMPLED, UNFINISHED, RunDirectory
from dpo_cli.strategies.figures import number
from dpo_cli.ui.console import Console


@dataclass(frozen=True)
class Round:
    """A round with its pairs: the config that trains on them, and the content of its sampled.json."""

    loaded: Loaded
    sampled: JsonObject


def require_unused(path: Path, may_exist: bool) -> None:
    """Refuse the run directory of a round whose sampling has started, unless it is replaced or resumed."""
    if not may_exist and RunDirectory(path).has(PAIRS):
        fix = "continue it with --resume, replace it with --overwrite, or choose another folder with output_dir=..."
        raise invalid("run-exists", f"{path} {UNFINISHED}", fix, "output_dir")


def known(loaded: Loaded, path: Path) -> Round | None:
    """A round in this run directory, if its pairs are complete."""
    run = RunDirectory(path)
    return _round(loaded, run) if run.has(SAMPLED) else None


def sample(loaded: Loaded, inspection: Inspection, console: Console, overwrite: bool) -> Round:
    """Make the pairs of a round, continue them, or read them if they are complete.

    `inspection` is that of the config with its own dataset, and with the model of this round. `NoPairs` if no two answers to a
    prompt differ for the rank.
    """
    data, plan = inspection.require()
    rows = [*data.rows(plan.config)]
    data.require_unchanged()
    held_out = [row for is_held_out, row in rows if is_held_out and isinstance(row, Pair)]
    prompts = _prompts([row for is_held_out, row in rows if not is_held_out], {row.prompt_key for row in held_out}, console)
    assert loaded.round is not None
    seed = sampling_seed(plan.config.seed, loaded.round)
    plan = replace(plan, config=plan.config.replaced({"seed": seed}))
    with RunDirectory.claim(plan.run_dir, overwrite, resume=True) as run, resumable():
        if overwrite:
            ResumableFile.remove(run.path / PAIRS)
            for name in (SAMPLED, HELD_OUT):
                (run.path / name).unlink(missing_ok=True)
        _write_held_out(run, held_out, loaded)
        asked = _asked(plan, prompts)
        if not run.has(SAMPLED):
            _sample(loaded, plan, prompts, run, asked, console)
        require_same(run.path / PAIRS, run.read_json(SAMPLED)["asked"], asked, RESTART_FIX)
        ResumableFile.remove_marks(run.path / PAIRS)  # of a stop between the last two writes
    sampled = _round(loaded, run)
    console.line(sampled.loaded.notes[0])
    if not sampled.sampled["pairs"]:
        message = f"{loaded.part} has no pair to train on: no two answers to a prompt have scores that differ enough"
        fix = 'raise "responses" or "temperature" in "augment", lower its "min_distance", or ask for fewer rounds'
        raise NoPairs(message, fix)
    return sampled


def _sample(loaded: Loaded, plan: Plan, prompts: Prompts, run: RunDirectory, asked: JsonObject, console: Console) -> None:
    from dpo_cli.commands.augment import augment  # late, because it imports torch
    from dpo_cli.providers.out_of_memory import free_memory

    about = {"round": loaded.round, "rounds": loaded.rounds, "seed": plan.config.seed, "asked": asked}

    def keep(totals: JsonObject) -> None:
        own = {name: value for name, value in totals.items() if name not in ("out", "resumed")}
        run.write_json(SAMPLED, {**about, **own, "sha256": sha256(run.path / PAIRS)})

    console.line(f"{loaded.part}: {plan.model_label} answers {len(prompts.questions)} prompts")
    augment(plan, prompts, run.path / PAIRS, console, {"round": loaded.round}, keep)
    free_memory()  # the training of the round loads the model again


def _round(loaded: Loaded, run: RunDirectory) -> Round:
    """The round whose pairs are complete; `InvalidInput` if they have changed since."""
    sampled, pairs, held_out = run.read_json(SAMPLED), run.path / PAIRS, run.path / HELD_OUT
    if not pairs.is_file() or sha256(pairs) != sampled["sha256"]:
        raise invalid("out-changed", f"{pairs} has changed since it was written", "restore it, or restart with --overwrite")
    score = score_of(sampled)
    words = f"; the mean score of an answer is {number(score)}" if score is not None else ""
    note = (
        f"round {sampled['round']} of {sampled['rounds']}: {sampled['pairs']} pairs of answers to {sampled['prompts']} prompts"
    )
    note += f", sampled with the model that this round starts from{words}"
    return Round(on_pairs(loaded, pairs, held_out if held_out.is_file() else None, note), sampled)


def score_of(sampled: Mapping[str, Any]) -> Interval | None:
    """The mean score of the answers of a round."""
    return from_json(Interval, sampled["score"]) if sampled["score"] is not None else None


def _prompts(rows: Sequence[Any], held_out: set[str], console: Console) -> Prompts:
    """The prompts of these pairs, each once, except those that are held out; the reference answer is the chosen response."""
    questions: dict[str, Question] = {}
    for row in rows:
        questions.setdefault(row.prompt_key, Question(row.prompt, flat(row.chosen), row.line, row.file, row.tools))
    both = questions.keys() & held_out
    if both:
        console.line(f"{len(both)} prompts of dataset are also in eval_dataset, and are not answered")
    if len(both) == len(questions):
        raise invalid("nothing-to-train", "no prompt is left to answer", "add pairs with other prompts", "dataset")
    for prompt_key in both:
        del questions[prompt_key]
    asked = [[question.prompt, question.reference, question.tools] for question in questions.values()]
    digest = hashlib.sha256(json_text(asked).encode()).hexdigest()
    return Prompts(digest, tuple(questions.values()), 0, 0, ())


def _asked(plan: Plan, prompts: Prompts) -> JsonObject:
    """What decides the pairs of a round, as far as it is known before its model is loaded."""
    names = names_where(lambda option: option.is_sampling and not option.is_decided)
    asked = {
        **{name: getattr(plan.config, name) for name in names},
        "augment": {**inner_defaults("augment"), **plan.config.augment},
        "prompts": prompts.sha256,
        "weights": [*plan.model.weights_sha256.values()],
    }
    return dict(redacted(asked))


def _write_held_out(run: RunDirectory, pairs: Sequence[Pair], loaded: Loaded) -> None:
    """Write the held-out pairs, once; `InvalidInput` if those of the run or of the round before are others."""
    text = "".join(f"{json_text(_row(pair))}\n" for pair in pairs)
    before = Path(str(loaded.values["model_name"])) / HELD_OUT if (loaded.round or 0) > 1 else run.path / HELD_OUT
    for place in (before, run.path / HELD_OUT):
        if place.is_file() and place.read_text(encoding="utf-8") != text:
            message = f"the held-out pairs differ from those in {place}: dataset, its split or eval_dataset has changed"
            raise invalid("resume-differs", message, RESTART_FIX, "dataset")
    if pairs and not run.has(HELD_OUT):
        run.write_rows(HELD_OUT, text)


def _row(pair: Pair) -> JsonObject:
    row: JsonObject = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    row |= {"tools": [dict(tool) for tool in pair.tools]} if pair.tools else {}
    return row | ({"category": pair.category} if pair.category else {})


def show(rounds: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The results of rounds: whether the sampled answers get better, and the figures on the one held-out set."""
    header = ("round", "pairs", "score before it", "accuracy", "gain in logp_accuracy", "kl_sequence")
    rows = []
    for result in rounds:
        sampled, held_out, gain = result["sampled"], result["eval"] or {}, result["gain"] or {}
        score = score_of(sampled)
        figures = [held_out.get("accuracy"), gain.get("logp_accuracy"), held_out.get("kl_sequence")]
        shown = [str(number(from_json(Interval, figure))) if figure else "" for figure in figures]
        rows.append((str(sampled["round"]), str(sampled["pairs"]), str(number(score)) if score else "", *shown))
    console.table("rounds, with 95 % intervals; the figures after the score are of the held-out pairs", rows, header)
