"""Iterative DPO: each round trains on pairs of its own policy's answers, and all rounds are judged on one held-out set."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import judged_json
from conftest import ROOT
from safetensors.torch import load_file
from test_augment import talker_dir  # noqa: F401 - a fixture
from typer.testing import CliRunner

from dpo_cli.app import app
from dpo_cli.commands import augment, round_sampling
from dpo_cli.commands.requests import Request
from dpo_cli.commands.train_stages import train_stages
from dpo_cli.config.config import load
from dpo_cli.config.rounds import rounds_of
from dpo_cli.data.dataset import is_held_out_prompt, read
from dpo_cli.data.rows import Pair, read_row
from dpo_cli.errors import DpoError, Exit, InvalidInput, NoPairs
from dpo_cli.evaluation.evaluation import score
from dpo_cli.evaluation.generation import Answer, generate
from dpo_cli.runs.open_run import load_policy, open_run
from dpo_cli.scoring import reference_cache
from dpo_cli.storage.digests import sha256
from dpo_cli.storage.resumable_file import ResumableFile
from dpo_cli.storage.run_directory import RunDirectory
from dpo_cli.ui.console import Console

PROMPTS = 24
RULE = {"rank": "shorter", "pairs_per_prompt": 2, "max_new_tokens": 24, "temperature": 1.5, "prompts_per_batch": 6}
KEPT = ("pairs.jsonl", "held-out.jsonl", "sampled.json", "adapter/adapter_model.safetensors")  # the same bytes after any stop
Train = Callable[..., dict[str, Any]]


def row(i: int) -> dict[str, object]:
    return {"prompt": f"question {i}", "chosen": f"the cat sat on {i}", "rejected": f"no {i}"}


@pytest.fixture
def place(tmp_path: Path, talker_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811 - the fixture
    """A folder with pairs, and with a config of two rounds."""
    monkeypatch.chdir(tmp_path)
    write_rows("pairs.jsonl", range(PROMPTS))
    values = {"model_name": str(talker_dir), "dataset": "pairs.jsonl", "augment": RULE, "learning_rate": 1e-2, "lora_r": 4}
    values |= {"device": "cpu", "bf16": False, "fp16": False, "eval_split": 0.3, "max_steps": 4, "save_steps": 2}
    values |= {"kl_prompts": 2, "max_new_tokens": 4, "rounds": 2, "output_dir": str(tmp_path / "run")}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return tmp_path


def write_rows(name: str, numbers: range) -> None:
    Path(name).write_text("".join(json.dumps(row(i)) + "\n" for i in numbers), encoding="utf-8")


def train(*overrides: str, code: Exit = Exit.DONE, **options: bool) -> dict[str, Any]:
    result, ended = train_stages("config.json", overrides, Console(), **options)
    assert ended is code
    return result


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def document(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def held_out_prompts() -> set[str]:
    return {f"question {i}" for i in range(PROMPTS) if is_held_out_prompt(json.dumps(f"question {i}"), 0.3, 42)}


def test_two_rounds_have_their_pairs_and_one_held_out_set(place: Path, talker_dir: Path) -> None:  # noqa: F811
    done = CliRunner().invoke(app, ["train", "config.json", "--json"])
    assert done.exit_code == 0, done.output
    told, held_out = json.loads(done.stdout), held_out_prompts()
    assert [Path(result["run_dir"]).name for result in told["rounds"]] == ["round-1", "round-2"]
    assert told["run_dir"] == told["rounds"][-1]["run_dir"] and 0 < len(held_out) < PROMPTS
    first, second = place / "run" / "round-1", place / "run" / "round-2"
    assert (first / "held-out.jsonl").read_bytes() == (second / "held-out.jsonl").read_bytes()
    assert rows(first / "held-out.jsonl") == [row(i) for i in range(PROMPTS) if f"question {i}" in held_out]
    adapter = {"name": "round-1", "sha256": sha256(first / "adapter" / "adapter_model.safetensors")}
    model = {"name": talker_dir.name, "sha256": sha256(talker_dir / "model.safetensors")}
    for number, (run, sampled_by) in enumerate(((first, model), (second, adapter)), start=1):
        pairs, sampled = rows(run / "pairs.jsonl"), document(run / "sampled.json")
        assert {(own["round"], own["seed"]) for own in (pair["provenance"] for pair in pairs)} == {(number, 41 + number)}
        assert all(pair["provenance"]["model"] == sampled_by for pair in pairs)
        assert {pair["prompt"] for pair in pairs}.isdisjoint(held_out)
        assert (sampled["pairs"], sampled["prompts"]) == (len(pairs), PROMPTS - len(held_out))
        assert sampled["sha256"] == sha256(run / "pairs.jsonl") and told["rounds"][number - 1]["sampled"] == sampled
        manifest, plan = document(run / "manifest.json"), document(run / "plan.json")
        assert manifest["dataset"] == {str(run / "pairs.jsonl"): sampled["sha256"]}
        assert manifest["eval_dataset"] == {str(run / "held-out.jsonl"): sha256(run / "held-out.jsonl")}
        assert any(f"round {number} of 2: {len(pairs)} pairs" in note for note in plan["notes"])
        assert plan["config"]["rounds"] is None and plan["counts"]["eval_prompts"] == len(held_out)
        assert f"round {number} of 2" in (run / "report.html").read_text(encoding="utf-8")
    assert "round 2: round-1 answers 17 prompts" in done.stderr and "score before it" in done.stderr
    assert any("continues" in note and "frozen copy" in note for note in document(second / "plan.json")["notes"])
    compared = CliRunner().invoke(app, ["report", str(first), str(second)])
    assert compared.exit_code == 0, compared.output


def test_one_round_is_augment_and_train_by_hand(place: Path) -> None:
    """The same pairs but for the number of the round, and the same adapter to the bit."""
    write_rows("held.jsonl", range(100, 106))
    others = ["eval_dataset=held.jsonl", "eval_split=0"]
    train("rounds=1", *others)
    by_hand = CliRunner().invoke(app, ["augment", "pairs.jsonl", "config.json", "rounds=null", "--out", "made.jsonl"])
    assert by_hand.exit_code == 0, by_hand.output
    made, of_round = rows(Path("made.jsonl")), rows(place / "run" / "round-1" / "pairs.jsonl")
    assert [pair["provenance"].pop("round") for pair in of_round] == [1] * len(made) and of_round == made
    reference_cache.path().unlink(missing_ok=True)  # so that both compute the reference
    train("rounds=null", "dataset=made.jsonl", "output_dir=hand", *others)
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (place / "hand", place / "run" / "round-1")]
    assert files[0].read_bytes() == files[1].read_bytes()


def mean_score(run: Path) -> float:
    return float(document(run / "sampled.json")["score"]["value"])


@pytest.mark.long
def test_the_sampled_answers_get_better(place: Path) -> None:
    """After one round and after two: over five seeds the rise since before is above zero by a t-test, whose limit with 4
    degrees of freedom is 3.747 (1 %, one side)."""
    rule = {**RULE, "rank": "regex", "pattern": "^.{1,4}$", "max_new_tokens": 12}
    given = [f"augment={json.dumps(rule)}", "eval_split=0", "save_steps=null"]
    scores = []
    for seed in range(5):
        folder = place / f"run-{seed}"
        train(*given, f"seed={seed}", f"output_dir={folder}")
        after = ["augment", "pairs.jsonl", "config.json", *given, f"seed={seed}", f"model_name={folder / 'round-2'}"]
        told = CliRunner().invoke(app, [*after, "--out", f"after-{seed}.jsonl", "--json"])
        assert told.exit_code == 0, told.output
        last = json.loads(told.stdout)["score"]["value"]
        scores.append([mean_score(folder / "round-1"), mean_score(folder / "round-2"), last])
    first, second, last = np.array(scores).T
    for rise in (second - first, last - first):
        assert rise.mean() / (rise.std(ddof=1) / np.sqrt(5)) > 3.747, scores


def test_a_mean_score_has_an_interval_over_prompts() -> None:
    """Prompts with the means 1, 2 and 3: mean 2, variance ((-1)^2 + 0 + 1^2) / 2 = 1, half a width 1.96 / sqrt(3) = 1.1316."""
    means = augment.ScoreMeans()
    for scores in ([1.0], [1.0, 3.0], [], [3.0, 3.0, 3.0]):
        means.add(scores)
    assert means.interval is not None
    assert (means.interval.value, means.interval.high - 2) == (2, pytest.approx(1.1316, abs=1e-4))
    continued = augment.ScoreMeans()
    assert continued.interval is None
    continued.restore(json.loads(json.dumps(means.state)))
    assert continued.interval == means.interval


class Killed(BaseException):
    """Ends a command where dpo does not expect it."""


def killed_in_batch(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patched: pytest.MonkeyPatch) -> None:
        calls: list[object] = []

        def generated(*arguments: Any, **options: Any) -> list[list[Answer]]:
            calls.append(None)
            if len(calls) == number:
                raise Killed
            return generate(*arguments, **options)

        patched.setattr(augment, "generate", generated)

    return apply


def killed_at(owner: Any, name: str, call: int) -> Callable[[pytest.MonkeyPatch], None]:
    """In a call of this function, before it does anything."""

    def apply(patched: pytest.MonkeyPatch) -> None:
        calls, before = [], getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            calls.append(None)
            if len(calls) == call:
                raise Killed
            return before(*arguments, **options)

        patched.setattr(owner, name, wrapped)

    return apply


# One after the other; each is in what the resumed command does.
STOPS = {
    "in the second batch of round 1": killed_in_batch(2),
    "before the pairs are finished": killed_at(ResumableFile, "finish", 1),
    "before the pairs are read": killed_at(round_sampling, "_round", 1),
    "in the training of round 1": killed_at(RunDirectory, "append_line", 3),
    "in the first batch of round 2": killed_in_batch(1),
    "in the last batch of round 2": killed_in_batch(3),
    "in the training of round 2": killed_at(RunDirectory, "append_line", 4),
}


@pytest.mark.parametrize("reference", ["auto", "first"])
def test_stops_anywhere_lose_nothing(place: Path, monkeypatch: pytest.MonkeyPatch, reference: str) -> None:
    """Stopped at each point in turn, and resumed to the bytes of rounds that were never stopped."""
    given = (f"reference={reference}", "eval_split=0.1")
    train(*given)
    whole = {f"round-{n}/{name}": (place / "run" / f"round-{n}" / name).read_bytes() for n in (1, 2) for name in KEPT}
    shutil.rmtree(place / "run")
    reference_cache.path().unlink(missing_ok=True)  # so that both compute the reference
    for name, stop in STOPS.items():
        with monkeypatch.context() as patched:
            stop(patched)
            with pytest.raises(Killed):
                train(*given, resume=True)
        if "batch" in name:
            with pytest.raises(InvalidInput) as caught:
                train(*given)
            assert caught.value.problems[0].code == "run-exists", name
    train(*given, resume=True)
    assert {file: (place / "run" / file).read_bytes() for file in whole} == whole
    assert not [*place.rglob("*.progress")]


@pytest.mark.long
def test_a_killed_process_is_resumed_to_the_same_bytes(place: Path) -> None:
    """Killed at moments that spread over both rounds."""
    words = [sys.executable, "-m", "dpo_cli", "train", "config.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(*more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*words, *more], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    start_time = time.monotonic()
    assert start().wait() == 0
    seconds = time.monotonic() - start_time
    whole = {f"round-{n}/{name}": (place / "run" / f"round-{n}" / name).read_bytes() for n in (1, 2) for name in KEPT}
    for moment in np.linspace(0.4, 0.9, 4):
        shutil.rmtree(place / "run")
        reference_cache.path().unlink(missing_ok=True)
        process = start()
        time.sleep(moment * seconds)
        process.kill()
        process.wait()
        assert start("--resume").wait() == 0
        assert {file: (place / "run" / file).read_bytes() for file in whole} == whole, moment


def references(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """The log-probs of the held-out pairs by the policy of a run, and by its reference."""
    opened = open_run(str(run), None, Console())
    policy, plan = load_policy(opened, Console())
    scores = score(policy, opened.rows, opened.tokenizer, plan)
    return scores.policy, scores.reference


def test_the_reference_is_the_round_before_or_the_first_model(place: Path) -> None:
    train(f"output_dir={place / 'last'}")
    train(f"output_dir={place / 'first'}", "reference=first")
    (policy, model), (_, before) = references(place / "last" / "round-1"), references(place / "last" / "round-2")
    assert np.array_equal(policy, before) and np.abs(policy - model).mean() > 0.1
    first = [references(place / "first" / f"round-{number}") for number in (1, 2)]
    assert np.array_equal(first[0][1], model) and np.array_equal(first[1][1], model)
    assert np.array_equal(first[0][0], policy)  # round 1 is the same with both
    starts = [rows(place / name / "round-2" / "metrics.jsonl")[0] for name in ("last", "first")]
    assert starts[0]["margin"] == 0 and starts[1]["margin"] != 0
    plan = document(place / "first" / "round-2" / "plan.json")
    assert plan["config"]["reference"] == "first" and any("adapter off, as in the run before" in note for note in plan["notes"])
    summary = document(place / "first" / "round-2" / "metrics.json")
    assert judged_json(Request(str(place / "first" / "round-2")), Console())["policy"] == summary["eval"]
    weights = load_file(place / "first" / "round-2" / "adapter" / "adapter_model.safetensors")
    assert not any("ref" in name.split(".") for name in weights)


def test_rounds_after_an_adapter_start_from_it(place: Path) -> None:
    """Round 1 with "first" merges it, so that the model before round 1 has no adapter; and a run's chain is followed."""
    stages = [{"strategy": "sft", "rounds": None}, {"strategy": "dpo", "reference": "first"}]
    values = {**document(Path("config.json")), "stages": stages}
    Path("config.json").write_text(json.dumps(values), encoding="utf-8")
    result = train()
    names = [Path(stage["run_dir"]).relative_to(place / "run").as_posix() for stage in result["stages"]]
    assert names == ["1-sft", "2-dpo/round-1", "2-dpo/round-2"]
    (sft, _), (_, first), (_, second) = (references(place / "run" / name) for name in names)
    assert np.abs(first[:, :1] - sft).max() < 1e-4 and np.array_equal(first, second)
    given = [f"model_name={place / 'run' / '1-sft'}", "output_dir=other", "stages=null", "reference=first"]
    values = {key: value for key, value in values.items() if key != "stages"}
    Path("config.json").write_text(json.dumps(values), encoding="utf-8")
    told = CliRunner().invoke(app, ["validate", "config.json", *given])
    assert told.exit_code == 0 and "is merged into its base model" in " ".join(told.stdout.split()), told.output


