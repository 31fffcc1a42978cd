"""Every loss of TRL's, and sums of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from inspect import getsource
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, tiny_model
from datasets import Dataset
from peft import LoraConfig
from test_dpo import make_plan, make_trainer
from test_steps import five
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer, KTOConfig
from trl.trainer import dpo_trainer

from dpo_cli.config.schema import options
from dpo_cli.evaluation.losses import DIVERGENCES, Pairs
from dpo_cli.runs.state_io import load_state
from dpo_cli.scoring import forward, lm_head
from dpo_cli.scoring.lm_head import LOG_PROBS, LOG_SQUARES
from dpo_cli.scoring.reference import in_both
from dpo_cli.training.dpo_trainer import trainer_arguments

OF_KTO = options()["loss_type"].values_for["kto"]  # tests/test_kto.py
ALL = options()["loss_type"].rule["items"]["enum"]
LOSSES = [name for name in ALL if name not in OF_KTO]


def test_the_losses_are_trls() -> None:
    source = getsource(dpo_trainer)
    named = re.search(r"Should be one of \[([^]]*)\]", source)
    assert named is not None and re.findall(r"'(\w+)'", source[named.start() : source.index("]", named.start())]) == LOSSES
    assert options()["loss_type"].rule["pattern"] == f"^({'|'.join(ALL)})$"
    assert KTOConfig.__dataclass_fields__["loss_type"].metadata["choices"] == OF_KTO


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(run: Run, loss: str, pairs_file: Callable[..., Path], tokenizer: PreTrainedTokenizerFast) -> None:
    """At step 0 all log-ratios are 0, and each loss has a value that is worked out by hand; after it, the policy has moved."""
    smoothing = 0.001 if loss == "exo_pair" else 0.0
    at_zero = {  # beta 0.1, z = 0: sigmoid(0) = 1/2
        "hinge": 1.0,  # max(0, 1 - z)
        "ipo": 25.0,  # (0 - 1 / (2 * 0.1))^2
        "exo_pair": math.log(0.5) - (math.log(0.999) + math.log(0.001)) / 2,  # KL((1/2, 1/2) || (1 - e, e))
        "nca_pair": 2 * math.log(2),  # ln 2 + ln 2 / 2 + ln 2 / 2
        "bco_pair": 2 * math.log(2),
        "sppo_hard": 50.0,  # 2 * (0.5 / 0.1)^2
        "apo_zero": 1.0,  # 1 - 1/2 + 1/2
        "apo_down": 1.0,
        "discopop": (math.log(2) + 1) / 2,  # half logistic, half exp(0)
    }
    _, place = run(loss_type=loss, label_smoothing=smoothing, max_steps=2, per_device_train_batch_size=4)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if loss == "sft":  # -log p(chosen) a token
        pairs = {
            "dataset": str(pairs_file([{"prompt": f"q{i}", "chosen": "the cat sat", "rejected": f"{i}"} for i in range(8)]))
        }
        summary, _ = run(loss_type=loss, max_steps=1, **pairs)
        tokens = len(tokenizer("the cat sat<|im_end|>\n")["input_ids"])
        assert summary["train"]["loss"] == pytest.approx(-summary["train"]["logp_chosen"] / tokens, rel=1e-5)
    else:
        assert lines[0]["loss"] == pytest.approx(at_zero.get(loss, math.log(2)), rel=1e-5)
    assert lines[1]["reward_chosen"] != 0


def test_losses_are_added_up_by_their_weights(run: Run) -> None:
    """0.8 ln 2 + 0.2 * 2 ln 2 = 1.2 ln 2 at step 0; without weights each counts 1."""
    summary, _ = run(loss_type=["sigmoid", "bco_pair"], loss_weights=[0.8, 0.2], max_steps=1)
    assert summary["train"]["loss"] == pytest.approx(1.2 * math.log(2), rel=1e-5)
    summary, _ = run(loss_type=["sigmoid", "bco_pair"], max_steps=1)
    assert summary["train"]["loss"] == pytest.approx(3 * math.log(2), rel=1e-5)


def test_divergences_by_hand() -> None:
    """Log-ratios ln 2 of chosen and -ln 2 of rejected, so t = 2 and 1/2, beta 1.

    reverse KL: ln 2 + ln 2 = 1.3863. forward KL: (1 - 1/2) - (1 - 2) = 1.5. JS: ln(4/3) - ln(2/3) = ln 2 = 0.6931.
    alpha 1/2: (2^(-1/2) - 1) / (-1/2) = 0.5858, and (2^(1/2) - 1) / (-1/2) = -0.8284: together 1.4142.
    """
    pi, zero = torch.tensor([[math.log(2), -math.log(2)]]), torch.zeros(1, 2)
    expected = {"reverse_kl": 1.3863, "forward_kl": 1.5, "js_divergence": 0.6931, "alpha_divergence": 1.4142}
    found = {name: float(Pairs(pi, zero, torch.ones(1, 2), 1.0, 0.0, name, 0.5).z) for name in DIVERGENCES}
    assert found == pytest.approx(expected, abs=1e-4)
    assert float(Pairs(pi, zero, torch.ones(1, 2), 1.0, 0.0, "alpha_divergence", 1 - 1e-9).z) == pytest.approx(1.3863, abs=1e-4)


def test_tokens_in_both_by_hand() -> None:
    """Responses of 2 and 4 tokens after a prompt of 1, and of 3 and 1: the first 2, 2 and the first 1, 1 are in both."""
    scored = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]]).bool()
    assert in_both(scored).int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]


VARIANTS: tuple[dict[str, Any], ...] = (
    {"ld_alpha": 0.3},
    {"ld_alpha": 0.0, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    {"use_weighting": True},
    {"use_weighting": True, "loss_type": "ipo", "ld_alpha": 0.5},
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence", "loss_type": "hinge"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2},
)


class StockTrainer(DPOTrainer):
    """TRL's trainer, with token ids as rows."""

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset


