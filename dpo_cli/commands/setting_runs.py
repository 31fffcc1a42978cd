"""The runs of a sweep: which settings there are, and how several of them train at once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_cli.commands.many_runs import EndedRuns, require_folder, require_no_errors, write_json
from dpo_cli.commands.optuna_study import Asked, Grid, Outcome, Source, opened, require_optuna
from dpo_cli.commands.own_process import STOPPED, Child, Children
from dpo_cli.commands.train_stages import fetch_data, inspected
from dpo_cli.config.config import ConfigLike, Loaded, load_settings
from dpo_cli.config.options import Config
from dpo_cli.config.search_space import MOST, Setting, Space, folder_name
from dpo_cli.config.stages import default_folder
from dpo_cli.errors import Exit, InvalidInput, Problem, UsageError, invalid
from dpo_cli.evaluation.selection import Criterion
from dpo_cli.hardware.machine import Machine
from dpo_cli.models.hub_models import require
from dpo_cli.plan.preflight import inspect
from dpo_cli.results.codec import JsonObject
from dpo_cli.results.judgement import Evaluation
from dpo_cli.results.methods_compared import MethodRun
from dpo_cli.results.settings_swept import SettingRow
from dpo_cli.runs.kept_evaluation import basis_of, digest_of
from dpo_cli.storage.lock import is_locked_now
from dpo_cli.storage.processes import WATCH_SECONDS, cores
from dpo_cli.storage.run_directory import EVALUATION, LOCK, RunDirectory
from dpo_cli.strategies.figures import LINE_FIGURES
from dpo_cli.strategies.strategies import STRATEGIES
from dpo_cli.strategies.strategy import Strategy
from dpo_cli.ui.console import Console

PROGRESS, STUDY, MESSAGES = "progress.json", "study.db", "messages.txt"
PRUNED = "pruned"
LEFT_ALONE = 1 / 3  # of the steps of a training: a small learning rate is behind at first
# Of the config, and not of its runs: the sweep has a folder of its own, and its runs are not uploaded.
NOT_OF_RUNS = ("output_dir", "compare", "push_to_hub", "hub_model_id")
ONE_TRAINING = (
    "name the run of the stage before in model_name, or that of a reward model in reward_model, and sweep one training"
)


@dataclass(frozen=True)
class Sweep:
    """What is asked for: the space, the config that all settings share, and the folder."""

    space: Space
    trials: int | None  # settings to draw; None for a grid
    probes: Sequence[Loaded]  # configs that have each value, or each end of a range, at least once
    folder: Path

    @classmethod
    def of(cls, config: ConfigLike, words: Sequence[str], trials: int | None) -> Sweep:
        """`UsageError` for a wrong range or grid; `InvalidInput` with every problem of the values and of the config."""
        space = Space.of(words)
        if not space.is_grid and trials is None:
            way = "write LOW..HIGH@COUNT for so many values, or --trials N to draw settings"
            raise UsageError("a range without a count has no list of values", way)
        if space.is_grid and (trials is None or trials >= space.size):
            trials = None
            if space.size > MOST:
                raise UsageError(
                    f"the grid has {space.size:,} settings", f"write fewer values, or draw some with --trials {MOST}"
                )
        settings = [*space.settings()] if space.is_grid and trials is None else [*space.probes()]
        loaded = load_settings(config, space.fixed, settings)
        problems = [*space.problems, *(problem for stages in loaded for one in stages for problem in one.problems)]
        first = loaded[0][0]
        if any(len(stages) > 1 or one.values.get("rounds") is not None for stages in loaded for one in stages[:1]):
            message = (
                "a sweep varies one training, and this config has several: stages, rounds, or rlhf with a reward model to train"
            )
            problems.append(Problem("error", "sweep-of-several", message, ONE_TRAINING, None, first.file))
        if any(problem.severity == "error" for problem in problems):
            raise InvalidInput(list(dict.fromkeys(problems)))
        named, place = first.values.get("output_dir"), default_folder(first.file)
        folder = Path(str(named)) if named else place.with_name(f"{place.name}-sweep")
        return cls(space, trials, [stages[0] for stages in loaded], folder)

    @property
    def first(self) -> Loaded:
        return self.probes[0]

    @property
    def config(self) -> Config:
        return self.first.require()

    @property
    def strategy(self) -> Strategy:
        return STRATEGIES[self.config.strategy]

    @cached_property
    def criterion(self) -> Criterion:
        return Criterion.of(self.strategy)

    @property
    def max_kl(self) -> float | None:
        """The limit of kl_sequence, for a strategy that has one."""
        return self.config.max_kl if self.strategy.refers else None

    @property
    def given(self) -> dict[str, Any]:
        """The config as it is given, without its defaults and without the keys of the sweep."""
        keys = {axis.key for axis in self.space.axes}
        named = {key for key, source in self.first.sources.items() if source in ("config", "override")}
        return {key: value for key, value in self.first.values.items() if key in named - keys}

    def values(self, setting: Setting) -> dict[str, Any]:
        """The config of a setting's run. The held-out rows are the same in all."""
        shared = {key: value for key, value in self.given.items() if key not in NOT_OF_RUNS}
        same = {"seed": self.config.seed, "split_seed": self.config.split_seed}
        return {**shared, **setting, **same, "output_dir": str(self.place(setting).path)}

    def place(self, setting: Setting) -> RunDirectory:
        return RunDirectory(self.folder / folder_name(setting))

    def require_sound(self, machine: Machine, console: Console) -> int:
        """`InvalidInput` with the problems of config, data, model and hardware; the data are read once.

        Returns the number of steps of a training, by the data that the first setting trains on.
        """
        fetch_data(self.probes[:1], console)
        inspection = inspected(self.first, machine)
        others = [
            inspect(one, machine, with_data=False, with_fit=False).stricter(lambda problem: problem.stops_training)
            for one in self.probes[1:]
        ]
        problems = list(dict.fromkeys(problem for one in (inspection, *others) for problem in one.problems))
        require_no_errors({"": problems}, "setting")
        data, plan = inspection.require()
        if not (data.held_out.pairs if data.held_out is not None else data.split.rows):
            message = "nothing is held out to choose a setting by"
            raise invalid("nothing-to-compare", message, "set or raise eval_split", "eval_split", self.first.file)
        require(plan.model.foundation)
        require_folder(self.folder, "a sweep")
        if self.trials is not None:
            require_optuna()
        return plan.steps_over(max(1, data.train.pairs - data.split.rows))

    def progress(self) -> EndedRuns:
        basis = basis_of(self.config.to_json())
        return EndedRuns.read(self.folder / PROGRESS, digest_of({"config": self.values({}), **basis}))

    @contextmanager
    def source(self, steps: int) -> Iterator[Source]:
        """The settings: of the grid, or of the study of this space and config, whose trainings have so many steps."""
        if self.trials is None:
            yield Grid(iter(self.space.settings()))
            return
        decides: JsonObject = {"space": self.space.to_json(), "config": self.values({}), "by": self.criterion.name}
        prunes_from = None if self.config.eval_steps is None else round(steps * LEFT_ALONE)
        place, name, is_better_large = self.folder / STUDY, digest_of(decides), self.criterion.is_better_large
        with opened(place, name, self.space, self.trials, self.config.seed, is_better_large, prunes_from) as source:
            yield source

    def clear(self) -> None:
        """Remove what earlier calls left: each file NAME.json whose NAME is a folder, with that folder's run."""
        for name in (PROGRESS, STUDY):
            (self.folder / name).unlink(missing_ok=True)
        for path in (file.with_suffix("") for file in self.folder.glob("*.json")):
            if path.is_dir():
                with RunDirectory.claim(path, overwrite=True, resume=False) as run:
                    run.checkpoints.clear(with_damaged=True)
                    run.clear()


