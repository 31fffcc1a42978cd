"""Figures that are known are shown at once, and never after anything has changed that decides them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fork_server
import pytest
from conftest import Run, made_row
from test_imports import HEAVY

from dpo_cli.commands import train as composer
from dpo_cli.errors import InvalidInput
from dpo_cli.hardware.machine import Machine, probe
from dpo_cli.results.codec import to_json
from dpo_cli.runs import kept_evaluation
from dpo_cli.runs.kept_evaluation import SEAL, basis_of, keep, kept
from dpo_cli.storage.run_directory import EVALUATION, MANIFEST, PLAN, SUMMARY, RunDirectory


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A folder with a run, its data and its own copy of the model, and a copy of all of it in `pristine`."""
    place = tmp_path_factory.mktemp("judged") / "place"
    shutil.copytree(tiny_model_dir, place / "model")
    (place / "pairs.jsonl").write_text("".join(json.dumps(made_row(i)) + "\n" for i in range(24)), encoding="utf-8")
    values = {"model_name": str(place / "model"), "dataset": str(place / "pairs.jsonl"), "device": "cpu", "bf16": False}
    values |= {"max_steps": 2, "lora_r": 4, "learning_rate": 1e-2, "kl_prompts": 2, "max_new_tokens": 4, "eval_split": 0.25}
    (place / "config.json").write_text(json.dumps({**values, "output_dir": str(place / "run")}), encoding="utf-8")
    assert dpo("train", place / "config.json")
    shutil.copytree(place, place.parent / "pristine")
    return place


@pytest.fixture
def judged(trained: Path) -> Iterator[RunDirectory]:
    yield RunDirectory.open(trained / "run")
    shutil.rmtree(trained)
    shutil.copytree(trained.parent / "pristine", trained)  # with the times of the files


