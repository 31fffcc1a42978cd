"""An optimizer step is what the config says: the same update however its pairs are divided into micro-batches."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import line_of, norms_in_float64
from conftest import Run, made_row
from safetensors.torch import load_file
from test_dpo import make_plan, make_trainer
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig

from dpo_cli.config.rules import sorts_pairs
from dpo_cli.config.schema import options
from dpo_cli.data.encoded import Encoded
from dpo_cli.data.rows import to_pair
from dpo_cli.data.tokens import encode
from dpo_cli.errors import InvalidInput
from dpo_cli.evaluation.losses import DISCOPOP_TAU, LOSSES, LOSSES_OF_RATINGS, is_known, trained_loss
from dpo_cli.evaluation.metrics import score_rows
from dpo_cli.scoring import forward
from dpo_cli.training.callbacks.early_stopping import StopEarly
from dpo_cli.training.callbacks.metrics_log import Record
from dpo_cli.training.dpo_trainer import PairTrainer
from dpo_cli.training.trainer import ProbeFirst

DIVISIONS = [[4, 1], [3, 2], [2, 2, 1], [1, 1, 1, 1, 1]]
LISTS = [["sigmoid", "sft"], ["ipo", "sppo_hard", "nca_pair"]]


def five(tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """Five pairs of other lengths, so that a mean over tokens is another than one over pairs. Both responses are about as
    long, so that an adapter changes the order of their log-ratios."""
    lengths = [(1, 2), (4, 3), (2, 3), (5, 4), (3, 2)]
    responses = [{"chosen": "the cat sat on " * chosen, "rejected": "on sat cat the " * other} for chosen, other in lengths]
    rows = [{**made_row(i), **both} for i, both in enumerate(responses)]
    return encode([to_pair(row, i + 1) for i, row in enumerate(rows)], tokenizer)


def moved_trainer(place: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> PairTrainer:
    """In float64, with an adapter that has moved: at step 0 all log-ratios are 0, and sorted already."""
    trainer, _ = make_trainer(place, tokenizer, pairs=five(tokenizer), **options)
    norms_in_float64(trainer.model.double())
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in _weights(trainer):
            weight.normal_(std=0.1)
    return trainer


def _weights(trainer: PairTrainer) -> list[Tensor]:
    return [weight for weight in trainer.model.parameters() if weight.requires_grad]


def sgd_update(trainer: PairTrainer, division: Sequence[int]) -> tuple[Tensor, float]:
    """The update of one step of SGD at a rate of 1, in micro-batches of so many pairs, and the mean of the pairs' losses."""
    rows, batches = iter(trainer.train_dataset), []
    for pairs in division:
        batches.append(trainer.data_collator([next(rows) for _ in range(pairs)]))
    trainer.model.zero_grad()
    batches, size = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    losses = [trainer.training_step(trainer.model, batch, size) for batch in batches]
    figures = trainer.totals.of_step()
    assert float(sum(losses)) == pytest.approx(figures["loss"], rel=1e-6)  # what Trainer logs, and what health sees
    return -torch.cat([weight.grad.flatten() for weight in _weights(trainer) if weight.grad is not None]), figures["loss"]


@pytest.mark.parametrize(
    ("loss", "own"),
    [
        *((loss, {}) for loss in (*LOSSES, *LISTS)),
        *(("sigmoid", {"f_divergence_type": name}) for name in ("forward_kl", "js_divergence")),
        ("ipo", {"f_divergence_type": "forward_kl"}),
        (["sigmoid", "sft"], {"ld_alpha": 0.3}),
        ("ipo", {"use_weighting": True}),
    ],
    ids=str,
)
def test_a_step_is_the_same_for_every_division(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, loss: str | list[str], own: dict[str, Any]
) -> None:
    """But of the losses that compare the pairs of a micro-batch, of which a division is another loss: they are not divided.

    An evaluation finds the same loss as TRL, from the scores of the pairs.
    """
    smoothing = 0.1 if loss in ("exo_pair", "robust") else 0.0
    weights = [0.7, 1.3, 0.2][: len(loss)] if isinstance(loss, list) else None
    options = {"loss_type": loss, "loss_weights": weights, "label_smoothing": smoothing, **own}
    trainer = moved_trainer(tmp_path, tokenizer, **options)
    whole, loss_of_all = sgd_update(trainer, [5])
    assert whole.norm() > 1e-3
    scores = score_rows(trainer.policy, five(tokenizer), forward.shared_states, tokenizer.pad_token_id, 2, torch.float32)
    config = make_plan(tmp_path, **options).config
    assert not is_known(config) or trained_loss(scores, config) == pytest.approx(loss_of_all, rel=1e-7)
    divided = [sgd_update(trainer, division) for division in DIVISIONS]
    apart = [float((update - whole).norm() / whole.norm()) for update, _ in divided]
    assert sorts_pairs(loss) == trainer.IS_WHOLE
    if trainer.IS_WHOLE:
        assert max(apart) > 1e-3
    else:
        assert max(apart) < 1e-9
        assert [of_parts for _, of_parts in divided] == pytest.approx([loss_of_all] * len(DIVISIONS), rel=1e-9)


