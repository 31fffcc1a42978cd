"""Answers that are rated alone: TRL's loss of them in rows of any size, its reference point, its figures, and its runs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import norms_in_float64
from conftest import tiny_model
from datasets import Dataset
from fork_server import dpo
from process_runs import Config, apart, assert_same, document, trained
from safetensors.torch import load_file
from test_dpo import make_plan
from transformers import PreTrainedTokenizerFast
from trl import KTOTrainer
from trl.trainer import kto_trainer

from dpo_cli.data.encoded import EncodedRows
from dpo_cli.data.rating_balance import unbalanced
from dpo_cli.data.rows import Rating, read_row
from dpo_cli.data.tokens import encode
from dpo_cli.evaluation.bootstrap import Intervals, value_of
from dpo_cli.evaluation.evaluation import score
from dpo_cli.evaluation.losses import trained_loss
from dpo_cli.evaluation.metrics import RatedScores, point_figures
from dpo_cli.providers.architecture import lora_config
from dpo_cli.scoring import forward
from dpo_cli.scoring.mismatched import mismatched_ids, partners, with_mismatched
from dpo_cli.storage.run_directory import ADAPTER, EVALUATION, LINES, SUMMARY, WEIGHTS
from dpo_cli.strategies.figures import FIGURES, Columns
from dpo_cli.strategies.row_kinds import RATINGS
from dpo_cli.training.callbacks.metrics_log import Record
from dpo_cli.training.kto_trainer import RatingTrainer, build_trainer, mismatched_rows, order_of_rows, trainer_arguments
from dpo_cli.training.trainer import ProbeFirst

NONE = EncodedRows.of([])  # held out
SEED = 1  # with which a moved adapter has a reference point above 0
ANSWERS = ("the cat sat", "no dog", "the answer is on the mat", "cat")


def rated(i: int) -> dict[str, object]:
    """A row; every third answer is good. Answers have several lengths."""
    return {"prompt": f"question {i}", "completion": f"{ANSWERS[i % 4]} {i}", "label": i % 3 == 0}


def ratings(count: int = 8) -> list[Rating]:
    rows = [read_row(rated(i), i + 1, "f", None, RATINGS).rows[0] for i in range(count)]
    return [row for row in rows if isinstance(row, Rating)]


def make_trainer(
    place: Path, tokenizer: PreTrainedTokenizerFast, family: str = "llama", count: int = 8, **options: object
) -> tuple[RatingTrainer, EncodedRows]:
    rows = EncodedRows.of(encode(ratings(count), tokenizer))
    plan = make_plan(place, strategy="kto", lora_r=4, **options)
    model = tiny_model(family, torch.float32)
    return build_trainer(model, lora_config(plan.config), tokenizer, plan, rows, NONE, lambda model: {}), rows


def losses_of(trainer: KTOTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights_of(trainer: Any) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters() if weight.requires_grad])


# --- the loss is TRL's


def test_trl_contract() -> None:
    """What the seam overrides exists, and TRL makes a mean of the losses of rows, and of what the calls for its KL return."""
    source = inspect.getsource(KTOTrainer._compute_loss)
    assert source.count("KL_logps = self._compute_kl_logps(model, batch)") == 1
    assert source.count("kl = (KL_logps - ref_KL_logps).mean().detach()") == 1
    assert source.count("loss = losses.nanmean()") == 1
    assert source.count("outputs = model(**model_kwargs, labels=completion_labels, fused_lm_head=True)") == 1
    assert 'ref_KL_logps = batch["ref_KL_logps"]' in source and 'batch["ref_logps"].index_select(0, chosen_idx)' in source
    assert 'self._metrics[mode]["rewards/chosen"]' in source
    assert "dataset_name" in inspect.signature(KTOTrainer._prepare_dataset).parameters
    assert '[examples["completion_ids"][-1]] + examples["completion_ids"][:-1]' in inspect.getsource(kto_trainer)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gemma3", {"beta": 0.4, "desirable_weight": 1.5}),
        ("gpt2", {"undesirable_weight": 0.3}),
        ("llama", {"loss_type": "apo_zero_unpaired"}),
    ],
    ids=str,
)
def test_losses_and_adapter_are_those_of_trl(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str, options: dict[str, object]
) -> None:
    """Plain TRL on the texts of the same rows in the same order, with its own template, collator and other answers."""
    whole: dict[str, object] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 8, **options}
    whole |= {"learning_rate": 5e-3, "use_chat_template": True}
    ours, rows = make_trainer(tmp_path, tokenizer, family, **whole)
    plan = make_plan(tmp_path, strategy="kto", lora_r=4, **whole)
    arguments = trainer_arguments(plan)
    arguments.logging_strategy, arguments.logging_steps, arguments.remove_unused_columns = "steps", 1, True
    written = [rows.rows[place] for place in order_of_rows(len(rows), plan.config.seed)]
    texts = [
        {
            "prompt": [{"role": "user", "content": row.prompt}],
            "completion": [{"role": "assistant", "content": row.responses[0]}],
            "label": isinstance(row, Rating) and row.is_good,
        }
        for row in written
    ]
    theirs = KTOTrainer(
        model=tiny_model(family, torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
        peft_config=lora_config(plan.config),
    )
    forward.attach(theirs.model.get_base_model(), forward.plain_states)  # TRL's own head is a Triton kernel
    before, points = weights_of(ours), list[float]()
    ours.add_callback(Record(ours.totals, [lambda line: points.append(line.figures["kl_baseline"])]))
    ours.train()
    theirs.train()
    assert losses_of(ours) == pytest.approx(losses_of(theirs), abs=2e-6)
    assert (max(points) > 0.02) == ours.calculate_KL  # so that the reference point is in these losses
    assert abs(losses_of(ours)[-1] - losses_of(ours)[0]) > 1e-3
    assert (weights_of(ours) - weights_of(theirs)).norm() < 1e-4 * (weights_of(ours) - before).norm()


def move(trainer: RatingTrainer) -> None:
    """In float64, with an adapter that has moved: at step 0 all log-ratios are 0."""
    norms_in_float64(trainer.model.double())
    torch.manual_seed(SEED)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.1)


def test_a_step_is_the_same_for_every_division(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Eight rows of several lengths, in rows of any size, after the adapter has moved."""
    updates, losses, points = [], [], []
    for budget in (1, 60, 4096):
        trainer, _ = make_trainer(tmp_path, tokenizer)
        move(trainer)
        trainer.row_budget = budget
        batches, size = trainer.get_batch_samples(iter([trainer.data_collator([*trainer.train_dataset])]), 1, "cpu")
        assert size == 8
        loss = trainer.training_step(trainer.model, batches[0], size)
        figures = trainer.totals.of_step()
        assert float(loss) == pytest.approx(figures["loss"], rel=1e-9)
        losses.append(figures)
        points.append(trainer.kl)
        updates.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert updates[0].norm() > 1e-3 and points[0] > 0
    assert points == pytest.approx([points[0]] * 3, rel=1e-9)
    assert all((update - updates[0]).norm() < 1e-9 * updates[0].norm() for update in updates)
    assert all(figures == pytest.approx(losses[0], rel=1e-9) for figures in losses)


