"""What a training asks of its device: one GPU a process, no float64 on it, and its memory back at the end of a stage."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from test_dpo import make_plan
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from typer.testing import CliRunner

from dpo_cli.app import app
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.runs.state_io import random_state, random_state_kept, set_random_state
from dpo_cli.storage.world import ALONE
from dpo_cli.training import dpo_trainer, sft_trainer
from dpo_cli.training.trainer import of_process


@pytest.mark.parametrize("arguments", [dpo_trainer.trainer_arguments, sft_trainer.trainer_arguments])
@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
def test_one_process_uses_one_device(
    arguments: Callable[..., Any], gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' arguments with so many GPUs in sight, and as the trainers get them."""
    plan = make_plan(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(dpo_trainer, "common_arguments", on_gpus)
    monkeypatch.setattr(sft_trainer, "common_arguments", on_gpus)
    theirs = arguments(plan)
    assert (theirs.n_gpu, theirs.train_batch_size) == (gpus, 2 * max(1, gpus))
    ours = of_process(theirs, ALONE)
    assert (ours.n_gpu, ours.train_batch_size, ours.eval_batch_size) == (
        min(1, gpus),
        2,
        plan.config.per_device_eval_batch_size,
    )


def on_gpus(plan: Any) -> dict[str, Any]:
    from dpo_cli.training.trainer import common_arguments

    return {**common_arguments(plan), "use_cpu": False}


class NoDoubles(TorchDispatchMode):
    """Stands in for a device without float64, as Apple's GPUs are: each tensor lies there until `.cpu()` brings it here.

    A float64 tensor is refused that is made of one on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.here = WeakIdKeyDictionary()
        self.brought = 0

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            copied = tensor.detach().clone()
        self.here[copied] = True
        self.brought += 1
        return copied

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_here = all(tensor in self.here for tensor in given)  # what is made of no tensor is made here
        made = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)):
            if is_here:
                self.here[tensor] = True
            elif tensor.dtype == torch.float64:
                raise RuntimeError(f"the device has no float64: {func}")
        return made


@contextmanager
def no_doubles(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoDoubles]:
    with monkeypatch.context() as patched, NoDoubles() as guard:
        patched.setattr(torch.Tensor, "cpu", lambda tensor: guard.bring(tensor))
        yield guard


def test_the_guard_sees_a_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(2)
    with no_doubles(monkeypatch):
        assert float(weight.cpu().double().sum()) == 2
        assert torch.ones(2, dtype=torch.float64).sum() == 2
        for wrong in (lambda: weight.double(), lambda: weight * weight.cpu().double(), lambda: weight.new_zeros(2).double()):
            with pytest.raises(RuntimeError, match="no float64"):
                wrong()


@pytest.mark.parametrize("options", [{}, {"strategy": "sft"}, {"prompt_sharing": False, "lora_dropout": 0.1}, {"lora_r": 0}])
def test_a_training_makes_no_float64_on_its_device(run: Run, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run: loading, steps, evaluation with sampled answers, saving."""
    plain, _ = run(**options, eval_split=0.3)
    with no_doubles(monkeypatch) as guard:
        guarded, _ = run(**options, eval_split=0.3)
    assert guard.brought > 10
    assert guarded["adapter_sha256"] == plain["adapter_sha256"] and guarded["eval"] == plain["eval"]


def test_what_is_drawn_within_leaves_no_trace() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    with random_state_kept():
        torch.manual_seed(8)
        torch.rand(5)
    assert torch.equal(torch.rand(3), wanted)
    before = {
        name: value for name, value in random_state().items() if name != "mps"
    }  # as checkpoints of earlier versions have it
    set_random_state(before)


@pytest.mark.parametrize("in_ram", [False, True])
def test_the_model_of_a_stage_is_gone_before_the_next_one_loads(
    tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, in_ram: bool
) -> None:
    load, parameters, alive = HuggingFace.base_model, [], []

    def base_model(self: HuggingFace, *given: Any) -> Any:
        alive.append(sum(reference() is not None for reference in parameters))
        model = load(self, *given)
        parameters.extend(map(weakref.ref, model.parameters()))
        return model

    monkeypatch.setattr(HuggingFace, "base_model", base_model)
    common = {"dataset": str(pairs_file()), "device": "cpu", "bf16": False, "fp16": False, "eval_split": 0.3, "lora_r": 4}
    stages = [{"strategy": "sft", "learning_rate": 1e-2}, {"reference": "adapter"}, {"reference": "base"}]
    config = tmp_path / "three.json"
    options = {**common, "model_name": str(tiny_model_dir), "max_steps": 1, "kl_prompts": 2, "max_new_tokens": 2}
    options["cpu_offload"] = in_ram
    config.write_text(json.dumps({**options, "stages": stages, "output_dir": str(tmp_path / "all")}), encoding="utf-8")
    gc.disable()  # what is let go of is so by the program
    try:
        done = CliRunner().invoke(app, ["train", str(config)])
    finally:
        gc.enable()
    assert done.exit_code == 0, done.stderr
    assert alive == [0, 0, 0] and len(parameters) > 30
