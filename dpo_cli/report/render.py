"""report.html: a run, or a comparison, as one page that needs no network. No torch."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import dpo_cli
from dpo_cli.errors import UsageError
from dpo_cli.report import comparison, curves, method_table, setting_table, views
from dpo_cli.report.run_data import Contents
from dpo_cli.results.judgement import Answers
from dpo_cli.results.methods_compared import MethodsCompared
from dpo_cli.results.settings_swept import SettingsSwept
from dpo_cli.storage.atomic import write_whole
from dpo_cli.storage.redaction import redact
from dpo_cli.storage.run_directory import MANIFEST, PLAN, REPORT, RunDirectory
from dpo_cli.strategies.figures import FIGURES

PAGES = Path(__file__).parent / "pages"
MARK = '<meta name="generator" content="dpo '  # marks a page that may be replaced


def write_report(path: Path) -> Path:
    """Write report.html into a run directory, from its files."""
    RunDirectory(path).write_text(REPORT, report(Contents.read(path)))
    return path / REPORT


def write_comparison(paths: Sequence[Path], out: Path) -> Path:
    """Write one page about several runs."""
    if out.exists() and not (out.is_file() and MARK in out.read_text(encoding="utf-8", errors="replace")[:4000]):
        raise UsageError(f"{out} exists already and is not a page of dpo", "name another file with --out")
    page = _page("comparison.html.j2", **comparison.compared([Contents.read(path) for path in paths]))
    try:
        out.write_text(redact(page), encoding="utf-8")
    except OSError as error:  # the folder does not exist or is not writable: the user can fix it
        raise UsageError(f"cannot write {out}: {error.strerror}", "name a file in a folder that exists") from error
    return out


def write_methods(result: MethodsCompared, samples: Mapping[str, Sequence[Answers]], out: Path) -> None:
    """Write the page about the methods of `dpo compare`, with their runs as on the page about several runs."""
    runs = [Path(run.run_dir) for method in result.methods for run in method.runs]
    shown = method_table.answers(samples)
    _write_with_runs("methods.html.j2", runs, out, result=result, tables=method_table.tables(result), samples=shown)


def write_settings(result: SettingsSwept, out: Path) -> None:
    """Write the page about the settings of `dpo sweep`, with their runs as on the page about several runs."""
    runs = [Path(row.run.run_dir) for row in result.settings]
    best = setting_table.best_sentences(result)
    _write_with_runs("sweep.html.j2", runs, out, result=result, table=setting_table.table(result), sentences=best)


def _write_with_runs(template: str, runs: Sequence[Path], out: Path, **content: object) -> None:
    """A page with those of the runs that have started."""
    there = [Contents.read(path) for path in runs if all((path / name).is_file() for name in (PLAN, MANIFEST))]
    page = _page(template, **comparison.compared(there), **content)
    write_whole(out, lambda part: part.write_text(redact(page), encoding="utf-8"))


def report(run: Contents) -> str:
    """The page of one run."""
    lengths = run.evaluation.answer_tokens if run.evaluation else None
    answer_lengths = ""
    if lengths:
        base, policy = (lengths[side].value for side in ("base", "policy"))
        answer_lengths = f"; on average the {run.base}'s have {base:.0f} tokens, and the {run.who}'s {policy:.0f}"
    return _page(
        "report.html.j2",
        run=run,
        facts=views.facts(run),
        tiles=views.tiles(run),
        plots=curves.plots(run),
        against=views.against(run) if run.judged else [],
        categories=views.categories(run),
        spread=curves.spread(run),
        answer_lengths=answer_lengths,
        data=views.data(run),
        bill=views.bill(run),
        config=views.config(run),
        command=views.command(run),
        made_with=views.made_with(run),
        terms=[(term.label, term.meaning) for name, term in FIGURES.items() if run.judged and run.judged.policy.get(name)],
    )


def _page(template: str, **content: object) -> str:
    return _environment().get_template(template).render(content)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "shortened": views.shortened,
        "one_line": lambda text: shorten(text, 110, placeholder=" ..."),
    }
    environment.globals |= {
        "reading": views.reading,
        "signed": views.signed,
        "place_of": _place,
        "hash_of": _hash,
        "css": Markup((PAGES / "page.css").read_text(encoding="utf-8")),
        "js": Markup((PAGES / "page.js").read_text(encoding="utf-8")),
        "version": dpo_cli.__version__,
    }
    return environment


def _hash(text: str) -> str:
    """The hash that the Content-Security-Policy of the page needs for its script or its style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _place(problem: dict[str, str | None]) -> str:
    """file:line of a finding, if it has one."""
    parts = [Path(problem["file"]).name if problem["file"] else None, problem["line"]]
    place = ":".join(str(part) for part in parts if part is not None)
    return f"{place}: " if place else ""