def stepped(trainer: PairTrainer, faults: Iterator[bool]) -> tuple[Tensor, dict[str, Any]]:
    """The update of a training of one step and its line; memory is out where `faults` says so."""
    trainer.remove_callback(ProbeFirst)
    weights, lines = _weights(trainer), []
    before = torch.cat([weight.detach().flatten().clone() for weight in weights])
    trainer.add_callback(Record(trainer.totals, [lambda line: lines.append(line.figures)]))

    def fail(gradient: Tensor) -> None:
        if next(faults, False):
            raise torch.OutOfMemoryError("none left")

    weights[len(weights) // 2].register_hook(fail)
    trainer.train()
    assert next(faults, None) is None
    return torch.cat([weight.detach().flatten() for weight in weights]) - before, lines[-1]


def test_a_training_steps_alike_in_micro_batches_and_in_halves(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """5 at once; 4 + 1; and 4 + 1 where the 4 are out of memory, and then the second 2 of them."""
    options = {"loss_type": ["sigmoid", "sft"], "max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.5}
    made = []
    for batch, faults in [(8, []), (4, []), (4, [True, False, True])]:
        size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch}
        made.append(stepped(moved_trainer(tmp_path, tokenizer, **options, **size), iter(faults)))
    (whole, line), *others = made
    assert whole.norm() == pytest.approx(0.05, rel=1e-6)  # clipped to 0.5, times the rate
    for update, other_line in others:
        assert (update - whole).norm() <= 1e-9 * whole.norm()
        for figure in ("loss", "grad_norm", "margin", "accuracy"):
            assert other_line[figure] == pytest.approx(line[figure], rel=1e-6), figure


def test_a_loss_that_compares_pairs_is_not_run_in_halves(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = moved_trainer(tmp_path, tokenizer, loss_type=["sft", "aot"], max_steps=1, per_device_train_batch_size=8)
    with pytest.raises(torch.OutOfMemoryError):
        stepped(trainer, iter([True]))


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({"warmup_ratio": 0.1}, False),
        ({"warmup_steps": 7, "lr_scheduler_type": "cosine"}, False),
        ({"warmup_steps": 2, "lr_scheduler_type": "polynomial"}, False),
        ({"warmup_ratio": 0.1, "lr_scheduler_type": "constant"}, True),
        ({"lr_scheduler_type": "cosine"}, True),
    ],
)
def test_a_single_step_that_is_all_warmup_is_told(run: Run, options: dict[str, Any], moves: bool) -> None:
    """Its rate is 0: a warning names the warm-up before, and health says after it that nothing was learned."""
    summary, place = run(max_steps=1, **options)
    found = json.loads((place / "plan.json").read_text(encoding="utf-8"))["problems"]
    assert [problem["key"] for problem in found if problem["code"] == "never-warm"] == ([] if moves else [next(iter(options))])
    assert [event["rule"] for event in summary["health"]] == ([] if moves else ["no-movement"])
    adapter = load_file(place / "adapter" / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name) == moves


def test_a_polynomial_decay_after_no_step_is_refused(run: Run) -> None:
    """transformers divides its decay by the steps that are left after the warm-up."""
    with pytest.raises(InvalidInput, match="warmup_ratio is"):
        run(max_steps=1, warmup_ratio=0.1, lr_scheduler_type="polynomial")


def test_steps_of_a_warmup_that_never_ends_are_asked_whether_they_moved(run: Run) -> None:
    summary, _ = run(max_steps=3, warmup_steps=100_000)
    assert [event["rule"] for event in summary["health"]] == ["no-movement"]
    summary, _ = run(max_steps=2, strategy="sft", warmup_ratio=0.9)
    assert summary["health"] == []
    summary, _ = run(max_steps=1, strategy="sft", warmup_ratio=0.9)
    assert [event["rule"] for event in summary["health"]] == ["no-movement"]


def test_every_loss_can_be_evaluated() -> None:
    assert [*LOSSES, *LOSSES_OF_RATINGS] == options()["loss_type"].rule["items"]["enum"]
    assert DPOConfig.__dataclass_fields__["discopop_tau"].default == DISCOPOP_TAU


def test_early_stopping_watches_the_loss_that_is_trained(run: Run) -> None:
    """The line of an evaluation has it in addition to DPO's loss, if it differs; it decides the best."""
    training = {"eval_split": 0.3, "eval_steps": 1, "max_steps": 3, "early_stopping_patience": 9, "label_smoothing": 0.1}
    summary, place = run(loss_type=["robust", "sft"], loss_weights=[0.5, 2.0], **training)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["trained_loss"] for line in lines if line["split"] == "eval"}
    assert len(losses) == 3 and summary["best_step"] == min(losses, key=losses.__getitem__)
    assert all(0 < line["loss"] < 2 * math.log(2) < line["trained_loss"] for line in lines if line["split"] == "eval")
    early = StopEarly(torch.nn.Linear(1, 1), 2)
    for step, figures in enumerate([{"loss": 0.6, "trained_loss": 9.0}, {"loss": 0.7, "trained_loss": 8.0}], start=1):
        early.see(line_of(split="eval", step=step, **figures))
    assert (early.best_step, early.best_loss) == (2, 8.0)
    early.see(line_of(split="eval", step=3, loss=0.5))  # of sigmoid, or of demonstrations: the one loss is the trained one
    assert early.best_step == 3
