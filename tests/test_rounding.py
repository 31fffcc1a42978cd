"""The rounding of a run in bfloat16, and evaluations without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import judged_json
from conftest import Run, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from dpo_cli.commands.requests import Request
from dpo_cli.config.config import load
from dpo_cli.data.encoded import Encoded
from dpo_cli.evaluation.rounding import rounding_of
from dpo_cli.hardware.machine import probe
from dpo_cli.plan.plan import Decided, Plan, Rounding
from dpo_cli.plan.preflight import inspect
from dpo_cli.plan.tokenized import prepare
from dpo_cli.providers.policy import Policy
from dpo_cli.ui.console import Console

Prepared = Callable[..., tuple[Plan, list[Encoded]]]


@pytest.fixture
def prepared(
    tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> Prepared:
    """A plan with these options, and its first pairs."""

    def start(**options: object) -> tuple[Plan, list[Encoded]]:
        config = tmp_path / "rounded.json"
        values = {"model_name": str(tiny_model_dir), "dataset": str(pairs_file()), "device": "cpu", "bf16": True, **options}
        config.write_text(json.dumps(values), encoding="utf-8")
        data, plan = inspect(load(str(config)), probe(), with_fit=False).require()
        return plan, prepare(data, tokenizer, plan, None, print).train[:8]

    return start


def adapted(dtype: torch.dtype) -> Policy:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    return Policy(get_peft_model(tiny_model("llama", dtype), config))


def whole(dtype: torch.dtype) -> Policy:
    return Policy(tiny_model("llama", torch.float32), tiny_model("llama", torch.float32))


@pytest.mark.parametrize("policy_of", [adapted, whole])
def test_rounding_is_measured_without_a_trace(
    policy_of: Callable[[torch.dtype], Policy], prepared: Prepared, tokenizer: PreTrainedTokenizerFast
) -> None:
    plan, rows = prepared()
    policy, state = policy_of(torch.bfloat16), torch.get_rng_state()
    before = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    rounding = rounding_of(policy, rows, tokenizer, plan)
    assert rounding is not None and rounding.response > 0 and rounding.pair > 0
    after = dict(policy.model.named_parameters())
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert torch.equal(torch.get_rng_state(), state)
    assert rounding_of(policy, rows, tokenizer, plan) == rounding  # the same draws


@pytest.mark.parametrize("options", [{"bf16": False, "fp16": False}, {"strategy": "sft"}])
def test_nothing_is_measured_in_float32_or_without_a_reference(
    options: dict[str, object], prepared: Prepared, tokenizer: PreTrainedTokenizerFast
) -> None:
    plan, rows = prepared(**options)
    assert rounding_of(adapted(torch.float32), rows, tokenizer, plan) is None


def test_the_rounding_of_a_mean_is_that_of_a_pair_over_the_root_of_their_number() -> None:
    assert Rounding(0.3, 0.4).of_mean(16, beta=0.5) == 0.05


def plan_of(run_dir: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))
    return plan


def test_a_run_keeps_its_rounding_and_shows_it(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    _, run_dir = run(bf16=True)
    plan, shown = plan_of(run_dir), capsys.readouterr().out
    rounding = Decided.of(plan).rounding
    assert rounding is not None and plan["rounding"] == vars(rounding)
    (note,) = [note for note in plan["notes"] if note.startswith("rounding: bfloat16 moves the reward of a response by about")]
    assert note in " ".join(shown.split())
    assert plan_of(run(bf16=False)[1])["rounding"] is None


@pytest.mark.parametrize(("learning_rate", "dtype"), [(1e-7, "float32"), (5e-2, "bfloat16")])
def test_figures_of_the_size_of_rounding_are_computed_in_float32(
    learning_rate: float, dtype: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """The policy has hardly moved, or far; `dpo eval` decides the same."""
    _, run_dir = run(bf16=True, learning_rate=learning_rate, max_steps=8, eval_split=0.5)
    assert ("scored again in float32" in " ".join(capsys.readouterr().out.split())) == (dtype == "float32")
    kept = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    again = judged_json(Request(str(run_dir)), Console())
    assert kept["dtype"] == again["dtype"] == dtype and kept["policy"]["margin"] == again["policy"]["margin"]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (last,) = [line for line in lines if line["split"] == "eval" and line["step"] == 8]
    assert last["margin"] == pytest.approx(kept["policy"]["margin"]["value"], rel=1e-6)  # the curve ends at the headline
    rounding = Decided.of(plan_of(run_dir)).rounding
    assert rounding is not None
    if dtype == "float32":  # a change of 8 steps of 1e-7 is not visible in bfloat16
        assert abs(kept["policy"]["margin"]["value"]) < rounding.of_mean(kept["pairs"], 0.1)


def test_a_plan_without_rounding_is_read(run: Run) -> None:
    plan = plan_of(run(bf16=True)[1])
    decided = Decided.of(plan)
    del plan["rounding"]  # of an older version
    assert Decided.of(plan) == replace(decided, rounding=None)
