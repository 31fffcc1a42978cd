"""The table of a comparison of methods, its tests and its notes in words, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dpo_cli.report.views import duration
from dpo_cli.results.intervals import FEW_PROMPTS, Interval
from dpo_cli.results.judgement import Answers
from dpo_cli.results.methods_compared import LEVEL, MethodRow, MethodsCompared, PairTest
from dpo_cli.strategies.figures import FIGURES, FigureText, points, share

Row = list[str]
Table = tuple[str, Row, list[Row]]  # title, header, rows
BASE = "base"


@dataclass(frozen=True)
class Column:
    """A figure of the table: its heading, and its words in a sentence."""

    heading: str
    show: Callable[[Interval], FigureText]
    words: str = ""


FIGURE_COLUMNS = {
    "logp_accuracy": Column("log-prob accuracy", share, "log-prob accuracy"),
    "normalized_logp_accuracy": Column("by length", share, "log-prob accuracy by length"),
    "gain": Column("gain over the base", points),
    "kl_token": Column("KL/token", FIGURES["kl_token"].text),
    "kl_sequence": Column("KL/answer", FIGURES["kl_sequence"].text),
    "answer_tokens": Column("tokens/answer", FIGURES["answer_tokens"].text),
    "win_rate": Column("wins, reward model", share, "win rate by the reward model"),
    "vote_rate": Column("wins, votes", share, "win rate by votes"),
}
COST_HEADER = ["method", "healthy", "steps", "tokens", "time", "peak memory", "own keys"]


def tables(result: MethodsCompared) -> list[Table]:
    """The figures on the held-out pairs, and what each method took; one row a method in both."""
    names = [name for name in FIGURE_COLUMNS if any(method.figures.get(name) for method in result.methods)]
    header = ["method", *(FIGURE_COLUMNS[name].heading for name in names)]
    base = [BASE, *(_cell(name, result.base.get(name)) for name in names)]
    rows = [[method.name, *(_cell(name, method.figures.get(name)) for name in names)] for method in result.methods]
    about = f"{result.pairs} held-out pairs of {result.prompts} prompts, {_seeds(result.seeds)}; 95 % intervals"
    figures: list[Table] = [(about, header, [base, *rows])] if names else []
    costs = [_costs(method) for method in result.methods]
    return [*figures, (f"budget: {budget_words(result)}; means of the seeds that ended healthy", COST_HEADER, costs)]


def _cell(name: str, figure: Interval | None) -> str:
    return str(FIGURE_COLUMNS[name].show(figure)) if figure else ""


def _seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"


def _costs(method: MethodRow) -> Row:
    steps, tokens, seconds, peak = (method.mean(name) for name in ("steps", "tokens", "seconds", "peak_memory_gb"))
    return [
        method.name,
        f"{len(method.completed)} of {len(method.runs)}",
        f"{steps:,.0f}" if steps is not None else "",
        f"{tokens:,.0f}" if tokens is not None else "",
        duration(seconds) if seconds is not None else "",
        f"{peak:.2f} GB" if peak is not None else "",
        str(len(method.config)),
    ]


def budget_words(result: MethodsCompared) -> str:
    return f"a budget of {result.budget}" if result.budget_value is None else f"{result.budget_value:,.6g} {result.budget}"


def sentence(test: PairTest) -> str:
    """One comparison in words."""
    column = FIGURE_COLUMNS[test.figure]
    apart = f"{points(test.difference)}, corrected p = {test.p_corrected:.2g}"
    if test.p_corrected < LEVEL:
        return f"{test.first} is {test.result} than {test.second} in {column.words}: {apart}"
    return f"no clear difference between {test.first} and {test.second} in {column.words}: {apart}"


def answers(samples: Mapping[str, Sequence[Answers]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each prompt with the base's answer and that of each method; all runs answer the same prompts."""
    if not samples:
        return []
    together = zip(*samples.values(), strict=False)
    return [
        (own[0]["prompt"], [(BASE, own[0]["base"]), *((name, one["adapter"]) for name, one in zip(samples, own, strict=True))])
        for own in together
    ]


def notes(result: MethodsCompared) -> list[str]:
    """What to know before the figures are read."""
    said = []
    for method in result.methods:
        said += [
            f"{method.name}, seed {run.seed}: {run.status} (exit {run.exit_code}): {run.message}"
            for run in method.runs
            if run.status != "completed"
        ]
    if result.failed:
        said.append("figures are of the runs that ended healthy")
    if len(result.seeds) == 1:
        said.append("with one seed the intervals are over prompts only, and do not say how another seed would differ")
    if 0 < result.prompts < FEW_PROMPTS:
        said.append(f"{result.prompts} held-out prompts are too few for the intervals to hold")
    if result.tests:
        count = len(result.tests)
        said.append(
            f"p-values: bootstrap over seeds and prompts, the same prompts for both methods; corrected for {count} "
            f"comparison{'s' * (count > 1)} by Holm's method"
        )
    if result.budget == "tokens":
        said.append("the budget decides the steps by the tokens of a mean step; the table has what was trained on")
    if result.budget == "seconds":
        said.append("the budget decides the steps by the seconds of a trial's steps; the table has what the training took")
    return said
