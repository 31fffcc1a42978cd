"""The story of a run, top to bottom: config -> data -> plan -> provider -> trainer -> run directory. The only composer."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from dpo_cli.config.config import Loaded
from dpo_cli.config.config import load as load_config
from dpo_cli.config.schema import defaults
from dpo_cli.console import Console
from dpo_cli.data.tokens import EncodedPair, encode
from dpo_cli.errors import DoesNotFit, Exit, InvalidInput, Problem
from dpo_cli.evaluation.metrics import PairScores, figures, point_figures, score_pairs
from dpo_cli.evaluation.samples import answer_tokens, side_by_side
from dpo_cli.hardware.probe import Machine, probe
from dpo_cli.inspection import Data, Inspection, inspect
from dpo_cli.plan import Counts, Plan, Scoring, does_not_fit, out_of_memory, resolve
from dpo_cli.providers.base import Provider
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.runs.card import card
from dpo_cli.runs.directory import MANIFEST, PLAN, SUMMARY, RunDirectory
from dpo_cli.runs.log import log_line, log_to
from dpo_cli.runs.manifest import manifest
from dpo_cli.training.callbacks.health import Health
from dpo_cli.training.callbacks.record import Record
from dpo_cli.training.callbacks.stop import StopOnSignal
from dpo_cli.training.dpo import build_trainer
from dpo_cli.training.scoring import choose, states_of

PROVIDERS: dict[str, Callable[[str], Provider]] = {"huggingface": HuggingFace}
ANSWERS, SAMPLES = 32, 3  # held-out prompts that an evaluation answers, and of those that it shows


def train(
    loaded: Loaded, inspection: Inspection, machine: Machine, console: Console, overwrite: bool, dry_run: bool
) -> tuple[dict[str, Any], Exit]:
    """Train an adapter on an inspected config: what metrics.json holds (the plan with `dry_run`), and the exit code.

    Longer than other functions: the whole story of a run, in the order in which it happens.
    """
    data, draft = inspection.require()
    console.problems(inspection.problems)
    if not dry_run:
        RunDirectory.check(draft.run_dir, overwrite)

    provider = PROVIDERS[draft.config.provider](draft.config.model_name)
    tokenizer = provider.tokenizer()
    train_pairs, held_out, counts = _prepare(data, tokenizer, draft)
    plan = resolve(loaded, machine, counts)
    show_plan(plan, console)
    console.panel("the first pair, as the model sees it", _first_pair(train_pairs[0], tokenizer))
    if tokenizer.eos_token_id not in train_pairs[0].chosen_ids:
        end = tokenizer.decode(train_pairs[0].chosen_ids[-2:])
        console.line(f"note: a response ends with {end!r}, and nowhere with the tokenizer's EOS {tokenizer.eos_token!r}")
    _require_fit(plan, loaded)
    if dry_run:
        return plan.to_json(), Exit.DONE

    run = RunDirectory.create(plan.run_dir, overwrite)
    run.write_json(PLAN, plan.to_json())
    run.write_json(MANIFEST, manifest(plan, machine, provider.local_dir))
    with log_to(run.log), StopOnSignal(console.line) as stop, console.training(plan.total_steps) as view:
        base = provider.base_model(plan)
        pairs, pad_token_id = [*train_pairs, *held_out], int(tokenizer.pad_token_id)
        with _fitting(plan, loaded):
            scoring = choose(base, pairs, pad_token_id, plan.config.prompt_sharing)
        plan = _settled(plan, scoring, loaded, machine, console)
        run.write_json(PLAN, plan.to_json())
        adapter = provider.adapter_config(plan, base)
        evaluate = partial(_point_figures, pairs=held_out, tokenizer=tokenizer, plan=plan)
        trainer = build_trainer(base, adapter, tokenizer, plan, train_pairs, held_out, evaluate, console.line)
        health = Health(console.line)
        record = Record(trainer.totals, [run.append_line, view.show, log_line, health.see])
        for callback in (record, health, stop):
            trainer.add_callback(callback)
        if stop.received:
            raise KeyboardInterrupt  # there is nothing trained to keep
        started = time.monotonic()
        with _fitting(plan, loaded):
            trainer.train()
        seconds = time.monotonic() - started

    status, code = _ending(stop, health)
    summary: dict[str, Any] = {
        "status": status,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 3),
        "train": record.last_train,
        "eval": None,
        "base": None,
        "gain": None,
        "memory": {"predicted_gb": plan.predicted_gb, "measured_gb": record.peak_gb},
        "health": [event.to_json() for event in health.events],
        "adapter_sha256": run.write_adapter(partial(_save, trainer.model, tokenizer)),
    }
    run.write_json(SUMMARY, summary)  # before the judging, so that a second Ctrl-C loses only that
    judged = _judge(trainer.model, tokenizer, held_out if code is Exit.DONE else [], plan)
    summary |= {"eval": judged["policy"], "base": judged["base"], "gain": judged["gain"]}
    run.write_json(SUMMARY, summary)
    run.write_card(card(plan, summary["steps"], judged))
    if code is Exit.DONE:
        console.judgement(judged, [])
    console.line(f"{status} after step {summary['steps']}; adapter: {run.adapter}")
    return {**summary, "run_dir": str(run.path)}, code


def evaluate(run_path: str, dataset: str | None, console: Console) -> dict[str, Any]:
    """Judge a finished run's adapter against its base, on what it held out or on another file."""
    run = RunDirectory.open(Path(run_path))
    # What that machine decided, this one decides anew: a run from a GPU can be judged on a CPU.
    measured = [key for key, source in run.read_json(PLAN)["sources"].items() if source == "measured"]
    overrides = [f"{key}={json.dumps(defaults()[key])}" for key in measured]
    overrides += [f"dataset={dataset}", "eval_split=0", "eval_dataset=null"] if dataset else []
    inspection = inspect(load_config(str(run.path / PLAN), overrides), probe(), with_fit=False)
    data, plan = inspection.require()
    console.problems([problem for problem in inspection.problems if problem.severity == "warning"])
    if dataset and Path(dataset).absolute() in map(Path, run.trained_on()):
        console.line(f"note: the run was trained on {dataset}, so these figures show memory, not learning")
    provider = PROVIDERS[plan.config.provider](plan.config.model_name)
    tokenizer = provider.tokenizer()
    with log_to(run.log):
        train_pairs, held_out, _ = _prepare(data, tokenizer, plan)
        pairs = train_pairs if dataset else held_out
        model = provider.with_adapter(plan, run.adapter)
        if pairs:
            base, pad_token_id = model.get_base_model(), int(tokenizer.pad_token_id)
            plan = replace(plan, scoring=choose(base, pairs, pad_token_id, plan.config.prompt_sharing))
            _tell_scoring(plan, console)
        judged = _judge(model, tokenizer, pairs, plan)
        answers = side_by_side(model, tokenizer, pairs, ANSWERS, getattr(torch, plan.dtype))
    judged["answer_tokens"] = answer_tokens(answers)
    samples = [sample.to_json() for sample in answers[:SAMPLES]]
    console.judgement(judged, samples)
    return {**judged, "thresholds": [], "samples": samples}


