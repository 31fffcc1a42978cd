"""The run directory: the files of a run, and the only module that knows their names.

plan.json  manifest.json  metrics.jsonl  metrics.json  evaluation.json  report.html  train.log  run.lock
adapter/, a PEFT adapter, or model/, if all weights were trained
checkpoints/, see storage/checkpoints.py
side-by-side.html and votes.json, after `dpo vote`; chat-pairs.jsonl, after votes in `dpo chat`
pairs.jsonl, held-out.jsonl and sampled.json, of a round of iterative DPO
tensorboard/, if report_to names it
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dpo_cli.errors import InvalidInput, invalid
from dpo_cli.storage.atomic import let_others_read, sync, sync_all, trial, write_whole, writing
from dpo_cli.storage.checkpoints import Checkpoints, FollowedCheckpoints
from dpo_cli.storage.digests import SAFE, sha256_of_all, sha256_of_settings
from dpo_cli.storage.jsonio import json_text, read_json
from dpo_cli.storage.lock import locked
from dpo_cli.storage.redaction import redact, redact_forms, redacted

PLAN, MANIFEST, LINES, SUMMARY = "plan.json", "manifest.json", "metrics.jsonl", "metrics.json"
ADAPTER, WEIGHTS, MODEL, CARD, LOG = "adapter", "adapter_model.safetensors", "model", "README.md", "train.log"
EVALUATION, REPORT = "evaluation.json", "report.html"
PAIRS, HELD_OUT, SAMPLED = "pairs.jsonl", "held-out.jsonl", "sampled.json"
PAGE, VOTES, CHAT_PAIRS = "side-by-side.html", "votes.json", "chat-pairs.jsonl"
TENSORBOARD, CHECKPOINTS, LOCK, TRIAL = "tensorboard", "checkpoints", "run.lock", ".trial"


RUNS_SHOWN = 10  # of the runs in the folders below one that is not a run
UNFINISHED = "holds a run that is not finished"


def not_a_run(path: Path, what: str, missing: Sequence[str], needed: Sequence[str]) -> InvalidInput:
    """The error of a directory without a run; it names the runs one or two folders below that have the needed files."""
    places = (plan.parent for pattern in (f"*/{PLAN}", f"*/*/{PLAN}") for plan in sorted(path.glob(pattern)))
    below = [str(place) for place in places if all((place / name).is_file() for name in needed)]
    shown = ", ".join(below[:RUNS_SHOWN]) + (", ..." if len(below) > RUNS_SHOWN else "")
    lacks = f"it has no {' and no '.join(missing)}"
    if (path / LOCK).is_file() and not (path / SUMMARY).is_file():
        return invalid("not-a-run", f"{path} {UNFINISHED}: {lacks}", "repeat its `dpo train` command with --resume")
    fix = f"name a run below it: {shown}" if below else f"name the output_dir of {what}"
    return invalid("not-a-run", f"{path} is not {what}: {lacks}", fix)


def _unwritable(path: Path, why: str) -> InvalidInput:
    return invalid("run-unwritable", f"cannot write to {path}: {why}", "choose another output_dir", "output_dir")


def run_of(name: str) -> Path:
    """The run directory that is named so, or whose adapter folder is."""
    place = Path(name)
    return place.absolute().parent if place.name == ADAPTER and not (place / PLAN).is_file() else place


def config_of_run(name: str) -> Mapping[str, Any] | None:
    """The config of a run directory, or of the run of an adapter folder; None for anything else."""
    try:
        config = read_json(run_of(name) / PLAN)["config"]
    except (OSError, ValueError, KeyError, TypeError):  # no run, or a damaged one
        return None
    return config if isinstance(config, dict) else None


class RunDirectory:
    """A directory of one run. Files are written under a temporary name and renamed, so a reader never sees half of one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def check(cls, path: Path, replace: bool) -> None:
        """Refuse a directory that holds a run, or parts of one, unless the run is replaced or resumed."""
        _require_no_links(path)
        foreign = [name for name in (ADAPTER, MODEL) if (path / name).exists()]
        if foreign and not any((path / name).exists() for name in (LOCK, MANIFEST)):
            message = f"{path} holds a folder {foreign[0]} that is not from a run, and a run would replace it"
            raise invalid("run-exists", message, "choose another output_dir", "output_dir")
        holds_run = any((path / name).exists() for name in (LINES, SUMMARY, ADAPTER, MODEL)) or cls(path).checkpoints.all()
        if holds_run and not replace:
            message = f"{path} already holds a run" if (path / SUMMARY).is_file() else f"{path} {UNFINISHED}"
            fix = "continue it with --resume, replace it with --overwrite, or choose another folder with output_dir=..."
            raise invalid("run-exists", message, fix, "output_dir")

    @staticmethod
    def require_place(path: Path) -> None:
        """`InvalidInput` where the nearest existing place is not a folder in which this user may write."""
        try:
            place = next(place for place in (path, *path.absolute().parents) if place.exists())
            if not place.is_dir():
                raise _unwritable(path, f"{place} is a file")
            if not os.access(place, os.W_OK | os.X_OK):
                raise _unwritable(path, f"this user may not write in {place}")
        except OSError as error:
            raise _unwritable(path, error.strerror or str(error)) from error

    @staticmethod
    def is_plan(path: Path) -> bool:
        """Whether this is the plan of the run in its folder; another file may have the same name."""
        return path.name == PLAN and (path.parent / MANIFEST).is_file() and (path.parent / LOCK).is_file()

    @classmethod
    @contextmanager
    def claim(cls, path: Path, overwrite: bool, resume: bool) -> Iterator[RunDirectory]:
        """The directory for a run, locked against other processes within the context.

        `InvalidInput` if another process has it, if it is not writable, or if it holds a run that is neither replaced nor
        resumed.
        """
        with ExitStack() as held:
            try:
                cls.check(path, overwrite or resume)
                cls.require_place(path)
                path.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(path / LOCK))
                cls.check(path, overwrite or resume)
                (path / LOG).open("a").close()
            except OSError as error:  # before any model is loaded: the user can choose a writable path
                raise _unwritable(path, error.strerror or str(error)) from error
            yield cls(path)

    def clear(self) -> None:
        """Remove the files of an earlier run, except checkpoints, votes, and its adapter, which the new one replaces."""
        for name in (SUMMARY, LINES, EVALUATION, REPORT, LOG, PAGE, MANIFEST, PLAN):  # first the file that marks a finished run
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / TENSORBOARD, ignore_errors=True)

    def trained_on(self) -> list[str]:
        """The data files of the run, as absolute paths."""
        return list(self.read_json(MANIFEST)["dataset"])

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """A directory that holds a finished run, with the weights that the run wrote."""
        run = cls(path)
        missing = [name for name in (PLAN, SUMMARY) if not (path / name).is_file()]
        if not any(run.trained.glob(SAFE)):
            missing.append(f"{ADAPTER}/{WEIGHTS}")
        if missing:
            raise not_a_run(path, "a finished run", missing, (PLAN, SUMMARY))
        _require_no_links(path)
        _require_whole(run)
        if not run.has_its_weights():
            message = f"the {run.trained.name} in {path} has changed since this run wrote it"
            raise invalid("adapter-changed", message, "train again, or restore the file")
        return run

    @property
    def trained(self) -> Path:
        """The folder of what was trained: the adapter, or the whole model."""
        return self.path / (MODEL if (self.path / MODEL).is_dir() else ADAPTER)

    def has_its_weights(self) -> bool:
        """Whether the trained weights and their settings are unchanged since the run wrote them."""
        settings = self.read_json(MANIFEST).get("trained") if self.has(MANIFEST) else None  # older runs have none
        is_same = self.read_json(SUMMARY)["adapter_sha256"] == sha256_of_all(self.trained)
        return is_same and settings in (None, sha256_of_settings(self.trained))

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.path / CHECKPOINTS)

    @property
    def log(self) -> Path:
        return self.path / LOG

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read_json(self, name: str) -> Any:
        return read_json(self.path / name)

    def write_json(self, name: str, value: object) -> None:
        self._write(name, json_text(redacted(value), indent=2) + "\n")

    def write_plan(self, plan: dict[str, object]) -> None:
        """Write plan.json; its config can be read back unchanged."""
        document = redacted(plan) | {"config": redacted(plan["config"], redact_forms)}
        self._write(PLAN, json_text(document, indent=2) + "\n")

    def read_lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, none before the first step. An incomplete last line is skipped."""
        if not (self.path / LINES).is_file():
            return []
        text = (self.path / LINES).read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def write_rows(self, name: str, text: str) -> None:
        """Rows of the user's data, as they are."""
        write_whole(self.path / name, lambda part: part.write_text(text, encoding="utf-8"))

    def write_text(self, name: str, text: str) -> None:
        self._write(name, redact(text))

    def _write(self, name: str, text: str) -> None:
        write_whole(self.path / name, lambda part: part.write_text(text, encoding="utf-8"))

    def take_lines(self, folder: Path) -> None:
        """Restore metrics.jsonl to its state in the checkpoint `folder`."""
        text = (folder / LINES).read_text(encoding="utf-8") if (folder / LINES).is_file() else ""
        self._write(LINES, text)

    def held_bytes(self) -> int:
        """Bytes of the files that a resumed run replaces: its checkpoints, and what it trained."""
        folders = (self.path / name for name in (CHECKPOINTS, ADAPTER, MODEL))
        return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())

    def forget_end(self) -> None:
        """Remove the files of the run's end, because the run continues."""
        for name in (SUMMARY, EVALUATION, REPORT):
            (self.path / name).unlink(missing_ok=True)

    def append_line(self, line: Mapping[str, object]) -> None:
        """One line of metrics.jsonl, flushed."""
        with (self.path / LINES).open("a", encoding="utf-8") as file:
            file.write(json_text(redacted(line)) + "\n")

    def write_trained(self, save: Callable[[Path], object], whole: bool) -> str:
        """`save` fills a folder that then becomes adapter/, or model/ if `whole`; returns the SHA-256 of the weights.

        The SHA-256 of their settings is written into the manifest.
        """
        place, other = self.path / (MODEL if whole else ADAPTER), self.path / (ADAPTER if whole else MODEL)
        part = self.path / f".{place.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        with writing(self.path):
            save(part)
        let_others_read(part)
        sync_all(part)
        shutil.rmtree(place, ignore_errors=True)
        part.rename(place)
        sync(self.path)
        shutil.rmtree(other, ignore_errors=True)  # left by the run that this one replaces
        if self.has(MANIFEST):
            self.write_json(MANIFEST, {**self.read_json(MANIFEST), "trained": sha256_of_settings(place)})
        return sha256_of_all(place)

    def try_to_write(self, save: Callable[[Path], object]) -> None:
        """A trial of `write_trained` in a temporary folder; raises as `trial` says."""
        part = self.path / TRIAL
        shutil.rmtree(part, ignore_errors=True)
        try:
            with trial(), writing(self.path):
                save(part)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def write_card(self, text: str) -> None:
        write_whole(self.trained / CARD, lambda part: part.write_text(redact(text), encoding="utf-8"))


