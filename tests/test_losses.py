"""Every loss of TRL's, and sums of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from inspect import getsource
from pathlib import Path

import pytest
from conftest import Run
from transformers import PreTrainedTokenizerFast
from trl.trainer import dpo_trainer

from dpo_cli.config.schema import options

LOSSES = options()["loss_type"].rule["items"]["enum"]


def test_the_losses_are_trls() -> None:
    source = getsource(dpo_trainer)
    named = re.search(r"Should be one of \[([^]]*)\]", source)
    assert named is not None and re.findall(r"'(\w+)'", source[named.start() : source.index("]", named.start())]) == LOSSES
    assert options()["loss_type"].rule["pattern"] == f"^({'|'.join(LOSSES)})$"


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
