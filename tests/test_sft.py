"""SFT: TRL's ids, the loss by its equation, halves that add up, and the seam to TRL."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig
from test_dpo import make_plan
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.trainer import sft_trainer

from dpo_cli.data.encoded import Encoded, EncodedRows
from dpo_cli.data.messages import BadRow
from dpo_cli.data.rows import Demonstration, to_demonstration
from dpo_cli.data.tokens import encode
from dpo_cli.evaluation.metrics import Scores, figures, point_figures, score_rows
from dpo_cli.results.intervals import required
from dpo_cli.scoring import forward
from dpo_cli.scoring.oom import list_halves, run_in_parts
from dpo_cli.training.callbacks.metrics_log import Record
from dpo_cli.training.sft_trainer import DemonstrationTrainer, build_trainer

NONE = EncodedRows.of([])  # held out

ROWS: list[dict[str, Any]] = [
    {"prompt": "where is the cat", "completion": "on the mat"},
    {"prompt": "and the answer", "completion": "the answer is the cat; the cat sat"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the mat"}]},
    {"prompt": "which", "chosen": "the mat on the cat", "rejected": "no"},
    {"text": "the cat sat on the mat; the answer is the mat"},
]


def demonstrations() -> list[Demonstration]:
    return [to_demonstration(row, i + 1) for i, row in enumerate(ROWS)]


def make_trainer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, **options: Any
) -> tuple[DemonstrationTrainer, list[Encoded]]:
    rows = encode(demonstrations(), tokenizer)
    plan = make_plan(tmp_path, strategy="sft", **options)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    return build_trainer(tiny_model("llama", torch.float32), adapter, tokenizer, plan, rows, NONE, lambda policy: {}), rows


def test_trl_contract() -> None:
    """TRL takes ready ids and labels, calls the fused head once, and leaves the mean over a step's tokens to the loss."""
    source = inspect.getsource(sft_trainer)
    assert (
        source.count("outputs = model(**inputs, fused_lm_head=True)\n                    per_token_loss = -outputs.log_probs")
        == 1
    )
    assert 'args.dataset_kwargs.get("skip_prepare_dataset", False)' in source
    assert "loss = per_token_loss.sum() / torch.as_tensor(num_tokens).clamp(min=1)" in source


def test_ids_and_labels_are_trls(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """TRL's own preparation of the same rows as messages, trained on the completion only."""
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in ROWS[:2]
    ]
    from datasets import Dataset

    arguments = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    theirs = SFTTrainer(
        tiny_model("llama", torch.float32), arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    ).train_dataset
    trainer, _ = make_trainer(tmp_path, tokenizer)
    for name in ("input_ids", "labels"):
        assert [list(row) for row in theirs[name]] == trainer.train_dataset[name][:2]


def test_prompts_are_no_part_of_the_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(demonstrations(), tokenizer)
    assert [tokenizer.decode(row.responses[0]) for row in encoded] == [
        "on the mat<|im_end|>\n",
        "the answer is the cat; the cat sat<|im_end|>\n",
        "the mat<|im_end|>\n",
        "the mat on the cat<|im_end|>\n",
        "the cat sat on the mat; the answer is the mat<|im_end|>",
    ]
    assert all(tokenizer.decode(row.prompt_ids).endswith("<|im_start|>assistant\n") for row in encoded[:4])
    assert encoded[4].prompt_ids == []


def test_a_text_that_is_too_long_ends_there_and_a_prompt_loses_its_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    text, prompted = to_demonstration(ROWS[4], 1), to_demonstration(ROWS[0], 2)
    whole = encode([text, prompted], tokenizer)
    limits = [whole[0].length - 3, whole[1].length - 3]
    cut, shorter = (encode([row], tokenizer, max_length=limit)[0] for row, limit in zip((text, prompted), limits, strict=True))
    assert cut.responses[0] == whole[0].responses[0][:-3] and cut.is_cut
    assert shorter.responses == whole[1].responses and shorter.is_cut and shorter.length <= limits[1]


