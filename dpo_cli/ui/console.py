"""All output: tables and panels on a terminal, plain lines in a pipe, one JSON document with --json."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console as RichConsole
from rich.console import Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dpo_cli.errors import DpoError, InvalidInput, OtherFailed, Problem
from dpo_cli.results.compared import compared
from dpo_cli.results.intervals import FEW_PROMPTS
from dpo_cli.results.merge import LARGER_CHANGE
from dpo_cli.storage.jsonio import json_text
from dpo_cli.storage.redaction import beneath, redact, redacted
from dpo_cli.storage.world import REPORTED, Place
from dpo_cli.strategies.figures import FIGURES, number
from dpo_cli.ui.progress_view import ProgressView

if TYPE_CHECKING:
    from dpo_cli.results.intervals import Interval
    from dpo_cli.results.judgement import Answers, Evaluation, Judged, Limit
    from dpo_cli.results.merge import Merge, MergeLimit
    from dpo_cli.results.tally import Tally
    from dpo_cli.results.validation import BillJson
    from dpo_cli.strategies.strategy import Strategy

COLOURS = {"error": "red", "warning": "yellow", "hint": "cyan"}
MARKS = {"error": "x", "warning": "!", "hint": "-"}
PIPED_WIDTH = 120
NARROW = 80  # columns of a terminal
AUC_SCALE = "(0.5: no pattern, 1: always the longer, 0: always the shorter)"
BORDER = 3  # columns between two cells


def _stream(stderr: bool) -> RichConsole:
    """A pipe has its own width, and nothing in it is redrawn, also with FORCE_COLOR."""
    if (sys.stderr if stderr else sys.stdout).isatty():
        return RichConsole(stderr=stderr, highlight=False)
    return RichConsole(stderr=stderr, highlight=False, width=PIPED_WIDTH, force_interactive=False)


def _is_reported(error: BaseException | None) -> bool:
    """Whether the first process of the training shows this error, or the one behind it."""
    while error is not None and not getattr(error, REPORTED, False):
        error = error.__cause__ or error.__context__
    return error is not None


class Console:
    """Results on standard output, the rest on standard error; with `as_json`, everything except the JSON is the rest."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self._place: Place | None = None  # of a follower
        self._document = beneath(sys.stdout)
        self.errors = _stream(stderr=True)
        self._own_errors = self.errors
        self.out = self.errors if as_json else _stream(stderr=False)
        self.results = self.out
        self.progress = ProgressView(lambda: self.out)

    def keep_results_apart(self) -> None:
        """From now on only `results` are on standard output; progress and notes are on standard error."""
        self.out = self.errors

    @classmethod
    def of_follower(cls, place: Place) -> Console:
        """That of a process which is not the first one of its training: it shows only an error of its own."""
        console, nowhere = cls(), open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        console._own_errors, console._place, console._document = console.errors, place, nowhere
        console.out = console.errors = RichConsole(file=nowhere)
        return console

    @property
    def is_of_follower(self) -> bool:
        return self._place is not None

    def json(self, value: object) -> None:
        """The one document of standard output."""
        self._document.write(json_text(redacted(value), indent=2) + "\n")
        self._document.flush()  # so that a full disk is reported here, and not at the end of the process

    def line(self, text: str) -> None:
        self.out.print(Text(redact(text)))

    def break_line(self) -> None:
        """End the line of a terminal."""
        if self.errors.is_terminal:
            self.errors.print()

    def problems(self, problems: Sequence[Problem]) -> None:
        """Every problem, errors first, each with its place and its fix."""
        self._print_texts(_problem_texts(problems))

    def _print_texts(self, texts: Sequence[tuple[Text, Text]]) -> None:
        with self.progress.left_to_another():  # its bars are on the other stream, which is the same terminal
            for text, fix in texts:
                if self.errors.is_terminal:
                    self.errors.print(text)
                    self.errors.print(Padding(fix, (0, 0, 0, 2)))
                else:  # one line per problem, so that grep finds whole messages
                    self.errors.print(text, soft_wrap=True)
                    self.errors.print(Text("  ").append(fix), soft_wrap=True)

    def error(self, error: DpoError) -> None:
        """A panel on a terminal, else plain lines; with --json also a document."""
        if self._place is not None:
            self._error_of_follower(error, self._place)
            return
        problems = error.problems if isinstance(error, InvalidInput) else ()
        texts = _problem_texts(problems) or [
            (Text("x error ").append(redact(error.message)), Text(redact(error.fix or ""), style="dim"))
        ]
        if self.errors.is_terminal:
            lines = [part for text, fix in texts for part in (text, Padding(fix, (0, 0, 0, 2)))]
            with self.progress.left_to_another():
                self.errors.print(Panel(Group(*lines), title="dpo", border_style="red", title_align="left"))
        else:
            self._print_texts(texts)
        if self.as_json:
            documents = [problem.to_json() for problem in problems]
            with suppress(OSError):  # standard output may have failed; standard error has the message
                self.json({"error": error.message, "fix": error.fix, "exit_code": int(error.exit_code), "problems": documents})

    def _error_of_follower(self, error: DpoError, place: Place) -> None:
        if not isinstance(error, OtherFailed) and not _is_reported(error):
            text = f"x error process {place.rank + 1} of {place.size}: {redact(error.message)}"
            self._own_errors.print(Text(text), soft_wrap=True)

    def table(self, title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
        """Rows of text; the columns after the first are right-aligned if there is a header.

        Where there is too little room, intervals are below their values: one broken over lines is hard to read.
        """
        cells = [[redact(cell) for cell in row] for row in rows]
        names, *columns = zip(*cells, strict=True)
        word = max((len(word) for name in names for word in name.split()), default=0)
        needed = word + sum(max(map(len, column)) + BORDER for column in columns) + 2 * BORDER
        is_narrow = needed > self.out.width
        if is_narrow:
            cells = [[cell.replace(" [", "\n[") for cell in row] for row in cells]
        self.out.print(_table(title, cells, header, box.ROUNDED if self.out.is_terminal and not is_narrow else None))

    def panel(self, title: str, text: str) -> None:
        """Text of a model or a dataset: control characters are removed."""
        title, text = printable(title), printable(text)
        if self.out.is_terminal:
            self.out.print(Panel(Text(text), title=Text(title), title_align="left", border_style="dim"))
        else:
            self.out.print(Text(f"{title}\n{text}"))

    def columns(self, read_as: Mapping[str, Any]) -> None:
        """The columns of the data for `validate`: the meaning of each, and those that are not read."""
        read = [name if name == meaning else f"{name} (as {meaning})" for name, meaning in read_as["read"].items()]
        unread = f"; not read: {', '.join(read_as['unread'])}" if read_as["unread"] else ""
        self.line(printable(f"columns: {', '.join(read)}{unread}"))

    def lengths(self, lint: dict[str, Any]) -> None:
        """The lengths of pairs for `validate`, and whether the longer response is preferred."""
        length, where = lint["length"], lint["length"]["longest"]
        unit, most = ("characters", length["characters"])
        if length["tokens"]:  # counted on a sample, without the markers of the template
            unit, most = ("tokens (estimated)", length["tokens"])
        over = f"; {most['share_over']:.0%} are longer than max_seq_length" if "share_over" in most else ""
        place = f"{where['file']}:{where['line']}"
        self.line(f"length: median {most['median']:,.0f} {unit}, maximum {most['most']:,} ({place}){over}")
        if "longer_chosen" in lint:
            longer, auc = lint["longer_chosen"], lint["length_auc"]
            self.line(f"length: the longer response is preferred in {longer:.0%} of pairs; AUC of length {auc:.2f} {AUC_SCALE}")

    def bill(self, memory: BillJson) -> None:
        """The memory bill with a bar per component."""
        largest = max(memory["components"].values())
        parts = {name: size for name, size in memory["components"].items() if size}
        bars = [(name, f"{size:.2f} GB", "#" * round(20 * size / largest)) for name, size in parts.items()]
        total, budget = compared(memory["total_gb"], memory["budget_gb"] or 0.0, digits=2)
        self.table(f"memory: {total}{f' of {budget}' if memory['budget_gb'] else ''} GB", bars)

    def judgement(
        self, evaluation: Evaluation, samples: Sequence[Answers], strategy: Strategy, start: str | None = None
    ) -> None:
        """The figures of an evaluation, and answers side by side; `start` is the adapter that the training started from."""
        if evaluation.sides is None:
            self.line(
                "nothing is measured, because there are no held-out rows: set or raise eval_split in the config, "
                "or name a file with `dpo eval --dataset`"
            )
            return
        sides = [evaluation.sides.policy, evaluation.sides.base, evaluation.sides.gain]
        has_base = bool(evaluation.sides.base or evaluation.answer_tokens)  # a reward model has none
        sides = sides if has_base else sides[:1]
        names = [name for name, figure in evaluation.sides.policy.items() if figure]
        figures = {name: [side.get(name) for side in sides] for name in names}
        if tokens := evaluation.answer_tokens:
            figures["answer_tokens"] = [tokens[side] for side in ("policy", "base", "gain")]
        rows = [
            [self._heading(name), *(_interval(value, FIGURES[name].digits) for value in values)]
            for name, values in figures.items()
        ]
        intervals = "95 % intervals" if evaluation.prompts >= FEW_PROMPTS else "too few for the intervals to hold"
        title = f"{evaluation.count} {evaluation.noun} of {evaluation.prompts} prompts; {intervals}"
        self.table(title, rows, ("figure", "adapter", "base", "gain")[: 1 + len(sides)])
        if start is not None and has_base:
            self.line(f"base: the model with the adapter {start}, from which this training started")
        if missing := evaluation.unanswered:
            fix = "lower max_seq_length, so that prompts are cut, or evaluate with shorter prompts"
            message = f"{missing} prompts fill the model's context and have no answer"
            partial = " and ".join(figure.label for figure in FIGURES.values() if figure.of_answers)
            self.line(f"note: {message}: {partial} are of the other prompts, and miss any limit; {fix}")
        self._categories(evaluation.categories, strategy)
        for sample in samples:
            base, adapter = sample["base"], sample["adapter"]
            text = f"base:    {base}\nadapter: {'(the same)' if adapter == base else adapter}"
            self.panel(sample["prompt"][-200:], text)

    def _heading(self, name: str) -> str:
        """The words of a figure at the start of a row; without its name where there is no room for it."""
        return FIGURES[name].heading if self.out.width >= NARROW else FIGURES[name].label

    def _categories(self, categories: Mapping[str, Judged], strategy: Strategy) -> None:
        """The first two figures of the rows of each category, and the gain in one if there is one."""
        if not categories:
            return
        shown, gained = strategy.shown[:2], strategy.gains[:1]
        rows = [
            (
                printable(name),
                str(part.count),
                *(_interval(part.sides.policy[key]) for key in shown),
                *(_interval(part.sides.gain[key]) for key in gained),
            )
            for name, part in categories.items()
            if part.sides
        ]
        names = [*(FIGURES[key].label for key in shown), *(f"gain in {FIGURES[key].label}" for key in gained)]
        self.table("by category", rows, ("category", strategy.rows.noun, *names))

    def thresholds(self, limits: Sequence[tuple[str, Limit]]) -> None:
        """Each limit on a figure, with its sign, and whether it is kept."""
        for sign, limit in limits:
            value, least = compared(limit.value or 0.0, limit.limit, 6, "g")
            value = value if limit.value is not None else "no value"
            self.line(f"{limit.metric} is {value}, {sign} {least}: {'ok' if limit.ok else 'missed'}")

    def tally(self, tally: Tally) -> None:
        """The count of a votes file, which may come from anyone."""
        rows = [("run", printable(tally.run)), ("prompts", f"{tally.prompts - tally.missing} of {tally.prompts}")]
        rows += [("judge", printable(tally.judge.model))] if tally.judge else []
        rows += [("wins", str(tally.wins)), ("losses", str(tally.losses)), ("ties", str(tally.ties))]
        rows += [("win rate", _interval(tally.win_rate)), ("sign test", f"p = {tally.sign_test:.2g}")]
        self.table("votes for the adapter", rows)
        if tally.same_text:
            self.line(f"note: {tally.same_text} of the ties are the same text from both models, which is not put to a vote")
        if tally.missing:
            self.line(f"note: {tally.missing} of {tally.prompts} prompts have no vote yet, and are not counted")

    def voted_pairs(self, out: Path, counts: Mapping[str, int]) -> None:
        """What `dpo vote --pairs` wrote, and the votes that give no pair."""
        reasons = {"ties": "ties", "missing": "prompts without a vote", "empty": "votes on an empty answer"}
        without = [f"{counts[name]} {words}" for name, words in reasons.items() if counts[name]]
        left_out = f"; left out: {', '.join(without)}" if without else ""
        self.line(
            f"{out}: {counts['pairs']} pairs{left_out}" if counts["pairs"] else f"no pair, so {out} is not written{left_out}"
        )

    def comparison(self, merge: Merge) -> None:
        """The figures of a run and of its export, and the difference of their log-probs."""
        limits = {limit.metric: _limit(limit) for limit in merge.limits}
        rows = [
            (self._heading(name), _interval(merge.before[name]), _interval(merge.after[name]), limits[name]) for name in limits
        ]
        self.table("the run, and the model read back; 95 % intervals", rows, ("figure", "run", "merged", "limit"))
        if merge.undecided:
            self.line(merge.undecided)
        apart = merge.difference
        self.line(f"log-probs of responses differ by {apart.mean:.3g} nats on average, by {apart.max:.3g} at most")
        limit = "" if apart.limit is None else f"; limit of the average difference: {apart.limit:.3g}"
        self.line(f"training changed them by {apart.trained:.3g} nats on average{limit}")
        if merge.is_rounded_away:
            self.line(f"note: {merge.dtype} weights keep little of so small a change: {LARGER_CHANGE}")


def _table(title: str, rows: Sequence[Sequence[str]], header: Sequence[str], frame: box.Box | None) -> Table:
    table = Table(title=title, title_justify="left", box=frame, show_header=bool(header))
    for column in range(len(rows[0])):
        has_intervals = column > 0 and any("[" in row[column] for row in rows)
        justify: Literal["left", "right"] = "right" if column and header else "left"
        table.add_column(header[column] if header else "", justify=justify, overflow="fold", no_wrap=has_intervals)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _problem_texts(problems: Sequence[Problem]) -> list[tuple[Text, Text]]:
    """The message and the fix of each problem; errors first."""
    texts = []
    order = list(COLOURS)
    for problem in sorted(problems, key=lambda problem: order.index(problem.severity)):
        text = Text.assemble(
            (f"{MARKS[problem.severity]} {problem.severity} ", f"bold {COLOURS[problem.severity]}"),
            (f"[{problem.code}] ", "dim"),
            (f"{problem.place}: " if problem.place else "", "bold"),
            printable(problem.message),
        )
        texts.append((text, Text(printable(problem.fix or ""), style="dim")))
    return texts


def printable(text: str) -> str:
    """Text without secrets and control characters. It is cleaned before line breaks, which would hide secrets."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in redact(text))


def _limit(limit: MergeLimit) -> str:
    return "none" if limit.limit is None else f"{limit.limit:.3f}{'' if limit.ok else ' missed'}"


def _interval(value: Interval | None, digits: int = 3) -> str:
    return str(number(value, digits=digits)) if value else ""
