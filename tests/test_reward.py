"""A reward model: TRL's loss on rewards of our layout, its figures, the run that it leaves, and what it is used for."""

from __future__ import annotations

import inspect
import json
import math
import random
import signal
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import WORDS, norms_in_float64
from conftest import ROOT, Run, made_row, tiny_model
from fork_server import dpo
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from test_dpo import make_plan
from test_shared_prompts import BATCHES, FAMILIES, collate
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from dpo_cli.config.config import load, load_stages
from dpo_cli.data.encoded import Encoded, EncodedRows
from dpo_cli.data.rows import Question, to_pair
from dpo_cli.data.tokens import encode
from dpo_cli.errors import Exit, InvalidInput, RunFailed, invalid
from dpo_cli.evaluation.bootstrap import Intervals, value_of
from dpo_cli.evaluation.generation import Answer
from dpo_cli.evaluation.metrics import Rewards, figures
from dpo_cli.preferences.ranking import Reward, ranking
from dpo_cli.providers.architecture import lora_config
from dpo_cli.providers.classifier import HEAD, as_classifier, on_meta
from dpo_cli.runs.reward_run import RewardModel
from dpo_cli.scoring import score_head, shared_prompts
from dpo_cli.scoring.forward import choose
from dpo_cli.training.callbacks.health_rules import chance_level
from dpo_cli.training.reward_trainer import FIGURES, RewardModelTrainer, build_trainer, trainer_arguments

NONE = EncodedRows.of([])  # held out
DAY = date(2026, 11, 30)
TIMED = ("tokens_per_second", "peak_memory_gb")


def planted(count: int = 160, seed: int = 0) -> list[dict[str, object]]:
    """Pairs of random words over half as many prompts; what ends a response says which one is preferred."""
    draw, words = random.Random(seed), WORDS.split()

    def text(end: str) -> str:
        return f"{' '.join(draw.choices(words, k=draw.randint(3, 9)))} {end}"

    return [{"prompt": f"question {i // 2}", "chosen": text("the cat sat"), "rejected": text("no dog")} for i in range(count)]


