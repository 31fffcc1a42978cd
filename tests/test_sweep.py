"""`dpo sweep`: its words, the choice and its correction by hand, and whole sweeps of tiny models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Run
from fork_server import dpo

from dpo_cli.commands.optuna_study import Outcome, opened, require_optuna
from dpo_cli.commands.own_process import Children
from dpo_cli.commands.setting_runs import Sweep, evaluation_of, share_of_machine, watched
from dpo_cli.config.schema import options
from dpo_cli.config.search_space import FIXED, Space, folder_name, spaced
from dpo_cli.errors import InvalidInput, UsageError
from dpo_cli.evaluation.bootstrap import mean, value_of
from dpo_cli.evaluation.pooling import Rows
from dpo_cli.evaluation.selection import Criterion, best_of
from dpo_cli.report.setting_table import best_sentences, notes, table
from dpo_cli.results.codec import to_json
from dpo_cli.results.intervals import Interval
from dpo_cli.results.judgement import RowScores
from dpo_cli.results.methods_compared import MethodRun
from dpo_cli.results.settings_swept import Best, SettingRow, SettingsSwept
from dpo_cli.runs.manifest import RECALLED
from dpo_cli.storage.run_directory import RunDirectory
from dpo_cli.strategies.dpo import DPO
from dpo_cli.strategies.reward import REWARD
from dpo_cli.strategies.sft import SFT
from dpo_cli.strategies.strategies import STRATEGIES

# --- the words


def test_a_wide_range_has_equal_factors() -> None:
    """1e-3 / 1e-5 = 100: the factor of four values is 100 ** (1/3) = 4.642. 64 / 8 = 8: the factor is 2."""
    assert spaced(1e-5, 1e-3, 4, is_whole=False) == (1e-5, 4.642e-5, 2.154e-4, 1e-3)
    assert spaced(8, 64, 4, is_whole=True) == (8, 16, 32, 64)


def test_a_narrow_range_has_equal_steps() -> None:
    """Also one that starts at 0, which has no factor. Whole numbers that are rounded to the same one are one value."""
    assert spaced(0, 0.1, 3, is_whole=False) == (0, 0.05, 0.1)
    assert spaced(1, 4, 4, is_whole=False) == (1, 2, 3, 4)
    assert spaced(1, 3, 5, is_whole=True) == (1, 2, 3)


def test_words_are_lists_ranges_and_values() -> None:
    space = Space.of(["beta=0.1,0.5,0.1", 'loss_type=sigmoid,["sigmoid","sft"]', "lora_r=8..16@2", "max_steps=4"])
    assert space.to_json() == {"beta": [0.1, 0.5], "loss_type": ["sigmoid", ["sigmoid", "sft"]], "lora_r": [8, 16]}
    assert space.fixed == ("max_steps=4",) and space.is_grid and space.size == 8
    assert [*space.settings()][1] == {"beta": 0.1, "loss_type": "sigmoid", "lora_r": 16}
    assert Space.of(['target_modules=["q_proj","v_proj"]']).axes == ()
    assert Space.of(["beta=0.1,"]).size == 1  # a list of one value


def test_a_range_without_a_count_is_drawn_from() -> None:
    space = Space.of(["learning_rate=1e-5..1e-3", "lora_r=4..8", "beta=0.1,1"])
    assert not space.is_grid and [axis.is_wide for axis in space.axes] == [True, False, False]
    assert [*space.probes()] == [
        {"learning_rate": 1e-5, "lora_r": 4, "beta": 0.1},
        {"learning_rate": 1e-3, "lora_r": 4, "beta": 0.1},
        {"learning_rate": 1e-5, "lora_r": 8, "beta": 0.1},
        {"learning_rate": 1e-5, "lora_r": 4, "beta": 1},
    ]
    rate, rank, _ = space.axes
    assert (rate.value(3.14159e-4), rate.value(9.99999e-4), rank.value(5.0)) == (3.142e-4, 1e-3, 5)


@pytest.mark.parametrize("word", ["beta=1..0.1@3", "beta=0.1..1@1", "lora_r=1.5..3@2", "beta=0.1..", "beta=1..1"])
def test_what_is_no_range_is_wrong_usage(word: str) -> None:
    with pytest.raises(UsageError, match="is not a range"):
        Space.of([word])


def test_a_key_has_one_word() -> None:
    with pytest.raises(UsageError, match="beta is given twice"):
        Space.of(["beta=0.1,0.2", "beta=0.3"])


def test_each_key_that_is_fixed_says_why() -> None:
    space = Space.of([f"{key}=1,2" for key in options()])
    refused = {problem.key for problem in space.problems}
    assert {*FIXED, "dataset", "eval_split", "split_seed", "max_seq_length", "output_dir", "use_4bit", "max_kl"} <= refused
    assert {"learning_rate", "beta", "lora_r", "loss_type", "num_train_epochs", "per_device_train_batch_size"} <= {
        *options()
    } - refused
    assert all(problem.severity == "error" and problem.message for problem in space.problems)


def test_settings_have_different_folders() -> None:
    assert folder_name({"beta": 0.1, "learning_rate": 1e-5}) == "beta-0.1-learning_rate-1e-05"
    assert folder_name({}) == "as-given"
    odd = [{"x": "a b"}, {"x": "a_b"}, {"x": "a/b"}, {"x": ["a", "b"]}, {"x": "n" * 300}, {"x": "n" * 301}]
    names = [folder_name(setting) for setting in odd]
    assert len({*names}) == len(odd) and all(len(name) <= 80 and "/" not in name for name in names)


# --- the choice


def rows(*values: float) -> Rows:
    """The figure of one run, a value for each of so many prompts."""
    return mean(np.array(values, dtype=float)), [str(place) for place in range(len(values))]


def test_the_best_of_two_that_are_chance_is_corrected() -> None:
    """Each is right on one of two prompts. A resample of prompt 0 alone chooses the one that is wrong on prompt 1: 0.

    A resample of both has left none out. So the mean of 0.5 is corrected to 0.
    """
    best = best_of({"a": rows(1, 0), "b": rows(0, 1)}, is_better_large=True)
    assert (best.name, best.of, best.value.value) == ("a", 2, 0.5)
    assert best.corrected == Interval(0, 0, 0) and best.optimism == 0.5 and best.not_clearly_worse == ["b"]


def test_where_one_is_better_on_every_prompt_there_is_little_to_correct() -> None:
    """Every resample chooses it. A smaller loss is better: the signs are turned."""
    best = best_of({"a": rows(0.9, 0.7, 0.8), "b": rows(0.5, 0.3, 0.4)}, is_better_large=False)
    assert best.name == "b" and best.not_clearly_worse == []
    assert best.corrected is not None and best.corrected.value == pytest.approx(0.4, abs=0.01)
    assert best.corrected.value >= best.value.value == pytest.approx(0.4)


def test_one_setting_or_one_prompt_is_not_corrected() -> None:
    assert best_of({"a": rows(1, 0, 1)}, is_better_large=True).corrected is None
    assert best_of({"a": rows(1), "b": rows(0)}, is_better_large=True).corrected is None


def test_of_equal_settings_the_first_is_the_best() -> None:
    assert best_of({"b": rows(1, 0), "a": rows(1, 0)}, is_better_large=True).name == "b"


def test_the_correction_is_right_on_average() -> None:
    """Six settings that are all right on half of the prompts: the best of them is too good, and corrected it is not."""
    draws = np.random.default_rng(0)
    made = [best_of({str(i): rows(*draws.integers(0, 2, 40)) for i in range(6)}, is_better_large=True) for _ in range(30)]
    corrected = [best.corrected.value for best in made if best.corrected is not None]
    assert np.mean([best.value.value for best in made]) > 0.57
    assert np.mean(corrected) == pytest.approx(0.5, abs=0.03)


def test_the_figure_of_a_choice_by_hand() -> None:
    """-10 > -12 yes, the base -11 > -10 no: gain 1. Both have -8 < -6: gain 0. The loss falls from 12 / 5 to 10 / 5 nats."""
    pairs = [RowScores("p", [-10, -12], [-11, -10], [5, 2]), RowScores("q", [-8, -6], [-8, -6], [4, 2])]
    (above, below), prompts = Criterion.of(DPO).rows(pairs)
    assert (above.tolist(), below.tolist(), prompts) == ([1, 0], [1, 1], ["p", "q"])
    assert value_of(Criterion.of(SFT).rows([RowScores("p", [-10], [-12], [5])])[0]) == pytest.approx(-0.4)
    assert value_of(Criterion.of(REWARD).rows([RowScores("p", [1.0, 0.0]), RowScores("q", [2.0, 2.0])])[0]) == 0.75
    assert (Criterion.of(REWARD).is_gain, Criterion.of(SFT).is_better_large) == (False, False)


def test_a_figure_of_evaluation_lines_is_watched() -> None:
    named = {name: watched(strategy, Criterion.of(strategy)) for name, strategy in STRATEGIES.items()}
    assert named == {"dpo": "accuracy", "kto": "accuracy", "rlhf": "accuracy", "sft": "loss", "reward": "accuracy"}


@pytest.mark.parametrize("strategy", ["dpo", "kto", "sft", "reward"])
def test_the_scores_of_rows_give_the_figure_of_the_run(run: Run, strategy: str) -> None:
    summary, place = run(strategy=strategy, eval_split=0.5)
    method = STRATEGIES[strategy]
    criterion = Criterion.of(method)
    evaluation = evaluation_of(RunDirectory(place), method)
    scores = [row.scores for row in evaluation.rows if row.scores is not None]
    assert len(scores) == evaluation.count and len({row.prompt for row in scores}) == evaluation.prompts
    figure = summary["gain" if criterion.is_gain else "eval"][criterion.name]
    assert value_of(criterion.rows(scores)[0]) == pytest.approx(figure["value"], abs=1e-9)
    assert all(row.scores is None for row in (*evaluation.best, *evaluation.worst))


# --- words about a result

FIGURE = Interval(0.5, 0.25, 0.75)


def swept(**changes: Any) -> SettingsSwept:
    def row(name: str, status: str = "completed", excluded: str | None = None, **figures: Interval) -> SettingRow:
        ended = MethodRun(42, f"runs/c-sweep/{name}", status, 0, excluded, 4, 100, 61.0, 1.5)
        return SettingRow(name, {"beta": float(name[-3:])}, ended, figures, excluded)

    settings = [
        row("beta-0.1", "unhealthy", "its loss is NaN"),
        row("beta-0.5", logp_accuracy=FIGURE, kl_token=FIGURE),
        row("beta-0.9", excluded="its KL per answer is 12, above max_kl 10", logp_accuracy=Interval(0.9, 0.9, 0.9)),
    ]
    best = Best("beta-0.5", 2, FIGURE, Interval(0.4, 0.1, 0.7), ["beta-0.2"])
    plain = {"run_dir": "runs/c-sweep", "space": {"beta": [0.1, 0.5, 0.9]}, "trials": None, "chosen_by": "logp_accuracy"}
    plain |= {"is_gain": True, "max_kl": 10.0, "rows": 12, "prompts": 6, "best_config": "runs/c-sweep/best.json"}
    return SettingsSwept(**{**plain, "settings": settings, "best": best, "notes": [], "report": "r.html", **changes})


def test_the_table_has_the_best_first() -> None:
    title, header, lines = table(swept())
    assert title == "3 settings, 12 held-out rows of 6 prompts; 95 % intervals"
    assert header == ["beta", "gain in log-prob accuracy", "KL per token", "steps", "time", "status"]
    assert [(line[0], line[-1]) for line in lines] == [
        ("0.5", "best"),
        ("0.9", "cannot win"),
        ("0.1", "unhealthy"),
    ]
    assert lines[0][1] == "+50.0 points [+25, +75]"


def test_both_figures_of_the_best_are_said() -> None:
    best, warning, config = best_sentences(swept())
    assert best == "best: beta 0.5; gain in log-prob accuracy +50.0 points [+25, +75]"
    assert "the best of 2 on the same 6 prompts" in warning and "by about 10.0 points; corrected: +40.0 points" in warning
    assert config.endswith("best.json")
    assert best_sentences(swept(best=None)) == ["no setting can win: the notes have the reason of each"]


def test_what_cannot_win_and_what_is_few_is_said() -> None:
    said = notes(swept())
    assert said[:2] == [
        "beta-0.1: unhealthy: its loss is NaN",
        "beta-0.9: cannot win: its KL per answer is 12, above max_kl 10",
    ]
    assert [line.partition(" ")[0] for line in said[2:]] == ["not", "6", "corrected:"]


def test_the_json_has_these_keys() -> None:
    made = to_json(swept())
    plain = {"run_dir", "space", "trials", "chosen_by", "is_gain", "max_kl", "rows", "prompts", "best_config", "report"}
    assert made.keys() == plain | {"settings", "best", "notes"}
    assert made["settings"][0].keys() == {"name", "setting", "figures", "excluded", "run"}  # type: ignore[index]
    best = {"name", "of", "value", "corrected", "optimism", "not_clearly_worse"}
    assert made["best"].keys() == best  # type: ignore[attr-defined]


# --- settings that a sampler draws

DRAWN = Space.of(["learning_rate=1e-5..1e-3", "lora_r=4..64", "loss_type=sigmoid,ipo"])


def drawn(file: Path, trials: int, most: int, end: Callable[[dict[str, Any]], Outcome]) -> list[dict[str, Any]]:
    """The settings that a call draws until it is stopped after `most`, each ended so."""
    settings = []
    with opened(file, "s", DRAWN, trials, 42, is_better_large=True, prunes_from=None) as source:
        while len(settings) < most and (asked := source.next()) is not None:
            settings.append(dict(asked.setting))
            source.tell(asked, end(settings[-1]))
    return settings


def by_rank(setting: dict[str, Any]) -> Outcome:
    return Outcome(setting["lora_r"] / 64, above_limit=setting["learning_rate"] - 5e-4)


def test_a_stopped_sampler_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    whole = drawn(tmp_path / "a.db", 8, 8, by_rank)
    assert len(whole) == 8
    first = drawn(tmp_path / "b.db", 8, 5, by_rank)
    rest = drawn(tmp_path / "b.db", 8, 99, by_rank)
    assert first == whole[:5] and rest == whole  # the second call gives also those that have ended
    assert all(1e-5 <= one["learning_rate"] <= 1e-3 and one["lora_r"] in range(4, 65) for one in whole)
    assert {one["loss_type"] for one in whole} == {"sigmoid", "ipo"}
    assert len(drawn(tmp_path / "b.db", 10, 99, by_rank)) == 10  # more trials continue


def test_a_setting_that_failed_is_drawn_again_by_the_next_call(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    file = tmp_path / "s.db"
    first = drawn(file, 4, 99, lambda setting: Outcome(None, is_failed=setting["loss_type"] == "ipo"))
    failed = [one for one in first if one["loss_type"] == "ipo"]
    assert len(first) == 4 and failed and len(failed) < 4
    second = drawn(file, 4, 99, by_rank)
    assert len(second) == 4 and all(one in second for one in first)
    assert drawn(file, 4, 99, by_rank) == second  # all have ended


def test_a_run_that_is_worse_than_the_median_is_pruned(tmp_path: Path) -> None:
    """The median pruner of Optuna waits for five settings, and for the second step."""
    pytest.importorskip("optuna")
    with opened(tmp_path / "s.db", "s", DRAWN, 7, 42, is_better_large=True, prunes_from=2) as source:
        for _ in range(5):
            asked = source.next()
            assert asked is not None and not source.see(asked, 2, 0.8)
            source.tell(asked, Outcome(0.8))
        good, bad = source.next(), source.next()
        assert good is not None and not source.see(good, 2, 0.9)
        assert bad is not None and not source.see(bad, 1, 0.1) and source.see(bad, 2, 0.1)
        source.tell(bad, Outcome(None, is_pruned=True))
    with opened(tmp_path / "s.db", "s", DRAWN, 7, 42, is_better_large=True, prunes_from=2) as source:
        again = [source.next() for _ in range(8)]
    assert [one.is_pruned for one in again if one is not None] == [*[False] * 5, True, False]  # the last one still trains


def test_without_optuna_the_command_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cli.commands.optuna_study.find_spec", lambda name: None)
    with pytest.raises(InvalidInput) as raised:
        require_optuna()
    (problem,) = raised.value.problems
    assert problem.code == "optuna-missing" and "pip install 'dpo-cli[sweep]'" in str(problem.fix)


# --- processes


def test_several_commands_run_at_once(tmp_path: Path) -> None:
    with Children() as children:
        running = [children.start(["--version"], {"NO_COLOR": "1"}, tmp_path / "messages.txt") for _ in range(2)]
        done: list[Any] = []
        while len(done) < 2:
            done += children.ended()
    assert {id(child) for child in done} == {id(child) for child in running}
    assert all(code == 0 and "torch" in document for code, document in (child.result() for child in running))


def test_each_of_several_has_its_share_of_the_machine() -> None:
    assert share_of_machine(0, 1, 2, {}) == {}
    assert share_of_machine(1, 2, 0, {"OMP_NUM_THREADS": "3"}) == {}
    assert share_of_machine(3, 4, 2, {"OMP_NUM_THREADS": "3"}) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert share_of_machine(1, 2, 8, {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "5,7"}) == {"CUDA_VISIBLE_DEVICES": "7"}
    assert int(share_of_machine(0, 10_000, 1, {})["OMP_NUM_THREADS"]) == 1


# --- sweeps


def laid_out(place: Path, model: Path, pairs: Path) -> None:
    config = {
        "model_name": str(model), "dataset": str(pairs), "device": "cpu", "bf16": False, "fp16": False, "lora_r": 4,
        "learning_rate": 1e-2, "kl_prompts": 4, "max_new_tokens": 4, "eval_split": 0.6, "max_steps": 4, "max_kl": 1000,
    }  # fmt: skip
    (place / "tiny.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path]) -> Path:
    laid_out(tmp_path, tiny_model_dir, pairs_file())
    return tmp_path


def test_every_problem_is_named_before_anything_trains(place: Path) -> None:
    words = ["beta=-1,0.1", "lerning_rate=1,2", "seed=1,2", "lora_dropout=0..2@3"]
    done = dpo("sweep", "tiny.json", *words, "--json", cwd=place)
    problems = json.loads(done.stdout)["problems"]
    assert done.returncode == 3 and not (place / "runs").exists()
    errors = sorted((problem["code"], problem["key"]) for problem in problems if problem["severity"] == "error")
    wrong = [
        ("bad-value", "beta"),
        *[("bad-value", "lora_dropout")] * 2,
        ("sweep-key", "seed"),
        ("unknown-key", "lerning_rate"),
    ]
    assert errors == wrong


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["beta=0.1..1"], 2, "--trials"),
        (["beta=0.1..1@2000"], 2, "more than 1,000 values"),
        (["beta=0.1..1@100", "learning_rate=1e-5..1e-3@100"], 2, "10,000 settings"),
        (["beta=0.1,0.5", "eval_split=0"], 3, "nothing is held out"),
        (["beta=0.1,0.5", "strategy=rlhf"], 3, "several"),
        (["beta=0.1,0.5", "dataset=gone.jsonl"], 3, "gone.jsonl"),
    ],
)
def test_what_cannot_be_swept_is_refused(place: Path, words: Sequence[str], code: int, part: str) -> None:
    done = dpo("sweep", "tiny.json", *words, cwd=place)
    assert done.returncode == code and part in done.stderr, done.stderr
    assert not (place / "runs").exists()


def test_the_config_of_a_run_is_that_of_the_file_with_the_setting(place: Path) -> None:
    asked = Sweep.of(str(place / "tiny.json"), ["beta=0.1,0.5", "max_steps=2", "push_to_hub=true", "hub_model_id=me/m"], None)
    values = asked.values({"beta": 0.5})
    assert (values["beta"], values["max_steps"], values["seed"], values["split_seed"]) == (0.5, 2, 42, 42)
    assert "push_to_hub" not in values and values["output_dir"] == str(Path("runs/tiny-sweep/beta-0.5"))
    assert asked.max_kl == 1000 and asked.config.push_to_hub  # the best config keeps it


def started(place: Path, *words: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dpo_cli", "sweep", "tiny.json", *words]
    return subprocess.Popen(command, cwd=place, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def stopped(process: subprocess.Popen[bytes], when: Callable[[], bool], number: signal.Signals) -> int:
    """The exit code of a sweep that gets this signal as soon as something is there."""
    with process:
        while not when() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
    return process.returncode


SIX = ("beta=0.1,0.5", "learning_rate=1e-3..1e-1@3")


@pytest.mark.long
def test_a_sweep(place: Path) -> None:
    """Six settings: stopped, killed, and continued to the end; then called again, which trains nothing.

    16 pairs are trained on in 4 steps, and the reference of each is computed by the first run alone.
    """
    folder = place / "runs" / "tiny-sweep"
    names = [f"beta-{beta}-learning_rate-{rate}" for beta in (0.1, 0.5) for rate in (0.001, 0.01, 0.1)]
    assert stopped(started(place, *SIX), (folder / names[0] / "plan.json").exists, signal.SIGINT) == 130
    assert not (folder / "sweep.json").exists() and not (folder / names[1]).exists()
    assert stopped(started(place, *SIX), (folder / names[2] / "plan.json").exists, signal.SIGKILL) == -signal.SIGKILL
    kept = {name: (folder / name / "metrics.json").read_bytes() for name in names[:2]}

    first = dpo("sweep", "tiny.json", *SIX, "--json", cwd=place)
    assert first.returncode == 0, first.stderr
    made = json.loads(first.stdout)
    assert [row["name"] for row in made["settings"]] == names and made["chosen_by"] == "logp_accuracy"
    assert {row["run"]["status"] for row in made["settings"]} <= {"completed", "unhealthy"}
    assert {name: (folder / name / "metrics.json").read_bytes() for name in kept} == kept
    manifests = [json.loads((folder / name / "manifest.json").read_text(encoding="utf-8")) for name in names]
    pairs = json.loads((folder / names[0] / "plan.json").read_text(encoding="utf-8"))["counts"]["train_pairs"]
    assert [manifest[RECALLED] for manifest in manifests] == [0, *[pairs] * 5]

    best = made["best"]
    able = [row for row in made["settings"] if row["excluded"] is None]
    assert best["of"] == len(able) and best["value"]["value"] == max(row["figures"]["logp_accuracy"]["value"] for row in able)
    assert best["corrected"]["value"] <= best["value"]["value"] and best["optimism"] >= 0
    config = json.loads((folder / "best.json").read_text(encoding="utf-8"))
    assert {key: config[key] for key in ("beta", "learning_rate")} == next(
        row["setting"] for row in able if row["name"] == best["name"]
    )
    assert "output_dir" not in config and dpo("validate", folder / "best.json", cwd=place).returncode == 0
    page = (folder / "sweep.html").read_text(encoding="utf-8")
    assert "6 settings" in page and all(name in page for name in names) and "looks better than it is" in page

    again = dpo("sweep", "tiny.json", *SIX, "--json", cwd=place)
    assert (again.returncode, again.stdout) == (0, first.stdout) and "training " not in again.stderr


@pytest.mark.long
def test_settings_train_at_once_and_one_that_fails_does_not_win(place: Path) -> None:
    """A folder of others is in the place of one run; the same command tries that setting again when the folder is gone."""
    foreign = place / "out" / "learning_rate-0.01" / "adapter"
    foreign.mkdir(parents=True)
    words = ["sweep", "tiny.json", "learning_rate=0.001,0.01", "output_dir=out", "--processes", "2", "--json"]
    first = dpo(*words, cwd=place)
    assert first.returncode == 0, first.stderr
    made = json.loads(first.stdout)
    assert [row["run"]["status"] for row in made["settings"]] == ["completed", "failed"]
    assert made["best"]["of"] == 1 and made["best"]["corrected"] is None
    assert (place / "out" / "learning_rate-0.001-messages.txt").read_text(encoding="utf-8")
    foreign.rmdir()
    second = json.loads(dpo(*words, cwd=place).stdout)
    assert [row["run"]["status"] for row in second["settings"]] == ["completed", "completed"]
    assert second["best"]["of"] == 2


@pytest.mark.long
def test_a_sweep_of_one_setting_and_one_that_nothing_wins(place: Path) -> None:
    """Also of demonstrations. With a limit of KL that every run is above, or stops at, no setting can win: exit 5."""
    alone = json.loads(dpo("sweep", "tiny.json", "strategy=sft", "--json", cwd=place).stdout)
    assert [row["name"] for row in alone["settings"]] == ["as-given"] and alone["chosen_by"] == "loss"
    assert alone["best"]["of"] == 1 and alone["max_kl"] is None
    words = ["sweep", "tiny.json", "beta=50,", "learning_rate=1", "max_kl=0.001", "output_dir=far", "--json"]
    far = dpo(*words, cwd=place)
    assert far.returncode == 5, far.stderr
    made = json.loads(far.stdout)
    assert made["best"] is None and made["best_config"] is None and not (place / "far" / "best.json").exists()
    assert "max_kl" in made["settings"][0]["excluded"]


@pytest.mark.long
def test_drawn_settings_are_trained(place: Path) -> None:
    pytest.importorskip("optuna")
    words = ["sweep", "tiny.json", "learning_rate=1e-3..1e-1", "beta=0.1,0.5", "--trials", "3", "--json"]
    first = dpo(*words, cwd=place)
    assert first.returncode == 0, first.stderr
    made = json.loads(first.stdout)
    assert made["trials"] == 3 and 0 < len(made["settings"]) <= 3 and made["best"] is not None
    again = dpo(*words, cwd=place)
    assert again.stdout == first.stdout and "training " not in again.stderr
    assert (place / "runs" / "tiny-sweep" / "study.db").is_file()
