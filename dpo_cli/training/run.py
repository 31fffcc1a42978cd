"""The story of a run, top to bottom: config -> data -> plan -> provider -> trainer -> run directory. The only composer."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_cli.config.config import Loaded
from dpo_cli.config.config import load as load_config
from dpo_cli.config.schema import defaults
from dpo_cli.console import Console
from dpo_cli.data import reader
from dpo_cli.data.tokens import Encoded, encode
from dpo_cli.errors import DoesNotFit, Exit, InvalidInput, Problem
from dpo_cli.evaluation.metrics import Scores, figures, point_figures, score_rows
from dpo_cli.evaluation.samples import answer_tokens, side_by_side
from dpo_cli.hardware.probe import Machine, probe
from dpo_cli.inspection import Data, Inspection, inspect
from dpo_cli.plan import Counts, Plan, Scoring, does_not_fit, out_of_memory, resolve
from dpo_cli.providers.base import Provider
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.providers.policy import TRAINED, Policy
from dpo_cli.providers.unsloth import Unsloth
from dpo_cli.publish.hub import push
from dpo_cli.runs.card import card
from dpo_cli.runs.directory import MANIFEST, PLAN, SUMMARY, RunDirectory
from dpo_cli.runs.log import log_line, log_to
from dpo_cli.runs.manifest import manifest
from dpo_cli.training import dpo, sft
from dpo_cli.training.callbacks.health import Health
from dpo_cli.training.callbacks.record import Record
from dpo_cli.training.callbacks.stop import StopOnSignal
from dpo_cli.training.scoring import choose, states_of

PROVIDERS: dict[str, Callable[[str], Provider]] = {"huggingface": HuggingFace, "unsloth": Unsloth}
TRAINERS: dict[str, Callable[..., Any]] = {"dpo": dpo.build_trainer, "sft": sft.build_trainer}
ANSWERS, SAMPLES = 32, 3  # held-out prompts that an evaluation answers, and of those that it shows


def train(
    loaded: Loaded, inspection: Inspection, machine: Machine, console: Console, overwrite: bool, dry_run: bool
) -> tuple[dict[str, Any], Exit]:
    """Train an adapter on an inspected config: what metrics.json holds (the plan with `dry_run`), and the exit code.

    Longer than other functions: the whole story of a run, in the order in which it happens.
    """
    data, draft = inspection.require()
    console.problems(inspection.problems)

    provider = PROVIDERS[draft.config.provider](draft.config.model_name)
    tokenizer = provider.tokenizer()
    train_rows, held_out, counts = _prepare(data, tokenizer, draft)
    plan = resolve(loaded, machine, counts)
    show_plan(plan, console)
    console.panel(f"the first of the {plan.noun}, as the model sees it", _first_row(train_rows[0], tokenizer))
    if tokenizer.eos_token_id not in train_rows[0].responses[0]:
        end = tokenizer.decode(train_rows[0].responses[0][-2:])
        console.line(f"note: a response ends with {end!r}, and nowhere with the tokenizer's EOS {tokenizer.eos_token!r}")
    _require_fit(plan, loaded)
    if dry_run:
        return plan.to_json(), Exit.DONE

    run = RunDirectory.create(plan.run_dir, overwrite)
    run.write_json(PLAN, plan.to_json())
    run.write_json(MANIFEST, manifest(plan, machine, provider.local_dir))
    with log_to(run.log), StopOnSignal(console.line) as stop, console.training(plan.total_steps) as view:
        base = provider.base_model(plan)
        rows, pad_token_id = [*train_rows, *held_out], int(tokenizer.pad_token_id)
        with _fitting(plan, loaded):
            scoring = choose(base, rows, pad_token_id, plan.config.prompt_sharing, provider.no_sharing)
        plan = _settled(plan, scoring, loaded, machine, console)
        run.write_json(PLAN, plan.to_json())
        start, adapter = provider.start(plan, base), provider.adapter_config(plan, base)
        frozen = None if plan.config.lora_r else provider.base_model(plan)
        if frozen is not None:
            choose(frozen, rows, pad_token_id, plan.scoring.shared)  # its attention then takes the same layout
        evaluate = partial(_point_figures, rows=held_out, tokenizer=tokenizer, plan=plan)
        build = TRAINERS[plan.config.strategy]
        trainer = build(start, adapter, tokenizer, plan, train_rows, held_out, evaluate, console.line, frozen)
        provider.ready(trainer.model, plan)
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
        "adapter_sha256": run.write_trained(partial(_save, trainer.model, tokenizer, plan), whole=plan.config.lora_r == 0),
    }
    run.write_json(SUMMARY, summary)  # before the judging, so that a second Ctrl-C loses only that
    judged = _judge(trainer.policy, tokenizer, held_out if code is Exit.DONE else [], plan)
    summary |= {"eval": judged["policy"], "base": judged["base"], "gain": judged["gain"]}
    run.write_json(SUMMARY, summary)
    run.write_card(card(plan, summary["steps"], judged))
    if code is Exit.DONE:
        console.judgement(judged, [])
    console.line(f"{status} after step {summary['steps']}; {run.trained.name}: {run.trained}")
    if plan.config.push_to_hub and plan.config.hub_model_id and code is Exit.DONE:
        console.line(f"uploaded to {push(run.trained, plan.config.hub_model_id)}")
    return {**summary, "run_dir": str(run.path)}, code


def evaluate(run_path: str, dataset: str | None, console: Console) -> dict[str, Any]:
    """Judge a finished run's adapter against its base, on what it held out or on another file."""
    opened = open_run(run_path, dataset, console)
    with log_to(opened.run.log):
        policy, plan = load_policy(opened, console)
        judged = _judge(policy, opened.tokenizer, opened.rows, plan)
        answers = side_by_side(policy, opened.tokenizer, opened.rows, ANSWERS, getattr(torch, plan.dtype))
    judged["answer_tokens"] = answer_tokens(answers)
    samples = [sample.to_json() for sample in answers[:SAMPLES]]
    console.judgement(judged, samples)
    return {**judged, "thresholds": [], "samples": samples}