def test_more_rounds_go_on_and_other_values_are_refused(place: Path) -> None:
    train("rounds=1")
    with pytest.raises(InvalidInput) as caught:
        train(f"augment={json.dumps({**RULE, 'temperature': 1.0})}", resume=True)
    assert "augment.temperature was 1.5 and is now 1.0" in str(caught.value)
    write_rows("pairs.jsonl", range(1, PROMPTS))
    with pytest.raises(InvalidInput) as caught:
        train(resume=True)
    assert caught.value.problems[0].code in ("resume-differs", "out-other-settings")
    write_rows("pairs.jsonl", range(PROMPTS))
    (place / "run" / "round-1" / "pairs.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(InvalidInput) as caught:
        train(resume=True)
    assert caught.value.problems[0].code == "out-changed"
    result = train("rounds=2", overwrite=True)
    assert [each["sampled"]["round"] for each in result["rounds"]] == [1, 2]
    planned = CliRunner().invoke(app, ["train", "config.json", "--resume", "--dry-run"])
    assert planned.exit_code == 0 and planned.stdout.count("the run is finished") == 2, planned.output


def test_a_dry_run_writes_nothing(place: Path) -> None:
    done = CliRunner().invoke(app, ["train", "config.json", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("the pairs of this round are not made yet") == 2 and not (place / "run").exists()
    assert "the training of the adapter of round 1 (rank 4) continues" in " ".join(done.stdout.split())


def test_a_round_without_pairs_stops_and_keeps_the_rounds_before(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoPairs, match="round 1 has no pair"):
        train('augment={"rank": "regex", "pattern": "no such text", "max_new_tokens": 4}')
    assert NoPairs.exit_code is Exit.MISSED
    best_pairs = augment.best_pairs
    monkeypatch.setattr(
        augment, "best_pairs", lambda *given: best_pairs(*given) if not (place / "run/round-2").exists() else []
    )
    with pytest.raises(DpoError, match="round 2 has no pair"):
        train(overwrite=True)
    assert RunDirectory.open(place / "run" / "round-1")


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        (["augment={}"], "rank-missing"),
        (['augment={"rank": "shorter", "answers_url": "http://h/v1", "answers_model": "m"}'], "rounds-served"),
        (["lora_r=0", "reference=first"], "reference-first"),
        (["rounds=0"], "bad-value"),
    ],
)
def test_mistakes_are_told_before_anything_is_sampled(place: Path, overrides: list[str], code: str) -> None:
    done = CliRunner().invoke(app, ["train", "config.json", *overrides])
    assert done.exit_code == Exit.INVALID and f"[{code}]" in done.stderr, done.output
    assert not (place / "run").exists()


def test_rounds_have_no_effect_on_another_strategy(place: Path) -> None:
    loaded = load("config.json", ["strategy=sft"])
    assert "other-strategy" in [problem.code for problem in loaded.problems] and rounds_of(loaded) == [loaded]


def test_prompts_that_are_held_out_elsewhere_are_not_answered(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows("held.jsonl", range(4, 40))
    train("rounds=1", "eval_dataset=held.jsonl", "eval_split=0", "max_steps=1")
    assert {pair["prompt"] for pair in rows(place / "run/round-1/pairs.jsonl")} <= {f"question {i}" for i in range(4)}
    assert "20 prompts of dataset are also in eval_dataset" in capsys.readouterr().out
    write_rows("held.jsonl", range(PROMPTS))
    with pytest.raises(InvalidInput, match="no prompt is left"):
        train("rounds=1", "eval_dataset=held.jsonl", "eval_split=0", overwrite=True)


def test_held_out_pairs_are_read_back_as_they_were(place: Path) -> None:
    """Of messages, tools, a system column, categories and other names of columns."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    given: list[dict[str, Any]] = [
        row(1),
        {**row(2), "system": "Be brief."},
        {**row(3), "category": "maths"},
        {
            "prompt": talk,
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "n"}],
        },
        {**row(5), "tools": [tool]},
        {"prompt": "Human: hi\n\nAssistant:", "chosen": " one", "rejected": " two"},
    ]
    for each in given:
        (pair,) = read_row(each, 1, "f", None).rows
        assert isinstance(pair, Pair)
        assert read_row(json.loads(json.dumps(round_sampling._row(pair))), 1, "f", None).rows == (pair,)
    named = [{"q": f"question {i}", "chosen": "the cat", "rejected": "no"} for i in range(PROMPTS)]
    Path("named.jsonl").write_text("".join(json.dumps(each) + "\n" for each in named), encoding="utf-8")
    train("rounds=1", "dataset=named.jsonl", 'columns={"prompt": "q"}', "max_steps=1")
    assert read(str(place / "run/round-1/held-out.jsonl")).pairs == len(held_out_prompts())
