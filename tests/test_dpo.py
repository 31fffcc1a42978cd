"""The trainer: TRL's loss on our scores, and the seam to TRL that must fail loudly when TRL moves."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import norms_in_float64
from conftest import made_row, tiny_model
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, Trainer
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from dpo_cli.config.config import load
from dpo_cli.config.schema import defaults
from dpo_cli.data.encoded import Encoded, EncodedRows
from dpo_cli.data.rows import to_pair
from dpo_cli.data.tokens import encode
from dpo_cli.evaluation.metrics import score_rows
from dpo_cli.hardware.machine import probe
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.plan import Plan
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.scoring import forward, shared_prompts
from dpo_cli.scoring.reference import PAIR
from dpo_cli.training.callbacks.metrics_log import Record
from dpo_cli.training.dpo_trainer import FIGURES, PairTrainer, build_trainer, reward_figures, trainer_arguments
from dpo_cli.training.trainer import ProbeFirst, Totals

NONE = EncodedRows.of([])  # held out


def test_trl_contract() -> None:
    """What the seam overrides exists, is called as we expect, and scores with one call of the fused head."""
    assert list(inspect.signature(DPOTrainer._prepare_dataset).parameters) == [
        "self",
        "dataset",
        "processing_class",
        "args",
        "dataset_name",
    ]
    source = inspect.getsource(dpo_trainer)
    assert source.count("outputs = model(**model_kwargs, labels=labels, fused_lm_head=True)") == 1
    columns = 'ref_chosen_logps, ref_rejected_logps = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]'
    assert source.count(f"if self.precompute_ref_logps:\n            {columns}") == 1
    assert source.count("zip(self.loss_types, self.loss_weights, strict=True)") == 1  # from which we take "sft"
    assert source.count("loss += per_sequence_loss.mean() * loss_weight") == 1
    step = inspect.getsource(Trainer.training_step)
    assert "self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)" in step
    assert "if (not self.model_accepts_loss_kwargs or num_items_in_batch is None)" in step
    columns = inspect.getsource(DPOTrainer._set_signature_columns_if_needed)
    assert all(f'"{name}"' in columns for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


def test_reward_figures_by_hand() -> None:
    """Two pairs, beta 0.1. Rows are chosen 1, chosen 2, rejected 1, rejected 2.

    pi  = -10, -20 | -12, -30        ref = -11, -20 | -10, -30
    pair 1: r_chosen = 0.1 * (-10 + 11) = 0.1, r_rejected = 0.1 * (-12 + 10) = -0.2, margin 0.3, right: 1
    pair 2: both rewards 0, margin 0, a tie: 1/2
    """
    policy, reference = torch.tensor([-10.0, -20, -12, -30]), torch.tensor([-11.0, -20, -10, -30])
    made = reward_figures(policy, reference, 0.1)
    expected = torch.tensor([[1, 0.3, 0.1, -0.2, -10, -12], [0.5, 0, 0, 0, -20, -30]], dtype=torch.float64)
    assert FIGURES[1:] == ("accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
    torch.testing.assert_close(made, expected)


def make_plan(tmp_path: Path, **options: object) -> Plan:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n", encoding="utf-8")
    values = {"model_name": "tiny", "dataset": str(data), "output_dir": str(tmp_path / "run"), "device": "cpu", "bf16": False}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**values, "fp16": False, "learning_rate": 1e-2, **options}), encoding="utf-8")
    return resolve(load(str(config)), probe())


def make_trainer(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    family: str = "llama",
    dropout: float = 0.0,
    states: forward.States = forward.shared_states,
    pairs: list[Encoded] | None = None,
    **options: object,
) -> tuple[PairTrainer, list[Encoded]]:
    pairs = pairs or encode([to_pair(made_row(i), i + 1) for i in range(8)], tokenizer)
    plan = make_plan(tmp_path, lora_dropout=dropout, prompt_sharing=states is forward.shared_states, **options)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear")
    model = tiny_model(family, torch.float32)
    shared_prompts.enable(model)
    return build_trainer(model, adapter, tokenizer, plan, pairs, NONE, lambda model: {}), pairs


PATHS = pytest.mark.parametrize("states", [forward.plain_states, forward.shared_states])


@PATHS
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_training_starts_at_ln_2_and_learns(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str, states: forward.States
) -> None:
    """Step 0: policy and reference are the same model in the same layout, so loss ln 2 and margin 0."""
    trainer, _ = make_trainer(tmp_path, tokenizer, family, states=states, max_steps=12, lr_scheduler_type="constant")
    lines: list[dict[str, Any]] = []
    trainer.add_callback(Record(trainer.totals, [lambda line: lines.append(line.figures)]))
    trainer.train()
    losses = [line["loss"] for line in lines]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert losses[-1] < 0.3


def test_loss_is_the_equation_on_full_logits(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """-log sigmoid(beta * ((pi_c - ref_c) - (pi_r - ref_r))), from transformers' own logits, pair by pair without padding."""
    trainer, pairs = make_trainer(tmp_path, tokenizer, max_steps=3, beta=0.3)
    trainer.train()
    model = trainer.model.eval()

    def log_prob(prompt: list[int], response: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum()

    def scores(pair: Encoded) -> torch.Tensor:
        return torch.stack([log_prob(pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)])

    with torch.no_grad():
        pi = torch.stack([scores(pair) for pair in pairs])
        with model.disable_adapter():
            ref = torch.stack([scores(pair) for pair in pairs])
    pi_logratios, ref_logratios = pi[:, 0] - pi[:, 1], ref[:, 0] - ref[:, 1]
    expected = -torch.nn.functional.logsigmoid(0.3 * (pi_logratios - ref_logratios)).mean()
    batch = trainer.data_collator([row for row in trainer.train_dataset])
    trainer.totals = Totals(FIGURES)
    got = trainer.compute_loss(model, batch)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert abs(expected.item() - math.log(2)) > 0.01  # the adapter has moved, so the comparison is not of zeros
    rewards = 0.3 * (pi - ref)
    figures = trainer.totals.take()
    means = [rewards[:, 0].mean(), rewards[:, 1].mean(), pi[:, 0].mean(), pi[:, 1].mean()]
    assert [figures[name] for name in FIGURES[3:]] == pytest.approx([mean.item() for mean in means], abs=1e-4)
    assert figures["margin"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean().item(), abs=1e-4)


def test_each_prompt_goes_through_the_model_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tokens through the first block for a micro-batch, policy and reference: twice the pairs' own, no copy and no padding."""
    trainer, pairs = make_trainer(tmp_path, tokenizer)
    seen: list[int] = []
    trainer.model.get_base_model().model.layers[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0][..., 0].numel())
    )
    trainer.compute_loss(trainer.model, trainer.data_collator([row for row in trainer.train_dataset]))
    tokens = sum(len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    assert seen == [tokens, tokens]
    assert sum(pair.shared_length for pair in pairs) == tokens
    seen.clear()
    score_rows(trainer.policy, pairs, forward.shared_states, tokenizer.pad_token_id, 3, torch.float32)
    assert sum(seen) == 2 * tokens


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("family", "checkpointing"), [("llama", False), ("llama", True), ("gemma3", False), ("gemma3", True), ("mistral", False)]
)
def test_training_is_the_same_on_both_paths(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str, checkpointing: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Twenty steps of AdamW, micro-batches of 3 of 8 pairs with accumulation: losses and the update of the whole adapter."""
    losses, adapters = [], []
    for states in (forward.plain_states, forward.shared_states):
        options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 20}
        trainer, _ = make_trainer(
            tmp_path, tokenizer, family, states=states, gradient_checkpointing=checkpointing, learning_rate=2e-3, **options
        )
        if dtype == torch.float64:
            trainer.model.double()
            norms_in_float64(trainer.model)
        before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters() if p.requires_grad])
        trainer.train()
        after = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
        assert after.dtype == dtype
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        adapters.append(after - before)
    assert losses[0][-1] < 0.6
    assert losses[1] == pytest.approx(losses[0], abs=tolerance)
    assert (adapters[1] - adapters[0]).norm() <= tolerance * adapters[0].norm()


def test_every_option_reaches_trl_and_peft(tmp_path: Path) -> None:
    """Each value differs from its default, so an option that is dropped on the way is seen."""
    same = {
        "num_train_epochs": 2.5,
        "max_steps": 7,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 5,
        "per_device_eval_batch_size": 9,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "weight_decay": 0.02,
        "max_grad_norm": 0.7,
        "beta": 0.4,
        "seed": 11,
        "gradient_checkpointing": True,
        "optim": "sgd",
    }
    adapter = {"lora_r": 12, "lora_alpha": 18, "lora_dropout": 0.2, "target_modules": ["q_proj"]}
    assert not {key for key, value in {**same, **adapter}.items() if defaults()[key] == value}
    plan = make_plan(tmp_path, **same, **adapter)
    args = trainer_arguments(plan)
    whole_step = {"per_device_train_batch_size": 15, "gradient_accumulation_steps": 1}  # training/trainer.py divides it
    assert {key: getattr(args, key) for key in same} == {**same, **whole_step}
    compares = trainer_arguments(make_plan(tmp_path, **same, loss_type="aot"))
    assert {key: getattr(compares, key) for key in same} == same
    assert trainer_arguments(make_plan(tmp_path, group_by_length=True)).train_sampling_strategy == "group_by_length"
    ratio = make_plan(tmp_path, warmup_ratio=0.25, warmup_steps=0)
    assert trainer_arguments(ratio).get_warmup_steps(100) == 25
    made = HuggingFace(ModelSource.of("tiny/tiny")).adapter_config(plan, tiny_model("llama"))
    assert (made.r, made.lora_alpha, made.lora_dropout, made.target_modules) == (12, 18, 0.2, {"q_proj"})


def test_the_reference_of_a_pair_is_computed_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Eight pairs, three epochs: the live reference scores each of them once, with the same losses as one that always does."""

    def run(place: Path, keeps: bool) -> tuple[list[int], list[float]]:
        place.mkdir()
        trainer, _ = make_trainer(place, tokenizer, num_train_epochs=3, lr_scheduler_type="constant")
        trainer.remove_callback(ProbeFirst)
        live, scored = trainer.reference.live, list[int]()

        class Counting:
            def log_probs(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
                scored.extend(batch[PAIR].chunk(2)[0].tolist())
                if not keeps:
                    trainer.reference.known.zero_()
                return live.log_probs(batch)

        trainer.reference.live = Counting()
        if not keeps:
            step = trainer.run_row
            trainer.run_row = lambda *args: trainer.reference.known.zero_() is not None and step(*args)
        trainer.train()
        return sorted(scored), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    once, losses = run(tmp_path / "once", keeps=True)
    always, others = run(tmp_path / "always", keeps=False)
    assert once == list(range(8))
    assert always == sorted([*range(8)] * 3)
    assert losses[-1] < 0.6 and losses == pytest.approx(others, abs=1e-6)


def test_each_token_goes_through_the_model_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tokens that reach the embedding in two epochs: of the policy each pair twice with its prompt once, of the reference once.

    A prompt that is computed for each response, a reference that is computed again and padding would all add to them.
    """
    rows = [{**made_row(i), "chosen": made_row(i)["chosen"] + " the answer" * (i % 3)} for i in range(8)]  # of many lengths
    pairs = encode([to_pair(row, i + 1) for i, row in enumerate(rows)], tokenizer)
    trainer, _ = make_trainer(tmp_path, tokenizer, pairs=pairs, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer.remove_callback(ProbeFirst)
    tokens: dict[bool, int] = {True: 0, False: 0}  # by whether a gradient is computed: of the policy

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        tokens[torch.is_grad_enabled()] += inputs[0].numel()

    trainer.policy.network.get_input_embeddings().register_forward_hook(count)
    trainer.train()
    once = sum(pair.shared_length for pair in pairs)
    assert len({pair.shared_length for pair in pairs}) == 3
    assert tokens == {True: 2 * once, False: once}


def test_checkpointing_changes_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    losses = []
    for checkpointing in (False, True):
        trainer, _ = make_trainer(tmp_path, tokenizer, max_steps=4, gradient_checkpointing=checkpointing)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0][-1] < 0.6
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


def test_lora_dropout_acts_and_the_reference_has_none(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """With dropout two passes of a moved adapter differ; the reference, in training mode as TRL runs it, does not."""
    trainer, _ = make_trainer(tmp_path, tokenizer, dropout=0.5, max_steps=2)
    trainer.train()
    model = trainer.model.train()
    ids = torch.randint(3, 300, (1, 12))
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
