"""The story of `dpo eval`: open, load, evaluate; and `dpo vote`, if it is requested too."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from dpo_cli.commands.requests import Request
from dpo_cli.evaluation.evaluation import Measured, answered, judge, measure
from dpo_cli.evaluation.generation import Sample
from dpo_cli.evaluation.rounding import without_rounding
from dpo_cli.plan.adapter_start import start_of
from dpo_cli.plan.plan import Plan
from dpo_cli.preferences.rewards import SummedRewards
from dpo_cli.preferences.side_by_side import contest_of
from dpo_cli.report.render import write_report
from dpo_cli.results.judgement import Evaluation
from dpo_cli.results.tally import SideBySide
from dpo_cli.runs.kept_evaluation import basis_of, is_whole, keep
from dpo_cli.runs.open_run import Opened, OpenedRun, load_policy, open_adapter, open_run, require_answers
from dpo_cli.storage.log import log_to
from dpo_cli.storage.run_directory import PLAN
from dpo_cli.ui.console import Console


def evaluate(request: Request, console: Console) -> tuple[Evaluation, SideBySide | None]:
    """Evaluate what was trained against its reference; if votes are requested, compare its answers too."""
    if request.adapter is not None:
        opened = open_adapter(request.target, request.adapter, request.dataset, request.overrides, console)
    else:
        opened = open_run(request.target, request.dataset, console, request.overrides)
    if request.vote is not None:
        require_answers(opened.plan, "vote on")
    run, vote = opened.run if isinstance(opened, OpenedRun) else None, request.vote
    contest = contest_of(vote.prompts, vote.by_judge, run, opened.plan, opened.rows) if run and vote else None
    basis = basis_of(run.read_json(PLAN)["config"]) if run else {}
    with log_to(run.log) if run else nullcontext():
        rank = _rank(opened.plan, console)
        plan, samples, measured = measured_on(opened, console, vote.prompts if vote else 0)
        judged = judge(opened.rows, measured, samples, plan, rank)
    console.judgement(judged, judged.shown_samples, plan.strategy, start_of(plan.model, plan.config.reference))
    if run and request.is_as_trained and judged.sides is not None and not is_whole(run):
        keep(run, judged, basis)  # a training that was stopped has no evaluation
        console.line(f"report: {write_report(run.path)}")  # which had no figures
    return judged, contest.hold(samples, console) if contest else None


def _rank(plan: Plan, console: Console) -> SummedRewards | None:
    """What scores the answers of a run that was trained on scored answers, if it is still there."""
    name = plan.config.reward_model
    if not plan.strategy.generates:
        return None
    if name is not None and not os.path.exists(name) and Path(name).is_absolute():
        console.line(f"note: the reward model {name} is not there any more, so answers are not scored")
        return None
    return SummedRewards.of(plan)


def measured_on(opened: Opened, console: Console, count: int = 0) -> tuple[Plan, list[Sample], Measured | None]:
    """What an evaluation computes with the model: answers, to `count` prompts or more, and the scores of the rows, if any."""
    policy, plan = load_policy(opened, console)
    samples = answered(policy, opened.tokenizer, opened.rows, plan, count)
    if not opened.rows:
        return plan, samples, None
    measured = measure(policy, opened.rows, opened.tokenizer, plan)
    return plan, samples, without_rounding(policy, opened.rows, opened.tokenizer, plan, measured, console.line)
