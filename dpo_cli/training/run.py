"""The story of a run, top to bottom: config -> data -> plan -> provider -> trainer -> run directory. The only composer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_cli.config.config import Loaded
from dpo_cli.console import Console
from dpo_cli.data.tokens import Encoded
from dpo_cli.demands import does_not_fit, out_of_memory
from dpo_cli.errors import DoesNotFit, Exit
from dpo_cli.evaluation.judging import Measured, answered, judge, line_figures, measure, score
from dpo_cli.hardware.probe import Machine
from dpo_cli.inspection import Inspection
from dpo_cli.live import LiveView
from dpo_cli.plan import Plan, Scoring, resolve
from dpo_cli.providers.choice import PROVIDERS
from dpo_cli.providers.policy import TRAINED, Policy
from dpo_cli.publish.hub import push
from dpo_cli.report.writing import write_report
from dpo_cli.runs.card import card
from dpo_cli.runs.directory import EVALUATION, MANIFEST, PLAN, SUMMARY, RunDirectory
from dpo_cli.runs.log import log_line, log_to
from dpo_cli.runs.manifest import manifest
from dpo_cli.training import dpo, sft
from dpo_cli.training.callbacks.health import Health
from dpo_cli.training.callbacks.record import Record
from dpo_cli.training.callbacks.stop import StopOnSignal
from dpo_cli.training.prepare import first_row, prepare, show_plan, tell_scoring
from dpo_cli.training.scoring import choose

START_ROWS = 4  # pairs on which the policy has to be its reference before the first step
TRAINERS: dict[str, Callable[..., Any]] = {"dpo": dpo.build_trainer, "sft": sft.build_trainer}


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
    train_rows, held_out, counts = prepare(data, tokenizer, draft)
    plan = resolve(loaded, machine, counts)
    show_plan(plan, console)
    console.panel(f"the first of the {plan.noun}, as the model sees it", first_row(train_rows[0], tokenizer))
    if tokenizer.eos_token_id not in train_rows[0].responses[0]:
        end = tokenizer.decode(train_rows[0].responses[0][-2:])
        console.line(f"note: a response ends with {end!r}, and nowhere with the tokenizer's EOS {tokenizer.eos_token!r}")
    _require_fit(plan, loaded)
    if dry_run:
        return plan.to_json(), Exit.DONE

    run = RunDirectory.create(plan.run_dir, overwrite)
    found = {"problems": [problem.to_json() for problem in inspection.problems], "data": data.to_json()}
    run.write_json(PLAN, {**plan.to_json(), **found})
    run.write_json(MANIFEST, manifest(plan, machine, provider.local_dir))
    view = LiveView(console, plan.total_steps, plan.predicted_gb)
    with log_to(run.log), StopOnSignal(console.line) as stop, view:
        base = provider.base_model(plan)
        rows, pad_token_id = [*train_rows, *held_out], int(tokenizer.pad_token_id)
        with _fitting(plan, loaded):
            scoring = choose(base, rows, pad_token_id, plan.config.prompt_sharing, provider.no_sharing)
        plan = _settled(plan, scoring, loaded, machine, console)
        view.predicted_gb = plan.predicted_gb
        run.write_json(PLAN, {**plan.to_json(), **found})
        start, adapter = provider.start(plan, base), provider.adapter_config(plan, base)
        frozen = None if plan.config.lora_r else provider.base_model(plan)
        if frozen is not None:
            choose(frozen, rows, pad_token_id, plan.scoring.shared)  # its attention then takes the same layout

        measured: dict[int, Measured] = {}  # the last evaluation, by its step

        def evaluate(policy: Policy) -> dict[str, float]:
            measured.clear()
            measured[trainer.state.global_step] = measure(policy, held_out, tokenizer, plan)
            return line_figures(measured[trainer.state.global_step], plan)

        build = TRAINERS[plan.config.strategy]
        trainer = build(start, adapter, tokenizer, plan, train_rows, held_out, evaluate, console.line, frozen)
        provider.ready(trainer.model, plan)
        health = Health(plan, trainer.totals, view.note)
        record = Record(trainer.totals, [run.append_line, view.show, log_line, health.see])
        for callback in (record, health, stop):
            trainer.add_callback(callback)
        if stop.received:
            raise KeyboardInterrupt  # there is nothing trained to keep
        started = time.monotonic()
        with _fitting(plan, loaded):
            if plan.config.strategy == "dpo":
                health.see_start(score(trainer.policy, train_rows[:START_ROWS], tokenizer, plan))
            if not health.stopped:
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
    can_be_judged = not stop.received and health.can_be_judged
    rows, last = held_out if can_be_judged else [], measured.get(trainer.state.global_step)
    with log_to(run.log):
        judged = _judged(trainer.policy, rows, tokenizer, plan, last)
    summary |= {"eval": judged["policy"], "base": judged["base"], "gain": judged["gain"]}
    run.write_json(SUMMARY, summary)
    if judged["policy"] is not None:
        run.write_json(EVALUATION, judged)
    run.write_card(card(plan, summary["steps"], judged))
    if can_be_judged:
        console.judgement(judged, [])
    console.line(f"{status} after step {summary['steps']}; {run.trained.name}: {run.trained}")
    console.line(f"report: {write_report(run.path)}")  # the last of a run's files, made of the others
    if plan.config.push_to_hub and plan.config.hub_model_id and code is Exit.DONE:
        console.line(f"uploaded to {push(run.trained, plan.config.hub_model_id)}")
    return {**summary, "run_dir": str(run.path)}, code


def _ending(stop: StopOnSignal, health: Health) -> tuple[str, Exit]:
    """How a training ended: the status of metrics.json and the exit code."""
    if stop.received:
        return "interrupted", Exit[stop.received.name]
    return ("unhealthy", Exit.MISSED) if health.stopped else ("completed", Exit.DONE)


def _judged(
    policy: Policy, rows: list[Encoded], tokenizer: PreTrainedTokenizerBase, plan: Plan, last: Measured | None
) -> dict[str, Any]:
    """What evaluation.json holds; `last` is the evaluation of the last step, if there was one."""
    if not rows:
        return judge([], None, [], plan)
    return judge(rows, last or measure(policy, rows, tokenizer, plan), answered(policy, tokenizer, rows, plan), plan)


def _settled(plan: Plan, scoring: Scoring, loaded: Loaded, machine: Machine, console: Console) -> Plan:
    """The plan with what the loaded model decided: where prompts cannot be shared, micro-batches may have to be smaller."""
    assert plan.counts is not None
    settled = resolve(loaded, machine, plan.counts, scoring)
    tell_scoring(settled, console)
    for note in settled.notes:
        if note not in plan.notes:
            console.line(f"note: {note}")
    _require_fit(settled, loaded)
    return settled


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


def _save(model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, place: Path) -> None:
    """Write what was trained: the adapter without the frozen one beside it, or the whole model."""
    if isinstance(model, PeftModel):
        if plan.merges:  # not on the model below that adapter, then
            model.peft_config[TRAINED].base_model_name_or_path = plan.config.model_name
        model.save_pretrained(str(place), selected_adapters=[TRAINED])
    else:
        model.save_pretrained(str(place))
    tokenizer.save_pretrained(place)
