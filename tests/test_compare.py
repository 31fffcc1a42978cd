"""`dpo compare`: its arithmetic by hand, its methods as configs, and a whole comparison of tiny models."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SHAPE
from fork_server import dpo
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from dpo_cli.commands.held_out_scores import votes_of
from dpo_cli.config.config import load_methods, load_stages
from dpo_cli.errors import InvalidInput
from dpo_cli.evaluation.bootstrap import RESAMPLES, mean
from dpo_cli.evaluation.pooling import Pooled, Rows, holm, pair_tests, pooled, rows_of, rows_of_base
from dpo_cli.report.method_table import answers, notes, sentence, tables
from dpo_cli.results.codec import to_json
from dpo_cli.results.intervals import Interval
from dpo_cli.results.methods_compared import MethodRow, MethodRun, MethodsCompared, PairTest, ScoredRun
from dpo_cli.storage.run_directory import SUMMARY, VOTES, RunDirectory

LEAST_P = 2 / (RESAMPLES + 1)


# --- figures over seeds and prompts


def rows(*values: float, prompts: str = "") -> Rows:
    """A figure of one run, a value for each row; the prompts are letters."""
    return mean(np.array(values)), list(prompts or "abcdefgh"[: len(values)])


def interval(*runs: Rows) -> tuple[float, float, float]:
    made = pooled({"m": [{"f": run} for run in runs]})["m"]["f"]
    return made.value, made.low, made.high


def test_intervals_are_over_prompts_and_over_seeds() -> None:
    """Two seeds with the figures 1 and 0 on one prompt: a resample has both of one seed in 1 of 4 cases, for 0, and for 1.

    So 0 and 1 bound 95 % of the resamples. Likewise two prompts with 1 and 0 for both seeds. One seed and one prompt have
    nothing to draw.
    """
    assert interval(rows(1), rows(0)) == (0.5, 0, 1)
    assert interval(rows(1, 0), rows(1, 0)) == (0.5, 0, 1)
    assert interval(rows(0.25)) == (0.25, 0.25, 0.25)
    assert interval(rows(1, 1), rows(1, 1)) == (1, 1, 1)


def test_seeds_widen_an_interval() -> None:
    """Eight prompts, and 0.5 on average: a resample of two seeds with 1 and 0 has 0 or 1 in half of the cases.

    Where each seed has 0.5 itself, no resample but one of 2 ** 15 has only prompts with 1.
    """
    alike, apart = interval(rows(*[1, 0] * 4), rows(*[0, 1] * 4)), interval(rows(*[1] * 8), rows(*[0] * 8))
    assert alike[0] == apart[0] == 0.5
    assert apart == (0.5, 0, 1) and 0 < alike[1] < 0.5 < alike[2] < 1


def test_a_prompt_counts_with_all_its_rows() -> None:
    """Three rows of a with 1, one of b with 0: the figure is 3/4, and a resample has a alone, b alone, or both."""
    assert interval(rows(1, 1, 1, 0, prompts="aaab")) == (0.75, 0, 1)


def test_runs_without_a_value_for_a_prompt_are_pooled_by_what_they_have() -> None:
    """A vote is missing: seed 1 has prompts a and b, seed 2 only a. (1 + 0 + 1) / 3."""
    assert interval(rows(1, 0, prompts="ab"), rows(1, prompts="a"))[0] == pytest.approx(2 / 3)


def test_methods_are_compared_on_the_same_prompts() -> None:
    """One method is better by exactly 0.5 on each of four prompts that differ much: each resample has this difference.

    None of the 2,000 resamples is at or below zero: p = 2 * (0 + 1) / (2,000 + 1).
    """
    one, other = [{"f": rows(0.5, 1.5, 4.5, 9.5)}], [{"f": rows(0, 1, 4, 9)}]
    (test,) = pair_tests({"one": one, "other": other}, ["f"])
    assert (test.first, test.second, test.difference) == ("one", "other", Interval(0.5, 0.5, 0.5))
    assert test.p == test.p_corrected == LEAST_P and test.result == "better"
    (turned,) = pair_tests({"other": other, "one": one}, ["f"])
    assert turned.difference == Interval(-0.5, -0.5, -0.5) and turned.result == "worse" and turned.p == LEAST_P
    (same,) = pair_tests({"one": one, "two": one}, ["f"])
    assert same.difference.value == 0 and same.p == 1 and same.result == "no clear difference"


def test_only_what_both_methods_have_is_compared() -> None:
    methods = {"a": [{"f": rows(1), "g": rows(1)}], "b": [{"f": rows(1)}], "c": [{"g": rows(0)}], "failed": []}
    assert [(test.figure, test.first, test.second) for test in pair_tests(methods, ["f", "g"])] == [
        ("f", "a", "b"),
        ("g", "a", "c"),
    ]
    assert pooled(methods)["failed"] == {}


def test_p_values_are_corrected_by_hand() -> None:
    """0.01 * 3 = 0.03; 0.03 * 2 = 0.06; 0.04 * 1 = 0.04, but not below the one before: 0.06. None is above 1."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


