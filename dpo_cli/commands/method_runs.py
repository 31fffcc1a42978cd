"""The runs of a comparison: which there are, how long each trains, and which have ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dpo_cli.commands.budgets import TRIAL_STEPS, Budget, Ends, plans_of
from dpo_cli.commands.many_runs import EndedRuns, require_folder, require_no_errors, write_json
from dpo_cli.commands.own_process import dpo
from dpo_cli.commands.train_stages import fetch_data, inspected
from dpo_cli.config.compare_rules import parts_of
from dpo_cli.config.config import ConfigLike, Loaded, load_methods, load_stages
from dpo_cli.config.methods import NOT_SHARED, Method
from dpo_cli.config.options import Config
from dpo_cli.config.schema import options
from dpo_cli.config.stages import belongs, default_folder
from dpo_cli.errors import Exit, InvalidInput, RunFailed, invalid
from dpo_cli.hardware.machine import Machine, probe
from dpo_cli.models.adapter_config import SHAPE
from dpo_cli.models.hub_models import require
from dpo_cli.plan.preflight import Inspection
from dpo_cli.results.codec import JsonObject
from dpo_cli.results.methods_compared import MethodRow, MethodRun
from dpo_cli.runs.kept_evaluation import digest_of
from dpo_cli.storage.run_directory import RunDirectory
from dpo_cli.strategies.dpo import DPO
from dpo_cli.ui.console import Console

PROGRESS = "progress.json"
TRIAL = "trial"  # stands for the seed in the name of a trial's run


@dataclass(frozen=True)
class Comparison:
    """What is asked for: the methods with their configs, the seeds, and the folder."""

    whole: Loaded
    methods: Sequence[tuple[Method, Sequence[Loaded]]]
    folder: Path

    @classmethod
    def of(cls, config: ConfigLike, overrides: Sequence[str]) -> Comparison:
        """Raises `InvalidInput` with every problem of `compare` and of the methods' configs."""
        whole, methods = load_methods(config, overrides)
        if not methods:
            raise InvalidInput(whole.problems)
        require_no_errors({method.name: [p for one in stages for p in one.problems] for method, stages in methods}, "method")
        for method, stages in methods:
            if any(one.before is not None and _merges(one.before.require(), one.require()) for one in stages):
                message = f"the method {method.name} merges one of its stages, so that its last adapter is not one of the base"
                fix = "give all of its stages an adapter of the same shape, and remove reference: base"
                raise invalid("method-merges", message, fix, "compare", whole.file)
        named = whole.values.get("output_dir")
        return cls(whole, methods, Path(str(named)) if named else default_folder(whole.file))

    @property
    def parts(self) -> dict[str, Any]:
        return parts_of(self.whole.values)

    @property
    def seeds(self) -> list[int]:
        first = int(self.whole.values["seed"])
        return list(range(first, first + self.parts["seeds"]))

    @property
    def held_out(self) -> dict[str, Any]:
        """The config by which every run is evaluated: that of pairs, on the base, with the held-out set of all."""
        given = {key for key, source in self.whole.sources.items() if source in ("config", "override")}
        own = {key for key in given if key not in NOT_SHARED and belongs(key, DPO.name) and options()[key].group != "Training"}
        values = {key: value for key, value in self.whole.values.items() if key in own}
        seed = {"seed": self.seeds[0], "split_seed": self.whole.values["split_seed"]}
        return {**values, "strategy": DPO.name, **seed, "output_dir": str(self.folder)}

    def inspections(self, machine: Machine, console: Console) -> dict[str, list[Inspection]]:
        """Every stage of every method, inspected before torch is imported; `InvalidInput` with every problem."""
        fetch_data([loaded for _, stages in self.methods for loaded in stages], console)
        made = {
            method.name: [inspected(loaded.on_foundation(), machine) for loaded in stages] for method, stages in self.methods
        }
        require_no_errors({name: [p for one in stages for p in one.problems] for name, stages in made.items()}, "method")
        for name in dict.fromkeys(one.require()[1].model.foundation for stages in made.values() for one in stages):
            require(name)
        return made

    def require_place(self) -> None:
        """`InvalidInput` where the folder holds a run, or cannot be written."""
        require_folder(self.folder, "a comparison")

    def place(self, method: Method, name: object) -> Path:
        return self.folder / f"{method.name}-{name}"

    def stages(self, method: Method, name: object, seed: int, ends: Ends) -> tuple[dict[str, Any], list[RunDirectory]]:
        """The config of a run, and the run directories of its stages."""
        split_seed = int(self.whole.values["split_seed"])
        values = method.as_run(seed, split_seed, str(self.place(method, name)), ends)
        loaded = load_stages(values)
        folders = [self.place(method, name)] if len(loaded) == 1 else [Path(str(one.values["output_dir"])) for one in loaded]
        return values, [RunDirectory(folder) for folder in folders]

    def clear(self) -> None:
        """Remove what earlier runs of this comparison ended with: they start again."""
        (self.folder / PROGRESS).unlink(missing_ok=True)
        for method, stages in self.methods:
            for name in (*self.seeds, "trial"):
                _, runs = self.stages(method, name, self.seeds[0], [{}] * len(stages))
                for path in (run.path for run in runs if run.path.is_dir()):
                    with RunDirectory.claim(path, overwrite=True, resume=False) as run:
                        run.checkpoints.clear(with_damaged=True)
                        run.clear()


