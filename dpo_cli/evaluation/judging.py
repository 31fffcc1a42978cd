"""What a run trained, judged against its reference: on what it held out, or on another file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dpo_cli.config.config import load
from dpo_cli.config.schema import defaults
from dpo_cli.console import Console
from dpo_cli.data import reader
from dpo_cli.data.tokens import Encoded
from dpo_cli.errors import InvalidInput, Problem
from dpo_cli.evaluation.contest import Asked
from dpo_cli.evaluation.metrics import Scores, figures, score_rows
from dpo_cli.evaluation.samples import answer_tokens, side_by_side
from dpo_cli.hardware.probe import probe
from dpo_cli.inspection import inspect
from dpo_cli.plan import Plan
from dpo_cli.providers.base import Provider
from dpo_cli.providers.choice import PROVIDERS
from dpo_cli.providers.policy import Policy
from dpo_cli.runs.directory import MANIFEST, PLAN, RunDirectory, sha256_of_all
from dpo_cli.runs.log import log_to
from dpo_cli.training.prepare import prepare, tell_scoring
from dpo_cli.training.scoring import choose, states_of

ANSWERS, SAMPLES = 32, 3  # held-out prompts that an evaluation answers, and of those that it shows


def evaluate(run_path: str, dataset: str | None, console: Console, asked: Asked | None = None) -> dict[str, Any]:
    """Judge a finished run's adapter against its base, on what it held out or on another file."""
    opened = open_run(run_path, dataset, console)
    contest = asked.contest(opened.run, opened.plan.config.seed) if asked else None
    with log_to(opened.run.log):
        policy, plan = load_policy(opened, console)
        judged = judge(policy, opened.tokenizer, opened.rows, plan)
        count = max(ANSWERS, asked.prompts if asked else 0)
        answers = side_by_side(policy, opened.tokenizer, opened.rows, count, getattr(torch, plan.dtype))
    judged["answer_tokens"] = answer_tokens(answers[:ANSWERS])
    samples = [sample.to_json() for sample in answers[:SAMPLES]]
    console.judgement(judged, samples)
    held = contest.hold(answers, console) if contest else None
    return {**judged, "thresholds": [], "samples": samples, "side_by_side": held}


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
    _require_same_below(run)
    # What that machine decided, this one decides anew: a run from a GPU can be judged on a CPU.
    then = run.read_json(PLAN)
    measured = {key for key, source in then["sources"].items() if source == "measured"}
    if then["config"]["device"] not in ("cpu", probe().device):  # named in the config, and not here
        measured |= {"device", "bf16", "fp16"}
    overrides = [f"{key}={json.dumps(defaults()[key])}" for key in measured]
    overrides.append("provider=huggingface")  # any provider's adapter is PEFT's, and is judged where its provider is not
    if dataset:
        overrides += [f"dataset={dataset}", "eval_split=0", "eval_dataset=null"]
        overrides += ["strategy=dpo"] if reader.holds_pairs(dataset) else []  # pairs tell more, whatever was trained on
    inspection = inspect(load(str(run.path / PLAN), overrides), probe(), with_fit=False)
    data, plan = inspection.require()
    console.problems([problem for problem in inspection.problems if problem.severity == "warning"])
    if dataset and Path(dataset).absolute() in map(Path, run.trained_on()):
        console.line(f"note: the run was trained on {dataset}, so these figures show memory, not learning")
    provider = PROVIDERS[plan.config.provider](plan.config.model_name)
    tokenizer = provider.tokenizer()
    with log_to(run.log):
        train_rows, held_out, _ = prepare(data, tokenizer, plan)
    return Opened(run, plan, provider, tokenizer, train_rows if dataset else held_out)


def _require_same_below(run: RunDirectory) -> None:
    """`InvalidInput` where a run or an adapter that this run stands on is gone or has changed: its figures would be others."""
    for folder, digest in run.read_json(MANIFEST)["model"].get("below", {}).items():
        if not Path(folder).is_dir() or sha256_of_all(Path(folder)) != digest:
            message = f"{run.path} stands on {folder}, which is not the one that it was trained on"
            raise InvalidInput([Problem("error", "adapter-changed", message, "restore that folder, or train both again")])


def load_policy(opened: Opened, console: Console) -> tuple[Policy, Plan]:
    """What the run trained, with its reference, and the plan with how this model is scored here."""
    plan, rows, pad_token_id = opened.plan, opened.rows, int(opened.tokenizer.pad_token_id)
    policy = opened.provider.trained(plan, opened.run)
    if rows:
        scoring = choose(policy.network, rows, pad_token_id, plan.config.prompt_sharing)
        if policy.frozen is not None:
            choose(policy.frozen, rows, pad_token_id, scoring.shared)
        plan = replace(plan, scoring=scoring)
        tell_scoring(plan, console)
    return policy, plan


def score(policy: Policy, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Scores:
    batch_size, dtype = plan.config.per_device_eval_batch_size, getattr(torch, plan.dtype)
    return score_rows(policy, rows, states_of(plan.scoring), int(tokenizer.pad_token_id), batch_size, dtype)


def judge(policy: Policy, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], plan: Plan) -> dict[str, Any]:
    """The figures of `eval --json`; the three objects are null when there is nothing to judge on."""
    prompts = [row.row.prompt_key for row in rows]
    counts: dict[str, Any] = {plan.noun: len(rows), "prompts": len(set(prompts))}
    if not rows:
        return {**counts, "policy": None, "base": None, "gain": None}
    return {**counts, **figures(score(policy, rows, tokenizer, plan), prompts, plan.config.beta)}