SCORED = ScoredRun(
    digest="",
    prompts=["a", "b"],
    policy=[[-10.0, -12.0], [-8.0, -6.0]],
    reference=[[-11.0, -10.0], [-8.0, -6.0]],
    tokens=[[5.0, 2.0], [4.0, 2.0]],
    kl=[[1.0, 0.5], [0.0, 0.1]],
    kl_sequence=[1.0, 3.0],
    answer_tokens=[4.0],
    base_answer_tokens=[6.0],
    wins=[],
    samples=[{"prompt": "p", "base": "b", "adapter": "a"}],
)


def test_the_figures_of_a_run_by_hand() -> None:
    """As in tests/test_metrics.py: -10 > -12 yes, -8 > -6 no; the base never; by length always; KL 1.6 nats over 13 tokens."""
    own = {name: float(above.sum() / below.sum()) for name, ((above, below), _) in rows_of(SCORED).items()}
    assert own == pytest.approx(
        {"logp_accuracy": 0.5, "normalized_logp_accuracy": 1.0, "kl_token": 1.6 / 13, "gain": 0.5}
        | {"kl_sequence": 2.0, "answer_tokens": 4.0}
    )
    base = {name: float(above.sum() / below.sum()) for name, ((above, below), _) in rows_of_base(SCORED).items()}
    assert base == {"logp_accuracy": 0.0, "normalized_logp_accuracy": 1.0, "answer_tokens": 6.0}


def test_the_seeds_of_methods_are_drawn_apart() -> None:
    """Both methods have the seeds 0 and 1: with the same draws the difference would always be 0."""
    over = Pooled(["a"])
    one, other = (over.sums([rows(0, prompts="a"), rows(1, prompts="a")], number) for number in (0, 1))
    assert set(over.resampled(one) - over.resampled(other)) == {-1, -0.5, 0, 0.5, 1}


# --- words


def compared(**changes: Any) -> MethodsCompared:
    figure = Interval(0.5, 0.25, 0.75)
    ended = MethodRun(1, "runs/c/dpo-1", "completed", 0, None, 4, 100, 61.0, 1.5)
    lost = MethodRun(2, "runs/c/dpo-2", "failed", 4, "it does not fit")
    method = MethodRow("dpo", ["dpo"], {"beta": 0.1}, [4], [ended, lost], {"logp_accuracy": figure, "gain": figure})
    values = {"methods": [method], "seeds": [1, 2], "base": {"logp_accuracy": figure}, "tests": [], "notes": []}
    plain = {"run_dir": "runs/c", "budget": "tokens", "budget_value": 100.0, "pairs": 9, "prompts": 9, "report": "r.html"}
    return MethodsCompared(**{**values, **plain, **changes})


def test_the_tables_have_a_row_a_method() -> None:
    (about, header, lines), (costs, _, took) = tables(compared())
    assert about == "9 held-out pairs of 9 prompts, 2 seeds; 95 % intervals"
    assert header == ["method", "log-prob accuracy", "gain over the base"]
    assert lines == [["base", "50.0 % [25, 75]", ""], ["dpo", "50.0 % [25, 75]", "+50.0 points [+25, +75]"]]
    assert costs == "budget: 100 tokens; means of the seeds that ended healthy"
    assert took == [["dpo", "1 of 2", "4", "100", "1\u00a0min\u00a01\u00a0s", "1.50 GB", "1"]]