def _merges(before: Config, config: Config) -> bool:
    """Whether a stage cannot continue the adapter of the stage before it."""
    is_same = all(getattr(before, name) == getattr(config, name) for name in SHAPE)
    return config.reference == "base" or not before.lora_r or not is_same


@dataclass
class Progress(EndedRuns):
    """What the budget decided, and which runs have ended, as long as the methods, data, model and code do not change."""

    amount: float | None = None  # the budget's value
    ends: dict[str, Ends] = field(default_factory=dict)

    @classmethod
    def of_comparison(cls, asked: Comparison, basis: JsonObject) -> Progress:
        values = {method.name: method.values for method, _ in asked.methods}
        decides = {"methods": values, "compare": asked.parts, "held out": asked.held_out, **basis}
        return cls.read(asked.folder / PROGRESS, digest_of(decides))


@dataclass(frozen=True)
class Training:
    """Trains the runs of a comparison, one after the other, each in a process of its own."""

    asked: Comparison
    progress: Progress
    console: Console

    def decide(self, inspections: Mapping[str, Sequence[Inspection]]) -> dict[str, str]:
        """How long each method trains, if that is not known; for a method that could not be tried, the reason."""
        if self.progress.amount is not None:
            return {}
        budget = Budget(self.asked.parts["budget"], self.asked.parts["budget_value"])
        plans = {
            method.name: plans_of(list(zip(stages, inspections[method.name], strict=True)), probe(), self.console.line)
            for method, stages in self.asked.methods
        }
        if not all(plan.counts and plan.counts.eval_pairs for stages in plans.values() for plan in stages):
            message, fix = "nothing is held out to compare the methods on", "set or raise eval_split"
            raise invalid("nothing-to-compare", message, fix, "eval_split")
        amount, faults = budget.amount(plans), {}
        for method, stages in self.asked.methods:
            try:
                ends = budget.ends(amount, plans[method.name], partial(self._tried, method, len(stages)))
                self.progress.ends[method.name] = ends
            except RunFailed as error:  # the other methods go on
                faults[method.name] = error.message
        self.progress.amount = None if faults else amount
        self.progress.save()
        return faults

    def _tried(self, method: Method, stages: int) -> list[Path]:
        """The runs of a few steps of each stage."""
        few: Ends = [{"max_steps": TRIAL_STEPS}] * stages
        self.console.line(f"{method.name}: a trial of {TRIAL_STEPS} steps")
        made = self._run(method, TRIAL, self.asked.seeds[0], few)
        if made.status == "failed":
            raise RunFailed(f"its trial failed: {made.message}")
        return [run.path for run in self.asked.stages(method, TRIAL, self.asked.seeds[0], few)[1]]

    def row(self, method: Method, fault: str | None) -> MethodRow:
        """The runs of a method; with a `fault` they cannot be trained."""
        ends, made = self.progress.ends.get(method.name, []), []
        for seed in self.asked.seeds:
            if fault is not None:
                made.append(MethodRun(seed, str(self.asked.place(method, seed)), "failed", int(Exit.FAILED), fault))
            else:
                self.console.line(f"{method.name}, seed {seed}: {self.asked.place(method, seed)}")
                made.append(self._run(method, seed, seed, ends))
        kinds = [loaded.require().strategy for own, stages in self.asked.methods if own is method for loaded in stages]
        steps = [end.get("max_steps") for end in ends]
        keys = _own_keys(method, [one for one, _ in self.asked.methods])
        return MethodRow(method.name, kinds, keys, [step if isinstance(step, int) else None for step in steps], made)

    def _run(self, method: Method, name: object, seed: int, ends: Ends) -> MethodRun:
        """Train, or continue, one run; not one that has ended. A failure is in the result, and tried again by the next call."""
        values, runs = self.asked.stages(method, name, seed, ends)
        called = self.asked.place(method, name).name
        if (known := self.progress.known(called, seed, runs)) is not None:
            return known
        file = self.asked.folder / f"{called}.json"
        write_json(file, values)
        return self.progress.ended_with(called, seed, runs, *dpo(["train", str(file), "--resume"]))


def _own_keys(method: Method, methods: Sequence[Method]) -> dict[str, object]:
    """The keys of a method's config that are not those of all methods: its own ones, and those of the file for its strategy."""
    own = {
        key: value
        for key, value in method.values.items()
        if key in method.own or any(key not in other.values for other in methods)
    }
    stages = own.pop("stages", ())
    assert isinstance(stages, list | tuple)
    return own | {f"stage {number}: {key}": value for number, stage in enumerate(stages, 1) for key, value in stage.items()}