def _ending(stop: StopOnSignal, health: Health) -> tuple[str, Exit]:
    """How a training ended: the status of metrics.json and the exit code."""
    if stop.received:
        return "interrupted", Exit[stop.received.name]
    return ("unhealthy", Exit.MISSED) if health.stopped else ("completed", Exit.DONE)


def show_plan(plan: Plan, console: Console) -> None:
    config, counts = plan.config, plan.counts
    assert counts is not None
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    all_pairs = counts.train_pairs + counts.eval_pairs
    held_out = f"{counts.eval_pairs} pairs of {counts.eval_prompts} prompts"
    rows = [
        ("model", plan.model_label),
        ("data", f"{counts.train_pairs} pairs of {counts.train_prompts} prompts"),
        ("bad rows", f"{counts.bad_rows} are no pairs, and left out"),
        ("longest", f"{counts.longest} tokens ({counts.longest_at})"),
        ("tokens", f"{counts.train_tokens:,} an epoch; {counts.shared_tokens:,} with each prompt once"),
        ("held out", held_out if counts.eval_pairs else "nothing: there will be no figures (eval_split)"),
        ("cut", f"{counts.cut} pairs ({counts.cut / all_pairs:.0%}) lose the beginning of their prompt to max_seq_length"),
        ("left out", f"{counts.too_long} pairs whose responses are longer than max_seq_length {config.max_seq_length}"),
        ("parted", f"{counts.parted} prompts are rendered otherwise before a response than alone: see the first pair"),
        ("steps", f"{plan.total_steps} of {batch * accumulation} pairs ({batch} x {accumulation})"),
        ("learning", f"rate {config.learning_rate:g}, beta {config.beta:g}, LoRA rank {config.lora_r}"),
        ("scoring", plan.scoring.why),
        ("runs on", f"{config.device}, {plan.dtype}" + (", 4-bit base" if config.use_4bit else "")),
        ("writes to", str(plan.run_dir)),
    ]
    told = {"bad rows": counts.bad_rows, "cut": counts.cut, "left out": counts.too_long, "parted": counts.parted}
    console.table("plan", [row for row in rows if told.get(row[0], True)])
    for note in plan.notes:
        console.line(f"note: {note}")


