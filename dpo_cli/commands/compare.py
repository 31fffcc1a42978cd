"""The story of `dpo compare`: methods -> budget -> a run for each method and seed -> one held-out set -> figures and tests.

The folder of a comparison has the runs, METHOD-SEED, each with its config next to it as METHOD-SEED.json; held-out.json, the
config by which all are evaluated; progress.json; scores/, an evaluation of each run, row by row; and compare.json and
compare.html. A second call trains what is missing, and computes again what is of other runs, data or code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dpo_cli.commands.held_out_scores import Scorer, votes_of
from dpo_cli.commands.many_runs import write_json
from dpo_cli.commands.method_runs import Comparison, Progress, Training
from dpo_cli.config.config import ConfigLike
from dpo_cli.errors import Exit
from dpo_cli.evaluation.pooling import Rows, pair_tests, pooled, rows_of, rows_of_base
from dpo_cli.hardware.machine import probe
from dpo_cli.report.method_table import notes, sentence, tables
from dpo_cli.report.render import write_methods
from dpo_cli.results.codec import to_json
from dpo_cli.results.methods_compared import MethodRow, MethodsCompared, ScoredRun
from dpo_cli.storage.lock import locked
from dpo_cli.storage.run_directory import RunDirectory
from dpo_cli.ui.console import Console

HELD_OUT, SCORES, RESULT, PAGE, LOCK = "held-out.json", "scores", "compare.json", "compare.html", "compare.lock"
# The figures by which methods are compared with each other.
COMPARED = ("logp_accuracy", "normalized_logp_accuracy", "win_rate", "vote_rate")


def compare(
    config: ConfigLike, overrides: Sequence[str], console: Console, *, overwrite: bool = False
) -> tuple[MethodsCompared, Exit]:
    """Train, evaluate and compare the methods of a config: what compare.json holds, and the exit code."""
    asked = Comparison.of(config, overrides)
    inspections = asked.inspections(probe(), console)
    asked.require_place()
    asked.folder.mkdir(parents=True, exist_ok=True)
    with locked(asked.folder / LOCK):
        if overwrite:
            asked.clear()
        write_json(asked.folder / HELD_OUT, asked.held_out)
        scorer = Scorer(asked.folder / HELD_OUT, asked.folder / SCORES, asked.parts, console)
        training = Training(asked, Progress.of_comparison(asked, scorer.basis), console)
        faults = training.decide(inspections)
        del inspections  # which hold the rows
        rows = [training.row(method, faults.get(method.name)) for method, _ in asked.methods]
        # All are trained before the first is evaluated here: a model in this process would take memory from them.
        scores = {row.name: [scorer.scored(RunDirectory(Path(run.run_dir))) for run in row.completed] for row in rows}
        result = _result(asked, training.progress.amount, rows, scores, console)
        write_json(asked.folder / RESULT, to_json(result))
        write_methods(result, {name: own[0].samples for name, own in scores.items() if own}, asked.folder / PAGE)
    _show(result, console)
    if not result.failed:
        return result, Exit.DONE
    return result, Exit.MISSED if {run.status for run in result.failed} == {"unhealthy"} else Exit.FAILED


def _result(
    asked: Comparison,
    amount: float | None,
    rows: Sequence[MethodRow],
    scores: Mapping[str, Sequence[ScoredRun]],
    console: Console,
) -> MethodsCompared:
    """The figures of all methods, the tests between them, and what to know about them."""
    of_runs: dict[str, list[dict[str, Rows]]] = {}
    for row in rows:
        votes = [votes_of(RunDirectory(Path(run.run_dir)), console.line) for run in row.completed]
        of_runs[row.name] = [rows_of(one) | vote for one, vote in zip(scores[row.name], votes, strict=True)]
    figures = pooled(of_runs)
    first = next((one for own in scores.values() for one in own), None)
    result = MethodsCompared(
        run_dir=str(asked.folder),
        budget=asked.parts["budget"],
        budget_value=amount,
        seeds=asked.seeds,
        pairs=len(first.prompts) if first else 0,
        prompts=len(set(first.prompts)) if first else 0,
        base=dict(pooled({"base": [rows_of_base(first)]})["base"]) if first else {},
        methods=[replace(row, figures=dict(figures[row.name])) for row in rows],
        tests=[replace(test, sentence=sentence(test)) for test in pair_tests(of_runs, COMPARED)],
        notes=(),
        report=str(asked.folder / PAGE),
    )
    return replace(result, notes=notes(result))


def _show(result: MethodsCompared, console: Console) -> None:
    for title, header, rows in tables(result):
        console.table(title, rows, header)
    for test in result.tests:
        console.line(test.sentence)
    for note in result.notes:
        console.line(f"note: {note}")
    console.line(f"report: {result.report}")