@dataclass(frozen=True)
class Opened:
    """A finished run on this machine: its plan, as this machine decides it, and the rows to judge it on."""

    run: RunDirectory
    plan: Plan
    provider: Provider
    tokenizer: PreTrainedTokenizerBase
    rows: list[Encoded]


def open_run(run_path: str, dataset: str | None, console: Console) -> Opened:
    """Open a finished run with what it held out, or with all rows of another file. No model is loaded."""
    run = RunDirectory.open(Path(run_path))
    # What that machine decided, this one decides anew: a run from a GPU can be judged on a CPU.
    measured = [key for key, source in run.read_json(PLAN)["sources"].items() if source == "measured"]
    overrides = [f"{key}={json.dumps(defaults()[key])}" for key in measured]
    overrides.append("provider=huggingface")  # any provider's adapter is PEFT's, and is judged where its provider is not
    if dataset:
        overrides += [f"dataset={dataset}", "eval_split=0", "eval_dataset=null"]
        overrides += ["strategy=dpo"] if reader.holds_pairs(dataset) else []  # pairs tell more, whatever was trained on
    inspection = inspect(load_config(str(run.path / PLAN), overrides), probe(), with_fit=False)
    data, plan = inspection.require()
    console.problems([problem for problem in inspection.problems if problem.severity == "warning"])
    if dataset and Path(dataset).absolute() in map(Path, run.trained_on()):
        console.line(f"note: the run was trained on {dataset}, so these figures show memory, not learning")
    provider = PROVIDERS[plan.config.provider](plan.config.model_name)
    tokenizer = provider.tokenizer()
    with log_to(run.log):
        train_rows, held_out, _ = _prepare(data, tokenizer, plan)
    return Opened(run, plan, provider, tokenizer, train_rows if dataset else held_out)


def load_policy(opened: Opened, console: Console) -> tuple[Policy, Plan]:
    """What the run trained, with its reference, and the plan with how this model is scored here."""
    plan, rows, pad_token_id = opened.plan, opened.rows, int(opened.tokenizer.pad_token_id)
    policy = opened.provider.trained(plan, opened.run)
    if rows:
        scoring = choose(policy.network, rows, pad_token_id, plan.config.prompt_sharing)
        if policy.frozen is not None:
            choose(policy.frozen, rows, pad_token_id, scoring.shared)
        plan = replace(plan, scoring=scoring)
        _tell_scoring(plan, console)
    return policy, plan


def _ending(stop: StopOnSignal, health: Health) -> tuple[str, Exit]:
    """How a training ended: the status of metrics.json and the exit code."""
    if stop.received:
        return "interrupted", Exit[stop.received.name]
    return ("unhealthy", Exit.MISSED) if health.stopped else ("completed", Exit.DONE)


def show_plan(plan: Plan, console: Console) -> None:
    config, counts = plan.config, plan.counts
    assert counts is not None
    batch, accumulation, noun = config.per_device_train_batch_size, config.gradient_accumulation_steps, plan.noun
    all_rows = counts.train_pairs + counts.eval_pairs
    held_out = f"{counts.eval_pairs} {noun} of {counts.eval_prompts} prompts"
    trained = f"LoRA rank {config.lora_r}" if config.lora_r else "every weight"
    beta = f"beta {config.beta:g}, " if config.strategy == "dpo" else ""
    base = "4-bit base" if config.use_4bit else "8-bit base" if config.use_8bit else ""
    rows = [
        ("strategy", config.strategy),
        ("model", plan.model_label),
        ("data", f"{counts.train_pairs} {noun} of {counts.train_prompts} prompts"),
        ("bad rows", f"{counts.bad_rows} are no {noun}, and left out"),
        ("longest", f"{counts.longest} tokens ({counts.longest_at})"),
        ("tokens", f"{counts.train_tokens:,} an epoch; {counts.shared_tokens:,} with each prompt once"),
        ("held out", held_out if counts.eval_pairs else "nothing: there will be no figures (eval_split)"),
        ("cut", f"{counts.cut} {noun} ({counts.cut / all_rows:.0%}) lose the beginning of their prompt to max_seq_length"),
        ("left out", f"{counts.too_long} {noun} whose responses are longer than max_seq_length {config.max_seq_length}"),
        ("parted", f"{counts.parted} prompts are rendered otherwise before a response than alone: see the first"),
        ("steps", f"{plan.total_steps} of {batch * accumulation} {noun} ({batch} x {accumulation})"),
        ("learning", f"rate {config.learning_rate:g}, {beta}{trained}"),
        ("scoring", plan.scoring.why),
        ("runs on", ", ".join(filter(None, (config.device, plan.dtype, base)))),
        ("writes to", str(plan.run_dir)),
    ]
    told = {"bad rows": counts.bad_rows, "cut": counts.cut, "left out": counts.too_long, "parted": counts.parted}
    console.table("plan", [row for row in rows if told.get(row[0], True)])
    for note in plan.notes:
        console.line(f"note: {note}")