def test_the_loss_is_the_mean_over_all_tokens_of_a_step(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """-sum log p / tokens over one step of two micro-batches of unlike lengths, from transformers' own logits."""
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer, rows = make_trainer(tmp_path, tokenizer, **options)
    lines: list[dict[str, Any]] = []
    trainer.add_callback(Record(trainer.totals, [lambda line: lines.append(line.figures)]))
    trainer.train()
    log_probs, right, tokens = 0.0, 0, 0
    for row in rows:  # the adapter's B is zero at step 1, so the loss is the base model's
        ids = torch.tensor([row.prompt_ids + row.responses[0]])
        with torch.no_grad(), trainer.model.disable_adapter():
            log_p = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        first = max(len(row.prompt_ids) - 1, 0)  # nothing predicts the first token of a text without BOS
        targets = ids[0, first + 1 :]
        log_probs += log_p[first:].gather(-1, targets[:, None]).sum().item()
        right += int((log_p[first:].argmax(-1) == targets).sum())
        tokens += len(targets)
    assert lines[0]["loss"] == pytest.approx(-log_probs / tokens, rel=1e-5)
    assert lines[0]["token_accuracy"] == pytest.approx(right / tokens)


def test_it_learns(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer, rows = make_trainer(tmp_path, tokenizer, max_steps=25, lr_scheduler_type="constant")
    trainer.train()
    made = score_rows(trainer.policy, rows, forward.plain_states, tokenizer.pad_token_id, 2, torch.float32)
    judged = figures(made, [row.row.prompt_key for row in rows], 0.1)
    assert required(judged.gain, "loss").high < 0 < required(judged.gain, "token_accuracy").low
    assert point_figures(made, 0.1)["loss"] == pytest.approx(required(judged.policy, "loss").value)


def test_halves_of_a_sum_add_up() -> None:
    """Each row's share of a step's loss over six tokens is w * x / 6, so dw = (1 + 2 + 3) / 6 = 1, in parts too."""
    weight = torch.nn.Parameter(torch.tensor(1.0))

    def step(values: list[float]) -> Tensor:
        loss = (weight * torch.tensor(values)).sum() / 6
        loss.backward()
        if len(values) > 1:
            raise torch.OutOfMemoryError("none left")
        return loss.detach()

    assert run_in_parts(step, [[1.0, 2.0, 3.0]], [weight], list_halves).item() == pytest.approx(1)
    assert weight.grad is not None and weight.grad.item() == pytest.approx(1)


def test_figures_of_demonstrations_by_hand() -> None:
    """Two completions of 4 and 1 tokens: loss (8 + 1) / 5 = 1.8 against (10 + 1) / 5 = 2.2; right (3 + 0) / 5 against 2 / 5."""
    scores = Scores(
        policy=np.array([[-8.0], [-1.0]]),
        reference=np.array([[-10.0], [-1.0]]),
        policy_right=np.array([[3.0], [0.0]]),
        reference_right=np.array([[2.0], [0.0]]),
        tokens=np.array([[4.0], [1.0]]),
        kl=np.array([[0.5], [0.0]]),
    )
    made = figures(scores, ["a", "b"], 0.1)
    values = {side: {k: f.value for k, f in made.of(side).items() if f} for side in ("policy", "base", "gain")}
    assert values["policy"] == pytest.approx({"loss": 1.8, "token_accuracy": 0.6, "kl_token": 0.1})
    assert values["base"] == pytest.approx({"loss": 2.2, "token_accuracy": 0.4})
    assert values["gain"] == pytest.approx({"loss": -0.4, "token_accuracy": 0.2})


def test_rows_that_are_no_demonstrations() -> None:
    def code(row: object) -> str:
        with pytest.raises(BadRow) as caught:
            to_demonstration(row, 1)
        return caught.value.code

    assert code({"messages": [{"role": "user", "content": "hi"}]}) == "row-role"
    assert code({"prompt": "a"}) == "row-missing-key"
    assert code({"prompt": "a", "completion": " "}) == "row-empty"
    assert code({"prompt": "a", "completion": [{"role": "user", "content": "hi"}]}) == "row-role"
    assert json.loads(to_demonstration({"text": "all of it"}, 1).prompt_key) == "all of it"