def _prepare(data: Data, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> tuple[list[EncodedPair], list[EncodedPair], Counts]:
    """Split by prompt, tokenise, cut prompts to length, leave out what is still too long: (train, held out, counts)."""
    config = plan.config
    sides = [encode(side, tokenizer, config.use_chat_template, config.max_seq_length) for side in data.sides(config)]
    kept = [[pair for pair in side if pair.length <= config.max_seq_length] for side in sides]
    train, held_out = kept
    if not sides[0]:
        fix = "raise the weights in dataset, or add pairs"
        raise InvalidInput([Problem("error", "nothing-to-train", "no pair is left to train on", fix, "dataset")])
    if not train:
        message = (
            f"the responses of all {len(sides[0])} pairs to train on are longer than max_seq_length {config.max_seq_length}"
        )
        shortest = min(pair.length for pair in sides[0])
        fix = f"raise it: the shortest pair has {shortest} tokens"
        raise InvalidInput([Problem("error", "nothing-to-train", message, fix, "max_seq_length")])
    longest = max((pair for side in kept for pair in side), key=lambda pair: pair.length)
    counts = Counts(
        train_pairs=len(train),
        eval_pairs=len(held_out),
        train_prompts=len({pair.pair.prompt_key for pair in train}),
        eval_prompts=len({pair.pair.prompt_key for pair in held_out}),
        cut=sum(pair.is_cut for side in kept for pair in side),
        too_long=sum(map(len, sides)) - sum(map(len, kept)),
        parted=sum(pair.parts_early for side in kept for pair in side),
        bad_rows=sum(data_set.rows - data_set.pairs for data_set in (data.train, data.held_out) if data_set is not None),
        longest=longest.length,
        longest_at=f"{Path(longest.pair.file).name}:{longest.pair.line}",
        longest_pair=max(pair.shared_length for side in kept for pair in side),
        longest_responses=max(len(pair.chosen_ids) + len(pair.rejected_ids) for side in kept for pair in side),
        train_tokens=sum(pair.shared_length + len(pair.prompt_ids) for pair in train),
        shared_tokens=sum(pair.shared_length for pair in train),
    )
    return train, held_out, counts


def _settled(plan: Plan, scoring: Scoring, loaded: Loaded, machine: Machine, console: Console) -> Plan:
    """The plan with what the loaded model decided: where prompts cannot be shared, micro-batches may have to be smaller."""
    assert plan.counts is not None
    settled = resolve(loaded, machine, plan.counts, scoring)
    _tell_scoring(settled, console)
    for note in settled.notes:
        if note not in plan.notes:
            console.line(f"note: {note}")
    _require_fit(settled, loaded)
    return settled


def _tell_scoring(plan: Plan, console: Console) -> None:
    console.line(f"scoring: {plan.scoring.why}")
    logging.getLogger("dpo").info("scoring: %s", plan.scoring.why)


@contextmanager
def _fitting(plan: Plan, loaded: Loaded) -> Iterator[None]:
    """What runs out of memory inside, with one pair at a time, is for the user to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DoesNotFit([loaded.placed(out_of_memory(plan))]) from error


def _require_fit(plan: Plan, loaded: Loaded) -> None:
    if (misfit := does_not_fit(plan)) is not None:
        raise DoesNotFit([loaded.placed(misfit)])


def _point_figures(
    model: PeftModel, pairs: Sequence[EncodedPair], tokenizer: PreTrainedTokenizerBase, plan: Plan
) -> dict[str, float]:
    return point_figures(_score(model, pairs, tokenizer, plan), plan.config.beta)


def _score(model: PeftModel, pairs: Sequence[EncodedPair], tokenizer: PreTrainedTokenizerBase, plan: Plan) -> PairScores:
    batch_size, dtype = plan.config.per_device_eval_batch_size, getattr(torch, plan.dtype)
    return score_pairs(model, pairs, states_of(plan.scoring), int(tokenizer.pad_token_id), batch_size, dtype)


def _judge(model: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[EncodedPair], plan: Plan) -> dict[str, Any]:
    """The figures of `eval --json`; the three objects are null when there is nothing to judge on."""
    prompts = [pair.pair.prompt_key for pair in pairs]
    counts: dict[str, Any] = {"pairs": len(pairs), "prompts": len(set(prompts))}
    if not pairs:
        return {**counts, "policy": None, "base": None, "gain": None}
    return {**counts, **figures(_score(model, pairs, tokenizer, plan), prompts, plan.config.beta)}


def _save(model: PeftModel, tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    model.save_pretrained(str(place))
    tokenizer.save_pretrained(place)


def _first_pair(pair: EncodedPair, tokenizer: PreTrainedTokenizerBase) -> str:
    """Prompt and both responses decoded with their special tokens; what is scored stands after the bar."""
    prompt, chosen, rejected = (tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
    return f"{prompt}\nchosen   | {chosen!r}\nrejected | {rejected!r}"
