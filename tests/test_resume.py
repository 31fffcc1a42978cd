"""A training that was stopped anywhere goes on to the same bits, or says why it does not."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import judged_json
from conftest import made_row

from dpo_cli.commands.requests import Request
from dpo_cli.commands.train import train
from dpo_cli.config.config import load
from dpo_cli.errors import DoesNotFit, Exit, InvalidInput
from dpo_cli.hardware.machine import Machine, probe
from dpo_cli.plan import feasibility
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.plan import Counts, Decided, Scoring
from dpo_cli.plan.preflight import inspect
from dpo_cli.runs import open_run
from dpo_cli.runs.resume import _weights
from dpo_cli.scoring import reference_cache
from dpo_cli.scoring.reference import PAIR, LiveReference
from dpo_cli.scoring.reference_cache import ReferenceCache
from dpo_cli.storage.run_directory import RunDirectory
from dpo_cli.training import trainer as trainers
from dpo_cli.ui.console import Console

TIMED = ("tokens_per_second", "peak_memory_gb")
Go = Callable[..., tuple[dict[str, Any], Exit]]


class Killed(BaseException):
    """Ends a training where dpo does not expect it."""


@pytest.fixture
def go(tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path]) -> Go:
    """Trains ten steps in two epochs of 18 pairs, in the folder of that name."""
    data = str(pairs_file([made_row(i) for i in range(24)]))
    values = {"model_name": str(tiny_model_dir), "dataset": data, "device": "cpu", "bf16": False, "fp16": False, "lora_r": 4}
    values |= {"learning_rate": 1e-2, "lora_dropout": 0.1, "eval_split": 0.3, "num_train_epochs": 2, "kl_prompts": 0}
    values |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 2, "max_new_tokens": 2}

    def start(name: str, resume: bool = True, machine: Machine | None = None, **options: object) -> tuple[dict[str, Any], Exit]:
        machine = machine or probe()
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps({**values, "output_dir": str(tmp_path / name), **options}), encoding="utf-8")
        loaded = load(str(config))
        inspection = inspect(loaded, machine, with_fit=False).stricter(lambda found: found.stops_training)
        return train(loaded, inspection, machine, Console(), resume=resume)

    return start


def stopping(monkeypatch: pytest.MonkeyPatch, when: Callable[[dict[str, Any]], bool], stop: Callable[[], None]) -> None:
    """Calls `stop` once, when such a line is written."""
    append, stopped = RunDirectory.append_line, []

    def line(self: RunDirectory, told: dict[str, Any]) -> None:
        append(self, told)
        if when(told) and not stopped:
            stopped.append(True)
            stop()

    monkeypatch.setattr(RunDirectory, "append_line", line)


def is_line(line: dict[str, Any], step: int, split: str) -> bool:
    return bool(line["step"] == step and line["split"] == split)


def kill() -> None:
    raise Killed


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def lines(run: Path) -> list[dict[str, Any]]:
    told = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key not in TIMED} for line in told]


WAYS = ((3, kill), (5, interrupt), (7, kill))
CASES: dict[str, dict[str, Any]] = {
    "in an evaluated epoch": {},
    "no dropout": {"lora_dropout": 0.0},
    "evaluations": {"eval_steps": 1},
    "lines of three steps": {"logging_steps": 3, "save_steps": 1},
    "grouped by length": {"group_by_length": True, "save_steps": 1},
    "every weight": {"lora_r": 0, "learning_rate": 1e-3},
    "dora": {"use_dora": True, "modules_to_save": ["embed_tokens"]},
    "sft": {"strategy": "sft"},
    "reward": {"strategy": "reward"},
}


@pytest.mark.parametrize(("options", "way"), zip(CASES.values(), cycle(WAYS), strict=False), ids=CASES)
def test_it_goes_on_to_the_same_bits(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], way: tuple[int, Callable[[], None]]
) -> None:
    """Each in one way; `make torture` tries them all."""
    step, stop = way
    whole, _ = go("whole", **options)
    reference_cache.path().unlink(missing_ok=True)  # so that both compute the reference
    with monkeypatch.context() as patched:
        stopping(patched, lambda line: line["step"] >= step, stop)
        if stop is kill:
            with pytest.raises(Killed):
                go("stopped", **options)
        else:
            summary, code = go("stopped", **options)
            assert (summary["status"], code) == ("interrupted", Exit.SIGINT)
            assert summary["steps"] < whole["steps"]
    gone_on, code = go("stopped", **options)
    assert code is Exit.DONE and gone_on["adapter_sha256"] == whole["adapter_sha256"]
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    resumed = json.loads((tmp_path / "stopped" / "manifest.json").read_text(encoding="utf-8"))["resumed"]
    assert len(resumed) == 1 and 0 < resumed[0] < whole["steps"]


def change_the_cache(nats: float) -> None:
    """Other values than the model computes, with their checksums."""
    with closing(sqlite3.connect(reference_cache.path())) as file:
        ((digest,),) = file.execute("SELECT digest FROM models").fetchall()
        pairs = [pair for (pair,) in file.execute("SELECT pair FROM pairs")]
    cache = ReferenceCache(digest, "changed", print)
    cache.add({pair: (chosen + nats, rejected) for pair, (chosen, rejected) in cache.read(pairs).items()})


BETWEEN: dict[str, Callable[[], object]] = {
    "the cache is kept": lambda: None,
    "it is deleted": lambda: reference_cache.path().unlink(),
    "it is damaged": lambda: reference_cache.path().write_bytes(b"no cache"),
    "others have written to it": lambda: change_the_cache(0.003),
}


@pytest.mark.parametrize("change", BETWEEN.values(), ids=BETWEEN)
def test_a_resumed_run_has_the_reference_that_it_started_with(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]
) -> None:
    """Whatever happens to the cache in between. Its values are changed first, so that computing them again would be seen."""
    cold, _ = go("cold")
    change_the_cache(0.002)  # less than what the check before the first step calls rounding
    kept = reference_cache.path().read_bytes()
    whole, _ = go("whole")
    assert whole["adapter_sha256"] != cold["adapter_sha256"]
    reference_cache.path().write_bytes(kept)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stopping(patched, lambda line: line["step"] == 3, kill)
        go("stopped")
    change()
    resumed, _ = go("stopped")
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_a_later_run_computes_only_new_pairs(
    go: Go, tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another beta and rate none, with six more pairs those; in a run of other weights all."""
    scored: list[int] = []
    live = LiveReference.log_probs
    monkeypatch.setattr(
        LiveReference, "log_probs", lambda self, batch: scored.extend(batch[PAIR].chunk(2)[0].tolist()) or live(self, batch)
    )
    monkeypatch.setattr(trainers.CarefulTrainer, "probe_longest", lambda self: None)  # its values are not kept

    def computed(name: str, **options: object) -> list[int]:
        scored.clear()
        go(name, **options)
        return sorted(scored)

    all_pairs = {"eval_split": 0}
    assert computed("first", **all_pairs) == list(range(24))
    assert computed("second", beta=0.5, learning_rate=1e-3, num_train_epochs=3, **all_pairs) == []
    assert "the log-probs of 24 of 24 pairs come from the cache" in capsys.readouterr().out
    grown = str(pairs_file([made_row(i) for i in range(30)]))
    assert computed("grown", dataset=grown, **all_pairs) == list(range(24, 30))
    go("adapter", strategy="sft", **all_pairs)
    assert computed("other", model_name=str(tmp_path / "adapter"), **all_pairs) == list(range(30))