def edit(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def dpo(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = fork_server.dpo(*words)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_nothing_has_changed(judged: RunDirectory) -> None:
    known = kept(judged)
    assert known is not None
    document = judged.read_json(EVALUATION)
    assert {**json.loads(json.dumps(to_json(known))), SEAL: document[SEAL]} == document
    keep(judged, known, basis_of(config_of(judged)))
    assert judged.read_json(EVALUATION) == document


def test_what_changes_during_a_training_is_seen(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are of the rows that were read at the start, and their seal too."""

    def changing(*args: Any, **options: Any) -> Any:
        extend(tmp_path / "pairs.jsonl")
        return measure(*args, **options)

    measure = composer.measure
    monkeypatch.setattr(composer, "measure", changing)
    judged = RunDirectory.open(run(eval_split=0.25)[1])
    assert judged.has(EVALUATION) and kept(judged) is None


def test_data_that_is_gone_at_the_end_of_a_training(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deleting(*args: Any, **options: Any) -> Any:
        (tmp_path / "pairs.jsonl").unlink(missing_ok=True)
        return measure(*args, **options)

    measure = composer.measure
    monkeypatch.setattr(composer, "measure", deleting)
    summary, place = run(eval_split=0.25)
    assert summary["status"] == "completed" and (place / EVALUATION).is_file()


def test_eval_writes_only_what_is_missing_or_damaged(judged: RunDirectory) -> None:
    file = judged.path / EVALUATION
    whole = file.read_bytes()
    for damage in (CHANGES["a figure"], CHANGES["a half file"], CHANGES["no file"], CHANGES["another JSON value"]):
        damage(judged)
        dpo("eval", judged.path)
        assert file.read_bytes() == whole
        assert "nothing has changed" in dpo("eval", judged.path).stdout
    os.utime(Path(config_of(judged)["dataset"]))
    assert "nothing has changed" in dpo("eval", judged.path).stdout
    CHANGES["a row"](judged)  # a blank line: the same figures, of another file
    said = dpo("eval", judged.path).stdout
    assert "evaluation.json is of other data" in said and "accuracy" in said and file.read_bytes() == whole


@pytest.mark.parametrize("name", [PLAN, SUMMARY, MANIFEST])
@pytest.mark.parametrize("text", ["[]", "null", "", '{"config', "{}"])
def test_a_damaged_file_of_a_run_is_named(name: str, text: str, judged: RunDirectory) -> None:
    (judged.path / name).write_text(text, encoding="utf-8")
    said = dpo("eval", judged.path, code=3).stderr
    assert f"{name} is damaged" in said and "--resume" in said and "Error" not in said


def config_of(run: RunDirectory) -> dict[str, Any]:
    config: dict[str, Any] = run.read_json(PLAN)["config"]
    return config


CHANGES: dict[str, Callable[[RunDirectory], object]] = {
    "a figure": lambda run: edit(run.path / EVALUATION, lambda it: it["policy"]["accuracy"].update(value=0.125)),
    "a sample": lambda run: edit(run.path / EVALUATION, lambda it: it["samples"].clear()),
    "no seal": lambda run: edit(run.path / EVALUATION, lambda it: it.pop(SEAL)),
    "another seal": lambda run: edit(run.path / EVALUATION, lambda it: it.update({SEAL: "0" * 64})),
    "another JSON value": lambda run: (run.path / EVALUATION).write_text("[]", encoding="utf-8"),
    "a half file": lambda run: os.truncate(run.path / EVALUATION, 100),
    "no file": lambda run: (run.path / EVALUATION).unlink(),
    "an option": lambda run: edit(run.path / PLAN, lambda it: it["config"].update(max_new_tokens=5)),
    "the scoring": lambda run: edit(run.path / PLAN, lambda it: it["scoring"].update(shared=False)),
    "a row": lambda run: extend(Path(config_of(run)["dataset"])),
    "the dataset is gone": lambda run: Path(config_of(run)["dataset"]).unlink(),
    "the time of the weights": lambda run: os.utime(Path(config_of(run)["model_name"]) / "model.safetensors", (1, 1)),
    "the tokenizer": lambda run: extend(Path(config_of(run)["model_name"]) / "tokenizer.json"),
    "the model is gone": lambda run: shutil.rmtree(config_of(run)["model_name"]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen(what: str, judged: RunDirectory) -> None:
    assert kept(judged) is not None
    CHANGES[what](judged)
    assert kept(judged) is None


def test_other_code_versions_and_hardware_are_seen(judged: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_machine() -> Machine:
        return replace(probe(), processor="another")

    for name, value in {
        "sha256_of_package": lambda: "other code",
        "installed_versions": lambda *_: {"torch": "1.0"},
        "probe": other_machine,
        "revision": lambda *_: "another commit",
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(kept_evaluation, name, value)
            assert kept(judged) is None, name
    assert kept(judged) is not None


def test_a_changed_adapter_is_refused_as_ever(judged: RunDirectory) -> None:
    with (judged.trained / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(InvalidInput):
        RunDirectory.open(judged.path)


def test_eval_shows_what_is_known_and_computes_on_request(judged: RunDirectory) -> None:
    first = dpo("eval", judged.path)
    assert "nothing has changed" in first.stdout and "accuracy" in first.stdout
    again = dpo("eval", judged.path, "--again")
    assert "nothing has changed" not in again.stdout and "scoring:" in again.stdout
    figures = [json.loads(dpo("eval", judged.path, "--json", *words).stdout) for words in ([], ["--again"])]
    assert figures[0] == figures[1] and SEAL not in figures[0]
    assert "margin is" in dpo("eval", judged.path, "--fail-under", "margin=1000", code=5).stdout


@pytest.mark.parametrize("words", [["kl_prompts=3"], ["--dataset", "rows.jsonl"], ["--side-by-side", "2"]])
def test_another_question_is_computed(words: list[str], judged: RunDirectory) -> None:
    rows = Path(config_of(judged)["dataset"])
    words = [str(rows) if word == "rows.jsonl" else word for word in words]
    assert "nothing has changed" not in dpo("eval", judged.path, *words).stdout


def test_a_known_evaluation_loads_no_heavy_module(judged: RunDirectory) -> None:
    code = (
        "import sys\n"
        "from dpo_cli.app import app\n"
        f"app(['eval', {str(judged.path)!r}], standalone_mode=False)\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "nothing has changed" in done.stdout and done.stdout.strip().endswith("HEAVY []"), done.stdout + done.stderr