def test_the_reference_is_computed_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Three epochs: each answer, and each answer to another prompt, goes through the reference once."""
    trainer, rows = make_trainer(tmp_path, tokenizer, num_train_epochs=3, per_device_train_batch_size=4)
    trainer.remove_callback(ProbeFirst)
    live, seen = trainer.reference.live, list[int]()
    scored = live.log_probs

    def count(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.extend(batch["pair"].tolist())
        return scored(batch)

    object.__setattr__(live, "log_probs", count)
    trainer.train()
    assert sorted(seen) == list(range(2 * len(rows)))
    assert trainer.reference.known.all() and len(set(trainer.digests(rows))) == 2 * len(rows)


def test_an_evaluation_finds_the_loss_of_a_step(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """On the rows of one step, in its order, since the answers to other prompts depend on it."""
    trainer, rows = make_trainer(tmp_path, tokenizer, desirable_weight=1.7)
    plan = make_plan(tmp_path, strategy="kto", lora_r=4, desirable_weight=1.7)
    move(trainer)
    order = order_of_rows(len(rows), plan.config.seed)
    scores = score(trainer.policy, [rows[place] for place in order], tokenizer, plan)
    assert isinstance(scores, RatedScores)
    batch = trainer.data_collator([*trainer.train_dataset])
    trainer.model.train()
    trainer.kl = trainer._kl(batch)
    loss = trainer.compute_loss(trainer.model, batch)
    assert trained_loss(scores, plan.config) == pytest.approx(float(loss), rel=1e-5)
    assert scores.kl_baseline == pytest.approx(trainer.kl, rel=1e-4) and trainer.kl > 0
    figures, line = point_figures(scores, plan.config.beta), trainer.totals.take()
    for name in ("margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected", "kl_baseline"):
        assert line[name] == pytest.approx(figures[name], rel=1e-4), name


# --- answers to other prompts


@pytest.mark.parametrize(
    ("prompts", "others"),
    [("abc", [2, 0, 1]), ("aab", [2, 2, 1]), ("aabb", [3, 3, 1, 1]), ("aaa", [2, 0, 1]), ("a", [0]), ("", [])],
)
def test_partners_have_another_prompt(prompts: str, others: list[int]) -> None:
    assert partners(prompts) == others


def test_mismatched_answers_stay_in_their_step(tokenizer: PreTrainedTokenizerFast) -> None:
    """Steps of four of nine rows: in each the answers are those of its rows; the last step has one row, and that of the row
    before it. An answer that does not fit is cut."""
    rows = EncodedRows.of(encode(ratings(9), tokenizer))
    order = order_of_rows(9, 3)
    made = mismatched_rows(rows, order, 4, 1024)
    answers = [rows.ids(place)[1] for place in range(9)]
    for step in (order[:4], order[4:8]):
        used = [made[place]["completion_ids"] for place in step]
        assert sorted(used) == sorted(answers[place] for place in step)
        assert all(used[i] == answers[step[i - 1]] for i in range(4))
    assert made[order[8]]["completion_ids"] == answers[order[7]]
    assert [row["pair"] for row in made] == list(range(9, 18))
    assert mismatched_ids([1] * 6, [7, 8, 9], 8) == [7, 8] and mismatched_ids([1] * 8, [7, 8], 8) == [7]
    both = with_mismatched([*rows], 1024)
    assert [row.responses[1] for row in both] == [rows[i - 1].responses[0] for i in range(9)]


# --- figures


def columns(reward: list[float], good: list[int], baseline: float = 0.0) -> Columns:
    values = np.array(reward)[:, None]
    return Columns(10 * values, np.ones_like(values), values, values, values, np.array(good, dtype=float), baseline)


def test_figures_by_hand() -> None:
    """Rewards 0.4 and -0.1 of good answers, 0.2, -0.1 and -0.6 of bad ones, and a reference point of 0.1.

    accuracy: of 6 pairs of a good and a bad answer, 0.4 wins 3; -0.1 loses to 0.2, ties with -0.1 and beats -0.6: (3 + 1.5) / 6
    margin: (0.4 - 0.1) / 2 - (0.2 - 0.1 - 0.6) / 3 = 0.15 + 0.1667
    loss: 1 - s(0.4 - 0.1) = 0.42556, 1 - s(-0.2) = 0.54983; 1 - s(0.1 - 0.2) = 0.52498, 1 - s(0.2) = 0.45017,
    1 - s(0.7) = 0.33181; their mean 0.45647
    """
    made = columns([0.4, -0.1, 0.2, -0.1, -0.6], [1, 1, 0, 0, 0], 0.1)
    values = {name: value_of(figure.formulas[RATINGS](made)) for name, figure in FIGURES.items() if RATINGS in figure.formulas}
    assert values["accuracy"] == pytest.approx(4.5 / 6)
    assert values["margin"] == pytest.approx(0.15 + 0.5 / 3)
    assert values["loss"] == pytest.approx(0.45647, abs=1e-5)


def test_intervals_of_a_contrast_are_those_of_its_resamples() -> None:
    """The influence of each row against drawing rows again and computing both figures again: the same width within a tenth."""
    draws = np.random.default_rng(1)
    good = (draws.random(400) < 0.3).astype(float)
    reward = draws.normal(size=400) + 0.6 * good
    made = columns(reward.tolist(), good.astype(int).tolist())
    again: dict[str, list[float]] = {"accuracy": [], "margin": []}
    for _ in range(1000):
        places = draws.integers(400, size=400)
        chosen, rejected = reward[places][good[places] > 0], reward[places][good[places] == 0]
        again["accuracy"].append(float((chosen[:, None] > rejected).mean()))
        again["margin"].append(float(chosen.mean() - rejected.mean()))
    for name, values in again.items():
        interval = Intervals([str(i) for i in range(400)]).of(FIGURES[name].formulas[RATINGS](made))
        low, high = np.percentile(values, [2.5, 97.5])
        assert interval.high - interval.low == pytest.approx(high - low, rel=0.1)
        assert interval.low == pytest.approx(low, abs=0.2 * (high - low))


@pytest.mark.parametrize(
    ("good", "bad", "weights", "advised"),
    [
        (90, 90, (1, 1), None),
        (110, 100, (1, 1), None),  # 1.1 is between 1 and 4/3
        (80, 100, (1, 1), None),  # and 0.8 is close
        (70, 100, (1, 1), "desirable_weight"),
        (900, 100, (1, 1), "undesirable_weight"),
        (100, 900, (1, 1), "desirable_weight"),
        (100, 900, (9, 1), None),
        (900, 100, (1, 7), None),
        (900, 100, (1, 20), "undesirable_weight"),
        (100, 100, (3, 1), "desirable_weight"),
        (90, 0, (1, 1), None),  # an error of its own
    ],
)
def test_weights_that_balance(good: int, bad: int, weights: tuple[float, float], advised: str | None) -> None:
    """The advised weight is one that is then accepted: with it, and the other at 1, nothing is found."""
    problems = [*unbalanced({True: good, False: bad}, *weights)]
    assert [problem.key for problem in problems] == ([advised] if advised else [])
    for problem in problems:
        value = float(str(problem.fix).partition(": ")[2].partition(" ")[0])
        assert not [*unbalanced({True: good, False: bad}, *((value, 1) if advised == "desirable_weight" else (1, value)))]


# --- runs


@pytest.fixture
def of_ratings(config: Config, tmp_path: Path) -> Callable[..., Path]:
    """The file of a config on 24 rated answers."""
    data = tmp_path / "ratings.jsonl"
    data.write_text("".join(json.dumps(rated(i)) + "\n" for i in range(24)), encoding="utf-8")

    def write(name: str, **options: object) -> Path:
        return config(name, strategy="kto", dataset=str(data), **options)

    return write


def test_a_run_from_end_to_end(of_ratings: Config, tmp_path: Path) -> None:
    """Training, evaluation, report, resume of a finished run, export and a vote page; then evaluated on pairs."""
    run = trained(of_ratings("kto"))
    lines, summary, judged = (document(run, name) for name in (LINES, SUMMARY, EVALUATION))
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6) and lines[0]["kl_baseline"] == 0
    assert {"margin", "reward_chosen", "reward_rejected"} <= lines[-2].keys()
    assert {"accuracy", "margin", "loss", "kl_token", "kl_sequence", "kl_baseline"} <= lines[-1].keys()
    assert summary["status"] == "completed" and judged["ratings"] == len(judged["rows"])
    assert judged["policy"]["accuracy"]["value"] == pytest.approx(lines[-1]["accuracy"])
    assert {row["rating"] for row in (*judged["best"], *judged["worst"])} <= {"good", "bad"}
    for row in judged["rows"]:
        assert abs(row["margin"]) == abs(row["reward"])
    assert "Kahneman-Tversky" in (run / ADAPTER / "README.md").read_text(encoding="utf-8")
    assert "Rewards" in (run / "report.html").read_text(encoding="utf-8")
    again = dpo("train", of_ratings("kto"), "--resume", "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["adapter_sha256"] == summary["adapter_sha256"]
    seen = dpo("eval", run, "--json")
    assert seen.returncode == 0 and json.loads(seen.stdout)["policy"] == judged["policy"]
    pairs = dpo("eval", run, "--dataset", tmp_path / "pairs.jsonl", "--json")
    assert pairs.returncode == 0 and json.loads(pairs.stdout)["pairs"] == 24
    assert "logp_accuracy" in json.loads(pairs.stdout)["gain"]


def test_pairs_are_rated_answers(config: Config) -> None:
    """Each response of a pair is rated, so that 24 pairs are 48 ratings."""
    done = dpo("validate", config("pairs", strategy="kto"), "--json")
    found = json.loads(done.stdout)
    assert found["ok"] and (found["data"]["rows"], found["data"]["pairs"]) == (24, 48)


@pytest.mark.long
def test_resume_gives_the_same_bytes(of_ratings: Config) -> None:
    """Six steps at once; and three, then the rest, with what the reference has computed in the checkpoint."""
    whole = trained(of_ratings("whole", lr_scheduler_type="constant"))
    stopped = of_ratings("stopped", lr_scheduler_type="constant", max_steps=3)
    assert trained(stopped) and dpo("train", stopped, "max_steps=6", "--resume").returncode == 0
    one, other = (load_file(run / ADAPTER / WEIGHTS) for run in (whole, stopped.with_suffix("")))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"fsdp": True}], ids=str)
def test_two_processes_train_the_same(of_ratings: Config, options: dict[str, object]) -> None:
    """The reference point is that of all rows of a step, whatever process has them."""
    alone = trained(of_ratings("alone"))
    both = trained(of_ratings("both", num_processes=2, **options), processes=1)
    assert apart(alone, both) < 1e-4
    assert_same(alone, both)


def test_a_step_without_bad_answers_has_no_margin(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A step may have one rating only; the means of a line are over the rows that have each."""
    trainer, _ = make_trainer(tmp_path, tokenizer)
    good, bad = ([row for row in trainer.train_dataset if row["label"] is rating][:2] for rating in (True, False))
    for rows, missing in ((good, "reward_rejected"), (bad, "reward_chosen")):
        trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        figures = trainer.totals.of_step()
        assert {"loss", "reward_chosen", "reward_rejected", "margin"} - figures.keys() == {"margin", missing}
    assert {"reward_chosen", "reward_rejected", "margin"} <= trainer.totals.take().keys()
