"""Reinforcement learning on sampled answers: TRL's losses on dpo's samples, rewards, resume, and what can go wrong."""

from __future__ import annotations

import inspect as inspect_
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, tiny_model
from fork_server import dpo
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import GRPOTrainer, RLOOTrainer

from dpo_cli.commands.train import train
from dpo_cli.config.config import load
from dpo_cli.data.dataset import is_held_out_prompt
from dpo_cli.data.rows import Question
from dpo_cli.errors import Exit, InvalidInput, RunFailed
from dpo_cli.evaluation import generation
from dpo_cli.evaluation.generation import Answer
from dpo_cli.hardware.machine import probe
from dpo_cli.plan.preflight import inspect
from dpo_cli.preferences.rewards import SummedRewards
from dpo_cli.storage.digests import sha256_of_all
from dpo_cli.training import policy_trainer
from dpo_cli.training.policy_trainer import GroupSampler, SampleRewards, rows_of
from dpo_cli.ui.console import Console

RLHF = {"strategy": "rlhf", "eval_split": 0.2, "max_seq_length": 64, "num_generations": 4}
SHORTER = {**RLHF, "reward_functions": ["shorter"]}


@pytest.fixture(scope="session")
def ending_model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny model whose answers often end: the weights of its end token are larger, so samples differ in length."""
    place, model = tmp_path_factory.mktemp("ending"), tiny_model("llama", torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 4
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def rlhf(run: Run, ending_model_dir: Path) -> Run:
    """Trains with rlhf and these options; answers have at most 12 tokens."""

    def start(**options: object) -> tuple[dict[str, Any], Path]:
        return run(**{**SHORTER, "model_name": str(ending_model_dir), "max_new_tokens": 12, **options})

    return start


def lines(run_dir: Path, split: str) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in read if line["split"] == split]


def test_a_row_that_is_out_of_memory_is_divided(
    rlhf: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first row of three samples or more fails once: the step is the same, and later rows are smaller."""
    whole = lines(rlhf(max_steps=1, per_device_train_batch_size=8)[1], "train")[0]
    compute, failed = policy_trainer.SampledTrainer.compute_loss, []

    def fails(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        if self.samples is not None and len(inputs["advantages"]) > 2 and not failed:
            failed.append(len(inputs["advantages"]))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, model, inputs, *rest, **named)

    monkeypatch.setattr(policy_trainer.SampledTrainer, "compute_loss", fails)
    apart = lines(rlhf(max_steps=1, per_device_train_batch_size=8)[1], "train")[0]
    assert failed and "out of memory with" in capsys.readouterr().out
    for name in ("loss", "grad_norm", "reward", "kl_sampled"):
        assert apart[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("base", [RLOOTrainer, GRPOTrainer])
def test_the_seam_is_as_it_was(base: type) -> None:
    """The methods that are overridden, with the arguments that they get."""
    batch = [*inspect_.signature(base._get_per_token_logps_and_entropies).parameters]  # type: ignore[attr-defined]
    assert batch[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    turn = [*inspect_.signature(base._generate_single_turn).parameters]  # type: ignore[attr-defined]
    assert turn[:4] == ["self", "prompt_ids", "images", "multimodal_fields"]
    for name in ("_prepare_inputs", "_get_train_sampler", "_tokenize_prompts", "compute_loss", "log", "training_step"):
        assert name in vars(base), name
    source = inspect_.getsource(base._generate_and_score_completions)  # type: ignore[attr-defined]
    old, reference = source.index("old_per_token_logps"), source.index("ref_per_token_logps, _, _ =")
    assert old < reference < source.index("self._calculate_rewards(")  # the last log-probs are those of the reference


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_a_run_has_every_file_and_figure(rlhf: Run, algorithm: str) -> None:
    summary, run_dir = rlhf(rl_algorithm=algorithm)
    assert summary["status"] == "completed"
    assert {"adapter", "plan.json", "metrics.json", "evaluation.json", "report.html"} <= {
        path.name for path in run_dir.iterdir()
    }
    first, last = lines(run_dir, "train")
    assert first["kl_sampled"] == pytest.approx(0, abs=1e-5)  # the policy is its reference
    assert last["kl_sampled"] != 0
    assert first["sample_tokens"] == -first["reward"] > 0
    (held_out,) = lines(run_dir, "eval")
    assert held_out["reward"] <= 0
    reward = {side: summary[side]["answer_reward"] for side in ("eval", "base", "gain")}
    assert reward["gain"]["value"] == pytest.approx(reward["eval"]["value"] - reward["base"]["value"])
    evaluation = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    tokens = {side: evaluation["answer_tokens"][side]["value"] for side in ("policy", "base")}
    assert reward["eval"]["value"] == -tokens["policy"] and reward["base"]["value"] == -tokens["base"]


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_more_rows_give_the_same_step(rlhf: Run, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in rows of one sample each is the step in one row, but for rounding."""
    options = {"rl_algorithm": algorithm, "max_steps": 1, "gradient_accumulation_steps": 4}
    _, whole = rlhf(**options)
    once = lines(whole, "train")[0]
    cut = policy_trainer.rows_of
    monkeypatch.setattr(policy_trainer, "rows_of", lambda samples, budget: cut(samples, 1))
    apart = lines(rlhf(**options)[1], "train")[0]
    for name in ("loss", "grad_norm", "reward", "entropy", "kl_sampled"):
        assert apart[name] == pytest.approx(once[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(("base", "ours"), [(RLOOTrainer, "rloo"), (GRPOTrainer, "grpo")])
def test_log_probs_are_those_of_the_model(base: type, ours: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """TRL pads on the left, dpo on the right: the log-probs and entropies are those of each sequence alone."""
    model = tiny_model("llama", torch.float64)
    trainer: Any = object.__new__(policy_trainer.TRAINERS[ours][0])
    trainer.accelerator, trainer.row_budget = _Accelerator(), 1000
    policy_trainer.forward.attach(model, policy_trainer.forward.plain_states, 1.0, trainer.OUTPUTS)
    ids = torch.tensor([[2, 2, 5, 6, 7, 8, 9, 2], [4, 5, 6, 7, 8, 9, 10, 11]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    log_probs, entropies, nothing = trainer._get_per_token_logps_and_entropies(model, ids, mask, 4)
    assert nothing is None and log_probs.shape == entropies.shape == (2, 4)
    for row, start, length in ((0, 2, 3), (1, 0, 4)):
        own = ids[row, start : 4 + length][None]
        logits = model(own).logits[0, :-1].log_softmax(dim=-1)
        told = logits.gather(1, own[0, 1:, None])[:, 0][-length:]
        assert torch.allclose(log_probs[row, :length], told, atol=1e-9)
        entropy = -(logits.exp() * logits).sum(dim=1)[-length:]
        assert torch.allclose(entropies[row, :length], entropy, atol=1e-9)
    assert not log_probs[0, 3:].any()


class _Accelerator:
    @staticmethod
    def autocast() -> Any:
        return torch.autocast("cpu", enabled=False)


def test_rows_keep_every_sample_and_cut_padding() -> None:
    samples: dict[str, Tensor] = {
        "prompt_ids": torch.tensor([[0, 1], [2, 3], [0, 4]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1], [0, 1]]),
        "completion_ids": torch.tensor([[5, 0, 0], [6, 7, 8], [9, 10, 0]]),
        "completion_mask": torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0]]),
        "advantages": torch.tensor([0.0, 1.0, 2.0]),
        "num_items_in_batch": torch.tensor(6.0),
    }
    longest, rest = rows_of(samples, 6)
    assert longest["advantages"].tolist() == [1.0] and longest["completion_ids"].tolist() == [[6, 7, 8]]
    assert rest["advantages"].tolist() == [2.0, 0.0] and rest["prompt_ids"].tolist() == [[4], [1]]
    assert rest["completion_ids"].tolist() == [[9, 10], [5, 0]] and rest["num_items_in_batch"] == 6


def test_an_epoch_has_every_prompt_and_whole_steps() -> None:
    """Five prompts, two a step with three samples each, and each batch of samples twice: 3 batches, the last one filled up."""
    sampler = GroupSampler(5, 2, 3, 2)
    order = list(sampler)
    assert len(order) == len(sampler) == 3 * 2 * 3 * 2
    for start in range(0, len(order), 12):
        once, again = order[start : start + 6], order[start + 6 : start + 12]
        assert once == again and once[:3] == [once[0]] * 3 and once[3:] == [once[3]] * 3
    assert set(order) == set(range(5))
    torch.manual_seed(1)
    first = list(sampler)
    torch.manual_seed(1)
    assert list(sampler) == first  # the order follows torch's state, which a checkpoint has


def answer(tokens: int) -> Answer:
    return Answer("a" * tokens, tokens, True, tuple(range(tokens)))


def test_rewards_by_hand() -> None:
    """Two groups of two: rewards 1, 3 and 4, 4; lengths 2, 6 and 5, 5.

    Minus the means of their groups, rewards are -1, 1, 0, 0 and lengths -2, 2, 0, 0: their correlation is
    (2 + 2) / sqrt(2 * 8) = 1. The spreads are 1 and 0.
    """
    scores = {2: 1.0, 6: 3.0, 5: 4.0}
    rewards = SampleRewards(
        lambda _, answers: [scores[one.tokens] for one in answers], [Question("a", None, 1), Question("b", None, 2)], 2
    )
    rewards.answers = [answer(2), answer(6), answer(5), answer(5)]
    assert rewards(question=[0, 0, 1, 1]) == [1.0, 3.0, 4.0, 4.0]
    assert rewards.spreads.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert rewards.correlation == pytest.approx(1)
    rewards.rewards = np.zeros(4)
    assert rewards.correlation == 0


@pytest.mark.parametrize(("algorithm", "rank"), [("rloo", "shorter"), ("grpo", "longer")])
def test_the_reward_rises_by_more_than_chance(rlhf: Run, algorithm: str, rank: str) -> None:
    """Over five seeds: the mean change is over three standard errors; KL stays bounded; the rule for length says what it is."""
    changes = []
    for seed in range(5):
        options = {"rl_algorithm": algorithm, "seed": seed, "max_steps": 16, "learning_rate": 3e-3, "eval_split": 0}
        summary, run_dir = rlhf(
            **options, reward_functions=[rank], per_device_train_batch_size=16, gradient_accumulation_steps=1
        )
        trained = lines(run_dir, "train")
        rewards = [line["reward"] for line in trained]
        changes.append(np.mean(rewards[-4:]) - np.mean(rewards[:4]))
        assert max(line["kl_sampled"] for line in trained) < 20
        assert "reward-hacks-length" in [event["rule"] for event in summary["health"]], rewards
    assert min(changes) > 0
    assert np.mean(changes) > 3 * np.std(changes, ddof=1) / np.sqrt(len(changes))


Go = Callable[..., Exit]
TIMED = ("tokens_per_second", "peak_memory_gb")


class Killed(BaseException):
    """Ends a training where dpo does not expect it."""


@pytest.fixture
def go(tmp_path: Path, ending_model_dir: Path, pairs_file: Callable[..., Path]) -> Go:
    """Trains six steps, two on each batch of samples, in the folder of that name, or resumes that."""
    values = {"model_name": str(ending_model_dir), "dataset": str(pairs_file()), "device": "cpu", "bf16": False, "fp16": False}
    values |= {**SHORTER, "max_steps": 6, "num_iterations": 2, "save_steps": 1, "lora_r": 4, "learning_rate": 1e-2}
    values |= {"lora_dropout": 0.1, "max_new_tokens": 8, "kl_prompts": 2, "eval_steps": 3, "logging_steps": 2}

    def start(name: str) -> Exit:
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps({**values, "output_dir": str(tmp_path / name)}), encoding="utf-8")
        loaded, machine = load(str(config)), probe()
        inspection = inspect(loaded, machine, with_fit=False).stricter(lambda found: found.stops_training)
        return train(loaded, inspection, machine, Console(), resume=True)[1]

    return start


def left(run_dir: Path) -> tuple[str, list[dict[str, Any]], object]:
    """What a run leaves, without what is measured."""
    written = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figures = [{name: value for name, value in line.items() if name not in TIMED} for line in written]
    summary = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    return sha256_of_all(run_dir / "adapter"), figures, (summary["eval"], summary["gain"])


def test_a_run_that_was_killed_anywhere_has_the_same_bits(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it samples, while it trains on old samples, and in an evaluation: all from the checkpoint before."""
    assert go("whole") is Exit.DONE
    calls: list[str] = []
    limit = 0

    def counted(place: Any, name: str) -> None:
        call = getattr(place, name)

        def here(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == limit:
                raise Killed
            return call(*arguments, **options)

        monkeypatch.setattr(place, name, here)

    counted(generation, "_continued")
    counted(policy_trainer.SampledTrainer, "compute_loss")
    assert go("counted") is Exit.DONE
    moments, total = random.Random(0), len(calls)
    assert calls.count("_continued") >= 3 + 2 and calls.count("compute_loss") >= 6
    for number in range(4):
        calls.clear()
        limit = moments.randint(1, total)
        with pytest.raises(Killed):
            go(f"killed-{number}")
        limit = 0
        assert go(f"killed-{number}") is Exit.DONE
        assert left(tmp_path / f"killed-{number}") == left(tmp_path / "whole"), limit


def test_a_reward_model_is_trained_first(tmp_path: Path, ending_model_dir: Path, pairs_file: Callable[..., Path]) -> None:
    """Without one, the config is two stages; the second is refused if the reward model changes, and its figures are kept."""
    values = {**RLHF, "model_name": str(ending_model_dir), "dataset": str(pairs_file()), "device": "cpu", "bf16": False}
    values |= {"fp16": False, "max_steps": 3, "lora_r": 4, "max_new_tokens": 8, "kl_prompts": 2, "learning_rate": 1e-2}
    (tmp_path / "mine.json").write_text(json.dumps(values), encoding="utf-8")
    done = dpo("train", "mine.json", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["stages"]
    assert {"accuracy", "calibration_error"} <= first["eval"].keys() and "answer_reward" in second["eval"]
    run = tmp_path / "runs" / "mine" / "2-rlhf"
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["reward_model"]["name"] == str(run.parent / "1-reward")
    known = dpo("eval", str(run), "--json", cwd=tmp_path)
    again = dpo("eval", str(run), "--again", "--json", cwd=tmp_path)
    rewards = [json.loads(one.stdout)["policy"]["answer_reward"] for one in (known, again)]
    assert rewards[0] == rewards[1] == second["eval"]["answer_reward"]
    other = dpo("train", str(tmp_path / "mine.json"), "seed=7", "output_dir=other", "--json", cwd=tmp_path)
    assert other.returncode == 0, other.stderr
    shutil.rmtree(run.parent / "1-reward")
    shutil.copytree(tmp_path / "other" / "1-reward", run.parent / "1-reward")
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))["config"]
    refused = dpo("train", str(run / "plan.json"), "--resume", "max_steps=4", cwd=tmp_path)
    assert refused.returncode == 3, refused.stderr
    assert "the weights of reward_model have changed" in refused.stderr and plan["reward_model"] == str(run.parent / "1-reward")


def test_prompts_of_a_file_are_sampled_and_no_held_out_one(
    rlhf: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file has three prompts of its own and every prompt of the pairs; one that leaves no room is cut."""
    long = "the cat sat on the mat; " * 40
    asked = ["one", "two", long, *(f"question {i}" for i in range(12))]
    (tmp_path / "prompts.txt").write_text("\n".join(asked) + "\n", encoding="utf-8")
    sampled: list[list[int]] = []
    sample = policy_trainer.SampledTrainer.sample

    def seen(self: policy_trainer.SampledTrainer, prompts: list[list[int]]) -> list[list[int]]:
        sampled.extend(prompts)
        return sample(self, prompts)

    monkeypatch.setattr(policy_trainer.SampledTrainer, "sample", seen)
    _, run_dir = rlhf(prompts_file=str(tmp_path / "prompts.txt"), max_steps=None, num_train_epochs=1)
    plan = json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))["counts"]
    assert plan["train_prompts"] == len(asked) - plan["eval_prompts"]
    assert len({tuple(ids) for ids in sampled}) == plan["train_prompts"]
    assert max(map(len, sampled)) == plan["longest_prompt"] <= 64 - 12
    said = capsys.readouterr().out
    assert "1 prompts lose their start" in said.replace("\n", " ")
    assert f"{plan['eval_prompts']} prompts of" in said.replace("\n", " ")


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_every_weight_and_used_samples(rlhf: Run, algorithm: str) -> None:
    """Without an adapter the reference is a second model; a batch of samples is used for two steps, from the same KL."""
    options = {"rl_algorithm": algorithm, "lora_r": 0, "num_iterations": 2, "max_steps": 4, "learning_rate": 1e-3}
    _, run_dir = rlhf(**options, lora_dropout=0.0)
    first, second, third, _ = lines(run_dir, "train")
    assert first["kl_sampled"] == pytest.approx(0, abs=1e-5) and second["kl_sampled"] == first["kl_sampled"]
    assert first["reward"] == second["reward"] != third["reward"] and third["kl_sampled"] != 0
    assert second["loss"] != first["loss"]


@pytest.mark.parametrize("reference", ["auto", "first", "base"])
def test_it_continues_an_adapter(run: Run, rlhf: Run, tmp_path: Path, reference: str) -> None:
    """With a frozen copy as the reference, with the adapter off, or merged: an evaluation of the run has the same reference."""
    model = json.loads((run()[1] / "plan.json").read_text(encoding="utf-8"))["config"]["model_name"]
    first = tmp_path / "first"
    shutil.copytree(tmp_path / "run", first)
    rlhf(model_name=str(first), reference=reference, max_steps=2)
    done = dpo("eval", str(tmp_path / "run"), "--again", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    figures = json.loads(done.stdout)
    for name in ("margin", "kl_token", "answer_reward"):
        assert figures["policy"][name]["value"] == pytest.approx(summary["eval"][name]["value"], abs=1e-5), name
    assert model != str(first)


def test_dropout_has_no_effect_and_says_so(rlhf: Run, tmp_path: Path) -> None:
    """A ratio of probabilities would be its noise: the same bits as without it."""
    _, run_dir = rlhf(lora_dropout=0.0)
    without = sha256_of_all(run_dir / "adapter")
    _, run_dir = rlhf(lora_dropout=0.5)
    assert sha256_of_all(run_dir / "adapter") == without
    problems = load(str(tmp_path / "config.json")).problems
    assert [problem.key for problem in problems if problem.code == "other-strategy"] == ["lora_dropout"]


def test_a_judge_scores_only_answers_to_the_same_prompt() -> None:
    absolute, relative = SummedRewards([(1.0, lambda _, answers: [2.0 for _ in answers])]), SummedRewards([], is_relative=True)
    assert absolute.absolute is absolute and relative.absolute is None
    assert absolute(Question("a", None, 1), [answer(3)]) == [2.0]
    broken = SummedRewards([(0.5, lambda _, answers: [float("nan") for _ in answers])])
    with pytest.raises(RunFailed, match="not a finite number"):
        broken(Question("a", None, 1), [answer(3)])


def test_a_run_can_be_read_without_its_reward_model(
    tmp_path: Path, ending_model_dir: Path, pairs_file: Callable[..., Path]
) -> None:
    """A run that is not finished, and a model without a score, are refused before anything is replaced."""
    values = {**RLHF, "model_name": str(ending_model_dir), "dataset": str(pairs_file()), "device": "cpu", "bf16": False}
    values |= {"fp16": False, "max_steps": 2, "lora_r": 4, "max_new_tokens": 4, "kl_prompts": 2}
    (tmp_path / "mine.json").write_text(json.dumps(values), encoding="utf-8")
    assert dpo("train", "mine.json", cwd=tmp_path).returncode == 0
    run = tmp_path / "runs" / "mine" / "2-rlhf"
    before = sorted(path.name for path in run.iterdir())
    (tmp_path / "unfinished").mkdir()
    shutil.copy(run.parent / "1-reward" / "plan.json", tmp_path / "unfinished")
    shutil.copytree(run, tmp_path / "copy")
    others = {tmp_path / "unfinished": "not finished", ending_model_dir: "no head with one score", tmp_path / "copy": "rlhf"}
    for other, why in others.items():
        words = ("train", "mine.json", f"reward_model={other}", f"output_dir={run}", "--overwrite")
        refused = dpo(*words, cwd=tmp_path)
        assert refused.returncode == 3 and "[not-a-reward-model]" in refused.stderr and why in refused.stderr
        assert sorted(path.name for path in run.iterdir()) == before
    shutil.move(run.parent / "1-reward", tmp_path / "elsewhere")
    done = dpo("eval", str(run), "--again", "--json", cwd=tmp_path)
    assert done.returncode == 0 and "is not there any more" in " ".join(done.stderr.split())
    assert "answer_reward" not in json.loads(done.stdout)["policy"]


def test_prompts_of_a_file_that_cannot_be_used(rlhf: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n", encoding="utf-8")
    with pytest.raises(InvalidInput, match="reference"):
        rlhf(prompts_file=str(tmp_path / "prompts.txt"), reward_functions=["reference"])
    with pytest.raises(InvalidInput, match="not found"):
        rlhf(prompts_file=str(tmp_path / "nowhere.txt"))
    held_out = [f"question {i}" for i in range(12) if is_held_out_prompt(json.dumps(f"question {i}"), 0.2, 42)]
    (tmp_path / "prompts.txt").write_text("\n".join(held_out), encoding="utf-8")
    with pytest.raises(InvalidInput, match="every prompt of") as caught:
        rlhf(prompts_file=str(tmp_path / "prompts.txt"))
    assert held_out and caught.value.problems[0].key == "prompts_file"