def _prepare(data: Data, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> tuple[list[Encoded], list[Encoded], Counts]:
    """Split by prompt, tokenise, cut prompts to length, leave out what is still too long: (train, held out, counts)."""
    config = plan.config
    sides = [encode(side, tokenizer, config.use_chat_template, config.max_seq_length) for side in data.sides(config)]
    kept = [[row for row in side if row.length <= config.max_seq_length] for side in sides]
    train, held_out = kept
    if not sides[0]:
        fix = f"raise the weights in dataset, or add {plan.noun}"
        raise InvalidInput(
            [Problem("error", "nothing-to-train", f"none of the {plan.noun} is left to train on", fix, "dataset")]
        )
    if not train:
        limit = f"max_seq_length {config.max_seq_length}"
        message = f"the responses of all {len(sides[0])} {plan.noun} to train on are longer than {limit}"
        shortest = min(row.length for row in sides[0])
        fix = f"raise it: the shortest has {shortest} tokens"
        raise InvalidInput([Problem("error", "nothing-to-train", message, fix, "max_seq_length")])
    longest = max((row for side in kept for row in side), key=lambda row: row.length)
    counts = Counts(
        train_pairs=len(train),
        eval_pairs=len(held_out),
        train_prompts=len({row.row.prompt_key for row in train}),
        eval_prompts=len({row.row.prompt_key for row in held_out}),
        cut=sum(row.is_cut for side in kept for row in side),
        too_long=sum(map(len, sides)) - sum(map(len, kept)),
        parted=sum(row.parts_early for side in kept for row in side),
        bad_rows=sum(data_set.rows - data_set.pairs for data_set in (data.train, data.held_out) if data_set is not None),
        longest=longest.length,
        longest_at=f"{Path(longest.row.file).name}:{longest.row.line}",
        longest_pair=max(row.shared_length for side in kept for row in side),
        longest_responses=max(row.response_length for side in kept for row in side),
        train_tokens=sum(row.response_length + len(row.responses) * len(row.prompt_ids) for row in train),
        shared_tokens=sum(row.shared_length for row in train),
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


def _point_figures(policy: Policy, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, plan: Plan) -> dict[str, float]:
    return point_figures(score(policy, rows, tokenizer, plan), plan.config.beta)


def score(policy: Policy, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Scores:
    batch_size, dtype = plan.config.per_device_eval_batch_size, getattr(torch, plan.dtype)
    return score_rows(policy, rows, states_of(plan.scoring), int(tokenizer.pad_token_id), batch_size, dtype)


def _judge(policy: Policy, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], plan: Plan) -> dict[str, Any]:
    """The figures of `eval --json`; the three objects are null when there is nothing to judge on."""
    prompts = [row.row.prompt_key for row in rows]
    counts: dict[str, Any] = {plan.noun: len(rows), "prompts": len(set(prompts))}
    if not rows:
        return {**counts, "policy": None, "base": None, "gain": None}
    return {**counts, **figures(score(policy, rows, tokenizer, plan), prompts, plan.config.beta)}


def _save(model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, place: Path) -> None:
    """Write what was trained: the adapter without the frozen one beside it, or the whole model."""
    if isinstance(model, PeftModel):
        if plan.merges:  # not on the model below that adapter, then
            model.peft_config[TRAINED].base_model_name_or_path = plan.config.model_name
        model.save_pretrained(str(place), selected_adapters=[TRAINED])
    else:
        model.save_pretrained(str(place))
    tokenizer.save_pretrained(place)


def _first_row(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """Prompt and responses decoded with their special tokens; what is scored stands after the bar."""
    names = ("chosen", "rejected") if len(row.responses) == 2 else ("completion",)
    told = [f"{name:<8} | {tokenizer.decode(ids)!r}" for name, ids in zip(names, row.responses, strict=True)]
    return "\n".join([tokenizer.decode(row.prompt_ids), *told])