def classifier(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The reward model on the tiny model of a family; its head is in this dtype too."""
    return as_classifier(tiny_model(family, dtype), 3, 2, family).to(dtype)


# --- the loss, the layout, the head


def test_trl_contract() -> None:
    """What the seam overrides exists, and TRL gives the model all columns of a micro-batch, and makes a mean of its loss."""
    source = inspect.getsource(RewardTrainer.compute_loss)
    assert list(inspect.signature(RewardTrainer.compute_loss).parameters)[1:4] == ["model", "inputs", "return_outputs"]
    assert source.count("outputs = model(**inputs)") == 1
    assert source.count("torch.chunk(outputs.logits.squeeze(-1), chunks=2)") == 1
    assert source.count("loss = -nn.functional.logsigmoid(rewards_chosen - rewards_rejected).mean()") == 1
    assert "return (loss, outputs) if return_outputs else loss" in source
    assert 'self._metrics[mode]["accuracy"]' in source  # a name of dpo's, so TRL's average is dropped
    assert "dataset_name" in inspect.signature(RewardTrainer._prepare_dataset).parameters


def make_trainer(
    place: Path, tokenizer: PreTrainedTokenizerFast, family: str = "llama", shared: bool = True, **options: object
) -> tuple[RewardModelTrainer, list[Encoded]]:
    pairs = encode([to_pair(row, i + 1) for i, row in enumerate(planted(8))], tokenizer)
    plan = make_plan(place, strategy="reward", prompt_sharing=shared, lora_r=4, **options)
    model = classifier(family)
    shared_prompts.enable(model)
    return build_trainer(model, lora_config(plan.config), tokenizer, plan, pairs, NONE, lambda model: {}), pairs


def losses_of(trainer: RewardTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("shared", [True, False])
def test_losses_are_those_of_trl(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str, shared: bool) -> None:
    """Plain TRL on padded rows of the same ids: the loss of each of ten steps, and the trained head."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 10, "learning_rate": 5e-3}
    ours, pairs = make_trainer(tmp_path, tokenizer, family, shared, **options)
    plan = make_plan(tmp_path, strategy="reward", lora_r=4, **options)
    arguments = trainer_arguments(plan)
    arguments.logging_strategy, arguments.logging_steps, arguments.remove_unused_columns = "steps", 1, True
    rows = [
        {"chosen_ids": pair.prompt_ids + pair.chosen_ids, "rejected_ids": pair.prompt_ids + pair.rejected_ids} for pair in pairs
    ]
    theirs = RewardTrainer(
        model=classifier(family),
        args=arguments,
        data_collator=DataCollatorForPreference(2),
        train_dataset=type(ours.train_dataset).from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(plan.config),
    )
    ours.train()
    theirs.train()
    assert losses_of(ours) == pytest.approx(losses_of(theirs), abs=1e-5)
    assert losses_of(ours)[-1] < losses_of(ours)[0] - 1e-3
    heads = [trainer.model.get_base_model().get_submodule(HEAD).weight for trainer in (ours, theirs)]
    torch.testing.assert_close(*heads, rtol=1e-4, atol=1e-5)


def test_a_step_is_the_same_for_every_division(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Eight pairs of other lengths, in rows of any size."""
    updates = []
    for budget in (1, 60, 4096):
        trainer, _ = make_trainer(tmp_path, tokenizer)
        trainer.model.double()
        norms_in_float64(trainer.model)
        trainer.row_budget = budget
        batches, size = trainer.get_batch_samples(iter([trainer.data_collator([*trainer.train_dataset])]), 1, "cpu")
        assert size == 8
        loss = trainer.training_step(trainer.model, batches[0], size)
        assert float(loss) == pytest.approx(trainer.totals.of_step()["loss"], rel=1e-9)
        updates.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert updates[0].norm() > 1e-3
    assert all((update - updates[0]).norm() < 1e-9 * updates[0].norm() for update in updates)


@pytest.mark.parametrize("name", [name for name in BATCHES if "no prompt" not in name])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_rewards_and_gradients_are_those_of_padded_rows(family: str, name: str) -> None:
    batch, results = collate(BATCHES[name]), []
    for shared in (False, True):
        model = classifier(family, torch.float64)
        norms_in_float64(model)
        if shared:
            shared_prompts.enable(model)
        rewards = score_head.rewards(model, shared, **batch)
        (rewards * torch.arange(1, len(rewards) + 1)).sum().backward()
        results.append((rewards.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (plain, gradients), (once, others) = results
    torch.testing.assert_close(once, plain, rtol=0, atol=1e-9)
    assert gradients.keys() == others.keys()
    assert all((others[name] - grad).norm() <= 1e-9 * max(1, grad.norm()) for name, grad in gradients.items())
    model = classifier(family, torch.float64)
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(plain, own, rtol=0, atol=1e-6)  # with the norms of transformers


def test_the_rewarded_token_by_hand() -> None:
    """Padding is 2, which also ends a response: as transformers does, the last other token is read."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 2, 2], [5, 2, 2, 2], [5, 2, 6, 2]])
    assert score_head.last_tokens(classifier("llama"), ids).tolist() == [3, 1, 0, 2]


def test_the_head_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one, same, other = (as_classifier(tiny_model("llama", torch.bfloat16), seed, 2, "m") for seed in (3, 3, 4))
    heads = [model.get_submodule(HEAD).weight for model in (one, same, other)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert (heads[0].dtype, heads[0].shape) == (torch.float32, (1, 32))
    assert one.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert one.get_output_embeddings() is None and one.config.num_labels == 1


def test_a_family_without_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        on_meta(tiny_model("granite").config, "granite")
    assert [problem.code for problem in caught.value.problems] == ["model-no-classifier"]


def test_a_model_that_scores_otherwise_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """A family whose classifier would read another token."""
    pairs = encode([to_pair(made_row(0), 1)], tokenizer)
    model = classifier("llama")
    assert choose(model, [*pairs], 2, "auto").shared
    plain = type(model).forward
    model.forward = lambda **inputs: plain(model, **{**inputs, "input_ids": inputs["input_ids"].flip(1)})
    with pytest.raises(RunFailed, match="rewards differ"):
        choose(model, [*pairs], 2, "auto")


# --- the figures


def test_figures_by_hand() -> None:
    """Four pairs, margins 1, -1, 0 and 3, each of its own prompt.

    accuracy: (1 + 0 + 1/2 + 1) / 4 = 0.625; margin: 3/4; loss: mean of ln(1 + e^-m) = (0.3133 + 1.3133 + 0.6931 + 0.0486) / 4
    confidence: s(1) = 0.7311 twice (bin of 0.70 to 0.75), 0.5 (first bin), s(3) = 0.9526 (last bin)
    calibration error: (|1 + 0 - 2 * 0.7311| + |0.5 - 0.5| + |1 - 0.9526|) / 4 = (0.4621 + 0 + 0.0474) / 4
    """
    rewards = Rewards(np.array([[2.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, -2.0]]))
    sides = figures(rewards, ["a", "b", "c", "d"], beta=0.1)
    assert sides.base == sides.gain == {}
    values = {name: figure.value for name, figure in sides.policy.items() if figure is not None}
    assert values.keys() == {"accuracy", "margin", "loss", "calibration_error"}
    confidence = [1 / (1 + math.exp(-size)) for size in (1, 3)]
    assert (values["accuracy"], values["margin"]) == (0.625, 0.75)
    assert values["loss"] == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in (1, -1, 0, 3)) / 4)
    expected = (abs(1 - 2 * confidence[0]) + (1 - confidence[1])) / 4
    assert values["calibration_error"] == pytest.approx(expected)
    assert FIGURES == ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected")


def test_a_calibrated_model_has_no_error() -> None:
    """Of 1000 pairs at each margin the share that sigmoid(margin) says is right; chance alone is left."""
    draw, margins = np.random.default_rng(0), np.repeat([0.1, 0.5, 1.0, 2.0, 3.0], 1000)
    right = draw.random(len(margins)) < 1 / (1 + np.exp(-margins))
    signed = np.where(right, margins, -margins)
    sides = figures(Rewards(np.stack([signed, np.zeros_like(signed)], axis=1)), [str(i) for i in range(len(signed))], 1.0)
    assert sides.policy["calibration_error"].value < 0.02
    sure = figures(Rewards(np.stack([5 * signed, np.zeros_like(signed)], axis=1)), ["p"] * len(signed), 1.0)
    assert sure.policy["calibration_error"].value > 0.1


def test_bins_are_resampled_by_prompt() -> None:
    """The bootstrap of |sums of bins| is that of a loop over the same draws."""
    draw = np.random.default_rng(1)
    above, below, prompts = draw.normal(size=(60, 3)), np.ones(60), [str(i // 2) for i in range(60)]
    interval, of_prompts = Intervals(prompts), above.reshape(30, 2, 3).sum(axis=1)  # (prompts, bins)
    made, order = interval.of((above, below)), np.unique(np.array(prompts[::2]), return_index=True)[1]
    sums = [
        np.abs(sum(weight * of_prompts[place] for weight, place in zip(drawn, order, strict=True))).sum() / (2 * drawn.sum())
        for draws in interval._draw()
        for drawn in draws
    ]
    assert (made.low, made.high) == pytest.approx(tuple(np.percentile(sums, [2.5, 97.5])))
    assert made.value == value_of((above, below)) == pytest.approx(np.abs(above.sum(axis=0)).sum() / 60)


# --- a run


OPTIONS: dict[str, object] = {"strategy": "reward", "eval_split": 0.4, "max_steps": 12}


@pytest.fixture
def rows_file(tmp_path: Path) -> str:
    path = tmp_path / "planted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in planted()), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("seed", range(5))
def test_it_learns_to_rank(run: Run, rows_file: str, seed: int) -> None:
    summary, place = run(**OPTIONS, dataset=rows_file, seed=seed)
    assert summary["eval"]["accuracy"]["low"] > 0.5
    assert summary["eval"]["loss"]["value"] < math.log(2)
    assert (summary["base"], summary["gain"], summary["health"]) == ({}, {}, [])
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[-1]["accuracy_low"] == summary["eval"]["accuracy"]["low"]
    assert lines[-1]["accuracy"] == pytest.approx(summary["eval"]["accuracy"]["value"])
    assert "Better than chance" in (place / "report.html").read_text(encoding="utf-8")


def test_an_adapter_that_peft_alone_loads(run: Run, rows_file: str) -> None:
    """The adapter folder has the layers and the head; stock PEFT gives the rewards of the evaluation."""
    _, place = run(**OPTIONS, dataset=rows_file)
    written = json.loads((place / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (written["task_type"], written["modules_to_save"]) == ("SEQ_CLS", [HEAD])
    weights = load_file(place / "adapter" / "adapter_model.safetensors")
    assert [name for name in weights if "lora_" not in name] == [f"base_model.model.{HEAD}.weight"]
    tokenizer = AutoTokenizer.from_pretrained(place / "adapter")
    model = AutoPeftModelForSequenceClassification.from_pretrained(place / "adapter", num_labels=1, pad_token_id=2).eval()
    rows, judged = planted(), json.loads((place / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    for row in judged[:4]:
        pair = rows[row["line"] - 1]
        for name in ("chosen", "rejected"):
            said = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[name]}]
            ids = tokenizer.apply_chat_template(said, return_tensors="pt", return_dict=True)
            with torch.no_grad():
                assert model(**ids).logits.item() == pytest.approx(row[f"reward_{name}"], abs=1e-5)


def test_it_ranks_answers_as_its_evaluation_does(run: Run, rows_file: str) -> None:
    """By the run and by its adapter folder, each answer by itself; and what `augment` is given ranks with it."""
    _, place = run(**OPTIONS, dataset=rows_file)
    rows, judged = planted(), json.loads((place / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    rank = ranking({"rank": "reward", "pattern": None, "reward_model": str(place)}, "cpu", torch.float32, DAY)
    for reward in (
        Reward(str(place), "cpu", torch.float32, DAY),
        Reward(str(place / "adapter"), "cpu", torch.float32, DAY),
        rank,
    ):
        for row in judged[:6]:
            pair = rows[row["line"] - 1]
            question = Question(str(pair["prompt"]), None, 1)
            answers = [Answer(str(pair[name]), 3, True) for name in ("chosen", "rejected")]
            assert reward(question, answers) == pytest.approx([row["reward_chosen"], row["reward_rejected"]], abs=1e-5)
            assert [*reward(question, answers[:1]), *reward(question, answers[1:])] == reward(question, answers)
            as_messages = Question([{"role": "user", "content": pair["prompt"]}], None, 1)
            assert reward(as_messages, answers) == reward(question, answers)
    assert all(map(math.isfinite, rank(question, [Answer("", 0, True)])))


def test_rewards_of_a_run_that_is_not_one_are_refused(run: Run, rows_file: str) -> None:
    _, place = run(**OPTIONS, dataset=rows_file)
    (place / "metrics.json").rename(place / "aside.json")
    with pytest.raises(InvalidInput, match="not finished"):
        Reward(str(place), "cpu", torch.float32, DAY)
    (place / "aside.json").rename(place / "metrics.json")
    plan = json.loads((place / "plan.json").read_text(encoding="utf-8"))
    plan["config"]["strategy"] = "dpo"
    (place / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises((InvalidInput, RunFailed)):
        Reward(str(place), "cpu", torch.float32, DAY)


def test_it_starts_from_a_trained_adapter(run: Run, rows_file: str, tmp_path: Path) -> None:
    """After SFT: the adapter is merged below a fresh one, and the reward model is on the result."""
    summary, _ = run(strategy="sft", dataset=rows_file, output_dir=str(tmp_path / "sft"))
    assert summary["status"] == "completed"
    _, place = run(**OPTIONS, dataset=rows_file, model_name=str(tmp_path / "sft"), output_dir=str(tmp_path / "run"))
    plan = json.loads((place / "plan.json").read_text(encoding="utf-8"))
    assert plan["config"]["reference"] == "base" and any("another head" in note for note in plan["notes"])
    judged = json.loads((place / "evaluation.json").read_text(encoding="utf-8"))["rows"][0]
    pair = planted()[judged["line"] - 1]
    scores = Reward(str(place), "cpu", torch.float32, DAY)(
        Question(str(pair["prompt"]), None, 1), [Answer(str(pair["chosen"]), 3, True)]
    )
    assert scores == pytest.approx([judged["reward_chosen"]], abs=1e-5)


def test_an_answer_that_is_no_row_has_a_reward(run: Run, rows_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty answer is EOS after the generation prompt; one that the template cannot render has its own tokens before it."""
    _, place = run(**OPTIONS, dataset=rows_file)
    model = RewardModel.of_run(place, "cpu", torch.float32)
    tokenizer, question = model.encoder.tokenizer, Question("hi", None, 1)
    start, end = tokenizer.encode("<|im_start|>assistant\n", False), tokenizer.encode(tokenizer.eos, False)
    for text in ("", " \n"):
        row = model._encoded(question, text)
        assert row.prompt_ids[-len(start) :] == start and row.responses == ([*tokenizer.encode(text, False), *end],)

    def refused(*_: object) -> object:
        raise invalid("nothing", "the template renders nothing", None)

    whole = model._encoded(question, "the cat")
    monkeypatch.setattr("dpo_cli.runs.reward_run.encode_all", refused)
    row = model._encoded(question, "the cat")
    assert row.prompt_ids == whole.prompt_ids and row.responses[0] == whole.responses[0][: len(row.responses[0])]
    (score,) = model(question, ["the cat"])
    assert math.isfinite(score)


def test_guesses_are_reported(run: Run, tmp_path: Path) -> None:
    """Labels by a coin: the rule warns, and the verdict says so."""
    draw, rows = random.Random(0), planted()
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} if draw.random() < 0.5 else row for row in rows]
    path = tmp_path / "coin.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in swapped), encoding="utf-8")
    summary, place = run(**{**OPTIONS, "max_steps": 3}, dataset=str(path), learning_rate=1e-5)
    assert [(event["rule"], event["action"]) for event in summary["health"]] == [("chance-level", "warn")]
    assert "No better than chance" in (place / "report.html").read_text(encoding="utf-8")
    assert chance_level.__doc__


def test_the_commands(run: Run, rows_file: str, tmp_path: Path) -> None:
    """eval with limits, also on another file; report; export and vote are refused."""
    summary, place = run(**OPTIONS, dataset=rows_file)
    done = dpo("eval", place, "--again", "--fail-under", "accuracy=0.6,calibration_error<0.9", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["policy"] == summary["eval"]
    assert dpo("eval", place, "--fail-under", "accuracy=1.1").returncode == int(Exit.MISSED)
    other = json.loads(dpo("eval", place, "--dataset", rows_file, "--json").stdout)
    assert other["pairs"] == 160 and other["policy"].keys() == summary["eval"].keys()
    adapter = dpo("eval", tmp_path / "config.json", "--adapter", place / "adapter", "--json")
    assert json.loads(adapter.stdout)["policy"] == summary["eval"]
    assert dpo("report", place).returncode == 0
    for words in (("export", place, "--out", tmp_path / "out"), ("vote", place), ("eval", place, "--side-by-side", "2")):
        refused = dpo(*words, "--json")
        assert refused.returncode == int(Exit.INVALID)
        assert [problem["code"] for problem in json.loads(refused.stdout)["problems"]] == ["run-of-rewards"]
    assert not (tmp_path / "out").exists()
    trained = dpo("train", tmp_path / "config.json", f"model_name={place}", f"output_dir={tmp_path / 'next'}", "--json")
    assert trained.returncode == int(Exit.INVALID)
    assert [problem["code"] for problem in json.loads(trained.stdout)["problems"] if problem["severity"] == "error"] == [
        "adapter-unusable"
    ]


KILLED = """
import json, os, signal, sys
from dpo_cli.__main__ import main
from dpo_cli.storage.run_directory import RunDirectory

append = RunDirectory.append_line

def line(self, line):
    append(self, line)
    if line["step"] == 7:
        os.kill(os.getpid(), signal.SIGKILL)

RunDirectory.append_line = line
sys.argv = ["dpo", *sys.argv[1:]]
main()
"""


def test_a_killed_training_goes_on_to_the_same_bytes(run: Run, rows_file: str, tmp_path: Path) -> None:
    summary, place = run(**OPTIONS, dataset=rows_file, save_steps=5, eval_steps=5)
    there = ("train", tmp_path / "config.json", f"output_dir={tmp_path / 'killed'}")
    process = subprocess.run([sys.executable, "-c", KILLED, *map(str, there)], cwd=ROOT, capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    done = dpo(*there, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapter_sha256"] == summary["adapter_sha256"]
    assert json.loads((tmp_path / "killed" / "manifest.json").read_text(encoding="utf-8"))["resumed"] == [5]

    def lines(folder: Path) -> list[dict[str, Any]]:
        written = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [{key: value for key, value in line.items() if key not in TIMED} for line in written]

    assert lines(tmp_path / "killed") == lines(place)


# --- stages


def stages_of(tmp_path: Path, *words: str, **values: object) -> list[dict[str, Any]]:
    path = tmp_path / "my.json"
    path.write_text(json.dumps({"dataset": "d.jsonl", "model_name": "owner/model", **values}), encoding="utf-8")
    return [{**loaded.values, "loaded": loaded} for loaded in load_stages(str(path), words)]


def test_rlhf_without_a_reward_model_is_two_stages(tmp_path: Path) -> None:
    for words, values in (((), {"strategy": "rlhf"}), (("strategy=rlhf",), {})):
        reward, rlhf = stages_of(tmp_path, *words, **values, beta=0.2, lora_r=32, output_dir="runs/x")
        assert [stage["strategy"] for stage in (reward, rlhf)] == ["reward", "rlhf"]
        assert [stage["output_dir"] for stage in (reward, rlhf)] == ["runs/x/1-reward", "runs/x/2-rlhf"]
        assert [stage["model_name"] for stage in (reward, rlhf)] == ["owner/model"] * 2
        assert (reward["reward_model"], rlhf["reward_model"]) == (None, "runs/x/1-reward")
        assert (rlhf["beta"], reward["lora_r"], rlhf["lora_r"]) == (0.2, 32, 32)
        assert (reward["learning_rate"], rlhf["learning_rate"]) == (1e-4, 1.41e-5)
        assert rlhf["loaded"].before is None and rlhf["loaded"].rewarded_by.values["strategy"] == "reward"
        problems = [problem for stage in (reward, rlhf) for problem in stage["loaded"].problems]
        assert {problem.code for problem in problems if problem.severity == "error"} == set()
    stages_of(tmp_path, strategy="rlhf")
    assert load(str(tmp_path / "my.json")).values["strategy"] == "rlhf"  # what `dpo augment` reads is that of the policy
    named = stages_of(tmp_path, strategy="rlhf", reward_model="owner/reward")
    assert [stage["reward_model"] for stage in named] == ["owner/reward"]
    assert len(stages_of(tmp_path, "reward_model=owner/reward", strategy="rlhf")) == 1
    moved = stages_of(tmp_path, "model_name=owner/other", "beta=0.3", strategy="rlhf")
    assert [(stage["model_name"], stage["beta"]) for stage in moved] == [("owner/other", 0.1), ("owner/other", 0.3)]


def test_a_reward_stage_trains_no_policy(tmp_path: Path) -> None:
    """SFT, reward, rlhf: both later ones start from SFT's run, and the last is rewarded by the second."""
    kinds = [{"strategy": name} for name in ("sft", "reward", "rlhf")]
    sft, reward, rlhf = stages_of(tmp_path, stages=kinds)
    assert [stage["model_name"] for stage in (sft, reward, rlhf)] == ["owner/model", "runs/my/1-sft", "runs/my/1-sft"]
    assert rlhf["reward_model"] == "runs/my/2-reward"
    assert [stage["loaded"].foundation for stage in (sft, reward, rlhf)] == [None, "owner/model", "owner/model"]
    assert [stage["loaded"].before and stage["loaded"].before.values["strategy"] for stage in (reward, rlhf)] == ["sft"] * 2
    *_, named = stages_of(tmp_path, stages=[*kinds[:2], {"strategy": "rlhf", "reward_model": "owner/reward"}])
    assert named["reward_model"] == "owner/reward" and named["loaded"].rewarded_by is None
    own = stages_of(tmp_path, stages=[{"strategy": "reward", "model_name": "owner/small"}, {"strategy": "rlhf"}])
    assert [stage["model_name"] for stage in own] == ["owner/small"] * 2
    sft, dpo_stage = stages_of(tmp_path, stages=[{"strategy": "sft"}, {"strategy": "dpo"}])
    assert (dpo_stage["model_name"], dpo_stage["reward_model"]) == ("runs/my/1-sft", None)