def test_going_on_from_an_adapter_keeps_its_reference(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to the adapter in training is a frozen one. Trainer alone would restore only the frozen one."""
    go("first", strategy="sft")
    options = {"model_name": str(tmp_path / "first")}
    whole, _ = go("whole", **options)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stopping(patched, lambda line: line["step"] == 5, kill)
        go("stopped", **options)
    gone_on, _ = go("stopped", **options)
    assert gone_on["adapter_sha256"] == whole["adapter_sha256"]
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_early_stopping_leaves_the_best_and_goes_on(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"early_stopping_patience": 2, "eval_steps": 1, "learning_rate": 1.0, "num_train_epochs": 6, "save_steps": 1}
    options["lr_scheduler_type"] = "constant"
    whole, _ = go("whole", **options)
    losses = {line["step"]: line["loss"] for line in lines(tmp_path / "whole") if line["split"] == "eval"}
    best = min(losses, key=losses.__getitem__)
    assert whole["best_step"] == best and whole["steps"] == best + 2 < 30
    assert whole["eval"]["loss"]["value"] == pytest.approx(losses[best], rel=1e-6)
    step = whole["steps"] - 1  # after the best one: the checkpoint then has its weights and the last ones
    for name, split, stop in (("killed", "train", kill), ("interrupted", "train", interrupt), ("mid", "eval", interrupt)):
        with monkeypatch.context() as patched:
            stopping(patched, partial(is_line, step=step, split=split), stop)
            if stop is kill:
                with pytest.raises(Killed):
                    go(name, **options)
            else:
                assert go(name, **options)[1] is Exit.SIGINT
        gone_on, code = go(name, **options)
        assert code is Exit.DONE
        assert (gone_on["adapter_sha256"], gone_on["best_step"]) == (whole["adapter_sha256"], best)
        assert lines(tmp_path / name) == lines(tmp_path / "whole")


def test_a_signal_ends_an_evaluation_which_is_made_when_the_run_goes_on(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_cli.commands import train

    whole, _ = go("whole")
    measure, calls = train.measure, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(torch.rand(1))  # which a checkpoint must not remember
        signal.raise_signal(signal.SIGTERM)
        return measure(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(train, "measure", interrupted)
        summary, code = go("stopped")
    assert (summary["status"], code, len(calls)) == ("interrupted", Exit.SIGTERM, 1)
    assert [line["split"] for line in lines(tmp_path / "stopped")] == ["train"] * summary["steps"]
    gone_on, _ = go("stopped")
    assert gone_on["adapter_sha256"] == whole["adapter_sha256"]
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_an_evaluation_that_fails_after_the_last_step_loses_nothing(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is saved, and the run continues with only the evaluation."""
    options = {"max_steps": 1, "save_steps": 50}

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("this cannot be judged")

    with monkeypatch.context() as patched, pytest.raises(ValueError, match="cannot be judged"):
        patched.setattr("dpo_cli.commands.train.measure", fail)
        go("broken", **options)
    file = tmp_path / "broken/adapter/adapter_model.safetensors"
    saved = file.read_bytes()
    made, _ = go("broken", **options)
    assert made["eval"] is not None and file.read_bytes() == saved
    assert [(line["step"], line["split"]) for line in lines(tmp_path / "broken")] == [(1, "train"), (1, "eval")]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = go("whole")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stopping(patched, lambda line: line["step"] == 5, kill)
        go("stopped")
    optimizer = tmp_path / "stopped" / "checkpoints" / "step-4" / "optimizer.safetensors"
    data = bytearray(optimizer.read_bytes())
    data[len(data) // 2] ^= 1
    optimizer.write_bytes(data)
    capsys.readouterr()
    gone_on, _ = go("stopped")
    said = capsys.readouterr().out
    assert "checkpoint step-4 is skipped: optimizer.safetensors has changed" in said and "resuming from step-2" in said
    assert gone_on["adapter_sha256"] == whole["adapter_sha256"]
    for folder in (tmp_path / "whole" / "checkpoints").iterdir():
        (folder / "random.json").unlink()
    (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    again, _ = go("whole")  # nothing of it can be believed, so it starts again
    assert again["adapter_sha256"] == whole["adapter_sha256"]


def test_a_finished_run_is_told_and_not_touched(go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = go("run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "run.lock"}
    capsys.readouterr()
    assert go("run", logging_steps=2) == (first, Exit.DONE)
    assert "completed already, after step 10" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


def test_more_epochs_go_on_and_other_settings_are_refused(go: Go, tmp_path: Path) -> None:
    first, _ = go("run")
    for options, told in (
        ({"learning_rate": 2e-2}, "learning_rate was 0.01 and is now 0.02"),
        ({"beta": 0.2}, "beta was 0.1 and is now 0.2"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps was 2 and is now 4"),
        ({"num_train_epochs": 1}, "10 steps are done, and the config asks for 5"),
        ({"seed": 7}, "seed was 42 and is now 7"),
    ):
        with pytest.raises(InvalidInput) as caught:
            go("run", **options)
        found = {problem.message: (problem.code, problem.key) for problem in caught.value.problems}
        assert found[told][0] == "resume-differs" and found[told][1] in told + "num_train_epochs"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(made_row(i)) + "\n" for i in range(26)), encoding="utf-8")
    with pytest.raises(InvalidInput) as caught:
        go("run")
    assert "the content of dataset has changed since the run started" in [problem.message for problem in caught.value.problems]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(made_row(i)) + "\n" for i in range(24)), encoding="utf-8")
    more, _ = go("run", num_train_epochs=3)
    assert more["steps"] == 15 and more["adapter_sha256"] != first["adapter_sha256"]
    assert [line["step"] for line in lines(tmp_path / "run") if line["split"] == "train"] == list(range(1, 16))


def test_a_moved_run_and_a_moved_dataset_are_the_same_run(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = go("whole")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stopping(patched, lambda line: line["step"] == 5, kill)
        go("stopped")
    (tmp_path / "stopped").rename(tmp_path / "moved")
    (tmp_path / "pairs.jsonl").rename(tmp_path / "renamed.jsonl")
    gone_on, _ = go("moved", dataset=str(tmp_path / "renamed.jsonl"))
    assert gone_on["adapter_sha256"] == whole["adapter_sha256"]


def test_a_second_process_is_refused_and_told_who_is_there(go: Go, tmp_path: Path) -> None:
    with RunDirectory.claim(tmp_path / "run", overwrite=False, resume=False):
        code = "import sys; from pathlib import Path; from dpo_cli.storage.run_directory import RunDirectory as R\n"
        code += f"with R.claim(Path({str(tmp_path / 'run')!r}), False, True): pass"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "is in use by process " in done.stderr
        with pytest.raises(InvalidInput) as caught:
            go("run")
        assert [problem.code for problem in caught.value.problems] == ["run-locked"]
    assert go("run")[1] is Exit.DONE


def test_a_disk_without_room_is_told_before_anything_is_loaded(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasibility, "free_bytes", lambda path: 1 << 20)
    with pytest.raises(DoesNotFit) as caught:
        go("run")
    (problem,) = caught.value.problems
    assert problem.code == "disk-too-full" and "0.00 GB are free" in problem.message
    assert not (tmp_path / "run").exists()


def test_checkpoints_come_by_the_clock_where_no_steps_are_named(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(name: str) -> list[str]:
        return sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())

    go("slow", save_steps=None, eval_split=0)
    assert kept("slow") == ["step-12"]  # the end alone: ten minutes have not passed
    monkeypatch.setattr(trainers, "BETWEEN_SECONDS", 0.0)
    go("fast", save_steps=None, eval_split=0)
    assert kept("fast") == ["step-11", "step-12"]


def test_another_version_of_a_hub_model_is_other_weights(tmp_path: Path) -> None:
    manifest = {"model": {"sha256": {}, "revision": "a", "below": {}}}
    assert _weights(manifest) == _weights({"model": {"sha256": {}, "revision": "a", "below": {}}})
    assert _weights(manifest) != _weights({"model": {"sha256": {}, "revision": "b", "below": {}}})


def test_without_patience_the_last_is_kept_however_good_the_best_was(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"eval_steps": 1, "save_steps": 1, "learning_rate": 0.6}
    whole, _ = go("whole", **options)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stopping(patched, partial(is_line, step=5, split="train"), kill)
        go("stopped", **options, early_stopping_patience=9)
    gone_on, _ = go("stopped", **options)
    assert (gone_on["adapter_sha256"], gone_on["best_step"]) == (whole["adapter_sha256"], None)


def test_a_longer_training_has_its_own_learning_rates(go: Go, tmp_path: Path) -> None:
    go("run")
    go("run", num_train_epochs=3)
    rates = [line["learning_rate"] for line in lines(tmp_path / "run") if line["split"] == "train"]
    assert rates[10:] == pytest.approx([1e-2 * (15 - step) / 15 for step in range(10, 15)])


def test_the_size_of_micro_batches_is_taken_over_and_told(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = go("whole")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stopping(patched, partial(is_line, step=5, split="train"), kill)
        go("stopped")
    gone_on, _ = go("stopped", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert gone_on["adapter_sha256"] == whole["adapter_sha256"]
    assert "micro-batches are 2 x 2, as when the run started" in capsys.readouterr().out


def test_a_run_goes_on_with_the_batch_that_it_began_with_whatever_memory_there_is(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bill but without its margin, a new run would take other values; with less than the bill, neither runs."""
    whole, _ = go("whole", gradient_checkpointing="auto")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stopping(patched, partial(is_line, step=5, split="train"), kill)
        go("stopped", gradient_checkpointing="auto")
    plan = json.loads((tmp_path / "stopped" / "plan.json").read_text(encoding="utf-8"))
    assert plan["config"]["gradient_checkpointing"] is False
    settled = resolve(load(str(tmp_path / "stopped.json")), probe(), Counts(**plan["counts"]), Scoring(**plan["scoring"]))
    assert settled.memory is not None
    need = settled.memory.total_gb

    tight = replace(probe(), memory_gb=1.001 * need)
    go("other", gradient_checkpointing="auto", machine=tight)
    decided = json.loads((tmp_path / "other" / "plan.json").read_text(encoding="utf-8"))
    assert decided["row_tokens"] == 0 < plan["row_tokens"]
    with pytest.raises(DoesNotFit) as caught:
        go("stopped", gradient_checkpointing="auto", machine=replace(probe(), memory_gb=0.99 * need))
    assert "restart with --overwrite" in str(caught.value.problems[0].fix)
    gone_on, _ = go("stopped", gradient_checkpointing="auto", machine=tight)
    assert gone_on["adapter_sha256"] == whole["adapter_sha256"]


def test_a_run_goes_on_and_is_judged_with_what_it_decided(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started where bfloat16 is fast and memory is large; a new run on the other machine decides both differently."""
    left_open = {"device": "auto", "bf16": None, "fp16": None, "gradient_checkpointing": "auto"}
    here = replace(probe(), bf16_speed=2.0)
    whole, _ = go("whole", machine=here, **left_open)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stopping(patched, partial(is_line, step=5, split="train"), kill)
        go("stopped", machine=here, **left_open)
    first_plan = json.loads((tmp_path / "whole" / "plan.json").read_text(encoding="utf-8"))
    settled = partial(resolve, load(str(tmp_path / "whole.json")), counts=Counts(**first_plan["counts"]))
    need = settled(here, scoring=Scoring(**first_plan["scoring"])).memory
    assert need is not None
    other = replace(here, bf16_speed=0.5, memory_gb=1.0001 * need.total_gb)
    fresh = settled(other, scoring=Scoring(**first_plan["scoring"]))
    assert (fresh.dtype, fresh.row_tokens) == ("float32", 0)
    assert first_plan["row_tokens"] > 0

    gone_on, _ = go("stopped", machine=other, **left_open)
    assert gone_on["adapter_sha256"] == whole["adapter_sha256"] and gone_on["eval"] == whole["eval"]
    again = json.loads((tmp_path / "stopped" / "plan.json").read_text(encoding="utf-8"))
    assert Decided.of(again) == Decided.of(first_plan) and again["memory"]["total_gb"] == first_plan["memory"]["total_gb"]
    assert Decided.of(first_plan).values.keys() >= {"device", "bf16", "fp16", "gradient_checkpointing"}

    monkeypatch.setattr(open_run, "probe", lambda: other)
    opened = open_run.open_run(str(tmp_path / "whole"), None, Console())
    assert opened.plan.config.replaced({"output_dir": first_plan["config"]["output_dir"]}).to_json() == first_plan["config"]
    assert open_run.load_policy(opened, Console())[1].scoring == Decided.of(first_plan).scoring
    evaluation = json.loads((tmp_path / "whole" / "evaluation.json").read_text(encoding="utf-8"))
    assert judged_json(Request(str(tmp_path / "whole")), Console())["policy"] == evaluation["policy"]
    assert open_run.open_run(str(tmp_path / "whole"), None, Console(), ["device=auto"]).plan.dtype == "float32"


def test_an_unhealthy_run_goes_on_only_where_another_end_is_asked_for(go: Go) -> None:
    options = {"stop_on": ["kl"], "max_kl": 1e-6, "kl_prompts": 2, "eval_steps": 2}
    stopped, code = go("run", **options)
    assert (stopped["status"], code) == ("unhealthy", Exit.MISSED) and stopped["steps"] < 10
    assert go("run", **options) == (stopped, Exit.MISSED)
    gone_on, code = go("run", **{**options, "max_kl": 1e6})
    assert (gone_on["status"], gone_on["steps"], code) == ("completed", 10, Exit.DONE)


def test_what_a_run_replaces_is_no_lack_of_room(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = go("run")
    needed: list[int] = []
    monkeypatch.setattr(feasibility, "free_bytes", lambda path: needed[0])
    needed.append(feasibility.BESIDE_BYTES)
    with pytest.raises(DoesNotFit):
        go("other")
    assert go("run") == (whole, Exit.DONE)


def test_somebody_elses_model_is_not_replaced(go: Go, tmp_path: Path) -> None:
    (tmp_path / "home" / "model").mkdir(parents=True)
    (tmp_path / "home" / "model" / "mine").write_text("mine", encoding="utf-8")
    with pytest.raises(InvalidInput) as caught:
        go("home")
    assert "a folder model that is not from a run" in caught.value.problems[0].message
    assert [path.name for path in (tmp_path / "home").rglob("*")] == ["model", "mine"]


def test_a_plan_is_told_from_a_config_that_is_called_so(tmp_path: Path, go: Go) -> None:
    (tmp_path / "plan.json").write_text("{}", encoding="utf-8")
    assert not RunDirectory.is_plan(tmp_path / "plan.json")
    go("run")
    assert RunDirectory.is_plan(tmp_path / "run" / "plan.json")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-10")
    assert not RunDirectory.is_plan(checkpoint / "plan.json")


def test_a_config_of_the_model_counts_as_its_weights_do(go: Go, tmp_path: Path, tiny_model_dir: Path) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    go("run", model_name=str(model))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}), encoding="utf-8")
    with pytest.raises(InvalidInput) as caught:
        go("run", model_name=str(model))
    assert [problem.key for problem in caught.value.problems] == ["model_name"]
