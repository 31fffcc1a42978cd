"""Options that act between config and TRL: the evaluation set, the chat template, the optimizer, the order, the 4-bit kinds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import judged_json
from conftest import Run, made_row
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from dpo_cli.commands.requests import Request
from dpo_cli.config.config import load
from dpo_cli.data.rows import to_pair
from dpo_cli.data.tokens import encode
from dpo_cli.errors import InvalidInput
from dpo_cli.hardware.machine import probe
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.preflight import inspect
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.ui.console import Console


def test_an_evaluation_set_is_judged_and_the_whole_dataset_trained_on(run: Run, tmp_path: Path) -> None:
    others = tmp_path / "others.jsonl"
    others.write_text("".join(json.dumps({**made_row(i), "prompt": f"other {i}"}) + "\n" for i in range(5)), encoding="utf-8")
    summary, place = run(eval_dataset=str(others))
    counts = json.loads((place / "plan.json").read_text(encoding="utf-8"))["counts"]
    assert (counts["train_pairs"], counts["eval_pairs"], counts["eval_prompts"]) == (24, 5, 5)
    judged = judged_json(Request(str(place)), Console())
    assert judged["pairs"] == 5
    assert judged["policy"]["margin"]["value"] == pytest.approx(summary["eval"]["margin"]["value"], abs=1e-6)
    assert judged_json(Request(str(place), dataset=str(tmp_path / "pairs.jsonl")), Console())["pairs"] == 24


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "adafactor", "sgd"])
def test_every_optimizer_trains(run: Run, optim: str) -> None:
    summary, _ = run(optim=optim, max_steps=4)
    assert summary["steps"] == 4
    assert summary["train"]["loss"] != pytest.approx(math.log(2), abs=1e-7)  # it has moved


def test_rslora_scales_the_adapter_by_the_root_of_its_rank(run: Run) -> None:
    _, place = run(use_rslora=True)  # rank 4, alpha 8: 8 / sqrt(4), where 8 / 4 is usual
    base = AutoModelForCausalLM.from_pretrained(
        json.loads((place / "plan.json").read_text(encoding="utf-8"))["config"]["model_name"]
    )
    model = PeftModel.from_pretrained(base, str(place / "adapter"))
    assert {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)} == {4.0}


@pytest.mark.parametrize("wish", [True, False])
def test_the_chat_template_is_used_in_training_as_the_config_says(run: Run, wish: bool) -> None:
    _, place = run(use_chat_template=wish, max_steps=1)
    counts = json.loads((place / "plan.json").read_text(encoding="utf-8"))["counts"]
    assert (counts["longest"] > 30) == wish  # the markers of ChatML are more than half of such a short pair


def test_grouping_by_length_puts_the_longest_first(run: Run, pairs_file: Callable[..., Path]) -> None:
    """transformers' sampler begins with the longest batch, whatever the seed; at random the first pair would change with it."""
    data = str(pairs_file([{"prompt": f"q{i}", "chosen": "the cat " * (1 + 3 * i), "rejected": "no"} for i in range(12)]))
    one_pair = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 1}

    def first_tokens(grouped: bool) -> set[int]:
        runs = [run(dataset=data, group_by_length=grouped, seed=seed, **one_pair) for seed in range(3)]
        return {summary["train"]["tokens"] for summary, _ in runs}

    assert len(first_tokens(True)) == 1
    assert len(first_tokens(False)) > 1


def test_chat_template_auto_true_and_false(tokenizer: PreTrainedTokenizerFast) -> None:
    pair = to_pair(made_row(0), 1)
    ids = {wish: encode([pair], tokenizer, wish)[0].prompt_ids for wish in ("auto", True, False)}
    assert ids["auto"] == ids[True] != ids[False]
    assert tokenizer.decode(ids[False]).startswith("question")
    assert "<|im_start|>user" in tokenizer.decode(ids[True])
    rows = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    messages = to_pair({key: [{"role": role, "content": key}] for key, role in rows.items()}, 7)
    with pytest.raises(InvalidInput) as caught:
        encode([pair, messages], tokenizer, False)
    assert [(problem.code, problem.line) for problem in caught.value.problems] == [("messages-without-template", 7)]


def test_a_template_that_is_demanded_must_be_there(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert encode([to_pair(made_row(0), 1)], tokenizer, "auto")
    with pytest.raises(InvalidInput) as caught:
        encode([to_pair(made_row(0), 1)], tokenizer, True)
    assert caught.value.problems[0].code == "no-chat-template"


def test_4bit_weights_are_what_the_config_says(tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path]) -> None:
    config = tmp_path / "config.json"
    values = {"model_name": str(tiny_model_dir), "dataset": str(pairs_file()), "device": "cpu", "bf16": True, "use_4bit": True}
    values |= {"bnb_4bit_quant_type": "fp4", "use_nested_quant": False, "bnb_4bit_compute_dtype": "float32"}
    config.write_text(json.dumps(values), encoding="utf-8")
    _, plan = inspect(load(str(config)), probe()).require()
    made: Any = HuggingFace(ModelSource.of(str(tiny_model_dir))).base_model(plan).config.quantization_config
    assert isinstance(made, BitsAndBytesConfig)
    found = (made.bnb_4bit_quant_type, made.bnb_4bit_use_double_quant, made.bnb_4bit_compute_dtype)
    assert found == ("fp4", False, torch.float32)
