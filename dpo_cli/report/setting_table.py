"""The table of a sweep, its best setting and its notes in words, for a terminal and for a page."""

from __future__ import annotations

import json

from dpo_cli.report.method_table import Row, Table
from dpo_cli.report.views import duration
from dpo_cli.results.intervals import FEW_PROMPTS, Interval
from dpo_cli.results.settings_swept import SettingRow, SettingsSwept
from dpo_cli.strategies.figures import FIGURES, FigureText

KL = ("kl_sequence", "kl_token")


def table(result: SettingsSwept) -> Table:
    """One row a setting, in order of their figure; those that cannot win are at the end, with the reason."""
    keys = list(result.space)
    kl = [name for name in KL if any(row.figures.get(name) for row in result.settings)]
    header = [*(keys or ["setting"]), _heading(result), *(FIGURES[name].label for name in kl), "steps", "time", "status"]
    rows = [_row(result, row, keys, kl) for row in _ordered(result)]
    count = f"{len(result.settings)} setting{'s' if len(result.settings) > 1 else ''}"
    about = f"{result.rows} held-out rows of {result.prompts} prompts" if result.rows else "of which none can win"
    return f"{count}, {about}; 95 % intervals", header, rows


def _ordered(result: SettingsSwept) -> list[SettingRow]:
    """The best first; then by the figure, and what cannot win last."""
    sign = -1 if FIGURES[result.chosen_by].is_better_large else 1
    best = result.best.name if result.best is not None else ""

    def order(row: SettingRow) -> tuple[bool, bool, float]:
        figure = row.figures.get(result.chosen_by)
        return row.name != best, not row.can_win, sign * figure.value if figure is not None and figure.is_finite else 0.0

    return sorted(result.settings, key=order)


def _heading(result: SettingsSwept) -> str:
    label = FIGURES[result.chosen_by].label
    return f"gain in {label}" if result.is_gain else label


def figure_text(result: SettingsSwept, figure: Interval) -> FigureText:
    """The figure of the choice: a difference has its sign."""
    term = FIGURES[result.chosen_by]
    return term.gain(figure) if result.is_gain else term.text(figure)


def _row(result: SettingsSwept, row: SettingRow, keys: list[str], kl: list[str]) -> Row:
    figure, run = row.figures.get(result.chosen_by), row.run
    place = "best" if result.best is not None and row.name == result.best.name else run.status if row.can_win else ""
    return [
        *([_text(row.setting[key]) for key in keys] or [row.name]),
        str(figure_text(result, figure)) if figure else "",
        *(str(FIGURES[name].text(known)) if (known := row.figures.get(name)) else "" for name in kl),
        f"{run.steps:,}" if run.steps is not None else "",
        duration(run.seconds) if run.seconds is not None else "",
        place or (run.status if run.status != "completed" else "cannot win"),
    ]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def best_sentences(result: SettingsSwept) -> list[str]:
    """The best setting, its figure as it is and corrected, and where its config is; or that there is none."""
    best = result.best
    if best is None:
        return ["no setting can win: the notes have the reason of each"]
    values = next(row.setting for row in result.settings if row.name == best.name)
    named = ", ".join(f"{key} {_text(value)}" for key, value in values.items()) or "the config as it is given"
    said = [f"best: {named}; {_heading(result)} {figure_text(result, best.value)}"]
    if best.corrected is not None and best.optimism is not None:
        corrected = figure_text(result, best.corrected)
        said.append(
            f"warning: it is the best of {best.of} on the same {result.prompts} prompts, and looks better than it is by about "
            f"{_amount(result, best.optimism)}; corrected: {corrected}"
        )
    return [*said, f"config of the best: {result.best_config}"]


def _amount(result: SettingsSwept, amount: float) -> str:
    """A size of a difference of the figure, without a sign."""
    return f"{100 * amount:.1f} points" if FIGURES[result.chosen_by].is_share else f"{amount:.3f}"


def notes(result: SettingsSwept) -> list[str]:
    """What to know before the figures are read."""
    said = [f"{row.name}: {_fault(row)}" for row in result.settings if not row.can_win]
    best = result.best
    if any(row.run.status == "failed" for row in result.settings):
        said.append("the same command trains the settings that failed again")
    if best is not None and result.is_gain and not best.value.sign:
        said.append(
            "the best setting has no clear gain: its interval includes 0; larger learning rates or more steps may show one"
        )
    if best is not None and best.not_clearly_worse:
        are_all = len(best.not_clearly_worse) == best.of - 1
        which = "all others" if are_all else ", ".join(best.not_clearly_worse)
        said.append(f"not clearly worse than the best on these prompts: {which}")
    if 0 < result.prompts < FEW_PROMPTS:
        said.append(f"{result.prompts} held-out prompts are too few for the intervals to hold")
    if best is not None and best.corrected is not None:
        said.append(
            "corrected: the bootstrap bias correction of Tsamardinos et al. (2018), which chooses on the prompts of a resample "
            "and evaluates on the others; another seed is a further source of chance"
        )
    return said


def _fault(row: SettingRow) -> str:
    code = f" (exit {row.run.exit_code})" if row.run.status == "failed" else ""
    return f"{row.run.status}{code}: {row.excluded}" if row.run.status != "completed" else f"cannot win: {row.excluded}"
