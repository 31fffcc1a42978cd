"""The input of a report: a run directory. No torch and no model: a report can be written on any machine.

A run that has not ended has fewer files: then `summary` and `evaluation` are None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dpo_cli.config.schema import options
from dpo_cli.errors import InvalidInput, invalid
from dpo_cli.plan.plan import Rounding
from dpo_cli.report.svg import Point, finite
from dpo_cli.results.codec import object_of
from dpo_cli.results.intervals import Sides
from dpo_cli.results.judgement import Evaluation
from dpo_cli.results.summary import Event, Line, RunSummary
from dpo_cli.storage.run_directory import EVALUATION, LINES, MANIFEST, PLAN, SUMMARY, RunDirectory, not_a_run
from dpo_cli.strategies.strategies import STRATEGIES
from dpo_cli.strategies.strategy import Strategy
from dpo_cli.strategies.verdict import Outcome, Verdict, verdict

# The minimum content of these files.
NEEDED = {PLAN: ("config", "sources", "counts"), MANIFEST: ("dataset", "model", "versions")}
T = TypeVar("T")


def _parsed(run: RunDirectory, name: str, parse: Callable[[object], T]) -> T:
    """A file of the run; `InvalidInput` if it is damaged."""
    try:
        return parse(run.read_json(name))
    except ValueError as error:
        raise _damaged(run, name, str(error)) from error


def _object(name: str) -> Callable[[object], dict[str, Any]]:
    """Accepts a JSON value that has the keys of `NEEDED`."""

    def parse(value: object) -> dict[str, Any]:
        if missing := [key for key in NEEDED[name] if not isinstance(value, dict) or key not in value]:
            raise ValueError(f"it has no {' and no '.join(missing)}")
        assert isinstance(value, dict)
        return value

    return parse


def _strategy(plan: object) -> Strategy:
    config = object_of(object_of(plan)["config"], "strategy", "lora_r", "model_name")
    if config["strategy"] not in STRATEGIES:
        raise ValueError(f"it has the strategy {config['strategy']}, which this version does not know")
    return STRATEGIES[str(config["strategy"])]


def _summary(strategy: Strategy, value: object) -> RunSummary:
    summary = RunSummary.of_json(value)
    _require_figures(summary.sides, strategy)
    return summary


def _evaluation(strategy: Strategy, value: object) -> Evaluation:
    evaluation = Evaluation.of_json(value, strategy.rows.noun)
    for judged in (evaluation, *evaluation.categories.values()):
        _require_figures(judged.sides, strategy)
    return evaluation


def _require_figures(sides: Sides | None, strategy: Strategy) -> None:
    """`ValueError` where a figure has no value that a page shows of every run."""
    if sides is None:
        return
    missing = [name for name in (*strategy.shown, *strategy.distance) if sides.policy.get(name) is None]
    missing += [f"gain in {name}" for name in strategy.gains if sides.gain.get(name) is None]
    if missing:
        raise ValueError(f"it has no {' and no '.join(missing)}")


def _lines(run: RunDirectory) -> list[Line]:
    try:
        values = run.read_lines()
    except ValueError as error:
        raise _damaged(run, LINES, str(error)) from error
    lines = []
    for number, value in enumerate(values, start=1):
        try:
            lines.append(Line.of_json(value))
        except ValueError as error:
            raise _damaged(run, LINES, f"line {number}: {error}") from error
    return lines


def _damaged(run: RunDirectory, name: str, why: str) -> InvalidInput:
    message = f"{run.path / name} is damaged: {why}"
    return invalid("not-a-run", message, "restore it, or train again")


@dataclass(frozen=True)
class Contents:
    """The files of a run, parsed."""

    path: Path
    plan: dict[str, Any]
    manifest: dict[str, Any]
    lines: list[Line]  # of metrics.jsonl
    summary: RunSummary | None
    evaluation: Evaluation | None

    @classmethod
    def read(cls, path: Path) -> Contents:
        run = RunDirectory(path)
        if missing := [name for name in (PLAN, MANIFEST) if not run.has(name)]:
            raise not_a_run(path, "a run", missing, (PLAN, MANIFEST))
        plan, manifest = (_parsed(run, name, _object(name)) for name in (PLAN, MANIFEST))
        strategy = _parsed(run, PLAN, _strategy)
        summary = _parsed(run, SUMMARY, partial(_summary, strategy)) if run.has(SUMMARY) else None
        evaluation = _parsed(run, EVALUATION, partial(_evaluation, strategy)) if run.has(EVALUATION) else None
        return cls(path.absolute(), plan, manifest, _lines(run), summary, evaluation)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.plan["config"]
        return config

    @property
    def strategy(self) -> str:
        return str(self.config["strategy"])

    @property
    def method(self) -> Strategy:
        return STRATEGIES[self.strategy]

    def takes(self, option: str) -> bool:
        """Whether an option of the config applies to the strategy."""
        return self.strategy in options()[option].strategies

    @property
    def noun(self) -> str:
        """The rows that it was trained on."""
        return self.method.rows.noun

    @property
    def is_whole(self) -> bool:
        """Whether all weights were trained, not an adapter."""
        return bool(self.config["lora_r"] == 0)

    @property
    def margin_rounding(self) -> float | None:
        """The size of a step's mean margin that is only rounding; None in float32, and of runs that did not measure it."""
        if not self.plan.get("rounding"):
            return None
        pairs = self.config["per_device_train_batch_size"] * self.config["gradient_accumulation_steps"]
        return Rounding(**self.plan["rounding"]).of_mean(pairs, self.config["beta"])

    @property
    def who(self) -> str:
        return "model" if self.is_whole else "adapter"

    @property
    def base(self) -> str:
        """The model that it started from and is compared with."""
        return "starting adapter" if self.config.get("reference") == "adapter" else "base"

    @property
    def has_own_loss(self) -> bool:
        """Whether its trained loss differs from the `loss` of an evaluation, which is always DPO's sigmoid loss."""
        return self.takes("loss_type") and self.config["loss_type"] != "sigmoid"

    @property
    def health(self) -> Sequence[Event]:
        return self.summary.health if self.summary else ()

    @property
    def findings(self) -> list[dict[str, Any]]:
        """The problems of config and data that were reported before the training."""
        return list(self.plan.get("problems", ()))

    @property
    def held_out(self) -> int:
        return int((self.plan["counts"] or {}).get("eval_pairs", 0))

    @property
    def held_out_prompts(self) -> int:
        return int((self.plan["counts"] or {}).get("eval_prompts", 0))

    @property
    def max_kl(self) -> float | None:
        """The limit of kl_sequence; None without one in the config."""
        return self.config.get("max_kl")

    @property
    def judged(self) -> Sides | None:
        """The figures on held-out rows; if the run has none, those of `dpo eval`."""
        if self.summary is not None and self.summary.sides is not None:
            return self.summary.sides
        return self.evaluation.sides if self.evaluation else None

    @property
    def verdict(self) -> Verdict:
        return verdict(
            Outcome(
                status=self.summary.status if self.summary else "unfinished",
                steps=self.summary.steps if self.summary else max((line.step for line in self.lines), default=0),
                judged=self.judged,
                rows=self.held_out,
                prompts=self.held_out_prompts,
                health=self.health,
                max_kl=self.max_kl,
                whole=self.is_whole,
                base=self.base,
            ),
            self.method.read,
        )

    def points(self, split: str, key: str) -> list[Point]:
        """The values of one key over the steps; for a step that was logged twice (after a resume), the last value counts.

        The trained loss is `loss` if an evaluation has the same loss, else `own_loss`; an evaluation then has
        it as `trained_loss`, in addition to DPO's.
        """
        if self.has_own_loss:
            others = {"train": {"loss": "", "own_loss": "loss"}, "eval": {"own_loss": "trained_loss"}}
            key = others[split].get(key, key)
        lines = (line for line in self.lines if line.split == split and key in line.figures)
        return sorted({line.step: finite(line.figures[key]) for line in lines}.items())
