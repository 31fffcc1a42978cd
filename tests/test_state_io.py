"""The state of a training as JSON and safetensors: what is read is what was written, to the bit and to the type."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_dpo import make_trainer
from transformers import PreTrainedTokenizerFast

from dpo_cli.runs.state_io import load_state, random_state, save_state, set_random_state


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    shared = torch.arange(3)
    state = {
        "state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(2, 3).to(torch.bfloat16)}, 1: {"map": shared}},
        "param_groups": [{"betas": (0.9, 0.999), "lr": 1e-300, "foreach": None, "fused": True, "params": [0, 1]}],
        "again": shared,
        "nothing": torch.zeros(0, 4),
        "turned": torch.arange(6).reshape(2, 3).T,
        "array": np.array([1, 2**32 - 1], dtype=np.uint32),
        "limits": [math.inf, -0.0, 2**70],
    }
    save_state(tmp_path / "made", state)
    read = load_state(tmp_path / "made")
    assert list(read) == list(state)
    for name in ("step", "exp_avg"):
        assert torch.equal(read["state"][0][name], state["state"][0][name])
        assert read["state"][0][name].dtype == state["state"][0][name].dtype
    assert read["param_groups"] == state["param_groups"] and isinstance(read["param_groups"][0]["betas"], tuple)
    assert torch.equal(read["again"], shared) and torch.equal(read["state"][1]["map"], shared)
    assert read["nothing"].shape == (0, 4) and torch.equal(read["turned"], state["turned"])
    assert read["array"].dtype == np.uint32 and read["array"].tolist() == state["array"].tolist()
    assert read["limits"] == state["limits"] and math.copysign(1, read["limits"][1]) == -1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_what_it_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a function in the state"):
        save_state(tmp_path / "made", {"lambda": lambda: None})


def test_random_numbers_go_on(tmp_path: Path) -> None:
    save_state(tmp_path / "random", random_state())
    drawn = torch.rand(4), random.random(), np.random.rand()
    set_random_state(load_state(tmp_path / "random"))
    assert torch.equal(torch.rand(4), drawn[0]) and (random.random(), np.random.rand()) == drawn[1:]


def test_the_state_of_bitsandbytes(tmp_path: Path) -> None:
    """Its 8-bit states share one table, which safetensors alone would refuse. It steps on a GPU only, so a state is made up."""
    import bitsandbytes

    weights = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(2)]
    made = bitsandbytes.optim.AdamW8bit(weights)
    made.fill_qmap()
    table = made.name2qmap["dynamic"]
    for weight in weights:
        made.state[weight] = {"step": 3, "state1": torch.randint(0, 255, (64, 64), dtype=torch.uint8), "qmap1": table}
    save_state(tmp_path / "made", made.state_dict())
    read = load_state(tmp_path / "made")
    assert list(read["state"][0]) == list(made.state_dict()["state"][0])
    made.load_state_dict(read)
    again = load_state(tmp_path / "made")
    save_state(tmp_path / "again", made.state_dict())
    assert str(load_state(tmp_path / "again")) == str(again)
    assert torch.equal(made.state[weights[1]]["qmap1"], table)


def test_adafactor_keeps_its_precision_beside_weights_in_bf16(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """torch alone gives a loaded state the dtype of its weight."""
    trainers = []
    for _ in range(2):
        trainer, _ = make_trainer(tmp_path, tokenizer, optim="adafactor", max_steps=1)
        for weight in trainer.model.parameters():
            weight.data = weight.data.bfloat16() if weight.requires_grad else weight.data
        trainer.create_optimizer_and_scheduler(1)
        trainers.append(trainer)
    for weight in trainers[0].model.parameters():
        weight.grad = torch.randn_like(weight) if weight.requires_grad else None
    trainers[0].optimizer.step()
    trainers[0]._save_optimizer_and_scheduler(str(tmp_path))
    trainers[1]._load_optimizer_and_scheduler(str(tmp_path))
    kept, loaded = (trainer.optimizer.state_dict()["state"] for trainer in trainers)
    assert kept[0]["exp_avg_sq_row"].dtype == torch.float32
    for i, state in kept.items():
        for name, value in state.items():
            assert not isinstance(value, torch.Tensor) or (
                loaded[i][name].dtype == value.dtype and torch.equal(loaded[i][name], value)
            )