@dataclass
class Running:
    """A setting that trains."""

    asked: Asked
    run: RunDirectory
    child: Child
    slot: int  # of so many as train at once
    seen: int = -1  # the step of its last evaluation that the source has seen
    same: list[Asked] = field(default_factory=list)  # the same setting, drawn again while it trains


@dataclass
class Trainings:
    """Trains the settings that a source gives, some at once, each in a process of its own."""

    sweep: Sweep
    progress: EndedRuns
    source: Source
    at_once: int
    machine: Machine
    console: Console
    rows: dict[str, SettingRow] = field(default_factory=dict)  # by name; a sampler may draw a setting twice
    _order: dict[str, None] = field(default_factory=dict)  # the names, as they were asked for
    _running: list[Running] = field(default_factory=list)

    def all(self) -> list[SettingRow]:
        """Every setting with its run. An interrupt stops those that train, with a checkpoint each."""
        with Children() as children:
            while self._start(children):
                ended = children.ended()
                for running in [one for one in self._running if one.child in ended]:
                    self._running.remove(running)
                    self._end(running)
                if self.source.prunes:
                    for running in self._running:
                        self._look(running)
        return [self.rows[name] for name in self._order]

    def _start(self, children: Children) -> bool:
        """Start as many settings as can train now; whether any trains."""
        while len(self._running) < self.at_once and (asked := self.source.next()) is not None:
            name, run = folder_name(asked.setting), self.sweep.place(asked.setting)
            self._order[name] = None
            if name in self.rows:
                self.source.tell(asked, self._outcome(self.rows[name]))
            elif asked.is_pruned or self.progress.ended.get(name) == PRUNED:
                self._settle(asked, self._pruned(run))
            elif (known := self.progress.known(name, self.sweep.config.seed, [run])) is not None:
                self._settle(asked, known)
            elif (twin := next((one for one in self._running if one.run.path == run.path), None)) is not None:
                twin.same.append(asked)
            else:
                self._train(asked, run, children)
        return bool(self._running)

    def _train(self, asked: Asked, run: RunDirectory, children: Children) -> None:
        values, file = self.sweep.values(asked.setting), self.sweep.folder / f"{run.path.name}.json"
        write_json(file, values)
        _wait_for_end(run)
        slot = min({*range(self.at_once)} - {one.slot for one in self._running})
        self.console.line(f"training {run.path}")
        log = self.sweep.folder / f"{run.path.name}-{MESSAGES}" if self.at_once > 1 else None
        variables = share_of_machine(slot, self.at_once, len(self.machine.gpus), os.environ)
        child = children.start(["train", str(file), "--resume"], variables, log)
        self._running.append(Running(asked, run, child, slot))

    def _look(self, running: Running) -> None:
        """Show the source the evaluations of a run since the last look; stop the run if the source says so."""
        name = watched(self.sweep.strategy, self.sweep.criterion)
        with suppress(OSError, ValueError):  # a line that is being written
            for line in running.run.read_lines():
                value = line.get(name)
                if line["split"] != "eval" or line["step"] <= running.seen or value is None:
                    continue
                running.seen = line["step"]
                if self.source.see(running.asked, line["step"], value) and not running.child.is_stopped:
                    self.console.line(f"{running.run.path.name}: stopped after step {line['step']}, others are better by then")
                    running.child.stop()

    def _end(self, running: Running) -> None:
        code, document = running.child.result()
        name, seed = running.run.path.name, self.sweep.config.seed
        if running.child.is_stopped and code in STOPPED:
            self.progress.ended[name] = PRUNED
            self.progress.save()
            self._settle(running.asked, self._pruned(running.run))
        else:
            self._settle(running.asked, self.progress.ended_with(name, seed, [running.run], code, document))
        for asked in running.same:
            self.source.tell(asked, self._outcome(self.rows[name]))

    def _pruned(self, run: RunDirectory) -> MethodRun:
        message = "stopped early: the median of the settings before was better at the same step"
        return MethodRun(self.sweep.config.seed, str(run.path), PRUNED, int(Exit.SIGTERM), message)

    def _settle(self, asked: Asked, run: MethodRun) -> None:
        """Keep the row of a setting that has ended, and tell the source."""
        row = self.rows[folder_name(asked.setting)] = self._row(asked.setting, run)
        self.source.tell(asked, self._outcome(row))
        figure = row.figures.get(self.sweep.criterion.name)
        if self.at_once > 1:
            self.console.line(
                f"{row.name}: {run.status}" + (f", {self.sweep.criterion.name} {figure.value:.4g}" if figure else "")
            )

    def _row(self, setting: Setting, run: MethodRun) -> SettingRow:
        row = SettingRow(folder_name(setting), setting, run)
        if run.status != "completed":
            return replace(row, excluded=run.message or run.status)
        place = RunDirectory(Path(run.run_dir))
        sides = evaluation_of(place, self.sweep.strategy).sides if place.has(EVALUATION) else None
        if sides is None:
            return replace(row, excluded="it is not evaluated")
        name, limit = self.sweep.criterion.name, self.sweep.max_kl
        figures = {name: sides.of("gain" if self.sweep.criterion.is_gain else "policy").get(name)}
        figures |= {kl: sides.policy.get(kl) for kl in ("kl_token", "kl_sequence")}
        figure, kl = figures[name], figures["kl_sequence"]
        row = replace(row, figures={key: value for key, value in figures.items() if value is not None})
        if figure is None or not figure.is_finite:
            return replace(row, excluded="its figures are not finite")
        if limit is not None and kl is not None and not kl.value <= limit:
            return replace(row, excluded=f"its KL per answer is {kl.value:.3g}, above max_kl {limit:g}")
        return row

    def _outcome(self, row: SettingRow) -> Outcome:
        figure, kl, limit = row.figures.get(self.sweep.criterion.name), row.figures.get("kl_sequence"), self.sweep.max_kl
        above = kl.value - limit if kl is not None and limit is not None else 0.0
        value = figure.value if figure is not None and figure.is_finite else None
        return Outcome(value, above, row.run.status == PRUNED, row.run.status == "failed")


