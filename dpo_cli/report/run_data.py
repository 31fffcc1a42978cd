"""What a report reads of a run directory. No torch, and no model: a run can be told of on any machine.

Of a run that has not ended there is less: `summary` and `evaluation` are None then.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.config.schema import options
from dpo_cli.errors import InvalidInput, invalid
from dpo_cli.report.svg import Point
from dpo_cli.storage.run_directory import EVALUATION, LINES, MANIFEST, PLAN, SUMMARY, RunDirectory
from dpo_cli.strategies.strategies import STRATEGIES
from dpo_cli.strategies.strategy import Strategy
from dpo_cli.strategies.verdict import Outcome, Verdict, verdict

# What a file of a run has to have at least.
NEEDED = {
    PLAN: ("config", "sources", "counts"),
    MANIFEST: ("dataset", "model", "versions"),
    SUMMARY: ("status", "steps", "seconds", "eval", "base", "gain", "health"),
    EVALUATION: ("policy", "rows", "best", "worst", "samples"),
}


def _parsed(run: RunDirectory, name: str) -> dict[str, Any]:
    """A file of the run; `InvalidInput` where it is damaged."""
    try:
        value = run.read_json(name)
    except ValueError as error:
        raise _damaged(run, name, str(error)) from error
    missing = [key for key in NEEDED[name] if not isinstance(value, dict) or key not in value]
    if missing:
        raise _damaged(run, name, f"it has no {' and no '.join(missing)}")
    return dict(value)


def _lines(run: RunDirectory) -> list[dict[str, Any]]:
    try:
        lines = run.read_lines()
    except ValueError as error:
        raise _damaged(run, LINES, str(error)) from error
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or "split" not in line or not isinstance(line.get("step"), int):
            raise _damaged(run, LINES, f"line {number} has no split and step")
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
    lines: list[dict[str, Any]]  # of metrics.jsonl
    summary: dict[str, Any] | None
    evaluation: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> Contents:
        run = RunDirectory(path)
        if missing := [name for name in (PLAN, MANIFEST) if not run.has(name)]:
            message = f"{path} is not a run: it has no {' and no '.join(missing)}"
            raise invalid("not-a-run", message, "name the output_dir of a `dpo train`")
        plan, manifest = (_parsed(run, name) for name in (PLAN, MANIFEST))
        summary, evaluation = (_parsed(run, name) if run.has(name) else None for name in (SUMMARY, EVALUATION))
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
        """Whether an option of the config has to do with the strategy."""
        return self.strategy in options()[option].strategies

    @property
    def noun(self) -> str:
        """What it was trained on."""
        return self.method.rows.noun

    @property
    def is_whole(self) -> bool:
        """Whether every weight was trained, and not an adapter."""
        return bool(self.config["lora_r"] == 0)

    @property
    def who(self) -> str:
        return "model" if self.is_whole else "adapter"

    @property
    def base(self) -> str:
        """What it started from, and is compared with."""
        return "starting adapter" if self.config.get("reference") == "adapter" else "base"

    @property
    def has_own_loss(self) -> bool:
        """Whether it minimised another loss than the `loss` of an evaluation, which is always DPO's sigmoid loss."""
        return self.takes("loss_type") and self.config["loss_type"] != "sigmoid"

    @property
    def health(self) -> list[dict[str, Any]]:
        return list((self.summary or {}).get("health", ()))

    @property
    def findings(self) -> list[dict[str, Any]]:
        """The problems of config and data that were told before the training."""
        return list(self.plan.get("problems", ()))

    @property
    def held_out(self) -> int:
        return int((self.plan["counts"] or {}).get("eval_pairs", 0))

    @property
    def held_out_prompts(self) -> int:
        return int((self.plan["counts"] or {}).get("eval_prompts", 0))

    @property
    def max_kl(self) -> float | None:
        """The limit of kl_sequence; None where the config has none."""
        return self.config.get("max_kl")

    @property
    def judged(self) -> dict[str, Any] | None:
        """`policy`, `base` and `gain` on what was held out; where a run did not come to it, as `dpo eval` found them."""
        if self.summary is not None and self.summary["eval"] is not None:
            return {"policy": self.summary["eval"], "base": self.summary["base"], "gain": self.summary["gain"]}
        return self.evaluation if self.evaluation is not None and self.evaluation["policy"] is not None else None

    @property
    def verdict(self) -> Verdict:
        summary = self.summary or {"status": "unfinished", "steps": max((line["step"] for line in self.lines), default=0)}
        return verdict(
            Outcome(
                status=summary["status"],
                steps=summary["steps"],
                judged=self.judged,
                rows=self.held_out,
                prompts=self.held_out_prompts,
                health=tuple(self.health),
                max_kl=self.max_kl,
                whole=self.is_whole,
                base=self.base,
            ),
            self.method.read,
        )

    def points(self, split: str, key: str) -> list[Point]:
        """The values of one key over the steps; a step that was logged twice (after a resume) counts as it was last.

        What a training minimised is its `loss` where an evaluation has the same, else its `own_loss`; an evaluation then has
        that as its `trained_loss`, beside DPO's.
        """
        if self.has_own_loss:
            others = {"train": {"loss": "", "own_loss": "loss"}, "eval": {"own_loss": "trained_loss"}}
            key = others[split].get(key, key)
        lines = (line for line in self.lines if line["split"] == split and key in line)
        return sorted({line["step"]: line[key] for line in lines}.items())
