"""`dpo eval` compared with plain transformers and PEFT, adapters of other tools, categories, and limits for scripts."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import judged_json
from conftest import Run, made_row, tiny_model
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from rich.console import Console as RichConsole
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dpo_cli.app import app
from dpo_cli.commands.requests import Request, VoteRequest
from dpo_cli.config.config import load
from dpo_cli.errors import Exit, InvalidInput, UsageError
from dpo_cli.evaluation import evaluation
from dpo_cli.evaluation.bootstrap import Intervals
from dpo_cli.evaluation.generation import Answer, Sampling, generate
from dpo_cli.evaluation.thresholds import OF_VOTES, judged_by, parse
from dpo_cli.hardware.machine import probe
from dpo_cli.plan.preflight import inspect
from dpo_cli.results.codec import to_json
from dpo_cli.results.intervals import Interval, Sides
from dpo_cli.results.judgement import Evaluation
from dpo_cli.results.tally import Tally
from dpo_cli.strategies.dpo import DPO
from dpo_cli.ui.console import Console


def by_hand(model_dir: Path, adapter: Path, rows: list[dict[str, Any]], beta: float) -> dict[str, float]:
    """The figures of DESIGN 6 with transformers and PEFT alone, in float32, one response at a time over the full vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    policy = PeftModel.from_pretrained(base, str(adapter)).eval()
    wins = margins = losses = kl = tokens = logp_wins = base_wins = 0.0
    for row in rows:
        ask = [{"role": "user", "content": row["prompt"]}]
        start = tokenizer.apply_chat_template(ask, add_generation_prompt=True, tokenize=False)
        sums = {}
        for side in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template([*ask, {"role": "assistant", "content": row[side]}], tokenize=False)
            ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt").input_ids
            first = len(tokenizer(start, add_special_tokens=False).input_ids)
            with torch.no_grad():
                log_pi = policy(ids).logits[0, first - 1 : -1].double().log_softmax(-1)
                with policy.disable_adapter():
                    log_ref = policy(ids).logits[0, first - 1 : -1].double().log_softmax(-1)
            said = ids[0, first:, None]
            sums[side] = (float(log_pi.gather(1, said).sum()), float(log_ref.gather(1, said).sum()))
            kl += float((log_pi.exp() * (log_pi - log_ref)).sum())
            tokens += len(said)
        margin = beta * (sums["chosen"][0] - sums["chosen"][1]) - beta * (sums["rejected"][0] - sums["rejected"][1])
        wins += 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
        logp_wins += sums["chosen"][0] > sums["rejected"][0]
        base_wins += sums["chosen"][1] > sums["rejected"][1]
        margins += margin
        losses += float(torch.nn.functional.softplus(torch.tensor(-margin, dtype=torch.float64)))
    n = len(rows)
    figures = {"accuracy": wins / n, "margin": margins / n, "loss": losses / n, "kl_token": kl / tokens}
    return figures | {"logp_accuracy": logp_wins / n, "base_logp_accuracy": base_wins / n}


def test_figures_equal_an_independent_computation(run: Run, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Accuracy exactly; margin, loss and kl_token to 1e-4, in float32."""
    run(max_steps=8, learning_rate=3e-2, beta=0.3, eval_split=0)
    rows = [made_row(i) | {"prompt": f"which cat {i}"} for i in range(20)]
    file = tmp_path / "others.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judged = judged_json(Request(str(tmp_path / "run"), dataset=str(file)), Console())
    expected = by_hand(tiny_model_dir, tmp_path / "run" / "adapter", rows, 0.3)
    found = {name: judged["policy"][name]["value"] for name in ("accuracy", "margin", "loss", "kl_token", "logp_accuracy")}
    assert found["accuracy"] == expected["accuracy"] and found["logp_accuracy"] == expected["logp_accuracy"]
    assert judged["base"]["logp_accuracy"]["value"] == expected["base_logp_accuracy"]
    for name in ("margin", "loss", "kl_token"):
        assert found[name] == pytest.approx(expected[name], abs=1e-4), name
    assert abs(expected["margin"]) > 0.1 and expected["kl_token"] > 0.01  # there is something to agree on


def test_an_adapter_of_another_tool_is_judged_by_a_config(
    tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A LoRA with modules_to_save and an IA3 that PEFT alone wrote: figures as by hand; the config's beta counts."""
    config = tmp_path / "config.json"
    values = {"model_name": str(tiny_model_dir), "dataset": str(pairs_file()), "device": "cpu", "bf16": False, "fp16": False}
    config.write_text(json.dumps({**values, "beta": 0.5, "eval_split": 0.5, "kl_prompts": 2, "max_new_tokens": 4}))
    made = {
        "lora": LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    }
    rows = [made_row(i) for i in range(24)]
    for name, peft_config in made.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), peft_config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key))) * 0.2)
        model.save_pretrained(str(tmp_path / name))
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / name)
        judged = judged_json(Request(str(config), tmp_path / name, values["dataset"]), Console())
        expected = by_hand(tiny_model_dir, tmp_path / name, rows, 0.5)
        assert judged["pairs"] == 24
        assert judged["policy"]["margin"]["value"] == pytest.approx(expected["margin"], abs=1e-4)
        assert judged["policy"]["kl_token"]["value"] == pytest.approx(expected["kl_token"], abs=1e-4)
    held_out = judged_json(Request(str(config), tmp_path / "lora", overrides=("beta=0.1",)), Console())
    assert 0 < held_out["pairs"] < 24
    assert "as its base" not in capsys.readouterr().out