def evaluation_of(run: RunDirectory, strategy: Strategy) -> Evaluation:
    return Evaluation.of_json(run.read_json(EVALUATION), strategy.rows.noun)


def watched(strategy: Strategy, criterion: Criterion) -> str:
    """The figure of an evaluation line that comes nearest to that of the choice, and has the same direction."""
    names = (criterion.name, *strategy.shown)
    return next(
        name for name in names if name in LINE_FIGURES and LINE_FIGURES[name].is_better_large == criterion.is_better_large
    )


def share_of_machine(slot: int, at_once: int, gpus: int, variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of one of several trainings: its part of the cores, and a GPU of its own where there are several.

    What the user has set stays, except that each training gets one of the GPUs that CUDA_VISIBLE_DEVICES lists.
    """
    share: dict[str, str] = {}
    if at_once == 1:
        return share
    if "OMP_NUM_THREADS" not in variables:
        share["OMP_NUM_THREADS"] = str(max(1, cores() // at_once))
    visible = [name for name in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or list(map(str, range(gpus)))
    if len(visible) > 1:
        share["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
    return share


def _wait_for_end(run: RunDirectory) -> None:
    """Wait until the training of a sweep that was killed has seen that, and has left its run directory."""
    until = time.monotonic() + 3 * WATCH_SECONDS
    while run.has(LOCK) and time.monotonic() < until:
        with (run.path / LOCK).open("a+b") as file:
            if is_locked_now(file):
                return
        time.sleep(WATCH_SECONDS / 4)
