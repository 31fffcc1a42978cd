"""From a run to a model that others can load: merged, judged again, refused when it is worse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import made_row
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dpo_cli import export as exporting
from dpo_cli.cli import app
from dpo_cli.config.config import load
from dpo_cli.console import Console
from dpo_cli.errors import Exit, InvalidInput, RunFailed, UsageError
from dpo_cli.export import Request, export, limit
from dpo_cli.hardware.probe import probe
from dpo_cli.inspection import inspect
from dpo_cli.training.run import evaluate, load_policy, open_run, train

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Train:
    """Trains ten steps on pairs, once for each set of options, and gives the run's folder."""
    place = tmp_path_factory.mktemp("runs")
    data = place / "pairs.jsonl"
    data.write_text("".join(json.dumps(made_row(i)) + "\n" for i in range(40)), encoding="utf-8")
    values = {"model_name": str(tiny_model_dir), "dataset": str(data), "device": "cpu", "bf16": False, "fp16": False}
    values |= {"learning_rate": 5e-3, "eval_split": 0.4, "max_steps": 10, "lora_r": 4, "lora_dropout": 0.0}

    def train_in(name: str, **options: object) -> Path:
        config = place / f"{name}.json"
        if not config.exists():
            config.write_text(json.dumps({**values, "output_dir": str(place / name), **options}), encoding="utf-8")
            loaded = load(str(config))
            _, code = train(loaded, inspect(loaded, probe()), probe(), Console(), overwrite=False, dry_run=False)
            assert code is Exit.DONE
        return place / name

    return train_in


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = tokenizer("the cat sat on the mat; the answer is 4", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=ids).logits
    return made


# What a run can have been trained as. A name that ends in a run's name starts from that run.
KINDS: dict[str, dict[str, object]] = {
    "adapter": {},
    "bf16": {"bf16": True},
    "sft": {"strategy": "sft"},
    "goes-on": {"model_name": "adapter"},
    "merges": {"model_name": "adapter", "lora_r": 2},
    "whole": {"lora_r": 0, "learning_rate": 1e-4},
    "head-saved": {"modules_to_save": ["lm_head"]},
}


def of_kind(trained: Train, kind: str) -> Path:
    options = dict(KINDS[kind])
    if "model_name" in options:
        options["model_name"] = str(of_kind(trained, str(options["model_name"])))
    if options["lora_r"] if "model_name" in options and "lora_r" in options else False:
        options["reference"] = "base"
    return trained(kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_hold_what_the_run_trained(trained: Train, tmp_path: Path, kind: str) -> None:
    """Loaded by transformers alone, the model computes what the run's policy computes."""
    run, out = of_kind(trained, kind), tmp_path / "out"
    made, code = export(Request(str(run), out), Console())
    assert code is Exit.DONE
    policy, plan = load_policy(open_run(str(run), None, Console()), Console())
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, plan.dtype)}
    tokenizer = AutoTokenizer.from_pretrained(out)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        one, other = logits(policy.network, tokenizer), logits(model, tokenizer)
    torch.testing.assert_close(one, other, atol=0.1 if kind == "bf16" else 1e-4, rtol=1e-4)
    assert made["difference"]["max"] < (1 if kind == "bf16" else 1e-3)
