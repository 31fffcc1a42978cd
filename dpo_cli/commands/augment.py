"""The story of `dpo augment`, top to bottom: prompts -> sampled answers -> scores -> pairs with provenance, batch by batch.

A batch always holds the same prompts and is drawn with the same seed. So a continued file becomes, byte for byte,
the one that is written in one go: on the same machine, and with a judge and a server that give the same replies.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import dpo_cli
from dpo_cli.config.ranking_rules import RANK_PARTS
from dpo_cli.config.schema import inner_defaults, names_where
from dpo_cli.data.prompts import Prompts
from dpo_cli.data.rows import Question
from dpo_cli.data.text_features import plain
from dpo_cli.data.tokenizer import Tokenizer
from dpo_cli.data.tokens import encode_questions
from dpo_cli.errors import DoesNotFit, Problem
from dpo_cli.evaluation.generation import Answer, Rank, Sampling, generate
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.feasibility import DOES_NOT_FIT
from dpo_cli.plan.plan import Plan
from dpo_cli.preferences.ranking import RELATIVE, best_pairs, ranking
from dpo_cli.preferences.served_answers import ServedAnswers
from dpo_cli.providers.out_of_memory import is_out_of_memory
from dpo_cli.providers.precision import in_faster_precision
from dpo_cli.providers.registry import PROVIDERS
from dpo_cli.results.codec import JsonObject, to_json
from dpo_cli.results.intervals import Interval
from dpo_cli.storage.digests import sha256
from dpo_cli.storage.progress import working
from dpo_cli.storage.resumable_file import ResumableFile
from dpo_cli.strategies.figures import number
from dpo_cli.ui.console import Console

Options = Mapping[str, Any]  # the parts of the option `augment`

NORMAL_95 = 1.959964  # standard deviations
COUNTED = {
    "responses": "responses sampled",
    "unanswered": "prompts fill the model's context and have no answer",
    "unfinished": "did not end within max_new_tokens: they can be rejected, never chosen",
    "empty": "empty or with a NUL character, skipped",
    "short": "shorter than min_tokens, skipped",
    "identical": "the same as another answer except for case and blanks, skipped",
    "without_pair": "prompts gave no pair",
}


def augment(
    plan: Plan,
    prompts: Prompts,
    out: Path,
    console: Console,
    noted: Mapping[str, object] | None = None,
    keep: Callable[[JsonObject], object] = lambda totals: None,
) -> JsonObject:
    """Write pairs of the model's own answers to `out`, or continue the file: what `augment --json` prints.

    `noted` joins the provenance of each row. `keep` gets the totals when all rows are written, before the file is finished:
    after a stop in between, the file is continued with nothing to do.
    """
    started = ResumableFile.decided(out)  # the same for the whole file
    plan = in_faster_precision(plan, started.get("bf16"))
    options = {**inner_defaults("augment"), **plan.config.augment}
    provider = PROVIDERS[plan.config.provider](plan.model)
    tokenizer = provider.tokenizer()
    day = date.fromisoformat(started["day"]) if "day" in started else plan.day  # the date that a template writes
    dpo_tokenizer = Tokenizer.loaded(tokenizer, day, plan.model.generation)
    source: Sampled | ServedAnswers
    if options["answers_url"]:
        questions, left = list(prompts.questions), {"cut": 0, "too_long": 0}
        source = ServedAnswers(options, plan.config.seed)
    else:
        config, room = plan.config, plan.config.max_seq_length - options["max_new_tokens"]
        encoded, left = encode_questions(
            prompts.questions, dpo_tokenizer, config.use_chat_template, room, provider.token_rows()
        )
        questions = [question for question, _ in encoded]
        model = provider.start(plan, provider.base_model(plan))  # with its adapter, if model_name is one
        source = Sampled(model, tokenizer, plan, options, [ids for _, ids in encoded])
    origin = {**_origin(plan, options, source.identity), **(noted or {})}
    rank = ranking(options, plan.config.device, getattr(torch, plan.dtype), day)
    maker = Maker(source, rank, options, origin, ScoreMeans())
    settings = _settings(plan, prompts, options, origin)
    with closing(ResumableFile(out, settings, {"day": day.isoformat(), "bf16": plan.config.bf16})) as file:
        done, counts = file.state.get("prompts", 0), Counter(file.state.get("counts", {}))
        maker.scored.restore(file.state.get("scores", {}))
        if file.is_resumed:
            console.line(f"{out}: continuing after {done} of {len(questions)} prompts")
        with working("augmenting", len(questions), "prompts", done) as work:
            for start in range(done, len(questions), options["prompts_per_batch"]):
                batch = questions[start : start + options["prompts_per_batch"]]
                rows = maker.rows(batch, start, counts)
                file.append(rows, {"prompts": start + len(batch), "counts": counts, "scores": maker.scored.state})
                work.add(len(batch), f"{counts['pairs']} pairs")
        counted = {name: counts[name] for name in ("pairs", *COUNTED)}
        totals = {"prompts": len(questions), "repeated": prompts.repeated, "bad_rows": prompts.bad_rows, **left, **counted}
        score = None if options["rank"] in RELATIVE else maker.scored.interval
        told = {"out": str(out), **totals, "score": to_json(score), "resumed": file.is_resumed}
        keep(told)
        file.finish()
    _tell(totals, score, out, console)
    return told


@dataclass(frozen=True)
class Sampled:
    """Answers of the model of the config."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    options: Options
    prompts: Sequence[list[int]]  # token ids

    @property
    def identity(self) -> JsonObject:
        return _identity(self.plan.model, getattr(self.model.config, "_commit_hash", None))

    def __call__(self, questions: Sequence[Question], start: int) -> list[list[Answer]]:
        """Several answers to each question; the first question has number `start`."""
        options, dtype = self.options, getattr(torch, self.plan.dtype)
        sampling = Sampling(options["max_new_tokens"], float(options["temperature"]), float(options["top_p"]))
        # As many bits as torch takes, from a hash that is the same on every machine: batches of other seeds share nothing.
        torch.manual_seed(random.Random(f"{self.plan.config.seed}/{start}").getrandbits(63))
        prompts = self.prompts[start : start + len(questions)]
        try:
            room = self.plan.evaluation_room(dtype.itemsize)
            return generate(self.model, self.tokenizer, prompts, sampling, dtype, options["responses"], memory=room)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = f"out of memory with {len(prompts)} prompts and {options['responses']} responses each"
            fix = 'lower "prompts_per_batch", "responses" or "max_new_tokens" in "augment"'
            raise DoesNotFit([Problem("error", DOES_NOT_FIT, message, fix, "augment")]) from error


