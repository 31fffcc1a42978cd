"""From an adapter there are two ways on; on both, the policy is its reference at step 0, and that is never the base model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import judged_json
from safetensors.torch import load_file
from typer.testing import CliRunner

from dpo_cli.app import app
from dpo_cli.commands.requests import Request
from dpo_cli.commands.train import train
from dpo_cli.config.config import load_stages
from dpo_cli.errors import Exit, InvalidInput
from dpo_cli.evaluation.evaluation import score
from dpo_cli.hardware.machine import GIB, probe
from dpo_cli.hardware.memory import evaluation_room
from dpo_cli.models.checks import problems
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.preflight import inspect
from dpo_cli.runs.open_run import load_policy, open_run
from dpo_cli.ui.console import Console

Run = Callable[..., tuple[dict[str, Any], Path]]
FROZEN = "continues: the config gives no other shape; the reference is a frozen copy of it"
MERGED = "is merged into its base model, and a fresh adapter is trained on the result"


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path]) -> Run:
    """Trains in a folder of the given name: metrics.json and the folder."""
    common = {"model_name": str(tiny_model_dir), "dataset": str(pairs_file()), "device": "cpu", "bf16": False, "fp16": False}
    common |= {"eval_split": 0.3, "max_steps": 3, "lora_r": 4, "learning_rate": 5e-2}
    common |= {"kl_prompts": 2, "max_new_tokens": 4}

    def train_in(name: str, **options: Any) -> tuple[dict[str, Any], Path]:
        config = tmp_path / f"{name}.json"
        values = {key: value for key, value in {**common, **options}.items() if value is not None}
        config.write_text(json.dumps({**values, "output_dir": str(tmp_path / name)}), encoding="utf-8")
        (loaded,) = load_stages(str(config))
        summary, code = train(loaded, inspect(loaded, probe()), probe(), Console(), overwrite=True, dry_run=False)
        assert code is Exit.DONE
        return summary, tmp_path / name

    return train_in


def first_line(place: Path) -> dict[str, Any]:
    line: dict[str, Any] = json.loads((place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return line


def plan_of(place: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((place / "plan.json").read_text(encoding="utf-8"))
    return plan


def assert_starts_at_its_reference(place: Path) -> None:
    """Loss ln 2, margin 0, both rewards 0: to the bit, since policy and reference are computed alike."""
    line = first_line(place)
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (line["margin"], line["reward_chosen"], line["reward_rejected"]) == (0, 0, 0)


def assert_reference_is(place: Path, sft: Path, within: float = 1e-5) -> None:
    """What dpo was held to gives all pairs the margin that the policy of sft gives them, which is not the base model's."""
    pairs = str(place.parent / "pairs.jsonl")
    of_sft, of_dpo = (load_policy(open_run(str(folder), pairs, Console()), Console()) for folder in (sft, place))
    opened = open_run(str(place), pairs, Console())
    ours = score(of_dpo[0], opened.rows, opened.tokenizer, of_dpo[1])
    theirs = score(of_sft[0], opened.rows, opened.tokenizer, of_sft[1])
    apart, moved = np.abs(ours.reference - theirs.policy).mean(), np.abs(theirs.policy - theirs.reference).mean()
    assert moved > 0.1 and apart <= within * np.abs(theirs.policy).mean()


@pytest.fixture
def sft(run: Run) -> Path:
    _, place = run("sft", strategy="sft")
    return place


