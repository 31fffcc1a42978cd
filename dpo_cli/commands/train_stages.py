"""`dpo train` before torch is imported: every stage is checked, and then each is trained on the one before it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from dpo_cli.commands import round_sampling
from dpo_cli.commands.session import composer_for
from dpo_cli.config.config import ConfigLike, Loaded, load_stages
from dpo_cli.config.rounds import rounds_of
from dpo_cli.config.rules import OF_PROCESSES
from dpo_cli.data.dataset import hub_ids
from dpo_cli.data.hub_datasets import fetch
from dpo_cli.errors import Exit, InvalidInput, Problem, UsageError
from dpo_cli.hardware.machine import Machine, probe
from dpo_cli.models.hub_models import require
from dpo_cli.plan.plan import Plan
from dpo_cli.plan.preflight import Inspection, inspect
from dpo_cli.results.codec import JsonObject
from dpo_cli.storage.run_directory import MANIFEST, PAIRS, SUMMARY, RunDirectory
from dpo_cli.storage.world import ALONE, AUTO, Place, Processes, World, hidden_from_libraries
from dpo_cli.ui.console import Console

STAGES_FIX = "remove output_dir from the stages: each then has its own folder"


def train_stages(
    config: ConfigLike,
    overrides: Sequence[str],
    console: Console,
    *,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
) -> tuple[JsonObject, Exit]:
    """Train a config, in one stage or several: what `train --json` prints, and the exit code."""
    if overwrite and resume:
        raise UsageError("--overwrite restarts a run, and --resume continues it", "remove one of them")
    if (
        resume and isinstance(config, str) and RunDirectory.is_plan(Path(config))
    ):  # the run directory that holds the plan, even if it was moved
        overrides = [f"output_dir={Path(config).absolute().parent}", *overrides]
    stages = [part for loaded in load_stages(config, overrides) for part in rounds_of(loaded)]
    with _joined(stages) as world:
        return _trained([_in_world(loaded, world) for loaded in stages], console, overwrite, resume, dry_run, world)


@contextmanager
def _joined(stages: Sequence[Loaded]) -> Iterator[World]:
    """The processes that a launcher has started, connected with each other; or this one alone."""
    place = Place.of(os.environ)
    if place is None:
        with hidden_from_libraries():
            yield ALONE
        return
    configs = [loaded.require() for loaded in stages]
    for loaded, config in zip(stages, configs, strict=True):
        if loaded.sources["num_processes"] != "default" and config.num_processes not in (AUTO, place.size):
            message = f"num_processes is {config.num_processes}, but {place.size} processes were started"
            fix = "remove num_processes: whoever starts the processes says how many there are"
            raise InvalidInput([loaded.placed(Problem("error", "other-processes", message, fix, "num_processes"))])
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what a lost connection means is said by dpo
    if any(config.device != "cpu" for config in configs):
        place.take_card()
    composer_for(configs)
    world = Processes(place, max(config.ddp_timeout for config in configs))
    yield world
    world.leave()


def _in_world(loaded: Loaded, world: World) -> Loaded:
    """The config with the number of processes that there are."""
    if world.size == 1 or loaded.config is None:
        return loaded
    values = {**loaded.values, "num_processes": world.size, **({"rounds": loaded.rounds} if loaded.round else {})}
    problems = [problem for rule in OF_PROCESSES for problem in rule(values, loaded.values)]
    if any(problem.severity == "error" for problem in problems):
        raise InvalidInput([loaded.placed(problem) for problem in problems])
    return replace(loaded, values=values, config=loaded.config.replaced({"num_processes": world.size}))


def _trained(
    stages: Sequence[Loaded], console: Console, overwrite: bool, resume: bool, dry_run: bool, world: World
) -> tuple[JsonObject, Exit]:
    """The stages, one after the other."""
    machine = replace(probe(), processes=world.local_size)
    fetch_data(stages, console)
    may_exist = overwrite or dry_run or resume
    inspections, plans = world.together(lambda: _inspections(stages, machine, dry_run, may_exist, may_resume=resume))
    for name in dict.fromkeys(plan.model.foundation for plan in plans):
        require(name)
    composer = composer_for([plan.config for plan in plans])
    # The run of the next stage, if it has started on the adapter of this one.
    started = [
        plan.run_dir
        if (loaded.before or loaded.rewarded_by) and any(map(RunDirectory(plan.run_dir).has, (MANIFEST, PAIRS)))
        else None
        for loaded, plan in zip(stages, plans, strict=True)
    ]
    results: list[JsonObject] = []
    try:
        for loaded in stages:
            next_run = next((run for later, run in zip(stages, started, strict=True) if run and _uses(later, loaded)), None)
            _tell_part(loaded, stages[-1], console)
            ready = loaded.on_foundation() if dry_run and not (resume and _has_its_start(loaded)) else loaded
            # Removed here, since it holds the rows.
            inspection = inspections.popleft() or world.together(partial(inspected, ready, machine))
            sampled: JsonObject = {}
            if loaded.round and (of_round := _round(ready, inspection, console, overwrite, dry_run)) is not None:
                ready, sampled = of_round.loaded, {"sampled": of_round.sampled}
                inspection = inspected(ready, machine)
            result, code = composer.train(ready, inspection, machine, console, overwrite, dry_run, resume, next_run, world)
            del inspection
            results.append({**result, **sampled})
            if code is not Exit.DONE:
                break
    finally:  # also if a later round has no pairs
        of_rounds = [result for result in results if "sampled" in result]
        if of_rounds and not dry_run:
            round_sampling.show(of_rounds, console)
    several = {"stages": results} if stages[-1].stage else {"rounds": results} if stages[-1].round else {}
    return {**results[-1], **several}, code


def _uses(later: Loaded, loaded: Loaded) -> bool:
    """Whether a stage starts from the run of another, or is rewarded by it."""
    return loaded.values["output_dir"] in (later.values.get("model_name"), later.values.get("reward_model"))


def _tell_part(loaded: Loaded, last: Loaded, console: Console) -> None:
    """Which stage and which round starts."""
    stage = f"stage {loaded.stage} of {last.stage}: {loaded.require().strategy}" if loaded.stage else ""
    this_round = f"round {loaded.round} of {loaded.rounds}" if loaded.round else ""
    if part := ", ".join(filter(None, (stage, this_round))):
        console.line(part)


def _round(
    loaded: Loaded, inspection: Inspection, console: Console, overwrite: bool, dry_run: bool
) -> round_sampling.Round | None:
    """A round with its pairs; for a dry run None if they are not made: its plan is then that of the given pairs."""
    if not dry_run:
        return round_sampling.sample(loaded, inspection, console, overwrite)
    of_round = round_sampling.known(loaded, inspection.require()[1].run_dir)
    if of_round is None:
        console.line("the pairs of this round are not made yet: its plan is shown for the pairs of the dataset")
    return of_round


def fetch_data(configs: Sequence[Loaded], console: Console) -> None:
    """Fetch the data sets that these configs name on a hub."""
    for name in dict.fromkeys(name for loaded in configs for name in hub_ids(loaded.require().to_json())):
        console.line(f"fetching the dataset {name}")
        fetch(name)


def _inspections(
    stages: Sequence[Loaded], machine: Machine, dry_run: bool, may_exist: bool, may_resume: bool
) -> tuple[deque[Inspection | None], list[Plan]]:
    """Each stage, inspected before torch is imported and training starts; None for a stage on one that is not trained yet."""
    plans: list[Plan] = []
    inspections: deque[Inspection | None] = deque()
    for loaded in stages:
        is_first_to_run = loaded.foundation is None or (dry_run and not (may_resume and _has_its_start(loaded)))
        inspection = inspected(loaded.on_foundation(), machine)
        inspections.append(inspection if is_first_to_run else None)
        _, plan = inspection.require()
        RunDirectory.check(plan.run_dir, may_exist)
        round_sampling.require_unused(plan.run_dir, may_exist)
        if not dry_run:
            RunDirectory.require_place(plan.run_dir)
        if plan.run_dir in [earlier.run_dir for earlier in plans]:
            message = f"two stages would write to {plan.run_dir}"
            raise InvalidInput([loaded.placed(Problem("error", "stages-one-place", message, STAGES_FIX, "output_dir"))])
        plans.append(plan)
    return inspections, plans


def _has_its_start(loaded: Loaded) -> bool:
    """Whether the run that a stage starts from has ended."""
    return loaded.foundation is not None and RunDirectory(Path(str(loaded.values["model_name"]))).has(SUMMARY)


def inspected(loaded: Loaded, machine: Machine) -> Inspection:
    """What a training needs to know of a config; memory is checked later, with the real lengths."""
    return inspect(loaded, machine, with_fit=False).stricter(lambda problem: problem.stops_training)