class ScoreMeans:
    """The mean scores of prompts: as three sums, so that the state of a file does not grow."""

    def __init__(self) -> None:
        self.state = {"prompts": 0, "sum": 0.0, "squares": 0.0}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.state |= state

    def add(self, scores: Sequence[float]) -> None:
        """The scores of all answers to a prompt; without one, it does not count."""
        if scores:
            mean = sum(scores) / len(scores)
            new = {"prompts": 1, "sum": mean, "squares": mean * mean}
            self.state = {name: before + new[name] for name, before in self.state.items()}

    @property
    def interval(self) -> Interval | None:
        """The mean over prompts, with its 95 % interval by the normal distribution; None with fewer than two prompts."""
        count, total, squares = self.state.values()
        if count < 2:
            return None
        mean = total / count
        variance = max(0.0, squares - count * mean * mean) / (count - 1)
        half = NORMAL_95 * math.sqrt(variance / count)
        return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Maker:
    """Makes the rows of a batch of prompts. `origin` is the part of their provenance that all rows share."""

    source: Sampled | ServedAnswers
    rank: Rank
    options: Options
    origin: Mapping[str, object]
    scored: ScoreMeans

    def rows(self, batch: Sequence[Question], start: int, counts: Counter[str]) -> list[JsonObject]:
        """The rows of the pairs of these prompts; the first has number `start`. `counts` is updated."""
        options, rows = self.options, []
        for question, answers in zip(batch, self.source(batch, start), strict=True):
            counts["unanswered"] += answers[0].is_missing
            usable = _usable(answers, options["min_tokens"], counts)
            scores = self.rank(question, usable)
            score_of = dict(zip((plain(answer.text) for answer in usable), scores, strict=True))
            self.scored.add([score_of[text] for answer in answers if (text := plain(answer.text)) in score_of])
            pairs = best_pairs(usable, scores, options["pairs_per_prompt"], options["min_distance"])
            counts["pairs"] += len(pairs)
            counts["without_pair"] += not pairs
            rows += [self._row(question, usable[pair.chosen], usable[pair.rejected], pair.scores) for pair in pairs]
        return rows

    def _row(self, question: Question, chosen: Answer, rejected: Answer, scores: tuple[float, float]) -> JsonObject:
        pair = question.with_answers(chosen.text, rejected.text)
        tools = {"tools": [dict(tool) for tool in pair.tools]} if pair.tools else {}
        own = {
            "scores": scores,
            "tokens": (chosen.tokens, rejected.tokens),
            "rejected_finished": rejected.finished,
            "source": f"{Path(question.file).name}:{question.line}",
        }
        row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, **tools}
        return {**row, "provenance": {**self.origin, **own}}