def test_dpo_goes_on_from_the_sft_adapter_and_is_held_to_a_frozen_copy(run: Run, sft: Path) -> None:
    """A reference that is the bare base model, or that moves with the policy, gives other figures."""
    summary, place = run("dpo", model_name=str(sft), lora_r=None)
    assert_starts_at_its_reference(place)
    plan = plan_of(place)
    assert plan["config"]["reference"] == "adapter" and plan["config"]["lora_r"] == 4
    assert any("the training of the adapter of sft (rank 4) continues" in note for note in plan["notes"])
    assert_reference_is(place, sft)
    assert judged_json(Request(str(place)), Console())["policy"] == summary["eval"]  # as the run itself judged it
    # The saved adapter is one, on the base model, as PEFT loads it; and it has moved on from the SFT adapter.
    assert sorted(file.name for file in (place / "adapter").iterdir() if file.is_dir()) == []
    before, after = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (sft, place))
    assert before.keys() == after.keys() and not all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("why", [{"lora_r": 2}, {"lora_r": None, "reference": "base"}])
def test_another_shape_is_trained_on_the_merged_model(run: Run, sft: Path, tiny_model_dir: Path, why: dict[str, Any]) -> None:
    summary, place = run("dpo", model_name=str(sft), max_steps=1, **why)
    assert_starts_at_its_reference(place)
    plan = plan_of(place)
    assert plan["config"]["reference"] == "base"
    assert any("is merged into its base model" in note for note in plan["notes"])
    assert judged_json(Request(str(place)), Console())["policy"] == summary["eval"]
    assert_reference_is(place, sft)
    config = json.loads((place / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(sft)  # not the bare model, on which it would answer otherwise
    # A third run on top stands on both: its reference is the second run's policy.
    _, third = run("third", model_name=str(place), lora_r=None, max_steps=1)
    assert_starts_at_its_reference(third)
    assert ModelSource.of(str(third)).foundation == str(tiny_model_dir)


@pytest.mark.parametrize(
    ("first", "second", "notes"),
    [
        ({"lora_r": 4}, {}, (f"stage 1 (rank 4) {FROZEN}", f"stage 2 (rank 4) {FROZEN}")),
        ({}, {"lora_r": 2}, (f"stage 1 {MERGED}, because lora_r 2 differs from its 16", f"stage 2 (rank 2) {FROZEN}")),
        ({"lora_r": 0}, {}, ("model of stage 1; it is also the reference", f"stage 2 (rank 16) {FROZEN}")),
    ],
)
def test_a_stage_says_its_reference_before_the_stage_before_has_run(
    first: dict[str, Any], second: dict[str, Any], notes: tuple[str, str], tiny_model_dir: Path, pairs_file: Callable[..., Path]
) -> None:
    """Those of stages 2 and 3; the values of the plan stay those of the model of stage 1, on which it is checked."""
    common = {"model_name": str(tiny_model_dir), "dataset": str(pairs_file()), "device": "cpu"}
    stages = load_stages({**common, "stages": [{"strategy": "sft", **first}, second, {}]})
    plans = [plan for loaded in stages if (plan := inspect(loaded.on_foundation(), probe()).plan) is not None]
    assert [plan.config.reference for plan in plans] == ["base", "base", "base"]
    said = [[note for note in plan.notes if "stage" in note or "reference" in note] for plan in plans]
    assert [len(of_stage) for of_stage in said] == [0, 1, 1]
    assert [wanted in note for (note,), wanted in zip(said[1:], notes, strict=True)] == [True, True]


def test_what_cannot_be_gone_on_from_is_told(run: Run, sft: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        run("dpo", model_name=str(sft), lora_r=2, reference="adapter")
    assert [problem.code for problem in caught.value.problems if problem.severity == "error"] == ["reference-adapter"]
    (sft / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(InvalidInput) as caught:
        run("dpo", model_name=str(sft), lora_r=None)
    assert "adapter-unusable" in [problem.code for problem in caught.value.problems]


def test_settings_belong_to_what_was_trained(run: Run, sft: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Another lora_alpha is another model, with the same weights: the run is refused, and what stands on it."""
    _, place = run("dpo", model_name=str(sft), lora_r=None, max_steps=1)
    whole = run("whole", lora_r=0, max_steps=1, learning_rate=1e-4)[1]

    def refused(folder: Path) -> bool:
        try:
            open_run(str(folder), None, Console())
        except InvalidInput as caught:
            assert [problem.code for problem in caught.problems] == ["adapter-changed"]
            return True
        return False

    def changed(file: Path, **values: Any) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")

    settings = sft / "adapter" / "adapter_config.json"
    before = settings.read_text(encoding="utf-8")
    changed(settings, peft_version="0.0", inference_mode=False)  # which compute nothing
    assert (refused(sft), refused(place), refused(whole)) == (False, False, False)
    changed(settings, lora_alpha=999)
    assert (refused(sft), refused(place), refused(whole)) == (True, True, False)
    settings.write_text(before, encoding="utf-8")
    changed(whole / "model" / "config.json", rms_norm_eps=0.5)
    assert (refused(sft), refused(place), refused(whole)) == (False, False, True)
    for folder in (sft, place):  # as versions before this wrote it
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        del manifest["trained"], manifest["model"]["settings"]
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert (refused(sft), refused(place)) == (False, False)


def test_an_adapter_of_another_tool_is_a_start(run: Run, sft: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    """A PEFT folder alone, which names its base model."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((sft / "adapter" / name).read_bytes())
    source = ModelSource.of(str(folder))
    assert source.adapter is not None and source.adapter.shape["lora_r"] == 4
    assert source.below is not None and source.below.name == str(tiny_model_dir)
    _, place = run("dpo", model_name=str(folder), lora_r=None, max_steps=1)
    assert_starts_at_its_reference(place)


def test_what_stands_on_itself_is_no_start(tmp_path: Path) -> None:
    """An adapter, two in a ring, and a run that continues itself; none of them is followed without end."""
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    for name, base in (("alone", "alone"), ("one", "two"), ("two", "one"), ("run/adapter", "run")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        written = json.dumps({**lora, "base_model_name_or_path": str(tmp_path / base)})
        (folder / "adapter_config.json").write_text(written, encoding="utf-8")
        (folder / "adapter_model.safetensors").write_bytes(b"")
    plan = {"config": {"model_name": str(tmp_path / "run"), "reference": "adapter"}}
    (tmp_path / "run/plan.json").write_text(json.dumps(plan), encoding="utf-8")
    (tmp_path / "run/metrics.json").write_text("{}", encoding="utf-8")
    for name in ("alone", "one", "run"):
        (problem,) = problems(ModelSource.of(str(tmp_path / name)))
        assert problem.code == "adapter-unusable" and "is its own base model" in problem.message
        assert ModelSource.of(str(tmp_path / name)).foundation


@pytest.mark.parametrize("strategy", ["dpo", "sft"])
def test_every_weight_is_trained_when_the_rank_is_0(run: Run, strategy: str, tiny_model_dir: Path) -> None:
    summary, place = run("whole", strategy=strategy, lora_r=0, learning_rate=1e-3)
    if strategy == "dpo":
        assert_starts_at_its_reference(place)
    assert not (place / "adapter").exists()
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model_dir, place / "model"))
    assert all(not torch.equal(before[name], after[name]) for name in before if "norm" not in name)
    assert judged_json(Request(str(place)), Console())["policy"] == summary["eval"]
    _, on_top = run("on-top", model_name=str(place), max_steps=1)
    assert_starts_at_its_reference(on_top)


def test_4bit_goes_on_from_a_4bit_adapter(run: Run) -> None:
    _, place = run("sft", strategy="sft", use_4bit=True, bf16=True)
    _, on_top = run("dpo", model_name=str(place), use_4bit=True, bf16=True, lora_r=None, max_steps=1)
    assert plan_of(on_top)["config"]["reference"] == "adapter"
    assert_starts_at_its_reference(on_top)
    assert_reference_is(on_top, place, within=1e-2)


def test_an_adapter_is_not_lost_in_4bit_weights(run: Run) -> None:
    """bitsandbytes' steps are larger than what an adapter adds: merged into quantised weights, it would be gone."""
    _, place = run("sft", strategy="sft", use_4bit=True, learning_rate=1e-2, max_steps=10)
    _, on_top = run("dpo", model_name=str(place), use_4bit=True, lora_r=2, max_steps=1)
    assert plan_of(on_top)["config"]["reference"] == "base"
    assert_starts_at_its_reference(on_top)
    pairs = str(place.parent / "pairs.jsonl")
    (of_sft, plan), (of_dpo, _) = (
        load_policy(open_run(str(folder), pairs, Console()), Console()) for folder in (place, on_top)
    )
    opened = open_run(str(on_top), pairs, Console())
    theirs, ours = (score(policy, opened.rows, opened.tokenizer, plan) for policy in (of_sft, of_dpo))
    to_sft, to_base = (np.abs(ours.reference - scores).mean() for scores in (theirs.policy, theirs.reference))
    assert to_sft < 0.7 * to_base


def test_a_frozen_adapter_has_no_dropout(run: Run, sft: Path) -> None:
    """With dropout in the reference, no two passes of it would agree; the policy's own acts."""
    _, place = run("dpo", model_name=str(sft), lora_r=None, lora_dropout=0.3, max_steps=1)
    line = first_line(place)
    assert line["reward_chosen"] != 0
    policy, plan = load_policy(open_run(str(place), None, Console()), Console())
    opened = open_run(str(place), None, Console())
    first, again = (score(policy, opened.rows, opened.tokenizer, plan).reference for _ in range(2))
    assert np.array_equal(first, again)


def test_sft_on_sft_is_judged_alike_by_run_and_eval(run: Run, sft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert capsys.readouterr().out.count("base: the model with the adapter") == 0
    summary, place = run("more", strategy="sft", model_name=str(sft), lora_r=None)
    judged = judged_json(Request(str(place)), Console())
    assert capsys.readouterr().out.count("base: the model with the adapter sft, from which") == 2
    assert (judged["policy"], judged["base"]) == (summary["eval"], summary["base"])


def test_an_evaluation_of_a_run_has_the_room_of_its_training(sft: Path) -> None:
    """By the run's own bill, and not by one without its lengths: the same prompts are answered at once, with the same draws."""
    plan = open_run(str(sft), None, Console()).plan
    kept = plan_of(sft)["memory"]["components"]
    assert plan.model.facts is not None and plan.memory is not None
    assert plan.evaluation_room(4) == evaluation_room(plan.model.facts, (kept["activations"] + kept["scoring"]) * GIB, 4)
    assert replace(plan, freed_gb=1.0).evaluation_room(4) != plan.evaluation_room(4)


def test_a_run_below_that_changed_is_told(run: Run, sft: Path) -> None:
    _, place = run("dpo", model_name=str(sft), lora_r=2, max_steps=1)
    run("sft", strategy="sft", seed=1)
    with pytest.raises(InvalidInput, match="which has changed or is missing"):
        judged_json(Request(str(place)), Console())
    (sft / "metrics.json").unlink()  # as in a run that was replaced and died
    with pytest.raises(InvalidInput) as caught:
        run("third", model_name=str(sft), lora_r=None)
    assert "adapter-unusable" in [problem.code for problem in caught.value.problems]


def test_a_run_is_not_written_over_what_it_stands_on(run: Run, sft: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        run("sft", model_name=str(sft / "adapter"), lora_r=None)
    assert [problem.code for problem in caught.value.problems if problem.severity == "error"] == ["output-is-input"]
    assert (sft / "metrics.json").is_file()


def test_stages_train_one_on_the_other(tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path]) -> None:
    config = tmp_path / "two.json"
    common = {"dataset": str(pairs_file()), "device": "cpu", "bf16": False, "fp16": False, "eval_split": 0.3, "lora_r": 4}
    stages = [{"strategy": "sft", "learning_rate": 1e-2}, {"strategy": "dpo", "reference": "adapter"}]
    config.write_text(json.dumps({**common, "model_name": "/no/model", "stages": stages}), encoding="utf-8")
    place = tmp_path / "both"
    words = ["train", str(config), f"model_name={tiny_model_dir}", f"output_dir={place}", "max_steps=2", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert [Path(stage["run_dir"]).name for stage in told["stages"]] == ["1-sft", "2-dpo"]
    assert_starts_at_its_reference(place / "2-dpo")
    assert plan_of(place / "2-dpo")["config"]["model_name"] == str(place / "1-sft")
    assert CliRunner().invoke(app, [*words[:-1], "strategy=dpo"]).exit_code == Exit.USAGE
    again = CliRunner().invoke(app, words)
    assert (again.exit_code, "already holds a run" in again.stderr) == (Exit.INVALID, True)

    # Resumed with another length, the finished first stage would be trained further below the second: nothing is touched.
    before = plan_of(place / "1-sft")
    longer = [word.replace("max_steps=2", "max_steps=3") for word in words]
    refused = CliRunner().invoke(app, [*longer, "--resume"])
    assert refused.exit_code == Exit.INVALID and f"{place / '2-dpo'} started from its adapter" in refused.stderr
    assert plan_of(place / "1-sft") == before
    assert CliRunner().invoke(app, [*words, "--resume"]).exit_code == 0
    planned = CliRunner().invoke(app, [*words, "--resume", "--dry-run"])
    assert planned.exit_code == 0 and planned.stderr.count("the run is finished") == 2, planned.stderr

    # Without the second run it may be; then the second starts on the new adapter.
    shutil.rmtree(place / "2-dpo")
    assert CliRunner().invoke(app, [*longer, "--resume"]).exit_code == 0
    assert json.loads((place / "1-sft" / "metrics.json").read_text(encoding="utf-8"))["steps"] == 3


def test_a_stage_says_that_its_start_has_changed(tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path]) -> None:
    config, place = tmp_path / "two.json", tmp_path / "both"
    common = {"dataset": str(pairs_file()), "device": "cpu", "bf16": False, "fp16": False, "lora_r": 4, "max_steps": 1}
    stages = [{"strategy": "sft", "learning_rate": 1e-2}, {"strategy": "dpo"}]
    whole = {**common, "model_name": str(tiny_model_dir), "output_dir": str(place), "stages": stages}
    config.write_text(json.dumps(whole), encoding="utf-8")
    assert CliRunner().invoke(app, ["train", str(config)]).exit_code == 0
    shutil.rmtree(place / "1-sft")
    refused = CliRunner().invoke(app, ["train", str(config), "--resume", "seed=1"])
    assert refused.exit_code == Exit.INVALID
    assert "the adapter of stage 1, from which this stage started, has changed since" in refused.stderr
    assert f"delete {place / '2-dpo'} and resume" in refused.stderr.replace("\n", " ").replace("  ", " ")


def test_a_value_on_the_command_line_is_for_the_stages_that_use_it(tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    common = {"model_name": "org/model", "dataset": "pairs.jsonl"}
    path.write_text(json.dumps({**common, "stages": [{"strategy": "sft"}, {"strategy": "dpo"}]}), encoding="utf-8")
    sft, dpo = load_stages(str(path), ["kl_prompts=3", "max_steps=5"])
    assert ("kl_prompts" in sft.values and sft.values["kl_prompts"] == 3, dpo.values["kl_prompts"]) == (False, 3)
    assert (sft.values["max_steps"], dpo.values["max_steps"]) == (5, 5)
    assert "other-strategy" not in [problem.code for loaded in (sft, dpo) for problem in loaded.problems]
    path.write_text(json.dumps({**common, "stages": [{"strategy": "sft"}, {"strategy": "sft"}]}), encoding="utf-8")
    for loaded in load_stages(str(path), ["kl_prompts=3"]):  # of no use to any stage: it is not ignored in silence
        assert "other-strategy" in [problem.code for problem in loaded.problems]
