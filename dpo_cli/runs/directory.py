"""The run directory: what a run leaves, and the only place that knows the file names.

plan.json  manifest.json  metrics.jsonl  metrics.json  evaluation.json  report.html  train.log
adapter/, a PEFT adapter, or model/, where every weight was trained
side-by-side.html  votes.json, where an evaluation was asked for them
tensorboard/, where report_to names it
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_cli.console import json_text
from dpo_cli.errors import InvalidInput, Problem

PLAN, MANIFEST, LINES, SUMMARY = "plan.json", "manifest.json", "metrics.jsonl", "metrics.json"
ADAPTER, WEIGHTS, MODEL, CARD, LOG = "adapter", "adapter_model.safetensors", "model", "README.md", "train.log"
EVALUATION, REPORT = "evaluation.json", "report.html"
PAGE, VOTES = "side-by-side.html", "votes.json"
TENSORBOARD = "tensorboard"
SAFE = "*.safetensors"


class RunDirectory:
    """A directory of one run. Whole files are written beside their place and renamed, so a reader never sees half of one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def check(cls, path: Path, overwrite: bool) -> None:
        """Refuse a directory that holds results of a run, unless `overwrite`."""
        if any((path / name).exists() for name in (LINES, SUMMARY, ADAPTER, MODEL)) and not overwrite:
            message = f"{path} holds a run already"
            fix = "choose another with output_dir=..., or replace it with --overwrite"
            raise InvalidInput([Problem("error", "run-exists", message, fix, "output_dir")])

    @classmethod
    def create(cls, path: Path, overwrite: bool) -> RunDirectory:
        """A directory for a new run. An adapter that is there stays until the new one takes its place."""
        cls.check(path, overwrite)
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name in (PLAN, MANIFEST, LINES, SUMMARY, EVALUATION, REPORT, LOG, PAGE):  # votes stay: they say whose they are
                (path / name).unlink(missing_ok=True)
            shutil.rmtree(path / TENSORBOARD, ignore_errors=True)
            (path / LOG).touch()
        except OSError as error:  # before any model is loaded: a path that cannot be written is the user's to change
            message = f"cannot write to {path}: {error.strerror}"
            raise InvalidInput(
                [Problem("error", "run-unwritable", message, "choose another output_dir", "output_dir")]
            ) from error
        return cls(path)

    def trained_on(self) -> list[str]:
        """The data files of the run, by their absolute paths."""
        return list(self.read_json(MANIFEST)["dataset"])

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """A directory that holds a finished run, with the weights that the run wrote."""
        run = cls(path)
        missing = [name for name in (PLAN, SUMMARY) if not (path / name).is_file()]
        if not any(run.trained.glob(SAFE)):
            missing.append(f"{ADAPTER}/{WEIGHTS}")
        if missing:
            message = f"{path} is not a finished run: it has no {' and no '.join(missing)}"
            raise InvalidInput([Problem("error", "not-a-run", message, "name the output_dir of a finished `dpo train`")])
        if run.read_json(SUMMARY)["adapter_sha256"] != sha256_of_all(run.trained):
            message = f"the {run.trained.name} in {path} is not the one that this run wrote"
            raise InvalidInput([Problem("error", "adapter-changed", message, "train again, or restore the file")])
        return run

    @property
    def trained(self) -> Path:
        """The folder of what was trained: the adapter, or the whole model."""
        return self.path / (MODEL if (self.path / MODEL).is_dir() else ADAPTER)

    @property
    def log(self) -> Path:
        return self.path / LOG

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read_json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json_text(value, indent=2) + "\n")

    def read_lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, none before the first step. The last one may be half written: it is left out then."""
        if not (self.path / LINES).is_file():
            return []
        text = (self.path / LINES).read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def write_text(self, name: str, text: str) -> None:
        self._replace(self.path / name, lambda part: part.write_text(text, encoding="utf-8"))

    def append_line(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl, flushed."""
        with (self.path / LINES).open("a", encoding="utf-8") as file:
            file.write(json_text(line) + "\n")

    def write_trained(self, save: Callable[[Path], Any], whole: bool) -> str:
        """`save` fills a folder that then becomes adapter/, or model/ of a `whole` one; returns the SHA-256 of the weights."""
        place, other = self.path / (MODEL if whole else ADAPTER), self.path / (ADAPTER if whole else MODEL)
        self._replace(place, save)
        if other.is_dir():  # of the run that this one replaces
            shutil.rmtree(other)
        return sha256_of_all(place)

    def write_card(self, text: str) -> None:
        self._replace(self.trained / CARD, lambda part: part.write_text(text, encoding="utf-8"))

    def _replace(self, place: Path, write: Callable[[Path], Any]) -> None:
        part = place.with_name(f".{place.name}.part")
        if part.is_dir():
            shutil.rmtree(part)
        write(part)
        if place.is_dir():
            shutil.rmtree(place)
        part.replace(place)


def sha256_of_all(folder: Path) -> str:
    """The SHA-256 of the folder's weights; of several files, that of their digests in the order of their names."""
    digests = [sha256(file) for file in sorted(folder.glob(SAFE))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
