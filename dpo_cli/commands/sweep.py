"""The story of `dpo sweep`: a space of settings -> a run for each -> the best by a held-out figure -> how much that flatters.

The folder of a sweep has the runs, each with its config next to it as NAME.json; progress.json, and study.db of a sampler; and
sweep.json, sweep.html and best.json, the config of the best setting. A second call trains what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpo_cli.commands.many_runs import write_json
from dpo_cli.commands.setting_runs import NOT_OF_RUNS, Sweep, Trainings, evaluation_of
from dpo_cli.config.config import ConfigLike
from dpo_cli.errors import Exit
from dpo_cli.evaluation.pooling import Rows
from dpo_cli.evaluation.selection import best_of
from dpo_cli.hardware.machine import probe
from dpo_cli.report.render import write_settings
from dpo_cli.report.setting_table import best_sentences, notes, table
from dpo_cli.results.codec import to_json
from dpo_cli.results.settings_swept import SettingRow, SettingsSwept
from dpo_cli.storage.lock import locked
from dpo_cli.storage.run_directory import RunDirectory
from dpo_cli.ui.console import Console

RESULT, PAGE, BEST, HELD_BY = "sweep.json", "sweep.html", "best.json", "sweep.lock"


def sweep(
    config: ConfigLike,
    words: Sequence[str],
    console: Console,
    *,
    trials: int | None = None,
    processes: int = 1,
    overwrite: bool = False,
) -> tuple[SettingsSwept, Exit]:
    """Train the settings that `words` describe, and choose the best: what sweep.json holds, and the exit code.

    `trials` settings are drawn by a sampler if that is fewer than the grid has, or if a range has no count. `processes`
    trainings run at once.
    """
    asked, machine = Sweep.of(config, words, trials), probe()
    steps = asked.require_sound(machine, console)
    asked.folder.mkdir(parents=True, exist_ok=True)
    with locked(asked.folder / HELD_BY):
        if overwrite:
            asked.clear()
        with asked.source(steps) as source:
            rows = Trainings(asked, asked.progress(), source, processes, machine, console).all()
        result = _result(asked, rows)
        _write_best(asked, result)
        write_json(asked.folder / RESULT, to_json(result))
        write_settings(result, asked.folder / PAGE)
    _show(result, console)
    if result.best is not None:
        return result, Exit.DONE
    return result, Exit.FAILED if all(row.run.status == "failed" for row in rows) else Exit.MISSED


def _result(asked: Sweep, rows: Sequence[SettingRow]) -> SettingsSwept:
    """The settings with what excludes them, the best of the others, and what to know about it."""
    scored: dict[str, Rows] = {}
    checked: list[SettingRow] = []
    for row in rows:
        reason, own = (row.excluded, None) if not row.can_win else _rows_of(asked, row, scored)
        if own is not None:
            scored[row.name] = own
        checked.append(SettingRow(row.name, row.setting, row.run, row.figures, reason))
    # Of equal ones the first is the best: the one that has moved the model least.
    moved = {row.name: figure.value if (figure := row.figures.get("kl_token")) else 0.0 for row in checked}
    in_order = {name: scored[name] for name in sorted(scored, key=lambda name: moved[name])}
    prompts = next(iter(scored.values()))[1] if scored else ()
    result = SettingsSwept(
        run_dir=str(asked.folder),
        space=asked.space.to_json(),
        trials=asked.trials,
        chosen_by=asked.criterion.name,
        is_gain=asked.criterion.is_gain,
        max_kl=asked.max_kl,
        rows=len(prompts),
        prompts=len(set(prompts)),
        settings=checked,
        best=best_of(in_order, asked.criterion.is_better_large) if scored else None,
        best_config=str(asked.folder / BEST) if scored else None,
        notes=(),
        report=str(asked.folder / PAGE),
    )
    return SettingsSwept(**{**vars(result), "notes": notes(result)})


def _rows_of(asked: Sweep, row: SettingRow, others: dict[str, Rows]) -> tuple[str | None, Rows | None]:
    """The figure of a setting row by row; or why it cannot be compared with the others."""
    scores = [one.scores for one in evaluation_of(RunDirectory(Path(row.run.run_dir)), asked.strategy).rows]
    known = [one for one in scores if one is not None]
    if not known or len(known) < len(scores):
        return "its evaluation is of an older version, without the scores of rows: `dpo eval RUN --again` repeats it", None
    own = asked.criterion.rows(known)
    if any(other[1] != own[1] for other in others.values()):
        return "its held-out rows are not those of the other settings", None
    return None, own


def _write_best(asked: Sweep, result: SettingsSwept) -> None:
    """The config of the best setting, to train from; it names no folder. None is left of an earlier call."""
    file = asked.folder / BEST
    if result.best is None:
        file.unlink(missing_ok=True)
        return
    setting = next(row.setting for row in result.settings if row.name == result.best.name)
    given = {key: value for key, value in asked.given.items() if key not in NOT_OF_RUNS[:2]}
    write_json(file, {**given, **setting})


def _show(result: SettingsSwept, console: Console) -> None:
    title, header, rows = table(result)
    console.table(title, rows, header)
    for sentence in best_sentences(result):
        console.line(sentence)
    for note in result.notes:
        console.line(f"note: {note}")
    console.line(f"report: {result.report}")
