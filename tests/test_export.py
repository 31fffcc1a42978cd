"""From a run to a model that others can load: merged, judged again, refused when it is worse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import conversation_pairs, judged_json
from conftest import made_row
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dpo_cli.app import app
from dpo_cli.commands.export import Request, export, limit
from dpo_cli.commands.requests import Request as Judged
from dpo_cli.commands.train import train
from dpo_cli.config.config import load_stages
from dpo_cli.data.encoded import Encoded
from dpo_cli.errors import Exit, InvalidInput, RunFailed, UsageError
from dpo_cli.hardware.machine import probe
from dpo_cli.plan.preflight import inspect
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.results.intervals import Interval
from dpo_cli.runs.open_run import load_policy, open_run
from dpo_cli.strategies.figures import FIGURES
from dpo_cli.ui.console import Console

Train = Callable[..., Path]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Train:
    """Trains ten steps on pairs, once for each name, and gives the run's folder."""
    place = tmp_path_factory.mktemp("runs")
    data = place / "pairs.jsonl"
    write(data, [made_row(i) for i in range(40)])
    write(place / "varied.jsonl", conversation_pairs(40, 4, 6))
    values = {"model_name": str(tiny_model_dir), "dataset": str(data), "device": "cpu", "bf16": False, "fp16": False}
    values |= {"learning_rate": 5e-3, "eval_split": 0.4, "max_steps": 10, "lora_r": 4}
    values |= {"kl_prompts": 2, "max_new_tokens": 4}

    def train_in(name: str, **options: object) -> Path:
        if "dataset" in options:
            options["dataset"] = str(place / str(options["dataset"]))
        config = place / f"{name}.json"
        if not config.exists():
            config.write_text(json.dumps({**values, "output_dir": str(place / name), **options}), encoding="utf-8")
            (loaded,) = load_stages(str(config))
            _, code = train(loaded, inspect(loaded, probe()), probe(), Console(), overwrite=False, dry_run=False)
            assert code is Exit.DONE
        return place / name

    return train_in


# What a run can have been trained as; "after" names the run whose adapter it starts from.
KINDS: dict[str, dict[str, object]] = {
    "adapter": {},
    "bf16": {"bf16": True},
    "sft": {"strategy": "sft"},
    "goes-on": {"after": "adapter", "lora_r": 4},
    "merges": {"after": "adapter", "lora_r": 2},
    "whole": {"lora_r": 0, "learning_rate": 1e-4},
    "head-saved": {"modules_to_save": ["lm_head"]},
    "4bit": {
        "use_4bit": True,
        "bnb_4bit_quant_type": "fp4",
    },  # whose merged model is worse: rounding a tiny model to 4 bits changes it a lot
    "4bit-varied": {"use_4bit": True, "dataset": "varied.jsonl"},  # pairs on which the run's interval is wider than that
}


def of_kind(trained: Train, kind: str) -> Path:
    options = dict(KINDS[kind])
    if "after" in options:
        options["model_name"] = str(of_kind(trained, str(options.pop("after"))))
    return trained(kind, **options)


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = tokenizer("the cat sat on the mat; the answer is 4", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=ids).logits
    return made


def log_probs(model: Any, rows: Sequence[Encoded]) -> torch.Tensor:
    """Summed log-probs of both responses from a model's own logits, row by row: (rows, 2), nats."""

    def of(prompt: list[int], response: list[int]) -> torch.Tensor:
        with torch.no_grad():
            made = model.eval()(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return made.log_softmax(dim=-1).gather(-1, torch.tensor(response)[:, None]).sum()

    return torch.tensor([[of(row.prompt_ids, response) for response in row.responses] for row in rows])


def left_behind(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "4bit" not in kind])
def test_the_files_hold_what_the_run_trained(trained: Train, tmp_path: Path, kind: str) -> None:
    """Loaded by transformers alone, the model computes what the run's policy computes, in the dtype of the training."""
    run, out = of_kind(trained, kind), tmp_path / "out"
    made, code = export(Request(str(run), out), Console())
    policy, plan = load_policy(open_run(str(run), None, Console()), Console())
    assert (plan.goes_on, plan.merges) == (kind == "goes-on", kind == "merges")
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, plan.dtype)}
    tokenizer = AutoTokenizer.from_pretrained(out)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        one, other = logits(policy.network, tokenizer), logits(model, tokenizer)
    torch.testing.assert_close(one.float(), other.float(), atol=0.15 if kind == "bf16" else 1e-4, rtol=1e-4)
    assert (code, made["address"], made["out"]) == (Exit.DONE, None, str(out))
    assert made["difference"]["max"] < (1 if kind == "bf16" else 1e-3)
    assert made["trained_on"] == made["dtype"] == plan.dtype