def test_what_failed_and_what_is_few_is_said() -> None:
    said = notes(compared(seeds=[1]))
    assert said[0] == "dpo, seed 2: failed (exit 4): it does not fit"
    assert [line.partition(" ")[0] for line in said[1:]] == ["figures", "with", "9", "the"]


def test_a_comparison_is_a_sentence() -> None:
    test = PairTest("logp_accuracy", "dpo", "sft", Interval(0.1, 0.02, 0.2), 0.01, 0.03)
    tail = "in log-prob accuracy: +10.0 points [+2, +20], corrected p = 0.03"
    assert sentence(test) == f"dpo is better than sft {tail}"
    unclear = PairTest("logp_accuracy", "dpo", "sft", Interval(0.1, -0.02, 0.2), 0.1, 0.2)
    assert sentence(unclear).startswith("no clear difference between dpo and sft in log-prob accuracy: ")


def test_answers_stand_next_to_each_other() -> None:
    assert answers({"m": SCORED.samples}) == [("p", [("base", "b"), ("m", "a")])]
    assert answers({}) == []


def test_votes_on_another_adapter_are_not_counted(tmp_path: Path) -> None:
    """Two votes, one of them still open: 1 of 1."""
    run, said = RunDirectory(tmp_path), list[str]()
    run.write_json(SUMMARY, {"adapter_sha256": "new"})
    assert votes_of(run, said.append) == {}
    vote = {"prompt": "p", "adapter": "a", "base": "b", "winner": "adapter", "by": "human"}
    document = {"votes_version": 1, "run": "r", "adapter_sha256": "new", "criterion": "c", "page": "p", "judge": None}
    run.write_json(VOTES, {**document, "votes": [vote, {**vote, "prompt": "q", "winner": None, "by": None}]})
    (ratio, prompts) = votes_of(run, said.append)["vote_rate"]
    assert (ratio[0].tolist(), prompts, said) == ([1.0], ['"p"'], [])
    run.write_json(VOTES, {**document, "adapter_sha256": "old", "votes": [vote]})
    assert votes_of(run, said.append) == {} and "another adapter" in said[0]


# --- methods as configs

CONFIG = """{
  "model_name": "m", "dataset": "pairs.jsonl", "beta": 0.2, "packing": true, "learning_rate": 1e-4, "max_steps": 5,
  "compare": {"seeds": 2, "methods": [
    "sft",
    {"name": "ipo", "strategy": "dpo", "loss_type": "ipo", "learning_rate": 2e-4},
    {"name": "both", "stages": [{"strategy": "sft"}, {"strategy": "dpo", "beta": 0.5}]}
  ]}
}"""


def methods_in(tmp_path: Path, text: str, *overrides: str) -> list[Any]:
    (tmp_path / "c.json").write_text(text, encoding="utf-8")
    return load_methods(str(tmp_path / "c.json"), overrides)[1]


def test_a_method_has_what_belongs_to_its_strategy(tmp_path: Path) -> None:
    (sft, _), (ipo, loaded), (both, stages) = methods_in(tmp_path, CONFIG, "lora_r=8", "learning_rate=3e-4", "beta=0.3")
    shared = {"model_name": "m", "dataset": "pairs.jsonl", "max_steps": 5, "lora_r": 8}
    assert sft.values == {**shared, "strategy": "sft", "packing": True, "learning_rate": 3e-4}
    assert ipo.values == {**shared, "strategy": "dpo", "beta": 0.3, "loss_type": "ipo", "learning_rate": 2e-4}
    assert ipo.values == {key: loaded[0].values[key] for key in ipo.values}
    assert [(one.values["strategy"], one.values["beta"]) for one in stages] == [("sft", 0.1), ("dpo", 0.5)]
    assert both.as_run(7, 1, "d", [{"max_steps": 2}, {"max_steps": 3}])["stages"] == [
        {"strategy": "sft", "max_steps": 2},
        {"strategy": "dpo", "beta": 0.5, "max_steps": 3},
    ]
    run = sft.as_run(7, 1, "d", [{"num_train_epochs": 2}])
    assert (run["seed"], run["split_seed"], run["output_dir"], run["num_train_epochs"]) == (7, 1, "d", 2)
    assert "max_steps" not in run


