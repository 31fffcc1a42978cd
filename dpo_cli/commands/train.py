"""The story of a run, top to bottom: config -> data -> plan -> provider -> trainer -> run directory. The only composer.

Longer than other modules: the whole story is in one place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_cli.config.config import Loaded
from dpo_cli.data.encoded import Encoded
from dpo_cli.errors import DoesNotFit, Exit, InvalidInput, Problem, RunFailed
from dpo_cli.evaluation.evaluation import Measured, answered, judge, line_figures, measure, reward_accuracy, score
from dpo_cli.evaluation.rounding import rounding_of, without_rounding
from dpo_cli.hardware.machine import Machine
from dpo_cli.plan.adapter_start import start_of
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.feasibility import disk_problem, does_not_fit, out_of_memory
from dpo_cli.plan.plan import Plan, Rounding, Scoring
from dpo_cli.plan.preflight import Inspection, step_problems
from dpo_cli.plan.tokenized import Prepared, Rows, first_row, prepare, show_plan, tell_scoring
from dpo_cli.preferences.rewards import SummedRewards
from dpo_cli.providers.base import Provider
from dpo_cli.providers.huggingface import require_device
from dpo_cli.providers.out_of_memory import free_memory, is_out_of_memory
from dpo_cli.providers.policy import Policy
from dpo_cli.providers.precision import copy_speed, product_speed, same_bits, with_bf16_speed
from dpo_cli.providers.registry import PROVIDERS
from dpo_cli.providers.sharding import is_sharded
from dpo_cli.publish.upload import push
from dpo_cli.report.render import write_report
from dpo_cli.results.codec import JsonObject, to_json
from dpo_cli.results.judgement import Evaluation
from dpo_cli.results.summary import Line, Memory, RunSummary, Status
from dpo_cli.runs.card import card
from dpo_cli.runs.kept_evaluation import basis_of
from dpo_cli.runs.kept_evaluation import keep as keep_evaluation
from dpo_cli.runs.manifest import RECALLED, manifest
from dpo_cli.runs.resume import TO_RESUME, EarlierRun, restore_run, resumable, tell_on, with_resume_advice
from dpo_cli.scoring.forward import choose
from dpo_cli.scoring.reference import KeptReference, computed_by
from dpo_cli.scoring.reference_cache import ReferenceCache
from dpo_cli.storage.log import log_line, log_to
from dpo_cli.storage.run_directory import EVALUATION, MANIFEST, PLAN, REPORT, SUMMARY, FollowedRun, RunDirectory
from dpo_cli.storage.world import ALONE, World
from dpo_cli.training.callbacks.checkpointing import Keep
from dpo_cli.training.callbacks.early_stopping import StopEarly
from dpo_cli.training.callbacks.health import Health
from dpo_cli.training.callbacks.health_rules import APART_NATS
from dpo_cli.training.callbacks.metrics_log import Record
from dpo_cli.training.callbacks.signals import Agreement, StopOnSignal
from dpo_cli.training.trainer import save_trained
from dpo_cli.ui.console import Console
from dpo_cli.ui.live import LiveView

ROUNDED_ROWS = 8  # pairs that show the rounding of 16 bits
MOST_ROUNDED = 4.0  # times the root mean square of the rounding of a response: the largest of `START_ROWS` pairs
START_ROWS = 4  # pairs, the shortest, on which the policy must equal its reference before the first step
# The modules of training/, by strategy. Imported late: each brings a trainer of TRL.
TRAINERS = {"dpo": "dpo_trainer", "kto": "kto_trainer", "sft": "sft_trainer", "reward": "reward_trainer"}
TRAINERS |= {"rlhf": "policy_trainer"}


def train(
    loaded: Loaded,
    inspection: Inspection,
    machine: Machine,
    console: Console,
    overwrite: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    next_run: Path | None = None,
    world: World = ALONE,
) -> tuple[JsonObject, Exit]:
    """Train an adapter on an inspected config: what metrics.json holds (the plan with `dry_run`), and the exit code.

    `next_run` is the run of the next stage, if it has started. Of several processes the first one decides and writes.
    """
    data, draft = inspection.require()
    console.problems(inspection.problems)
    provider = world.in_turn(lambda: PROVIDERS[draft.config.provider](draft.model))  # the first fills the cache of models
    asked = Asked(loaded, inspection, machine, console, provider, overwrite, dry_run, resume, next_run)
    with ExitStack() as held:
        start = world.same(lambda: _started(asked, draft, held))
        draft = replace(draft, day=start.loaded.day or draft.day)
        tokenizer = provider.tokenizer()
        prepared = prepare(data, tokenizer, draft, provider.token_rows(), console.line)
        _require_same_rows(world, prepared)
        entry = world.same(lambda: _entered(asked, draft, start, prepared, tokenizer, held))
        if entry.result is not None:
            return entry.result
        run = entry.run if world.is_main else FollowedRun(entry.run.path)
        rows = Rows(prepared.train, prepared.held_out, tokenizer, prepared.prompts)
        job = Job(run, start.earlier, entry.findings, provider, rows, start.loaded, start.machine, console, entry.basis, world)
        result = _trained(job, entry.plan)
        world.steps = None  # the model of the next stage has its own
    free_memory()  # the trainer and its callbacks refer to each other and to the model: the next stage needs the memory
    return result


@dataclass(frozen=True)
class Asked:
    """What `train` is called with."""

    loaded: Loaded
    inspection: Inspection
    machine: Machine
    console: Console
    provider: Provider
    overwrite: bool
    dry_run: bool
    resume: bool
    next_run: Path | None


@dataclass(frozen=True)
class Start:
    """What is known before the rows are tokenised."""

    loaded: Loaded  # with what a resumed run has decided
    machine: Machine
    run: RunDirectory
    earlier: EarlierRun | None  # that is resumed
    is_claimed: bool


@dataclass(frozen=True)
class Entry:
    """A run that is ready to train; or the `result` of a call that trains nothing."""

    plan: Plan
    run: RunDirectory
    findings: JsonObject  # for plan.json
    basis: JsonObject  # of its evaluation
    result: tuple[JsonObject, Exit] | None = None


def _started(asked: Asked, draft: Plan, held: ExitStack) -> Start:
    """Look for a run to resume, and see what the machine decides.

    Before the plan: what a run decided at its start does not depend on the memory that is free now.
    """
    tell, run, earlier, loaded = tell_on(asked.console), RunDirectory(draft.run_dir), None, asked.loaded
    is_there = asked.resume and run.path.is_dir()
    if is_there:
        if not asked.dry_run:
            run = held.enter_context(_claimed(run.path, resume=True))
        if (earlier := EarlierRun.find(run, tell)) is not None:
            loaded = earlier.as_decided(loaded, tell)
    machine = with_bf16_speed(asked.machine, loaded.require(), draft.model.facts)
    return Start(replace(loaded, day=loaded.day or draft.day), machine, run, earlier, is_claimed=is_there)


def _require_same_rows(world: World, prepared: Prepared) -> None:
    """`RunFailed` where another process has read other rows, as from an older copy of a file on its machine."""
    digests = world.each(lambda: prepared.counts.digest)

    def check() -> None:
        other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
        if other is not None:
            message = f"process {other + 1} of {world.size} has read other rows than the first one"
            raise RunFailed(message, "give all machines the same files, for example in a shared folder")

    world.same(check)


def _entered(
    asked: Asked, draft: Plan, start: Start, prepared: Prepared, tokenizer: PreTrainedTokenizerBase, held: ExitStack
) -> Entry:
    """Make and show the plan, check what can be checked without the model, and write what the run starts with."""
    console, provider, inspection = asked.console, asked.provider, asked.inspection
    loaded, machine, run, earlier = start.loaded, start.machine, start.run, start.earlier
    data, _ = inspection.require()
    tell, is_resumed = tell_on(console), earlier is not None
    row_tokens = earlier.decided.row_tokens if earlier else None
    plan = resolve(
        loaded, machine, prepared.counts, is_resumed=is_resumed, row_tokens=row_tokens, model=draft.model
    ).with_adapted(provider.adapted(draft))
    late = [*prepared.problems, *_late_problems(plan, loaded, inspection)]
    console.problems(late)
    require_device(plan)
    show_plan(plan, console, product_speed(plan), copy_speed(plan))
    console.panel(f"the first of the {plan.noun}, as the model sees it", first_row(prepared.train[0], tokenizer))
    is_finished = earlier is not None and earlier.is_finished(plan)
    if not is_finished:
        _require_fit(plan, loaded, is_resumed)
    if asked.dry_run:
        if earlier is not None:
            earlier.require_same(loaded, plan, manifest(plan, machine, provider.local_dir), asked.next_run)
            tell("the run is finished" if is_finished else f"it would resume from step {earlier.step}")
        return Entry(plan, run, {}, {}, (plan.to_json(), Exit.DONE))

    if not start.is_claimed:
        run = held.enter_context(_claimed(run.path, asked.overwrite))
    held.enter_context(resumable())
    if earlier is None:
        if asked.resume:
            tell("there is no checkpoint to resume from: starting")
        run.checkpoints.clear(with_damaged=not asked.resume)
        run.clear()
    about = manifest(plan, machine, provider.local_dir)
    data.require_unchanged()  # since its rows were read, before the import of torch
    if earlier is not None:
        earlier.require_same(loaded, plan, about, asked.next_run)
        if is_finished:
            return Entry(plan, run, {}, {}, _finished(run, plan, earlier.left_out(plan), console))
        about["resumed"] = restore_run(run, earlier, plan, about, tell)
        about[RECALLED] = earlier.manifest.get(RECALLED, 0)
    findings: JsonObject = {
        "problems": [problem.to_json() for problem in (*inspection.problems, *late)],
        "data": data.to_json(),
    }
    run.write_plan({**plan.to_json(), **findings})
    run.write_json(MANIFEST, about)
    return Entry(plan, run, findings, basis_of(run.read_json(PLAN)["config"]))


@contextmanager
def _claimed(path: Path, overwrite: bool = False, resume: bool = False) -> Iterator[RunDirectory]:
    """The run directory, locked; a write that fails within the context is reported with the way to resume."""
    with RunDirectory.claim(path, overwrite, resume) as run, with_resume_advice(run):
        yield run


def _late_problems(plan: Plan, loaded: Loaded, inspection: Inspection) -> tuple[Problem, ...]:
    """Problems of the number of steps that appear only after rows are skipped; `InvalidInput` for an error."""
    assert plan.counts is not None
    known = {problem.code for problem in inspection.problems}
    problems = tuple(loaded.placed(one) for one in step_problems(plan, plan.counts.train_pairs) if one.code not in known)
    if any(problem.severity == "error" for problem in problems):
        raise InvalidInput(problems)
    return problems


@dataclass(frozen=True)
class Job:
    """What a training starts with."""

    run: RunDirectory
    earlier: EarlierRun | None  # that is resumed
    findings: JsonObject  # for plan.json
    provider: Provider
    rows: Rows
    loaded: Loaded
    machine: Machine
    console: Console
    basis: JsonObject  # of its evaluation
    world: World = ALONE


def _trained(job: Job, plan: Plan) -> tuple[JsonObject, Exit]:
    """The story from the model on."""
    view = LiveView(job.console, plan.total_steps, plan.predicted_gb)
    with same_bits(plan), log_to(job.run.log), StopOnSignal(listens=job.world.is_main) as stop, view:
        training = _built(job, plan, view, stop)
        with _fitting(training.plan, job.loaded):
            _begun(job, training, view)
            stop.received = job.world.same(lambda: stop.received)
            if not training.is_over:
                with _kept_when_trained(job, training):
                    training.keep.train()
        seconds = time.monotonic() - training.keep.start
        stop.received = job.world.same(lambda: stop.received)  # a signal after the last step
    return _concluded(job, training, seconds)


@dataclass(frozen=True)
class Training:
    """A trainer and what watches it, and the plan as the loaded model has settled it."""

    plan: Plan
    trainer: Any
    record: Record
    health: Health
    early: StopEarly
    stop: StopOnSignal
    keep: Keep
    measured: dict[int, Measured]  # the last evaluation, by its step
    rank: SummedRewards | None  # what scores answers, for a strategy that samples them

    @property
    def is_over(self) -> bool:
        return self.health.stopped or self.early.ended or bool(self.stop.received) or self.step >= self.plan.total_steps

    @property
    def step(self) -> int:
        return int(self.trainer.state.global_step)


def _built(job: Job, plan: Plan, view: LiveView, stop: StopOnSignal) -> Training:
    """Load the model, settle with it what the plan left open, and build the trainer."""
    run, earlier, provider = job.run, job.earlier, job.provider
    rows, loaded, console, world = job.rows, job.loaded, job.console, job.world
    tokenizer, pad_token_id = rows.tokenizer, int(rows.tokenizer.pad_token_id)
    base, scoring = _loaded_model(job, plan)
    plan = world.same(lambda: _settled(plan, scoring, loaded, job.machine, console, is_resumed=earlier is not None))
    view.predicted_gb = plan.predicted_gb
    run.write_plan({**plan.to_json(), **job.findings})
    start, adapter = provider.start(plan, base), provider.adapter_config(plan, base)
    frozen = None if plan.config.lora_r else provider.base_model(plan)
    if frozen is not None:
        choose(frozen, rows.extremes, pad_token_id, plan.scoring.shared)  # so that its attention takes the same layout

    measured: dict[int, Measured] = {}
    rank = SummedRewards.of(plan, world) if plan.strategy.generates else None

    def evaluate(policy: Policy) -> dict[str, float]:
        measured.clear()
        with stop.evaluating(world):
            now = measure(policy, rows.held_out, tokenizer, plan, rank.absolute if rank is not None else None)
            health.see_held_out(now.rewards.tolist())
            now = without_rounding(policy, rows.held_out, tokenizer, plan, now, console.line)
        measured[trainer.state.global_step] = now
        return line_figures(now, rows.held_out, plan)

    build = import_module(f"dpo_cli.training.{TRAINERS[plan.config.strategy]}").build_trainer
    sampled = {"prompts": rows.prompts, "rank": rank} if rank is not None else {}
    parts = (start, adapter, tokenizer, plan, rows.train, rows.held_out, evaluate, console.line, frozen, world)
    trainer = world.together(lambda: build(*parts, **sampled))
    provider.ready(trainer.model, plan)
    with _fitting(plan, loaded):
        first = rows.train[:ROUNDED_ROWS]
        rounding = earlier.decided.rounding if earlier else rounding_of(trainer.policy, first, tokenizer, plan)
    plan = _with_rounding(plan, rounding, console)
    run.write_plan({**plan.to_json(), **job.findings})
    health = Health(plan, trainer.totals, view.note)
    early = StopEarly(trainer.model, plan.config.early_stopping_patience)
    record = Record(trainer.totals, [partial(_write_line, run), view.show, health.see, early.see])
    keep = Keep(run, trainer, health, early, stop)
    for callback in (record, health, early, stop, keep, *([Agreement(world, stop)] if world.size > 1 else [])):
        trainer.add_callback(callback)
    return Training(plan, trainer, record, health, early, stop, keep, measured, rank)


def _loaded_model(job: Job, plan: Plan) -> tuple[PreTrainedModel, Scoring]:
    """The base model, and how its rows are scored: in all processes the same way."""
    rows, pad_token_id, earlier = job.rows, int(job.rows.tokenizer.pad_token_id), job.earlier
    provider = job.provider

    def load() -> PreTrainedModel:
        base = provider.base_model(plan, job.world)
        for note in provider.notes:
            job.console.line(f"note: {note}")
        return base

    def try_scoring(wanted: bool | str) -> Scoring:
        with _fitting(plan, job.loaded):
            return choose(base, rows.extremes, pad_token_id, wanted, provider.no_sharing)

    base = job.world.in_turn(load) if plan.merges else job.world.together(load)
    wanted = earlier.decided.scoring.shared if earlier else plan.config.prompt_sharing
    found = job.world.each(lambda: try_scoring(wanted))
    scoring = next((one for one in found if not one.shared), found[0])
    if any(one.shared != scoring.shared for one in found):  # all, because a divided model is run by all
        job.world.together(lambda: try_scoring(scoring.shared))
    return base, earlier.decided.scoring if earlier else scoring


def _begun(job: Job, training: Training, view: LiveView) -> None:
    """Before the first step: go back to the checkpoint of a resumed run, or check what a new one starts with."""
    run, earlier, rows, console = job.run, job.earlier, job.rows, job.console
    plan, trainer, keep = training.plan, training.trainer, training.keep
    if trainer.reference is not None and (job.world.is_main or is_sharded(trainer.model)):
        key = computed_by(trainer.policy, plan)
        if job.world.is_main:
            cache = ReferenceCache(key, f"{plan.model_label}, {plan.dtype}", console.line, trainer.reference.values.shape[1])
            trainer.reference.share_in(cache, trainer.digests(rows.train))
    if earlier is not None and earlier.checkpoint is not None:
        keep.go_back_to(earlier.checkpoint)
        if earlier.asks_on(plan):
            training.health.forget_stops()
        lines = [Line.of_json(line) for line in run.read_lines()]
        training.record.recall(lines)
        view.recall(lines)
        if keep.missed_evaluation:
            trainer.evaluate()
        return
    run.try_to_write(partial(_save, trainer.model, rows.tokenizer))
    if training.rank is not None and len(rows.held_out):
        training.health.see_reward(reward_accuracy(rows.held_out, training.rank))
    if plan.strategy.refers:
        _check_reference(job, training)


def _concluded(job: Job, training: Training, seconds: float) -> tuple[JsonObject, Exit]:
    """After the last step: save what was trained, evaluate it, and write about it."""
    run, rows, console = job.run, job.rows, job.console
    plan, trainer, health, early, stop = training.plan, training.trainer, training.health, training.early, training.stop
    status, code = _ending(stop, health)
    early.put_best_back()
    steps = training.step
    summary = RunSummary(
        status=status,
        steps=steps,
        best_step=early.best_step or None,
        seconds=round(seconds, 3),
        train=training.record.last_train,
        sides=None,
        memory=Memory(plan.predicted_gb, training.record.peak_gb),
        health=health.events,
        adapter_sha256=run.write_trained(partial(_save, trainer.model, rows.tokenizer), whole=plan.config.lora_r == 0),
    )
    run.write_json(SUMMARY, to_json(summary))  # before the evaluation, so that a second Ctrl-C loses only that
    can_be_judged = not stop.received and health.can_be_judged
    with log_to(run.log):
        last = training.measured.get(early.best_step or steps)
        held_out = rows.held_out if can_be_judged else []
        judged = _judged(trainer.policy, held_out, rows.tokenizer, plan, last, training.rank, console.line)
    reported = job.world.same(lambda: _reported(job, training, replace(summary, sides=judged.sides), judged, code))
    return reported, code


def _reported(job: Job, training: Training, summary: RunSummary, judged: Evaluation, code: Exit) -> JsonObject:
    """Write and show what a training has ended with."""
    run, console, plan, steps = job.run, job.console, training.plan, training.step
    if judged.sides is not None:
        keep_evaluation(run, judged, job.basis)
    run.write_card(card(plan, steps, judged))
    run.write_json(SUMMARY, to_json(summary))
    if not training.stop.received and training.health.can_be_judged:
        console.judgement(judged, [], plan.strategy, start_of(plan.model, plan.config.reference))
    console.line(f"{summary.status} after step {steps}; {run.trained.name}: {run.trained}")
    if summary.status == "interrupted":
        console.line(TO_RESUME)
    console.line(f"report: {write_report(run.path)}")  # the last file of a run, made from the others
    if plan.config.push_to_hub and plan.config.hub_model_id and code is Exit.DONE:
        console.line(f"uploaded to {push(run.trained, plan.config.hub_model_id)}")
    return {**to_json(summary), "run_dir": str(run.path)}


def _check_reference(job: Job, training: Training) -> None:
    """Before step 1: the policy must equal its reference, and so must the log-probs of it that the cache has, if it is kept.

    Not of a resumed run, which has what it started with.
    """
    rows, run, plan = job.rows, job.run, training.plan
    reference: KeptReference | None = training.trainer.reference
    lengths = [size.length for size in rows.train.sizes()]
    shortest = sorted(range(len(lengths)), key=lengths.__getitem__)[:START_ROWS]
    scores = score(training.trainer.policy, [rows.train[pair] for pair in shortest], rows.tokenizer, plan)
    training.health.see_start(scores)
    allowed = APART_NATS[plan.dtype] * scores.tokens
    if reference is None:
        return
    if plan.rounding is not None:  # a response of few tokens is rounded by more than so much a token
        allowed = np.maximum(allowed, MOST_ROUNDED * plan.rounding.response)

    def recall() -> tuple[int, dict[str, Tensor]]:
        recalled = reference.recall(shortest, scores.reference, allowed)
        return recalled, reference.state()

    recalled, state = job.world.same(recall)
    if recalled:
        reference.restore(state)
        known = f"{recalled} of {len(reference.known)} {reference.noun}"
        job.console.line(f"reference: the log-probs of {known} come from the cache of earlier runs")
        if job.world.is_main:
            run.write_json(MANIFEST, {**run.read_json(MANIFEST), RECALLED: recalled})


@contextmanager
def _kept_when_trained(job: Job, training: Training) -> Iterator[None]:
    """A failure after the last step (an evaluation, a tracker) loses nothing: what was trained is saved first."""
    run, plan = job.run, training.plan
    try:
        yield
    except Exception:
        if training.step >= plan.total_steps:
            run.write_trained(partial(_save, training.trainer.model, job.rows.tokenizer), whole=plan.config.lora_r == 0)
            job.console.line(
                f"all {plan.total_steps} steps are done, and {run.trained} is saved; --resume does what is missing"
            )
        raise


def _finished(run: RunDirectory, plan: Plan, left_out: list[str], console: Console) -> tuple[JsonObject, Exit]:
    """The figures of a run that is already finished."""
    summary = RunSummary.of_json(run.read_json(SUMMARY))
    if not run.has(REPORT):
        write_report(run.path)
    if run.has(EVALUATION):
        console.judgement(
            Evaluation.of_json(run.read_json(EVALUATION), plan.noun),
            [],
            plan.strategy,
            start_of(plan.model, plan.config.reference),
        )
    if left_out:
        console.line(f"note: a finished run keeps its {', '.join(left_out)}; `dpo eval` evaluates it again")
    console.line(f"{summary.status} already, after step {summary.steps}; {run.trained.name}: {run.trained}")
    code = Exit.DONE if summary.status == "completed" else Exit.MISSED
    return {**to_json(summary), "run_dir": str(run.path)}, code


def _write_line(run: RunDirectory, line: Line) -> None:
    """A line of metrics.jsonl, and of the log."""
    run.append_line(line.to_json())
    log_line(line.to_json())


def _ending(stop: StopOnSignal, health: Health) -> tuple[Status, Exit]:
    """How a training ended: the status of metrics.json and the exit code."""
    if stop.received:
        return "interrupted", Exit[stop.received.name]
    return ("unhealthy", Exit.MISSED) if health.stopped else ("completed", Exit.DONE)


def _judged(
    policy: Policy,
    rows: Sequence[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    last: Measured | None,
    rank: SummedRewards | None,
    tell: Callable[[str], None],
) -> Evaluation:
    """The evaluation of what was trained; `last` is the evaluation after the last step, if there is one."""
    if not rows:
        return judge([], None, [], plan)
    absolute = rank.absolute if rank is not None else None
    measured = without_rounding(policy, rows, tokenizer, plan, last or measure(policy, rows, tokenizer, plan, absolute), tell)
    return judge(rows, measured, answered(policy, tokenizer, rows, plan), plan, rank)


def _settled(plan: Plan, scoring: Scoring, loaded: Loaded, machine: Machine, console: Console, is_resumed: bool) -> Plan:
    """The plan with what the loaded model decides: if prompts cannot be shared, micro-batches may have to be smaller."""
    assert plan.counts is not None
    settled = resolve(
        loaded,
        machine,
        plan.counts,
        scoring,
        is_resumed=is_resumed,
        row_tokens=plan.row_tokens if is_resumed else None,
        model=plan.model,
        fsdp=plan.config.fsdp is True,
    ).with_adapted(plan.adapted)
    tell_scoring(settled, console)
    for note in settled.notes:
        if note not in plan.notes:
            console.line(f"note: {note}")
    _require_fit(settled, loaded, is_resumed)
    return settled


def _with_rounding(plan: Plan, rounding: Rounding | None, console: Console) -> Plan:
    """The plan with the noise of its dtype, which is shown."""
    rounded = plan.with_rounding(rounding)
    for note in rounded.notes[len(plan.notes) :]:
        console.line(note)
    return rounded


@contextmanager
def _fitting(plan: Plan, loaded: Loaded) -> Iterator[None]:
    """An out-of-memory error inside, with one pair at a time, becomes `DoesNotFit`: the user has to change the config."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit([loaded.placed(out_of_memory(plan))]) from error


def _require_fit(plan: Plan, loaded: Loaded, is_resumed: bool) -> None:
    """`DoesNotFit` if memory or disk are too small. A resumed run keeps its values: only a larger device helps."""
    misfit, lack = does_not_fit(plan), disk_problem(plan)
    if misfit is not None and is_resumed:
        misfit = replace(misfit, fix=f"resume on a larger device, or restart with --overwrite and other values: {misfit.fix}")
    if misfits := [loaded.placed(problem) for problem in (misfit, lack) if problem is not None]:
        raise DoesNotFit(misfits)


def _save(model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    save_trained(model, place)
    tokenizer.save_pretrained(place)
