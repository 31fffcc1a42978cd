"""The commands as a user runs them: a process, its output, its files, its exit code.

Most are forked (tests/fork_server.py); those that get signals, lose their reader or have
a terminal start from the console script.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import made_row
from fork_server import dpo

DPO = Path(sys.executable).parent / "dpo"
FIGURE = {"value", "low", "high"}
TRAIN_LINE = {"split", "step", "epoch", "loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen"} | {
    "logp_rejected",
    "grad_norm",
    "learning_rate",
    "tokens",
    "tokens_per_second",
    "peak_memory_gb",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A folder with a config, its data, and a finished run."""
    place = tmp_path_factory.mktemp("workplace")
    rows = [made_row(i) for i in range(40)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "model_name": str(tiny_model_dir),
        "dataset": "pairs.jsonl",
        "num_train_epochs": 2,
        "learning_rate": 5e-3,
        "eval_split": 0.3,
        "lora_r": 4,
        "lora_dropout": 0.05,
        "device": "cpu",
    }
    (place / "tiny.json").write_text(json.dumps(config), encoding="utf-8")
    done = dpo("train", "tiny.json", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    (place / "summary.json").write_text(done.stdout, encoding="utf-8")
    return place


def test_a_run_leaves_what_the_contract_says(workplace: Path) -> None:
    run = workplace / "runs" / "tiny"
    summary = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert json.loads((workplace / "summary.json").read_text(encoding="utf-8")) == {**summary, "run_dir": str(run)}
    own = {"best_step", "memory"}
    assert set(summary) == own | {"status", "steps", "seconds", "train", "eval", "base", "gain", "health", "adapter_sha256"}
    assert summary["status"] == "completed"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    held_out = [line for line in lines if line["split"] == "eval"]
    assert all(set(line) == TRAIN_LINE for line in train)
    assert [line["step"] for line in train] == list(range(1, summary["steps"] + 1))
    assert len(held_out) == 2 and all("kl_token" in line for line in held_out)
    assert train[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert train[0]["margin"] == pytest.approx(0, abs=1e-4)
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    assert None not in [plan["config"][key] for key in ("device", "bf16", "lora_alpha", "output_dir")]
    assert plan["sources"]["learning_rate"] == "config"
    assert plan["counts"]["train_pairs"] + plan["counts"]["eval_pairs"] == 40
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest) == {
        "versions",
        "hardware",
        "dataset",
        "eval_dataset",
        "prompts_file",
        "reward_model",
        "model",
        "seed",
        "day",
        "git_commit",
        "reference_from_cache",
        "trained",
    }
    adapter = {file.name for file in (run / "adapter").iterdir()}
    assert adapter >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"}
    assert (run / "train.log").stat().st_size > 0
    assert not [file for file in run.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]


def test_eval_repeats_the_figures_of_the_run(workplace: Path) -> None:
    done = dpo("eval", "runs/tiny", "--json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    judged = json.loads(done.stdout)
    summary = json.loads((workplace / "runs" / "tiny" / "metrics.json").read_text(encoding="utf-8"))
    names = ["accuracy", "margin", "loss", "kl_token", "logp_accuracy", "normalized_logp_accuracy"]
    assert sorted(judged["policy"]) == sorted([*names, "kl_sequence"])
    for name in names:
        assert set(judged["policy"][name]) == FIGURE
        assert judged["policy"][name] == pytest.approx(summary["eval"][name], abs=1e-4)
    assert set(judged["base"]) == set(judged["gain"]) == {"logp_accuracy", "normalized_logp_accuracy"}
    assert judged["policy"]["margin"]["value"] > 0.05
    assert len(judged["samples"]) == judged["prompts"] == 5
    tokens = judged["answer_tokens"]
    assert set(tokens) == {"base", "policy", "gain"} and all(set(figure) == FIGURE for figure in tokens.values())
    assert tokens["gain"]["value"] == pytest.approx(tokens["policy"]["value"] - tokens["base"]["value"])
    assert 0 < tokens["base"]["value"] <= 128
    assert judged["thresholds"] == []


def test_eval_on_another_file_and_as_a_table(workplace: Path) -> None:
    done = dpo("eval", "runs/tiny", "--dataset", "pairs.jsonl", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "40 pairs of 20 prompts" in done.stdout
    assert done.stdout.count("adapter: ") == 3
    assert done.stdout.count("log-prob accuracy by length") == done.stdout.count("(normalized_logp_accuracy)") == 1
    assert "tokens per answer (answer_tokens)" in done.stdout


@pytest.mark.long
def test_a_plan_repeats_its_run_bit_by_bit(workplace: Path, tmp_path: Path) -> None:
    """In processes of their own: the first process of the fork server was seen to round in another way."""
    digests = []
    for number, words in enumerate((["tiny.json", "output_dir=first"], ["first/plan.json", "output_dir=again"])):
        own_cache = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / str(number))}
        command = [DPO, "train", *words, "--json"]
        done = subprocess.run(command, cwd=workplace, env=own_cache, capture_output=True, text=True, check=True)
        digests.append(json.loads(done.stdout)["adapter_sha256"])
    assert digests[0] == digests[1]


def test_an_existing_run_is_refused(workplace: Path) -> None:
    done = dpo("train", "tiny.json", cwd=workplace)
    assert done.returncode == 3
    assert "--overwrite" in done.stderr


def test_dry_run_writes_nothing(workplace: Path) -> None:
    done = dpo("train", "tiny.json", "output_dir=dry", "--dry-run", "--json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["train_pairs"] > 0
    assert not (workplace / "dry").exists()


def test_without_a_split_nothing_is_held_out(workplace: Path) -> None:
    done = dpo("train", "tiny.json", "eval_split=0", "max_steps=1", "output_dir=whole", "--json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["eval"], summary["base"], summary["gain"]) == (None, None, None)
    assert "there are no held-out rows" in done.stderr


def test_the_held_out_pairs_and_prompts_are_counted(workplace: Path) -> None:
    """By prompt: 5 of the 20 prompts are held out, each with both of its pairs, as many as the plan of a training says."""
    done = dpo("validate", "tiny.json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "held out: 10 pairs of 5 prompts (eval_split 0.3); an interval needs 20 prompts" in done.stdout.splitlines()
    plan = json.loads((workplace / "runs" / "tiny" / "plan.json").read_text(encoding="utf-8"))
    assert (plan["counts"]["eval_pairs"], plan["counts"]["eval_prompts"]) == (10, 5)
    (workplace / "other.jsonl").write_text((workplace / "pairs.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    own = dpo("validate", "tiny.json", "eval_split=0", "eval_dataset=other.jsonl", cwd=workplace)
    assert "held out: 40 pairs of 20 prompts (eval_dataset)" in own.stdout.splitlines()
    whole = dpo("validate", "tiny.json", "eval_split=0", cwd=workplace)
    assert "data: 40 pairs of 20 prompts in 40 rows" in whole.stdout and "held out" not in whole.stdout


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_what_there_is(workplace: Path, number: signal.Signals, code: int) -> None:
    place = workplace / f"stopped-{code}"
    words = [DPO, "train", "tiny.json", "num_train_epochs=900", f"output_dir={place}"]
    process = subprocess.Popen(words, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = place / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not lines.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert printed.count("run the same `dpo train` command with --resume") == 1
    assert json.loads((place / "metrics.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    assert (place / "adapter" / "adapter_model.safetensors").is_file()
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["train", "gone.json"], 3, "gone.json: file not found"),
        (["train", "broken.json"], 3, "broken.json:2:3"),
        (["train", "nodata.json"], 3, '"dataset" is missing'),
        (["train", "tiny.json", "dataset=gone.jsonl"], 3, "file not found: gone.jsonl"),
        (["train", "tiny.json", "provider=unsloth", "device=auto"], 3, "pip install 'dpo-cli[unsloth]'"),
        (["train", "tiny.json", "num_processes=2", "loss_type=aot"], 3, "trains in one process"),
        (["train", "tiny.json", "--processes", "two"], 3, "num_processes"),
        (["train", "tiny.json", "model_name=nobody/no-such-model", "output_dir=hub"], 1, "not in the local cache"),
        (["train", "tiny.json", "beta"], 2, "key=value"),
        (["validate", "tiny.json", "--vram", "16GB"], 2, "--vram 16"),
        (["train", "tiny.json", 'target_modules=["nope"]', "output_dir=nope"], 3, "no linear layer named nope"),
        (["train", "tiny.json", "fp16=true", "output_dir=fp16"], 3, "needs CUDA"),
        (["train", "tiny.json", "dataset=" + "x" * 5000], 3, "file not found"),
        (["train", "gone.json", "--debug"], 3, "gone.json: file not found"),
        (["train", "tiny.json", "learning_rate=1", "lora_alpha=1e38", "output_dir=nan"], 5, ""),
        (["eval", "."], 3, "not a finished run"),
        (["validate", "gone.json"], 3, "gone.json: file not found"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_mistakes_are_told_without_a_traceback(workplace: Path, words: list[str], code: int, says: str) -> None:
    (workplace / "broken.json").write_text('{\n  model_name: "m"\n}', encoding="utf-8")
    (workplace / "nodata.json").write_text('{"model_name": "m"}', encoding="utf-8")
    done = dpo(*words, cwd=workplace, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr or "--debug" in words


def test_what_is_not_a_number_becomes_null(workplace: Path) -> None:
    done = dpo("train", "tiny.json", "learning_rate=1", "lora_alpha=1e38", "output_dir=nan2", "--json", cwd=workplace)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    summary = json.loads(done.stdout, parse_constant=refuse)
    assert (done.returncode, summary["status"], summary["train"]["grad_norm"]) == (5, "unhealthy", None)
    for line in (workplace / "nan2" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.long
def test_a_reader_that_leaves_does_not_end_the_training(workplace: Path) -> None:
    command = f"{DPO} train tiny.json output_dir=piped | head -1"
    subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, cwd=workplace, check=True)
    assert json.loads((workplace / "piped" / "metrics.json").read_text(encoding="utf-8"))["status"] == "completed"


@pytest.mark.parametrize(("words", "code"), [("train --help", 0), ("validate gone.json --json", 3), ("--version", 0)])
def test_a_reader_that_leaves_changes_no_exit_code(words: str, code: int, workplace: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f'{DPO} {words} | true; exit "${{PIPESTATUS[0]}}"'], capture_output=True, cwd=workplace
    )
    assert (done.returncode, b"Traceback" in done.stderr, b"BrokenPipe" in done.stderr) == (code, False, False)


def test_too_long_pairs_are_left_out_and_counted(workplace: Path) -> None:
    rows = [made_row(i) for i in range(6)]
    rows[3]["chosen"] = "the cat " * 50
    (workplace / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["dataset=long.jsonl", "max_seq_length=60", "eval_split=0", "--dry-run", "--json"]
    done = dpo("train", "tiny.json", *words, cwd=workplace)
    counts = json.loads(done.stdout)["counts"]
    assert (counts["train_pairs"], counts["too_long"]) == (5, 1)
    assert counts["longest"] <= 60
    assert "1 pairs whose responses are longer than max_seq_length" in done.stderr


def test_bad_rows_are_skipped_when_asked(workplace: Path) -> None:
    lines = [json.dumps(made_row(i)) for i in range(6)]
    (workplace / "bad.jsonl").write_text("\n".join([*lines[:3], "{", *lines[3:]]), encoding="utf-8")
    assert dpo("train", "tiny.json", "dataset=bad.jsonl", "--dry-run", cwd=workplace).returncode == 3
    done = dpo("train", "tiny.json", "dataset=bad.jsonl", "on_bad_rows=skip", "--dry-run", "--json", cwd=workplace)
    assert done.returncode == 0
    assert "bad.jsonl:4" in done.stderr


def test_strict_turns_warnings_into_errors(workplace: Path) -> None:
    (workplace / "strict.json").write_text(
        json.dumps({**json.loads((workplace / "tiny.json").read_text(encoding="utf-8")), "eval_split": 0, "eval_steps": 3}),
        encoding="utf-8",
    )
    assert dpo("validate", "strict.json", cwd=workplace).returncode == 0
    assert dpo("validate", "strict.json", "--strict", cwd=workplace).returncode == 3


def test_a_changed_adapter_is_not_judged(workplace: Path) -> None:
    shutil.copytree(workplace / "runs" / "tiny", workplace / "changed")
    weights = workplace / "changed" / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = dpo("eval", "changed", cwd=workplace)
    assert done.returncode == 3
    assert "has changed since this run wrote it" in done.stderr


def test_validate_json_has_the_documented_shape() -> None:
    done = dpo("validate", "configs/quickstart.json", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0
    assert set(document) == {"ok", "problems", "config", "data", "memory"}
    assert document["ok"] is True
    assert document["data"]["pairs"] >= 240
    keys = {"severity", "code", "key", "file", "line", "column", "lines", "message", "fix"}
    assert all(set(problem) == keys for problem in document["problems"])
    bad = dpo("validate", "-", "--json", input='{"model_name": "m", "beta": -1}')
    assert bad.returncode == 3
    assert json.loads(bad.stdout)["ok"] is False


def test_validate_refuses_what_does_not_fit_with_4() -> None:
    config = '{"model_name": "meta-llama/Llama-3.1-8B-Instruct", "dataset": "data-samples/documented-good.jsonl"}'
    done = dpo("validate", "-", "--vram", "8", "--json", input=config)
    assert done.returncode == 4
    assert json.loads(done.stdout)["memory"]["fits"] is False


def test_recommend_writes_a_config_that_lacks_the_dataset_only(tmp_path: Path) -> None:
    path = tmp_path / "made.json"
    done = dpo("recommend", "--vram", "12", "--write", path, "--json")
    assert done.returncode == 0
    made = json.loads(done.stdout)
    assert set(made) == {"profile", "vram_gb", "config", "memory", "reasons"}
    assert set(made["memory"]) == {"total_gb", "components", "budget_gb", "fits", "largest_change"}
    checked = json.loads(dpo("validate", path, "--vram", "12", "--json").stdout)
    errors = [(problem["code"], problem["key"]) for problem in checked["problems"] if problem["severity"] == "error"]
    assert errors == [("missing-key", "dataset")]


def test_a_recommended_config_says_why_and_trains_after_one_line(tmp_path: Path) -> None:
    path = tmp_path / "made.json"
    done = dpo("recommend", "--vram", "12", "--dataset", "data-samples/assistant-preferences.jsonl", "--write", path, "--json")
    assert f"To train an adapter, replace its line in {path} by the commented one with 0.0002" in " ".join(done.stderr.split())
    made = json.loads(done.stdout)["config"]
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    written = [i for i, line in enumerate(lines) if line.startswith('"')]
    assert all(lines[i - 1].startswith("// ") for i in written) and len(written) == len(made) + 1
    checked = json.loads(dpo("validate", path, "--vram", "12", "--json").stdout)
    made["dataset"] = str(Path(made["dataset"]).absolute())
    assert checked["ok"] and checked["config"] == {**checked["config"], **made, "learning_rate": 5e-7}
    documented, adapter = lines.index('"learning_rate": 5e-07,'), lines.index('// "learning_rate": 0.0002,')
    lines[documented], lines[adapter] = "", lines[adapter].removeprefix("// ")
    path.write_text("\n".join(lines), encoding="utf-8")
    checked = json.loads(dpo("validate", path, "--vram", "12", "--json").stdout)
    assert checked["ok"] and checked["config"]["learning_rate"] == 2e-4
    assert "learning-rate-small" not in {problem["code"] for problem in checked["problems"]}


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
def test_a_recommended_config_names_the_columns_of_its_dataset(workplace: Path, tiny_model_dir: Path) -> None:
    """A table with names of its own: the likely columns are written with their reason, and the config trains as it is."""
    rows = ["question,good,bad", *(f"Which number is {i}?,It is {i} of course.,It is not {i}." for i in range(20))]
    (workplace / "own.csv").write_text("\n".join(rows), encoding="utf-8")
    words = ("--vram", 12, "--model", tiny_model_dir, "--write", "own.json")
    done = dpo("recommend", *words, "--dataset", "own.csv", "--json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert json.loads(done.stdout)["config"]["columns"] == columns
    lines = [line.strip() for line in (workplace / "own.json").read_text(encoding="utf-8").splitlines()]
    place = lines.index(f'"columns": {json.dumps(columns)},')
    assert lines[place - 1] == "// the likely meaning of its columns by their names; correct what is wrong"
    here = ("device=cpu", "use_4bit=false", "bf16=false", "max_steps=1", "--json")
    trained = dpo("train", "own.json", *here, cwd=workplace)
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["steps"] == 1


def test_a_dataset_with_unknown_columns_is_answered_with_the_line_to_write(workplace: Path) -> None:
    (workplace / "odd.csv").write_text("eins,zwei,drei\na b,c d,e f\n", encoding="utf-8")
    done = dpo("recommend", "--vram", 12, "--dataset", "odd.csv", "--json", cwd=workplace)
    (problem,) = json.loads(done.stdout)["problems"]
    line = '"columns": {"prompt": "...", "chosen": "...", "rejected": "..."}'
    assert (done.returncode, problem["code"], problem["line"]) == (3, "row-missing-key", 2)
    assert "it has drei, eins, zwei" in problem["message"]
    assert problem["fix"].startswith("`dpo recommend --write my-config.json`") and line in problem["fix"]


@pytest.mark.long
def test_nothing_breaks_on_a_terminal_of_60_columns(workplace: Path) -> None:
    command = f"unset COLUMNS; stty cols 60; {DPO} train tiny.json max_steps=3 output_dir=narrow"
    done = subprocess.run(["script", "-qec", command, "/dev/null"], capture_output=True, text=True, cwd=workplace, check=False)
    assert done.returncode == 0, done.stdout
    assert "accuracy" in done.stdout and "loss" in done.stdout