def test_each_stage_of_a_method_has_its_own_length(tmp_path: Path) -> None:
    """Also where the config does not name them: rlhf without a reward model is two stages."""
    ((rlhf, stages),) = methods_in(tmp_path, CONFIG.split(', "methods"')[0] + ', "methods": ["rlhf"]}}')
    assert [one.values["strategy"] for one in stages] == ["reward", "rlhf"]
    run = rlhf.as_run(7, 1, str(tmp_path / "d"), [{"max_steps": 2}, {"max_steps": 3}])
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    first, second = load_stages(str(tmp_path / "run.json"))
    assert [(one.values["strategy"], one.values["max_steps"]) for one in (first, second)] == [("reward", 2), ("rlhf", 3)]
    assert second.values["reward_model"] == first.values["output_dir"] == str(tmp_path / "d" / "1-reward")


def test_what_is_wrong_in_a_method_is_placed(tmp_path: Path) -> None:
    (_, sft), (_, ipo), _ = methods_in(tmp_path, CONFIG.replace('"ipo", "learning_rate"', '"IPO", "learning_rate"'))
    assert sft[0].config is not None
    (problem,) = [one for one in ipo[0].problems if one.severity == "error"]
    assert (problem.key, problem.line, problem.fix) == ("loss_type", 5, 'did you mean "loss_type": "ipo"?')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"dataset": "d", "compare": {"methods": ["ppo"]}}', '"strategy": "ppo" is not one of'),
        ('{"dataset": "d", "compare": {"seeds": 0}}', '"compare"["seeds"]: 0 is not'),
        ('{"dataset": "d", "compare": [}', "JSON"),
    ],
)
def test_a_wrong_comparison_is_refused_before_it_starts(tmp_path: Path, text: str, message: str) -> None:
    from dpo_cli.commands.method_runs import Comparison

    (tmp_path / "c.json").write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput) as raised:
        Comparison.of(str(tmp_path / "c.json"), ())
    assert any(message in problem.message or message.lower() in problem.code for problem in raised.value.problems)


def test_the_shipped_comparison_is_sound() -> None:
    _, methods = load_methods(str(ROOT / "configs" / "compare.json"))
    assert [method.name for method, _ in methods][:2] == ["sft", "dpo"]
    assert not [p for _, stages in methods for one in stages for p in one.problems if p.severity != "hint"]


def test_a_merged_stage_is_refused(tmp_path: Path) -> None:
    from dpo_cli.commands.method_runs import Comparison

    (tmp_path / "c.json").write_text(CONFIG.replace('"beta": 0.5', '"reference": "base"'), encoding="utf-8")
    with pytest.raises(InvalidInput, match="merges one of its stages"):
        Comparison.of(str(tmp_path / "c.json"), ())


# --- a comparison