def test_what_is_no_adapter_of_the_model_is_refused(tmp_path: Path, run: Run, tiny_model_dir: Path) -> None:
    _, place = run(eval_split=0)
    config = str(tmp_path / "config.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InvalidInput, match=r"has no adapter_config\.json"):
        judged_json(Request(config, empty), Console())
    (empty / "adapter_config.json").write_text("{}")
    (empty / "adapter_model.bin").touch()
    with pytest.raises(InvalidInput, match="may run code"):
        judged_json(Request(config, empty), Console())
    (empty / "adapter_model.safetensors").touch()
    with pytest.raises(InvalidInput, match="has no peft_type"):
        judged_json(Request(config, empty), Console())
    (empty / "adapter_config.json").write_text('{"peft_type": "NEW"}')
    with pytest.raises(InvalidInput, match="PEFT cannot read"):
        judged_json(Request(config, empty), Console())
    virtual = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), virtual).save_pretrained(str(tmp_path / "prefix"))
    with pytest.raises(InvalidInput, match="virtual tokens"):
        judged_json(Request(config, tmp_path / "prefix"), Console())
    adapter_config = json.loads((place / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    for change in ({"target_modules": ["q_proj"]}, {"r": 2}):  # fewer places than tensors; tensors of another shape
        (place / "adapter" / "adapter_config.json").write_text(json.dumps(adapter_config | change), encoding="utf-8")
        with pytest.raises(InvalidInput, match=r"the adapter in .* (has|holds) .*: they are from two adapters"):
            judged_json(Request(config, place / "adapter", str(tmp_path / "pairs.jsonl")), Console())


def test_rows_with_a_category_are_judged_apart(run: Run, pairs_file: Callable[..., Path], tmp_path: Path) -> None:
    topics = ["maths", "small talk", None, 3]
    pairs_file([made_row(i) | {"topic": topics[i % 4]} for i in range(24)])
    summary, place = run(eval_split=0.6, columns={"category": "topic"}, learning_rate=3e-2)
    found = json.loads((place / "evaluation.json").read_text(encoding="utf-8"))
    assert set(found["categories"]) <= {"maths", "small talk", "(none)", "3"} and len(found["categories"]) > 2
    assert sum(part["pairs"] for part in found["categories"].values()) == found["pairs"] == len(found["rows"])
    assert found["policy"] == summary["eval"] and summary["eval"]["kl_sequence"] is not None
    for name, part in found["categories"].items():
        margins = [row["margin"] for row in found["rows"] if (row["category"] or "(none)") == name]
        assert part["policy"]["margin"]["value"] == pytest.approx(sum(margins) / len(margins))
        assert part["pairs"] == len(margins) and set(part["gain"]) == {"logp_accuracy", "normalized_logp_accuracy"}
    order = sorted((row["margin"] for row in found["rows"]), reverse=True)
    count = len(found["best"])
    assert [row["margin"] for row in found["best"]] == order[:count]
    assert [row["margin"] for row in found["worst"]] == order[::-1][: len(found["worst"])]
    assert len(found["worst"]) == min(10, found["pairs"] - count)
    lines = (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    for row in found["best"] + found["worst"]:
        written = json.loads(lines[row["line"] - 1])
        assert {name: row[name] for name in ("prompt", "chosen", "rejected")} == {
            name: written[name] for name in ("prompt", "chosen", "rejected")
        }


def test_a_stopped_run_gets_its_evaluation_from_eval(run: Run) -> None:
    _, place = run(eval_split=0.4)
    (place / "evaluation.json").rename(place / "before.json")
    judged_json(Request(str(place)), Console())
    again, before = (json.loads((place / f"{name}.json").read_text(encoding="utf-8")) for name in ("evaluation", "before"))
    assert again == before


def test_figures_of_other_settings_are_not_the_evaluation_of_the_run(run: Run) -> None:
    _, place = run(eval_split=0.4)
    written = (place / "evaluation.json").read_bytes()
    other = ("max_new_tokens=1", "kl_prompts=1")
    assert judged_json(Request(str(place), overrides=other), Console())["policy"]["kl_sequence"] is not None
    assert (place / "evaluation.json").read_bytes() == written
    (place / "evaluation.json").unlink()  # as a training that was stopped leaves it
    report = (place / "report.html").read_bytes()
    for overrides, dataset in ((other, None), ((), plan_dataset(place)), (("kl_prompts=1",), plan_dataset(place))):
        judged_json(Request(str(place), overrides=overrides, dataset=dataset), Console())
        assert not (place / "evaluation.json").exists() and (place / "report.html").read_bytes() == report


def plan_dataset(place: Path) -> str:
    return str(json.loads((place / "plan.json").read_text(encoding="utf-8"))["config"]["dataset"])


def test_a_plan_of_another_machine_judges_an_adapter_here(run: Run) -> None:
    """What that machine decided or had is decided again, with and without --adapter."""
    _, place = run(eval_split=0.4)
    here = judged_json(Request(str(place)), Console())
    plan = json.loads((place / "plan.json").read_text(encoding="utf-8"))
    plan["config"] |= {"device": "cuda", "bf16": True}
    for sources in ({"device": "config", "bf16": "measured"}, {"device": "measured", "bf16": "measured"}):
        plan["sources"] |= sources
        (place / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        assert (
            judged_json(Request(str(place), place / "adapter", overrides=("bf16=false",)), Console())["policy"]
            == here["policy"]
        )


def test_rows_that_a_run_was_trained_on_are_a_warning(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All rows, in another file: of those, the held-out ones were not trained on."""
    _, place = run(eval_split=0.4)
    other = tmp_path / "other.jsonl"
    other.write_bytes((tmp_path / "pairs.jsonl").read_bytes())
    counts = json.loads((place / "plan.json").read_text(encoding="utf-8"))["counts"]
    capsys.readouterr()
    judged_json(Request(str(place), dataset=str(other)), Console())
    told = capsys.readouterr().err
    assert 0 < counts["train_pairs"] < 24 and told.count("[prompt-in-both]") == 1
    assert f"{counts['train_pairs']} rows (lines" in told.split("[prompt-in-both]")[1]


FIGURE = Interval(0.7, 0.6, 0.8)
SIDES = Sides(
    {"accuracy": FIGURE, "loss": FIGURE, "kl_sequence": None},
    {"logp_accuracy": FIGURE},
    {"logp_accuracy": Interval(-0.1, -0.2, 0.0)},
)
NARROW_SIDES = Sides(
    dict.fromkeys(("accuracy", "logp_accuracy", "kl_sequence"), FIGURE),
    {"logp_accuracy": FIGURE},
    {"logp_accuracy": FIGURE},
)


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_an_interval_is_on_one_line_in_a_terminal_of_any_width(width: int) -> None:
    console, printed = Console(), io.StringIO()
    console.out = RichConsole(file=printed, width=width, force_terminal=True, color_system=None, highlight=False)
    console.judgement(Evaluation("pairs", 2, 2, NARROW_SIDES), [], DPO)
    lines = printed.getvalue().splitlines()
    whole = [re.findall(r"\[-?[\d.]+, -?[\d.]+\]", line) for line in lines]
    assert sum(map(len, whole)) == 5 and max(map(len, lines)) <= width
    assert ("(kl_sequence)" in printed.getvalue()) == (width >= 80)


JUDGED = Evaluation("pairs", 2, 2, SIDES, answer_tokens=dict.fromkeys(("policy", "base", "gain"), FIGURE))


@pytest.mark.parametrize(
    ("text", "is_met"),
    [
        ("accuracy=0.7", True),
        ("accuracy>=0.7", True),
        ("accuracy>0.7", False),
        ("accuracy=0.71", False),
        ("loss<0.7", False),
        ("loss<=7e-1", True),
        ("kl_sequence<10", False),  # which was not sampled: a limit on nothing is not kept
        ("gain.logp_accuracy>-0.2", True),
        ("gain.logp_accuracy>0", False),
        ("base.logp_accuracy < 1", True),
        ("answer_tokens<1", True),
        ("margin>0", False),  # of sft: there is none
    ],
)
def test_limits(text: str, is_met: bool) -> None:
    (made,) = judged_by(parse(text), JUDGED)
    assert made.ok is is_met and set(to_json(made)) == {"metric", "limit", "value", "ok"}


def test_no_number_keeps_no_limit() -> None:
    nothing = Interval(math.nan, math.nan, math.nan)
    broken = replace(JUDGED, sides=replace(SIDES, policy={"accuracy": nothing}))
    assert [made.ok for made in judged_by(parse("accuracy>0,accuracy<1"), broken)] == [False, False]
    assert [made.ok for made in judged_by(parse("accuracy>0"), replace(JUDGED, sides=None))] == [False]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("acuracy=0.6", "unknown figure acuracy"),
        ("accuracy", "is not a limit"),
        ("accuracy=high", "is not a number"),
        ("accuracy=nan", "is not a limit"),
        ("accuracy=0.5,", "'' is not a limit"),
        ("loss=0.6", "requires a loss of 0.6 or more"),
        ("gain.kl_token<1", "unknown figure gain.kl_token"),
    ],
)
def test_what_is_no_limit(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse(text)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "no run is given"),
        ({"target": "r", "adapter": Path("a"), "vote": VoteRequest("r")}, "run directory"),
        ({"target": "r", "overrides": ("beta=1",)}, "dpo eval does not accept beta="),
        ({"target": __file__}, "is a file"),
    ],
)
def test_what_does_not_go_together(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Request(**asked)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "no run is given"),
        ({"run": "r", "tally": Path("v")}, "only counts"),
        ({"by_judge": True, "tally": Path("v")}, "only counts"),
        ({"prompts": 7, "tally": Path("v")}, "only counts"),
        ({"overrides": ("beta=1",), "tally": Path("v")}, "only counts"),
        ({"run": __file__}, "is a file"),
        ({"run": "r", "fail_under": "win_rate=0.5"}, "no votes yet"),
        ({"run": "r", "overrides": ("beta=1",)}, "dpo vote does not accept beta="),
        ({"tally": Path("v"), "fail_under": "accuracy=1"}, "unknown figure accuracy"),
    ],
)
def test_what_does_not_go_together_in_a_vote(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        VoteRequest(**asked)


def test_votes_have_a_limit_too() -> None:
    request = VoteRequest(tally=Path("votes.json"), fail_under="win_rate=0.5")
    tally = Tally("run", "", "", None, 2, 0, 0, 1, 1, 0, FIGURE, 1.0)
    assert judged_by(request.thresholds, tally)[0].ok and OF_VOTES == ("win_rate",)
    assert not judged_by(request.thresholds, None)[0].ok


def test_a_run_that_adapts_the_embedding_is_judged_as_it_was(run: Run) -> None:
    """PEFT then writes the base's embedding with the adapter."""
    summary, place = run(target_modules=".*(q_proj|embed_tokens)", eval_split=0.4)
    assert judged_json(Request(str(place)), Console())["policy"] == summary["eval"]


def test_categories_by_the_hundred_are_told_as_twenty(run: Run, pairs_file: Callable[..., Path]) -> None:
    """An id in each row; the rows that are not among the first nineteen count as one category."""
    pairs_file([made_row(2 * i) | {"category": 1000 + i} for i in range(60)])
    _, place = run(eval_split=0.7)
    found = json.loads((place / "evaluation.json").read_text(encoding="utf-8"))
    sizes = [part["pairs"] for part in found["categories"].values()]
    assert len(sizes) == 20 and sizes[:19] == [1] * 19 and sizes[19] == found["pairs"] - 19 > 1
    assert list(found["categories"])[-1] == "(others)"


def test_kl_sequence_is_that_of_the_answers_that_were_sampled(
    run: Run, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """log pi - log ref of the very tokens, ends included, with transformers and PEFT alone; and the dice lie where they lay."""
    _, place = run(max_steps=8, learning_rate=3e-2, eval_split=0.5, kl_prompts=6, max_new_tokens=12)
    asked, made = [], []
    answers, sequence_kl = evaluation.answers, evaluation.sequence_kl

    def watched(model: Any, tokenizer: Any, prompts: Any, *rest: Any, **named: Any) -> Any:
        asked.extend(prompts)
        made.extend(found := answers(model, tokenizer, prompts, *rest, **named))
        return found

    def with_dice(*args: Any) -> Any:
        before = torch.get_rng_state()
        values = sequence_kl(*args)
        assert bool((torch.get_rng_state() == before).all())
        return values

    monkeypatch.setattr(evaluation, "answers", watched)
    monkeypatch.setattr(evaluation, "sequence_kl", with_dice)
    judged = judged_json(Request(str(place)), Console())
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    policy = PeftModel.from_pretrained(base, str(place / "adapter")).eval()
    differences = []
    for prompt, answer in zip(asked, made, strict=True):
        ids = torch.tensor([[*prompt, *answer.ids]])
        said = ids[0, len(prompt) :, None]
        with torch.no_grad():
            log_pi = policy(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            with policy.disable_adapter():
                log_ref = policy(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        differences.append(float((log_pi - log_ref).gather(1, said).sum()))
    assert len(differences) == judged["prompts"] > 3 and len({answer.ids for answer in made}) > 1
    assert all(len(answer.ids) == answer.tokens + answer.finished for answer in made)
    assert judged["policy"]["kl_sequence"]["value"] == pytest.approx(sum(differences) / len(differences), abs=1e-4)
    assert abs(sum(differences)) > 0.1


def test_prompts_without_an_answer_are_counted_and_keep_no_limit(
    run: Run, tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """With a context as long as some of the prompts: kl_sequence is of the others, and its limit is missed whatever it is."""
    model = shutil.copytree(tiny_model_dir, tmp_path / "short-context")
    shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 64}), encoding="utf-8")
    rows = [{**made_row(i), "prompt": f"question {i} " + ("the cat " * 40 if i % 4 == 0 else "")} for i in range(24)]
    _, place = run(model_name=str(model), dataset=str(pairs_file(rows)), eval_split=0.5, max_seq_length=512, kl_prompts=20)
    held = json.loads((place / "evaluation.json").read_text(encoding="utf-8"))
    long = [row for row in held["rows"] if (row["line"] - 1) % 4 == 0]
    assert 0 < held["unanswered"] == len(long) < held["pairs"]
    assert held["policy"]["kl_sequence"] is not None and f"{len(long)} prompts fill" in capsys.readouterr().out
    words = ["eval", str(place), "--fail-under", "kl_sequence<1e6,answer_tokens<1e6,kl_token<1e6", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == Exit.MISSED
    told = json.loads(done.stdout)
    assert [found["ok"] for found in told["thresholds"]] == [False, False, True] and told["unanswered"] == len(long)


def test_intervals_of_many_prompts_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [str(i) for i in range(40)]
    ratio = (np.random.default_rng(3).random(40), np.ones(40))
    kept = Intervals(prompts).of(ratio)
    monkeypatch.setattr("dpo_cli.evaluation.bootstrap.KEPT", 0)
    drawn = Intervals(prompts)
    assert drawn.of(ratio) == kept == drawn.of(ratio)


def test_no_answer_goes_beyond_the_context(tokenizer: Any) -> None:
    """GPT-2's positions end with its context: 5 tokens are left after 1,019, and none after 1,024."""
    model = tiny_model("gpt2", torch.float32)
    sampling = Sampling(12)
    ((answer,),) = generate(model, tokenizer, [[5] * 1019], sampling, torch.float32)
    assert answer.tokens <= 5
    assert generate(model, tokenizer, [[5] * 1024], sampling, torch.float32) == [[Answer("", 0, False)]]


def test_a_dataset_that_is_not_there_is_told(run: Run) -> None:
    _, place = run(eval_split=0)
    with pytest.raises(InvalidInput) as caught:
        judged_json(Request(str(place), dataset="/nowhere/pairs.jsonl"), Console())
    assert any(problem.key == "dataset" and problem.severity == "error" for problem in caught.value.problems)


def test_layers_may_be_named_by_their_whole_names(
    tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path]
) -> None:
    """As PEFT writes them into an adapter of "all-linear", whose shape a next stage takes over."""
    config = tmp_path / "config.json"
    for names, found in [(["model.layers.0.mlp.down_proj", "0.self_attn.q_proj"], 0), (["model.layers.9.mlp.down_proj"], 1)]:
        values = {"model_name": str(tiny_model_dir), "dataset": str(pairs_file()), "target_modules": names}
        config.write_text(json.dumps(values), encoding="utf-8")
        codes = [problem.code for problem in inspect(load(str(config)), probe()).problems]
        assert codes.count("no-such-layer") == found
