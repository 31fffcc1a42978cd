"""What commands that train many runs share: their folder, its files, and which of their runs have ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from dpo_cli.errors import Exit, InvalidInput, Problem, invalid
from dpo_cli.results.methods_compared import MethodRun
from dpo_cli.results.summary import RunSummary
from dpo_cli.storage.atomic import write_whole
from dpo_cli.storage.jsonio import json_text, read_object_if_there
from dpo_cli.storage.run_directory import MANIFEST, SUMMARY, RunDirectory

ENDED = {"completed": Exit.DONE, "unhealthy": Exit.MISSED}


def require_folder(folder: Path, what: str) -> None:
    """`InvalidInput` where the folder of `what` holds a run, or cannot be written."""
    if (folder / MANIFEST).exists():
        message = f"{folder} holds a run, and {what} has a folder of its own"
        raise invalid("run-exists", message, "choose another folder with output_dir=...", "output_dir")
    RunDirectory.require_place(folder)


def require_no_errors(problems: Mapping[str, Sequence[Problem]], what: str) -> None:
    """`InvalidInput` with the problems of several configs, by their names, if one is an error.

    A problem of all of them is named once. `what` a name stands for begins the message of any other.
    """
    counts = Counter(problem for own in problems.values() for problem in dict.fromkeys(own))
    shown = [
        problem if counts[problem] == len(problems) else replace(problem, message=f"{what} {name}: {problem.message}")
        for name, own in problems.items()
        for problem in own
    ]
    if any(problem.severity == "error" for problem in shown):
        raise InvalidInput(list(dict.fromkeys(shown)))


@dataclass
class EndedRuns:
    """A file that says which runs have ended, as long as nothing that decides them changes.

    If something has changed (configs, data, model, code), `dpo train --resume` looks at each run again.
    """

    file: Path
    digest: str
    ended: dict[str, str] = field(default_factory=dict)  # the status of runs, by name

    @classmethod
    def read(cls, file: Path, digest: str) -> Self:
        """The content of the file, if it is of the same `digest`."""
        before = read_object_if_there(file)
        return cls(file, **before) if before.get("digest") == digest else cls(file, digest)

    def save(self) -> None:
        write_json(self.file, {name: value for name, value in vars(self).items() if name != "file"})

    def known(self, name: str, seed: int, stages: Sequence[RunDirectory]) -> MethodRun | None:
        """A run that has ended, by the run directories of its stages; None for one that has to be trained, or looked at."""
        status = self.ended.get(name)
        if status not in ENDED or not any(run.has(SUMMARY) for run in stages):
            return None
        return _as_run(seed, stages, status, int(ENDED[status]))

    def ended_with(
        self, name: str, seed: int, stages: Sequence[RunDirectory], code: int, document: Mapping[str, Any]
    ) -> MethodRun:
        """A run whose training has ended with this exit code and document. A failure is not kept: it is tried again."""
        status = next((word for word, exit_code in ENDED.items() if exit_code == code), None)
        if status is None:
            fault = document.get("error") or f"the process ended with {code}, without a message"
            return MethodRun(seed, str(stages[-1].path), "failed", code, fault)
        self.ended[name] = status
        self.save()
        return _as_run(seed, stages, status, code)


def _as_run(seed: int, stages: Sequence[RunDirectory], status: str, code: int) -> MethodRun:
    """A run that has ended, by the summaries of its stages."""
    summaries = [RunSummary.of_json(run.read_json(SUMMARY)) for run in stages if run.has(SUMMARY)]
    stops = [event.message for event in summaries[-1].health if event.action == "stop"]
    peaks = [summary.memory.measured_gb for summary in summaries if summary.memory.measured_gb is not None]
    tokens = [int(summary.train.figures["tokens"]) for summary in summaries if summary.train is not None]
    return MethodRun(
        seed=seed,
        run_dir=str(stages[-1].path),
        status=status,
        exit_code=code,
        message=stops[-1] if status == "unhealthy" and stops else None,
        steps=sum(summary.steps for summary in summaries),
        tokens=sum(tokens),
        seconds=round(sum(summary.seconds for summary in summaries), 3),
        peak_memory_gb=max(peaks, default=None),
    )


def write_json(file: Path, value: object) -> None:
    text = json_text(value, indent=2) + "\n"
    write_whole(file, lambda part: part.write_text(text, encoding="utf-8"))