class FollowedRun(RunDirectory):
    """A run directory that the first process of a training writes, as its other processes have it: they only read."""

    @property
    def checkpoints(self) -> Checkpoints:
        return FollowedCheckpoints(self.path / CHECKPOINTS)

    @property
    def log(self) -> Path:
        return Path(os.devnull)

    def append_line(self, line: Mapping[str, object]) -> None:
        pass

    def clear(self) -> None:
        pass

    def forget_end(self) -> None:
        pass

    def write_card(self, text: str) -> None:
        pass

    def write_rows(self, name: str, text: str) -> None:
        pass

    def try_to_write(self, save: Callable[[Path], object]) -> None:
        pass

    def write_trained(self, save: Callable[[Path], object], whole: bool) -> str:
        return ""

    def _write(self, name: str, text: str) -> None:
        pass


def _require_whole(run: RunDirectory) -> None:
    """`InvalidInput` for a run whose files cannot be read, or lack what every run has."""
    for name, key in {PLAN: "config", SUMMARY: "adapter_sha256", MANIFEST: "model"}.items():
        if not run.has(name):
            continue
        try:
            document = run.read_json(name)
            what = "" if isinstance(document, dict) and key in document else f"it has no {key}"
        except (OSError, ValueError) as error:
            what = str(error)
        if what:
            message, fix = f"{run.path / name} is damaged: {what}", "repeat the `dpo train` command of this run with --resume"
            raise invalid("not-a-run", message, fix)


def _require_no_links(path: Path) -> None:
    """`InvalidInput` for a directory that holds a link: writes and removals there would affect other places."""
    for folder, folders, files in os.walk(path):
        for place in (Path(folder, name) for name in (*folders, *files)):
            if place.is_symlink():
                message = f"{place} is a link to {place.readlink()}, and a run writes only inside its directory"
                fix = f"remove the link, or copy its target: cp -rL {path} ANOTHER"
                raise invalid("run-link", message, fix, "output_dir")