def losses_of(trainer: DPOTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("states", [forward.plain_states, forward.shared_states])
def test_variants_are_those_of_trl(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], states: forward.States
) -> None:
    """Plain TRL on padded rows of the same ids, with its own reference: the loss of each of eight steps, and the adapter."""
    whole = {**options, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 1, "max_steps": 8}
    ours, _ = make_trainer(tmp_path, tokenizer, states=states, pairs=five(tokenizer), **whole)
    arguments = trainer_arguments(make_plan(tmp_path, **whole))
    arguments.logging_strategy, arguments.logging_steps, arguments.remove_unused_columns = "steps", 1, True
    theirs = StockTrainer(
        model=tiny_model("llama", torch.float32),
        args=arguments,
        train_dataset=ours.train_dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"),
    )
    forward.attach(theirs.model.get_base_model(), forward.plain_states)  # TRL's own head is a Triton kernel
    ours.train()
    theirs.train()
    assert losses_of(ours) == pytest.approx(losses_of(theirs), rel=1e-4, abs=1e-6)
    assert abs(losses_of(ours)[-1] - losses_of(ours)[0]) > 1e-3
    one, other = (
        torch.cat([weight.detach().flatten() for weight in trainer.model.parameters() if weight.requires_grad])
        for trainer in (ours, theirs)
    )
    assert (one - other).norm() < 1e-3 * one.norm()


def test_squares_of_the_head(tokenizer: PreTrainedTokenizerFast) -> None:
    """log of the sum of p squared, from transformers' own logits; of both functions of the head."""
    model = tiny_model("gemma2")
    ids = torch.randint(3, 300, (2, 9))
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
        p = model(input_ids=ids).logits[:, :-1].flatten(0, 1).softmax(dim=-1)
    for outputs in ([LOG_PROBS, LOG_SQUARES], lm_head.ALL):
        scores = lm_head.score_tokens(hidden, ids[:, 1:].flatten(), lm_head.Head.of(model), outputs)
        torch.testing.assert_close(scores.log_sum_sq_probs, p.square().sum(dim=-1).log(), rtol=0, atol=1e-9)


def test_a_run_with_every_variant(run: Run) -> None:
    """Four log-probs of each pair in the checkpoint, and no trained loss in the line of an evaluation that cannot know it."""
    _, place = run(ld_alpha=0.4, use_weighting=True, eval_split=0.4, save_steps=1, max_steps=2)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-5) and lines[0]["reward_chosen"] == pytest.approx(0, abs=1e-5)
    assert "trained_loss" not in lines[-1] and lines[-1]["loss"] > 0
    kept = load_state(place / "checkpoints" / "step-2" / "reference")
    assert kept["values"].shape[1] == 4
    _, place = run(f_divergence_type="forward_kl", eval_split=0.4)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[-1]["trained_loss"] != lines[-1]["loss"]
