"""The story of `dpo vote`: open a run, sample its answers and those of its base, and show them to people or a judge."""

from __future__ import annotations

from dpo_cli.commands.requests import VoteRequest
from dpo_cli.evaluation.evaluation import answered
from dpo_cli.preferences.side_by_side import contest_of
from dpo_cli.results.tally import SideBySide
from dpo_cli.runs.open_run import load_policy, open_run, require_answers
from dpo_cli.storage.log import log_to
from dpo_cli.ui.console import Console


def vote(request: VoteRequest, console: Console) -> SideBySide:
    """The page of a run, and the votes of a judge if one is requested."""
    opened = open_run(request.run, request.dataset, console, request.overrides)
    require_answers(opened.plan, "vote on")
    contest = contest_of(request.prompts, request.by_judge, opened.run, opened.plan, opened.rows)
    with log_to(opened.run.log):
        policy, plan = load_policy(opened, console)
        samples = answered(policy, opened.tokenizer, opened.rows, plan, request.prompts)
    return contest.hold(samples, console)