def test_what_is_written_is_a_whole_model_with_its_figures(trained: Train, tmp_path: Path) -> None:
    run, out = of_kind(trained, "adapter"), tmp_path / "out"
    made, _ = export(Request(str(run), out), Console())
    names = {file.name for file in out.iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md", "export.json"}
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(run / "adapter").chat_template
    assert left_behind(tmp_path) == ["out"]
    kept = json.loads((out / "export.json").read_text(encoding="utf-8"))
    assert {**kept, "out": str(out), "address": None} == made
    assert (kept["pairs"], kept["gguf"], kept["run"]) == (
        len(open_run(str(run), None, Console()).rows),
        None,
        str(run),
    )
    assert [entry["metric"] for entry in kept["limits"]] == ["accuracy", "margin"] and all(e["ok"] for e in kept["limits"])
    card = (out / "README.md").read_text(encoding="utf-8")
    for name in ("accuracy", "margin"):
        before, after = kept["before"][name]["value"], kept["after"][name]["value"]
        assert f"| {name} | {before:.3f} | {after:.3f} |" in card
    assert f"differs by {kept['difference']['mean']:.3g} nats on average, by {kept['difference']['max']:.3g} at most" in card
    assert (
        f"On {kept['pairs']} held-out pairs" in card and "AutoModelForCausalLM" in card and "library_name: transformers" in card
    )


def test_a_4bit_run_is_merged_into_the_16_bit_base_and_the_difference_measured(trained: Train, tmp_path: Path) -> None:
    """The weights are base + scale * B A, of the base as it was before it was quantised; the figures are those of each side."""
    run, out = of_kind(trained, "4bit-varied"), tmp_path / "out"
    made, code = export(Request(str(run), out), Console())
    assert (code, made["trained_on"], made["dtype"]) == (Exit.DONE, "4-bit", "float32"), made["limits"]
    opened = open_run(str(run), None, Console())
    base, weights = (
        load_file(file) for file in (Path(opened.plan.config.model_name) / "model.safetensors", out / "model.safetensors")
    )
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(weights[f"{layer}.weight"], base[f"{layer}.weight"] + 2 * b @ a)  # alpha is twice the rank
    assert weights.keys() == base.keys()

    policy, plan = load_policy(opened, Console())
    own = log_probs(policy.network, opened.rows)
    merged = log_probs(AutoModelForCausalLM.from_pretrained(out), opened.rows)
    with policy.as_reference() as network:
        reference = log_probs(network, opened.rows)
    apart = (own - merged).abs()
    assert apart.max() > 1
    assert made["difference"].pop("limit") is None
    trained_by = float((own - reference).abs().mean())
    assert made["difference"] == pytest.approx(
        {"mean": float(apart.mean()), "max": float(apart.max()), "trained": trained_by}, abs=1e-3
    )
    judged = judged_json(Judged(str(run)), Console())["policy"]
    for name in ("accuracy", "margin", "loss"):
        assert made["before"][name] == pytest.approx(judged[name], abs=1e-4)
    rewards = plan.config.beta * (merged - reference)
    assert made["after"]["margin"]["value"] == pytest.approx(float((rewards[:, 0] - rewards[:, 1]).mean()), abs=1e-3)


@pytest.mark.parametrize("kind", ["4bit", "sft"])
def test_a_worse_model_is_refused_and_nothing_is_left(
    trained: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What 4 bits cost a tiny model, and a merge that loses the adapter: exit 5, both figures told and in the JSON, no file."""
    run, out, name = of_kind(trained, kind), tmp_path / "out", {"4bit": "margin", "sft": "loss"}[kind]
    if kind == "sft":
        monkeypatch.setattr("dpo_cli.commands.export.merged", lambda model, *_: model.unload())
    done = CliRunner().invoke(app, ["export", str(run), "--out", str(out), "--json"])
    assert done.exit_code == Exit.MISSED, done.stderr
    made = json.loads(done.stdout)
    (missed,) = [entry for entry in made["limits"] if not entry["ok"]]
    assert (missed["metric"], missed["value"], missed["before"]) == (
        name,
        *(made[s][name]["value"] for s in ("after", "before")),
    )
    assert missed["limit"] == made["before"][name]["high" if kind == "sft" else "low"]
    assert f"[export-worse] the merged model's {name} is {missed['value']:.3f}" in done.stderr
    assert f"the end of the interval around the run's {missed['before']:.3f}" in done.stderr
    assert left_behind(tmp_path) == []


def test_limits_by_hand() -> None:
    """A figure may be anywhere in the run's interval, and better than it; of 30 prompts all right, 3/30 may be lost."""
    figure = Interval(0.8, 0.7, 0.9)
    for value, ok in ((0.7, True), (0.95, True), (0.69, False)):
        made = limit(FIGURES["accuracy"], figure, Interval(value, value, value), 30)
        assert (made.limit, made.ok, made.before, made.value) == (0.7, ok, 0.8, value)
    for value, ok in ((0.9, True), (0.1, True), (0.91, False)):
        assert limit(FIGURES["loss"], figure, Interval(value, value, value), 30).ok is ok
    all_right = Interval(1.0, 1.0, 1.0)
    assert limit(FIGURES["accuracy"], all_right, Interval(0.91, 0.9, 0.92), 30).ok
    assert not limit(FIGURES["accuracy"], all_right, Interval(0.89, 0.88, 0.9), 30).ok
    assert not limit(FIGURES["margin"], all_right, Interval(0.99, 0.98, 1.0), 30).ok


def test_few_prompts_give_no_limit_of_a_figure() -> None:
    """Of 5 prompts, all right, 1 - 3/5 = 0.4 is less than chance; of 6, 1 - 3/6 = 0.5. A share has no limit below 0."""
    all_right, wrong = Interval(1.0, 1.0, 1.0), Interval(0.0, 0.0, 0.0)
    for name in ("accuracy", "margin"):
        for prompts in (1, 2, 5):
            undecided = limit(FIGURES[name], all_right, wrong, prompts)
            assert (undecided.limit, undecided.ok) == (None, None)
    assert [limit(FIGURES["accuracy"], figure, wrong, 6).limit for figure in (all_right, wrong)] == [0.5, 0]
    assert limit(FIGURES["accuracy"], all_right, wrong, 6).ok is False


@pytest.mark.parametrize("prompts", [1, 5])
def test_with_few_prompts_log_probs_decide(
    trained: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], prompts: int
) -> None:
    """A sound merge is exported. One that loses the adapter is as far from the run as the base is, twice the limit."""
    run, data = of_kind(trained, "adapter"), write(tmp_path / "few.jsonl", [made_row(i) for i in range(50, 50 + 2 * prompts)])
    request = Request(str(run), tmp_path / "out", dataset=str(data))
    too_few = f"too few prompts to compare the figures: {prompts}; at least 6 are needed for a 95 % interval"
    result, code = export(request, Console())
    printed = capsys.readouterr().out
    assert (code, result["prompts"], printed.count(too_few)) == (Exit.DONE, prompts, 1)
    in_table = [line.split()[-1] for line in printed.splitlines() if re.match(r" (reward accuracy|margin) ", line)]
    assert in_table[-2:] == ["none", "none"]
    assert [(entry["limit"], entry["ok"]) for entry in result["limits"]] == [(None, None)] * 2
    difference = result["difference"]
    assert difference["limit"] == pytest.approx(difference["trained"] / 2) and difference["mean"] < 1e-3 < difference["limit"]

    monkeypatch.setattr("dpo_cli.commands.export.merged", lambda model, *_: model.unload())
    result, code = export(Request(str(run), tmp_path / "lost", dataset=str(data)), Console())
    difference = result["difference"]
    assert (code, left_behind(tmp_path)) == (Exit.MISSED, ["few.jsonl", "out"])
    assert difference["mean"] == pytest.approx(difference["trained"], abs=1e-3)
    message = f"[export-worse] the merged model's log-probs differ from the run's by {difference['mean']:.3g} nats on average"
    assert capsys.readouterr().err.count(message) == 1


def test_a_run_that_held_nothing_out_needs_a_file(trained: Train, tmp_path: Path) -> None:
    run = trained("whole-data", eval_split=0)
    with pytest.raises(InvalidInput) as caught:
        export(Request(str(run), tmp_path / "out"), Console())
    assert [(problem.code, "--dataset" in (problem.fix or "")) for problem in caught.value.problems] == [
        ("nothing-to-compare", True)
    ]
    other = write(tmp_path / "other.jsonl", [made_row(i) for i in range(50, 62)])
    made, code = export(Request(str(run), tmp_path / "out", dataset=str(other)), Console())
    assert (code, made["pairs"], made["prompts"]) == (Exit.DONE, 12, 6)
    assert "on 40 pairs of `pairs.jsonl`" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_folder_that_is_not_empty_is_not_written_into(trained: Train, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UsageError, match="exists already, and is not an export"):
            export(Request(str(of_kind(trained, "adapter")), out), Console())
    with pytest.raises(UsageError, match="cannot write"):
        export(Request(str(of_kind(trained, "adapter")), tmp_path / "notes.txt" / "out"), Console())
    assert (left_behind(tmp_path), (tmp_path / "notes.txt").read_text(encoding="utf-8")) == (["notes.txt"], "mine")
    with pytest.raises(UsageError, match="is not a hub repository"):
        export(Request(str(of_kind(trained, "adapter")), tmp_path / "out", push="mine"), Console())


def test_a_disk_without_room_is_told_before_anything_is_loaded(
    trained: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = of_kind(trained, "adapter")
    monkeypatch.setattr("dpo_cli.commands.export.free_bytes", lambda _: 1000)
    monkeypatch.setattr(HuggingFace, "base_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(RunFailed, match=r"takes 0\.0001 GB, .* has 0\.0000 free") as caught:
        export(Request(str(run), tmp_path / "out"), Console())
    assert "GB there, or name a folder on another disk" in (caught.value.fix or "")
    assert left_behind(tmp_path) == []