def _usable(answers: Sequence[Answer], min_tokens: int, counts: Counter[str]) -> list[Answer]:
    """The different answers that are usable; the others are counted."""
    different: dict[str, Answer] = {}
    for answer in (answer for answer in answers if not answer.is_missing):
        counts["responses"] += 1
        counts["unfinished"] += not answer.finished
        if not answer.text or "\0" in answer.text:  # a row may not hold a NUL
            counts["empty"] += 1
        elif answer.tokens < min_tokens:
            counts["short"] += 1
        elif plain(answer.text) in different:
            counts["identical"] += 1
        else:
            different[plain(answer.text)] = answer
    return list(different.values())


def _origin(plan: Plan, options: Options, model: JsonObject) -> JsonObject:
    """The origin of the rows: the model, the rule, the sampling and the version."""
    rank = options["rank"]
    own = {
        name: _identity(ModelSource.of(options[name]), None) if name == "reward_model" else options[name]
        for name in RANK_PARTS.get(rank, ())
    }
    return {
        "model": model,
        "rule": {"rank": rank, **own, "min_tokens": options["min_tokens"], "min_distance": options["min_distance"]},
        "sampling": {name: options[name] for name in ("responses", "max_new_tokens", "temperature", "top_p")},
        "seed": plan.config.seed,
        "dpo": dpo_cli.__version__,
    }


def _settings(plan: Plan, prompts: Prompts, options: Options, origin: Mapping[str, object]) -> JsonObject:
    """Everything that decides the content of the file."""
    config = plan.config
    shared = {name: getattr(config, name) for name in names_where(lambda option: option.is_sampling)}
    return {
        **shared,
        "dtype": plan.dtype,
        "augment": {**options, "rank": origin["rule"]},
        "model": origin["model"],
        "below": [*plan.model.weights_sha256.values(), *plan.model.settings_sha256.values()],
        "prompts": prompts.sha256,
        "dpo": origin["dpo"],
    }


def _identity(model: ModelSource, revision: str | None) -> JsonObject:
    """The name of a model, without the folder of a local one, and a hash of its weights or the hub's commit."""
    place = model.own.path
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors")) if place.is_dir() else []
    digests = [sha256(file) for file in files]
    if not digests:
        return {"name": model.name, "revision": revision}
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return {"name": Path(model.name).name, "sha256": whole}


def _tell(counts: Mapping[str, int], score: Interval | None, out: Path, console: Console) -> None:
    """The counts at the end; those that are 0 are omitted."""
    labels = {
        "repeated": "rows repeat an earlier prompt",
        "bad_rows": "rows are not prompts, skipped",
        "cut": "prompts were cut at the start, so that an answer fits max_seq_length",
        "too_long": "prompts left no room for an answer in max_seq_length, skipped",
        **COUNTED,
    }
    for name, words in labels.items():
        if counts[name]:
            console.line(f"{counts[name]} {words}")
    if score is not None:
        console.line(f"the mean score of an answer is {number(score)}, with its 95 % interval over prompts")
    console.line(f"{out}: {counts['pairs']} pairs of {counts['prompts'] - counts['without_pair']} prompts")
