"""`dpo eval` of a run whose figures are known: they are shown at once. Not in eval.py, whose imports bring torch."""

from __future__ import annotations

from pathlib import Path

from dpo_cli.commands.requests import Request
from dpo_cli.models.adapter_config import Adapter
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.adapter_start import start_of
from dpo_cli.results.judgement import Evaluation
from dpo_cli.runs.kept_evaluation import kept
from dpo_cli.storage.run_directory import EVALUATION, PLAN, RunDirectory
from dpo_cli.strategies.strategies import STRATEGIES
from dpo_cli.ui.console import Console


def show_known(request: Request, console: Console) -> Evaluation | None:
    """Show the figures in a run's evaluation.json, if the request is for these and they hold; else None."""
    if request.again or request.vote is not None or not request.is_as_trained:
        return None
    run = RunDirectory.open(Path(request.target))
    adapter = Adapter.in_folder(run.trained)
    if (known := kept(run)) is None or (adapter is not None and adapter.danger):  # which is refused when it is loaded
        if run.has(EVALUATION):
            why = "is of other data, another model, other options or versions, or was changed"
            console.line(f"{EVALUATION} {why}: the figures are computed again")
        return None
    config = run.read_json(PLAN)["config"]
    start = start_of(ModelSource.of(config["model_name"]), config["reference"])
    console.judgement(known, known.shown_samples, STRATEGIES[config["strategy"]], start)
    console.line(f"these figures are from {EVALUATION}: nothing has changed since; --again computes them")
    return known
