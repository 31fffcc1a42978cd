"""Resuming a run: what exists of it, and whether the current config is still that run. No torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dpo_cli.config.config import Loaded
from dpo_cli.config.schema import names_where, options
from dpo_cli.errors import InvalidInput, Problem, RunFailed, interrupt_behind, invalid
from dpo_cli.plan.plan import Decided, Plan
from dpo_cli.plan.tokenized import DIGEST
from dpo_cli.results.judgement import Evaluation
from dpo_cli.results.summary import RunSummary
from dpo_cli.storage.atomic import way_out
from dpo_cli.storage.checkpoints import Checkpoint
from dpo_cli.storage.jsonio import read_json
from dpo_cli.storage.log import Tell
from dpo_cli.storage.run_directory import EVALUATION, MANIFEST, PLAN, SUMMARY, RunDirectory
from dpo_cli.strategies.strategies import STRATEGIES
from dpo_cli.ui.console import Console

# With another value of these, a finished run continues.
ENDING = names_where(lambda option: option.end)
SAMPLED = "kl_prompts"  # an option that the length of a training decides
OF_PROCESSES = ("num_processes", "ddp_timeout", "fsdp", "cpu_offload", "activation_offloading")  # they change no figure
REGROUPED = ("per_device_train_batch_size", "gradient_accumulation_steps")
RESTART_FIX = "resume it with the same values, or restart with --overwrite"
WEIGHTS_CHANGED = "the weights of model_name have changed since the run started"
TO_RESUME = "to continue, run the same `dpo train` command with --resume, without --overwrite"
Json = Mapping[str, Any]


@dataclass(frozen=True)
class EarlierRun:
    """A run that was started: its plan and manifest, its newest complete checkpoint if there is one, and its end."""

    plan: Json
    manifest: Json
    checkpoint: Checkpoint | None
    summary: RunSummary | None
    asked: Json  # the config at the end of a finished run; it may be newer than that of its last checkpoint

    @classmethod
    def find(cls, run: RunDirectory, tell: Tell) -> EarlierRun | None:
        """What can be resumed; None for a run without a checkpoint. `tell` reports what is damaged."""
        skipped = partial(_tell_skipped, tell)
        checkpoint, summary = next(run.checkpoints.verified(skipped), None), _end(run, tell)
        if checkpoint is None and summary is None:
            return None
        # The files of the checkpoint are verified.
        place = checkpoint.folder if checkpoint else run.path
        plan, manifest = (read_json(place / name) for name in (PLAN, MANIFEST))
        return cls(plan, manifest, checkpoint, summary, run.read_json(PLAN)["config"] if summary else plan["config"])

    @property
    def decided(self) -> Decided:
        return Decided.of(self.plan)

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return self.checkpoint.step if self.checkpoint else self.summary.steps if self.summary else 0

    def is_finished(self, plan: Plan) -> bool:
        """Whether the current config is completely done."""
        return self.summary is not None and not self.asks_on(plan)

    def asks_on(self, plan: Plan) -> bool:
        """Whether the config has another end than when the run was started or resumed."""
        return any(_differs(self.asked, plan, name) for name in ENDING)

    def left_out(self, plan: Plan) -> list[str]:
        """The options that a finished run no longer applies."""
        names = [name for name in names_where(lambda option: not option.place) if name not in OF_PROCESSES]
        return [name for name in names if _differs(self.plan["config"], plan, name)]

    def as_decided(self, loaded: Loaded, tell: Tell) -> Loaded:
        """The config with the decisions of the machine at the start of the run, for options that are still open."""
        config, before, decided = loaded.require(), self.plan["config"], self.decided
        decisions = {key: value for key, value in decided.values.items() if getattr(config, key) in ("auto", None)}
        if before.get("num_processes", 1) != config.num_processes:
            decisions.pop("fsdp", None)  # other processes may have to divide the weights, or not
        is_as_large = config.per_device_train_batch_size * config.gradient_accumulation_steps == _product(before)
        decisions |= {key: before[key] for key in REGROUPED} if is_as_large else {}
        if self.plan["sources"].get(SAMPLED) == "measured" and loaded.sources.get(SAMPLED) == "default":
            decisions[SAMPLED] = before[SAMPLED]  # so that all figures of kl_sequence are of the same prompts
        now = config.replaced(decisions)
        if is_as_large and now.per_device_train_batch_size != config.per_device_train_batch_size:
            size = f"{now.per_device_train_batch_size} x {now.gradient_accumulation_steps}"
            tell(f"note: micro-batches are {size}, as when the run started: other sizes would round differently")
        sources = {**loaded.sources, **{key: self.plan["sources"][key] for key in decisions}}
        return replace(loaded, config=now, sources=sources, day=decided.day)

    def require_same(self, loaded: Loaded, plan: Plan, manifest: Json, next_run: Path | None = None) -> None:
        """`InvalidInput` with each difference that would change the adapter.

        `next_run` is the run of the next stage, if there is one: then a finished adapter may not be trained further.
        """
        problems = [*self._differences(plan, manifest)]
        if not problems and next_run is not None and self.summary is not None and self.asks_on(plan):
            message = f"this stage is finished, after step {self.step}, and {next_run} started from its adapter; "
            message += f"the config now asks for {plan.total_steps} steps"
            fix = f"resume with the same values as before, or delete {next_run} and train this stage further"
            problems = [
                Problem("error", "resume-differs", message, fix, "max_steps" if plan.config.max_steps else "num_train_epochs")
            ]
        if problems:
            raise InvalidInput([loaded.placed(_of_stage(problem, loaded, plan)) for problem in problems])

    def _differences(self, plan: Plan, manifest: Json) -> Iterator[Problem]:
        assert plan.counts is not None
        digest = self.plan["counts"].get("digest", "")
        if changes := [*self._other_words(plan, manifest)]:
            yield from changes
        elif digest.startswith(DIGEST) and digest != plan.counts.digest:
            yield _other("the rows, or their order, differ from when the run started", "dataset")
        if plan.total_steps < self.step:
            key = "max_steps" if plan.config.max_steps else "num_train_epochs"
            yield _other(f"{self.step} steps are done, and the config asks for {plan.total_steps}", key)

    def _other_words(self, plan: Plan, manifest: Json) -> Iterator[Problem]:
        """Changes by the user."""
        for name, option in options().items():
            if not option.may_change(plan.config.strategy) and _differs(self.plan["config"], plan, name):
                was, now = (json.dumps(value) for value in (self.plan["config"][name], getattr(plan.config, name)))
                yield _other(f"{name} was {was} and is now {now}", name)
        for name in names_where(lambda option: option.place in ("data", "prompts")):
            if _contents(self.manifest.get(name, {})) != _contents(manifest[name]):  # older ones have no prompts
                yield _other(f"the content of {name} has changed since the run started", name)
        settings = _settings(self.manifest)
        if _weights(self.manifest) != _weights(manifest) or settings not in (None, _settings(manifest)):
            yield _other(WEIGHTS_CHANGED, "model_name")
        scored = [one["reward_model"] for one in (self.manifest, manifest) if one.get("reward_model")]  # older ones have none
        if len(scored) == 2 and _weights({"model": scored[0]}) != _weights({"model": scored[1]}):
            yield _other("the weights of reward_model have changed since the run started", "reward_model")

    def other_versions(self, manifest: Json) -> list[str]:
        """The versions at the start of the run that are different now."""
        before, now = self.manifest["versions"], manifest["versions"]
        return [f"{name} {before[name]}, now {now.get(name)}" for name in before if before[name] != now.get(name)]


def _of_stage(problem: Problem, loaded: Loaded, plan: Plan) -> Problem:
    """The problem in the words of a config with stages, where --overwrite would train the stages before again too."""
    if loaded.before is None:
        return problem
    fix = f"resume with the same values, or delete {plan.run_dir} and resume: the stages before it are kept"
    problem = replace(problem, fix=fix) if problem.fix == RESTART_FIX else problem
    if problem.message != WEIGHTS_CHANGED:
        return problem
    message = f"the adapter of {loaded.before.part}, from which this stage started, has changed since"
    return replace(problem, message=message, key=None)


def _end(run: RunDirectory, tell: Tell) -> RunSummary | None:
    """The metrics.json of a run that has ended, with its evaluation if it has one, and with unchanged files."""
    if not run.has(SUMMARY):
        return None
    try:
        summary, plan, _ = RunSummary.of_json(run.read_json(SUMMARY)), run.read_json(PLAN), run.read_json(MANIFEST)
        held_out = plan["counts"]["eval_pairs"]
        if run.has(EVALUATION):
            Evaluation.of_json(run.read_json(EVALUATION), STRATEGIES[plan["config"]["strategy"]].rows.noun)
        is_same = run.trained.is_dir() and run.has_its_weights()
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:  # missing or damaged: a checkpoint is used
        tell(
            f"{SUMMARY}, {EVALUATION}, {PLAN} or {MANIFEST} is not what the run wrote ({error}): the end of the run is repeated"
        )
        return None
    if summary.status == "interrupted" or (summary.status == "completed" and summary.sides is None and held_out):
        return None
    if not is_same:
        tell(f"the {run.trained.name} has changed since the run wrote it: it is written again")
    return summary if is_same else None


def _differs(before: Json, plan: Plan, name: str) -> bool:
    return name in before and bool(before[name] != getattr(plan.config, name))


def _contents(hashes: Mapping[str, str]) -> list[str]:
    """The hashes of files, without their places."""
    return sorted(hashes.values())


def _weights(manifest: Json) -> tuple[list[str], str | None, list[str]]:
    """What identifies the weights of a model: of a local one, of one from the hub, and of the models below it."""
    model = manifest["model"]
    return _contents(model["sha256"]), model.get("revision"), _contents(model["below"])


def _settings(manifest: Json) -> list[str] | None:
    """The settings for these weights; None if an older version did not record them."""
    settings = manifest["model"].get("settings")
    return None if settings is None else _contents(settings)


def _product(config: Json) -> int:
    return int(config["per_device_train_batch_size"]) * int(config["gradient_accumulation_steps"])


def _other(message: str, key: str) -> Problem:
    return Problem("error", "resume-differs", message, RESTART_FIX, key)


def _tell_skipped(tell: Tell, checkpoint: Checkpoint, damage: str) -> None:
    tell(f"checkpoint {checkpoint.folder.name} is skipped: {damage}")


def restore_run(run: RunDirectory, earlier: EarlierRun, plan: Plan, manifest: Json, tell: Tell) -> list[int]:
    """Restore the run directory to the state of the checkpoint; returns the steps of all resumes for the manifest."""
    if earlier.checkpoint is None:
        message = f"{run.path} is finished, and has no checkpoint to resume from"
        raise invalid("resume-differs", message, "restart with --overwrite", "output_dir")
    run.forget_end()
    run.take_lines(earlier.checkpoint.folder)
    tell(f"resuming from {earlier.checkpoint.folder.name}")
    if any(_differs(earlier.plan["config"], plan, name) for name in names_where(lambda option: option.end == "length")):
        tell(f"note: from here on the learning rate follows a training of {plan.total_steps} steps")
    then, now = (config.get("num_processes", 1) for config in (earlier.plan["config"], plan.config.to_json()))
    if then != now:
        plural = "" if then == 1 else "es"
        tell(f"note: started in {then} process{plural}, and resumed in {now}: the last bits may differ")
    if others := earlier.other_versions(manifest):
        tell(f"note: started with {'; '.join(others)}: the last bits may differ")
    return [*earlier.manifest.get("resumed", []), earlier.step]


@contextmanager
def resumable() -> Iterator[None]:
    """A stop inside, when the run has replaced an earlier one, says how to continue it."""
    try:
        yield
    except BaseException as error:
        if (interrupt := interrupt_behind(error)) is not None:
            interrupt.add_note(TO_RESUME)
        raise


@contextmanager
def with_resume_advice(run: RunDirectory) -> Iterator[None]:
    """A failed write inside ends the run; the error says what is kept and how to resume."""
    try:
        yield
    except BrokenPipeError:  # the reader of standard output is gone: not a fault of the disk
        raise
    except OSError as error:
        checkpoints = run.checkpoints.all()
        left = f"{checkpoints[0].folder.name} is kept" if checkpoints else "there was no checkpoint yet"
        if not run.path.is_dir():
            left = f"{run.path} was removed or renamed"
        where = error.filename or run.path
        message = f"{where}: {error.strerror or error}; {left}"
        again = f"the same command with --resume {'continues from there' if checkpoints else 'starts again'}"
        first = way_out(error, run.path)
        raise RunFailed(message, f"{first}, then {again}" if first else again) from error


def tell_on(console: Console) -> Tell:
    """A message for the screen and the log."""

    def tell(text: str) -> None:
        console.line(text)
        logging.getLogger("dpo").info("%s", text)

    return tell