def laid_out(place: Path, model: Path, pairs: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A config with three methods: "far" is stopped by its health rule with seed 42, and cannot be written with seed 43."""
    torch.manual_seed(1)
    LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1)).save_pretrained(place / "reward")
    tokenizer.save_pretrained(place / "reward")
    far = {"name": "far", "strategy": "dpo", "beta": 50, "learning_rate": 1, "max_kl": 0.001, "stop_on": ["kl"]}
    config = {
        "model_name": str(model), "dataset": str(pairs), "device": "cpu", "bf16": False, "fp16": False, "lora_r": 4,
        "learning_rate": 1e-2, "kl_prompts": 4, "max_new_tokens": 4, "eval_split": 0.6, "num_train_epochs": 2,
        "compare": {"methods": ["sft", "dpo", far], "seeds": 2, "judge_reward_model": "reward", "side_by_side": 2},
    }  # fmt: skip
    (place / "tiny.json").write_text(json.dumps(config), encoding="utf-8")
    foreign = place / "runs" / "tiny" / "far-43" / "adapter"
    foreign.mkdir(parents=True)


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def interrupted(place: Path) -> int:
    """The exit code of a comparison that gets a Ctrl-C while its first run trains."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "dpo_cli", "compare", "tiny.json"]
    with subprocess.Popen(words, cwd=place, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (place / "runs" / "tiny" / "sft-42" / "plan.json").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    return process.returncode


@pytest.mark.long
def test_a_comparison(
    tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Stopped, continued to its end, and called again, which trains nothing.

    The budget is the most that a method takes by its 2 epochs: dpo's 784 tokens an epoch, 1,568. A step of sft has 404 / 2
    tokens: 1,568 / 202 = 7.8, 8 steps; one of dpo has 784 / 2: 4 steps.
    """
    laid_out(tmp_path, tiny_model_dir, pairs_file(), tokenizer)
    folder = tmp_path / "runs" / "tiny"
    assert interrupted(tmp_path) == 130
    assert not (folder / "compare.json").exists() and not (folder / "dpo-42").exists()

    first = dpo("compare", "tiny.json", "--json", cwd=tmp_path)
    assert first.returncode == 1, first.stderr
    made = json.loads(first.stdout)
    methods = {method["name"]: method for method in made["methods"]}
    runs = {
        name: [(run["seed"], run["status"], run["exit_code"]) for run in method["runs"]] for name, method in methods.items()
    }
    assert runs == {
        "sft": [(42, "completed", 0), (43, "completed", 0)],
        "dpo": [(42, "completed", 0), (43, "completed", 0)],
        "far": [(42, "unhealthy", 5), (43, "failed", 3)],
    }
    assert "max_kl" in methods["far"]["runs"][0]["message"] and "not from a run" in methods["far"]["runs"][1]["message"]
    assert (made["budget"], made["budget_value"], made["seeds"]) == ("tokens", 1568, [42, 43])
    assert {name: method["max_steps"] for name, method in methods.items()} == {"sft": [8], "dpo": [4], "far": [4]}
    assert [methods[name][key] for name in ("sft", "dpo") for key in ("steps", "tokens")] == [8, 1616, 4, 1568]
    assert [method["healthy"] for method in made["methods"]] == [1, 1, 0]
    assert methods["sft"]["config"] == {"strategy": "sft"}
    assert methods["far"]["config"].keys() == {"strategy", "beta", "learning_rate", "max_kl", "stop_on", "kl_prompts"}
    assert methods["far"]["figures"] == {} and methods["far"]["tokens"] is None

    figures = {"logp_accuracy", "normalized_logp_accuracy", "kl_token", "gain", "kl_sequence", "answer_tokens", "win_rate"}
    assert methods["sft"]["figures"].keys() == methods["dpo"]["figures"].keys() == figures
    for figure in (one for name in ("sft", "dpo") for one in methods[name]["figures"].values()):
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert [(test["figure"], test["first"], test["second"]) for test in made["tests"]] == [
        ("logp_accuracy", "sft", "dpo"),
        ("normalized_logp_accuracy", "sft", "dpo"),
        ("win_rate", "sft", "dpo"),
    ]
    assert all(test["p"] <= test["p_corrected"] <= 1 and test["sentence"] for test in made["tests"])
    scores = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((folder / "scores").iterdir())]
    assert len(scores) == 4 and all(one["prompts"] == scores[0]["prompts"] for one in scores)
    assert all(one["reference"] == scores[0]["reference"] for one in scores)
    assert (made["pairs"], made["prompts"]) == (len(scores[0]["prompts"]), len(set(scores[0]["prompts"])))
    page = (folder / "compare.html").read_text(encoding="utf-8")
    assert "3 methods compared" in page and all(test["sentence"] in page for test in made["tests"])
    assert (folder / "sft-42" / "side-by-side.html").is_file()

    before = digests(folder)
    again = dpo("compare", "tiny.json", "--json", cwd=tmp_path)
    assert (again.returncode, again.stdout, digests(folder)) == (1, first.stdout, before)
    assert "starting torch" not in again.stderr and "evaluating" not in again.stderr


def test_the_json_has_these_keys() -> None:
    made = to_json(compared(tests=[PairTest("logp_accuracy", "a", "b", Interval(0, 0, 0), 1.0, 1.0, "s")]))
    plain = {"run_dir", "budget", "budget_value", "seeds", "pairs", "prompts", "notes", "report"}
    assert made.keys() == plain | {"base", "methods", "tests"}
    (method,), (test,) = made["methods"], made["tests"]  # type: ignore[misc, has-type]
    costs = {"steps", "tokens", "seconds", "peak_memory_gb"}
    assert method.keys() == {"name", "strategies", "config", "max_steps", "healthy", "figures", "runs"} | costs
    assert method["runs"][0].keys() == {"seed", "run_dir", "status", "exit_code", "message"} | costs
    assert test.keys() == {"figure", "first", "second", "difference", "p", "p_corrected", "result", "sentence"}
