"""Everything that can go wrong, and the exit code it ends in.

    DpoError
    ├── UsageError          2   the command line itself is wrong
    ├── InvalidInput        3   the config or the data is wrong; carries every Problem found
    │   └── DoesNotFit      4   the hardware is too small
    ├── NoPairs             5   a round of iterative DPO has nothing to train on
    ├── RunFailed           1   something outside the user's input failed: a model that cannot be loaded, a full disk
    └── OtherFailed             another process of the same training failed, and the first process reports it

A training that was stopped (130, 143) or is unhealthy (5) is not an error: it saves what it has, and has its own exit code.

A `Problem` is one finding about the user's input. Errors stop, warnings and hints are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from typing import Any, Literal


class Exit(IntEnum):
    """The exit codes that scripts rely on; docs/reference/exit-codes.md explains each."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    INVALID = 3
    UNFIT = 4
    MISSED = 5
    SIGINT = 130
    SIGTERM = 143


Severity = Literal["error", "warning", "hint"]


@dataclass(frozen=True)
class Problem:
    """One finding: what is wrong, where, and what to do. `code` is stable; `line` and `column` start at 1.

    `line` is set for a problem of one value or row, `lines` for a problem of several rows: it has them all. In data files
    without a line for each row (Parquet, a JSON list on one line) both are numbers of rows.
    """

    severity: Severity
    code: str
    message: str
    fix: str | None = None
    key: str | None = None
    file: str | None = None
    line: int | None = None
    column: int | None = None
    lines: tuple[int, ...] | None = None
    stops_training: bool = False  # `validate` warns, since the config may be for another machine; `train` stops

    @property
    def place(self) -> str:
        """Where it is, as file:line:column; the message does not repeat it."""
        return ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)

    @property
    def sentence(self) -> str:
        """The place and the message."""
        return f"{self.place}: {self.message}" if self.place else self.message

    def to_json(self) -> dict[str, Any]:
        """All keys, always, in the documented order."""
        order = ("severity", "code", "key", "file", "line", "column", "lines", "message", "fix")
        values = asdict(self)
        return {name: values[name] for name in order}


def problem_of_json(values: Mapping[str, Any]) -> Problem:
    """The problem whose `asdict` is in a file."""
    return Problem(**{**values, "lines": None if values["lines"] is None else tuple(values["lines"])})


def about_rows(
    severity: Severity, code: str, reason: str, fix: str, key: str | None, file: str, lines: Sequence[int], unit: str = "line"
) -> Problem:
    """A problem of these rows of a file; the message shows the first ten. `unit` is what their numbers count: lines or rows."""
    lines = sorted(lines)
    if len(lines) == 1:
        message = f"row {lines[0]}: {reason}" if unit == "row" else reason
        return Problem(severity, code, message, fix, key, file, lines[0])
    shown = ("lines " if unit == "line" else "") + ", ".join(map(str, lines[:10])) + (", ..." if len(lines) > 10 else "")
    return Problem(severity, code, f"{len(lines)} rows ({shown}): {reason}", fix, key, file, lines=tuple(lines))


class DpoError(Exception):
    """Base of every error shown to a user: one sentence for what is wrong, and one for what to do."""

    exit_code = Exit.FAILED

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __reduce__(self) -> tuple[Any, ...]:
        """As it leaves another process."""
        return type(self), (self.message, self.fix)

    def of(self, where: str) -> DpoError:
        """The same error with the name of the process that it comes from."""
        return type(self)(f"{where}: {self.message}", self.fix)


class UsageError(DpoError):
    exit_code = Exit.USAGE


class InvalidInput(DpoError):
    exit_code = Exit.INVALID

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(problem.sentence for problem in problems))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)

    def of(self, where: str) -> DpoError:
        return type(self)([replace(problem, message=f"{where}: {problem.message}") for problem in self.problems])


def invalid(
    code: str,
    message: str,
    fix: str | None = None,
    key: str | None = None,
    file: str | None = None,
    line: int | None = None,
    column: int | None = None,
) -> InvalidInput:
    """The error of a single problem."""
    return InvalidInput([Problem("error", code, message, fix, key, file, line, column)])


class DoesNotFit(InvalidInput):
    exit_code = Exit.UNFIT


class NoPairs(DpoError):
    exit_code = Exit.MISSED


class RunFailed(DpoError):
    exit_code = Exit.FAILED


class OtherFailed(DpoError):
    """The end of a process because another one failed. It is not shown: the first process shows what failed."""

    def __init__(self, exit_code: Exit = Exit.FAILED) -> None:
        super().__init__("another process of this training failed")
        self.exit_code = exit_code

    @classmethod
    def like(cls, error: BaseException) -> OtherFailed:
        """With the exit code of the error of the other process."""
        return cls(error.exit_code if isinstance(error, DpoError) else Exit.FAILED)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.exit_code,)


def interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The interrupt that caused an error, or is it; None without one, and for a DpoError and an OSError.

    After an interrupt, transformers may fail in a `finally` with an UnboundLocalError.
    """
    behind = None if isinstance(error, DpoError | OSError) else error
    while behind is not None and not isinstance(behind, KeyboardInterrupt):
        behind = behind.__context__
    return behind
