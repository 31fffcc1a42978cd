"""All that can be said of a config before torch is imported: one look at config, data, model and hardware together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from dpo_cli.config.config import Loaded
from dpo_cli.config.options import Config
from dpo_cli.data import lint, reader
from dpo_cli.data.formats import Pair
from dpo_cli.data.reader import Dataset
from dpo_cli.data.split import split
from dpo_cli.errors import DoesNotFit, Exit, InvalidInput, Problem
from dpo_cli.hardware import models
from dpo_cli.hardware.probe import Machine
from dpo_cli.plan import DOES_NOT_FIT, Plan, does_not_fit, hardware_problems, resolve


@dataclass(frozen=True)
class Data:
    """The pairs to train on, and those of "eval_dataset" where it is named."""

    train: Dataset
    held_out: Dataset | None

    def sides(self, config: Config) -> tuple[Sequence[Pair], Sequence[Pair]]:
        """(train, held out): two files, or one divided by prompt."""
        if self.held_out is not None:
            return self.train.pairs, self.held_out.pairs
        return split(self.train.pairs, config.eval_split, config.seed)


@dataclass(frozen=True)
class Inspection:
    """All that can be said of a config before torch is imported: every problem, the data, and the plan when there is one."""

    problems: tuple[Problem, ...]
    data: Data | None
    plan: Plan | None

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def only_misfit(self) -> bool:
        """Whether the hardware is all that is wrong."""
        return all(problem.code == DOES_NOT_FIT for problem in self.errors)

    @property
    def exit_code(self) -> Exit:
        return Exit.DONE if not self.errors else Exit.UNFIT if self.only_misfit else Exit.INVALID

    def stricter(self, when: Callable[[Problem], bool]) -> Inspection:
        """The same with those warnings as errors."""
        stopped = [replace(p, severity="error") if p.severity == "warning" and when(p) else p for p in self.problems]
        return replace(self, problems=tuple(stopped))

    def require(self) -> tuple[Data, Plan]:
        """The data and the plan, or the error of what stands in the way."""
        if self.data is not None and self.plan is not None and not self.errors:
            return self.data, self.plan
        raise (DoesNotFit if self.only_misfit else InvalidInput)(self.problems)


def inspect(
    loaded: Loaded, machine: Machine, vram_gb: float | None = None, with_data: bool = True, with_fit: bool = True
) -> Inspection:
    """Check config, data, model and hardware together, so that one look shows everything that is wrong.

    Without `with_fit` the memory is not judged: a training judges it later, by its real lengths.
    """
    found = list(loaded.problems)
    wrong = {problem.key for problem in found if problem.severity == "error"}
    model = loaded.values.get("model_name") if "model_name" not in wrong else None
    about_model = list(models.problems(model)) if isinstance(model, str) else []
    found += map(loaded.placed, about_model)
    damaged = any(problem.severity == "error" for problem in about_model)
    data = None
    if with_data:
        data, about_data = _read_data(loaded, wrong)
        found += [problem if problem.file else loaded.placed(problem) for problem in about_data]
    plan = None
    if loaded.config is not None and not damaged:
        plan = resolve(loaded, machine, vram_gb=vram_gb)
        found += map(loaded.placed, hardware_problems(plan, machine, vram_gb))
        if with_fit and (misfit := does_not_fit(plan)) is not None:
            found.append(loaded.placed(misfit))
    return Inspection(tuple(found), data, plan)


def _read_data(loaded: Loaded, wrong: set[str | None]) -> tuple[Data | None, list[Problem]]:
    """The data that the config names, and what is wrong with it. A key in `wrong` was told of already."""
    found: list[Problem] = []
    sets: dict[str, Dataset] = {}
    for key in ("dataset", "eval_dataset"):
        path = loaded.values.get(key)
        if not isinstance(path, str) or key in wrong:
            continue
        if loaded.values.get("strategy") == "sft":  # whose rows have other shapes, which this version does not read
            found += reader.unreadable(path, key)
            continue
        sets[key] = reader.read(path, skip=loaded.values.get("on_bad_rows") == "skip", key=key)
        found += sets[key].problems
    if "dataset" not in sets:
        return None, found
    data = Data(sets["dataset"], sets.get("eval_dataset"))
    found += lint.check(data.train)
    if data.held_out is not None:
        found += lint.overlap(data.train, data.held_out)
    elif loaded.config is not None:
        found += _split_problems(data, loaded.config)
    return data, found


def _split_problems(data: Data, config: Config) -> Iterator[Problem]:
    if not data.train.pairs or not config.eval_split:
        return
    train, held_out = data.sides(config)
    if not train:
        fix = "lower eval_split, or add pairs with other prompts"
        yield Problem("error", "nothing-to-train", f"all {len(held_out)} pairs are held out", fix, "eval_split")
    if not held_out:
        fix = "raise eval_split, or add pairs with other prompts"
        yield Problem("warning", "nothing-held-out", "no prompt falls into the held-out share", fix, "eval_split")
