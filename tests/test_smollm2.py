"""On the demo model, where rounding is that of a real model: `make exact`, some minutes on two cores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import conversation_pairs, norms_in_float64
from conftest import ROOT
from peft import get_peft_model
from test_dpo import make_plan
from test_forward import BREAKS
from transformers import PreTrainedTokenizerBase

from dpo_cli.data.encoded import Encoded, EncodedRows
from dpo_cli.data.rows import to_pair
from dpo_cli.data.tokens import encode
from dpo_cli.models.source import ModelSource
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.scoring import forward, shared_prompts
from dpo_cli.scoring.lm_head import Head, score_tokens
from dpo_cli.training.dpo_trainer import build_trainer

NONE = EncodedRows.of([])  # held out

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS = 20


def some_pairs(count: int, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    return encode([to_pair(row, i + 1) for i, row in enumerate(conversation_pairs(count, 8, 8))], tokenizer)


def train(
    tmp_path: Path,
    prompt_sharing: bool,
    optimizer: str = "adamw_torch",
    micro_batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[float], torch.Tensor]:
    """Twenty steps over forty multi-turn pairs: the loss of each step, and the update of the whole adapter.

    With `micro_batch` 1 the two pairs of a step run one after the other, in rows of their own: nothing but rounding changes.
    """
    options = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": 2 // micro_batch, "max_steps": STEPS}
    options["learning_rate"] = 0.3 if optimizer == "sgd" else 2e-4  # both move the weights by about as much
    plan = make_plan(tmp_path, model_name=str(MODEL), prompt_sharing=prompt_sharing, optim=optimizer, **options)
    plan = replace(plan, row_tokens=0) if micro_batch == 1 else plan  # else both pairs share a row all the same
    provider = HuggingFace(ModelSource.of(str(MODEL)))
    tokenizer = provider.tokenizer()
    pairs = some_pairs(2 * STEPS, tokenizer)
    base = provider.base_model(plan)
    plan = replace(plan, scoring=forward.choose(base, pairs, int(tokenizer.pad_token_id), prompt_sharing))
    assert plan.scoring.shared == prompt_sharing
    torch.manual_seed(plan.config.seed)
    trainer = build_trainer(base, provider.adapter_config(plan, base), tokenizer, plan, pairs, NONE, lambda model: {})
    if dtype == torch.float64:
        trainer.model.double()
        norms_in_float64(trainer.model)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    before = torch.cat([parameter.detach().flatten() for parameter in trained])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    return losses, torch.cat([parameter.detach().flatten() for parameter in trained]) - before


Record = Callable[[str, object], None]  # what benchmarks/exact.py makes its table of
Trained = tuple[list[float], torch.Tensor]


def compare(record: Record, name: str, one: Trained, other: Trained) -> tuple[float, float]:
    """The largest difference of a step's loss, and the norm of the adapters' difference over that of the update."""
    apart = max(abs(a - b) for a, b in zip(one[0], other[0], strict=True))
    relative = float((one[1] - other[1]).norm() / other[1].norm())
    print(f"\n{name}: losses differ by {apart:.1e} at most, adapters by {relative:.1e} of the update's norm")
    record(name, f"{apart:.3e} {relative:.3e}")
    return apart, relative


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_file(), reason="`make install` fetches the demo model")
def test_twenty_steps_are_the_same_on_both_paths(tmp_path: Path, record_property: Record) -> None:
    """In float32, and again in float64, where both optimizers agree.

    Gradient descent carries a gradient's rounding over as it is, and in float32 the adapters agree to 1e-5. AdamW divides each
    element of a gradient by its own size, so those that are nearly zero turn their rounding into whole steps: in float32
    even the plain path is further than 1e-5 from itself when its micro-batches are smaller, and the shared one is held to that.
    """
    plain, shared = train(tmp_path, False, "sgd"), train(tmp_path, True, "sgd")
    assert max(plain[0]) - min(plain[0]) > 0.01  # it has moved
    assert max(compare(record_property, "shared against plain, SGD", shared, plain)) <= 1e-5
    plain, shared = train(tmp_path, False), train(tmp_path, True)
    assert max(plain[0]) - min(plain[0]) > 0.01
    apart, relative = compare(record_property, "shared against plain, AdamW", shared, plain)
    one_by_one = train(tmp_path, False, micro_batch=1)
    _, rounding = compare(record_property, "plain against itself, one pair at a time, AdamW", one_by_one, plain)
    assert apart <= 1e-5 and relative <= 2 * rounding
    plain, shared = (train(tmp_path, sharing, dtype=torch.float64) for sharing in (False, True))
    assert max(compare(record_property, "shared against plain, AdamW, float64", shared, plain)) <= 1e-8


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_file(), reason="`make install` fetches the demo model")
def test_the_paths_differ_by_less_than_float32_does_from_float64(tmp_path: Path, record_property: Record) -> None:
    """The gradient of the whole adapter for one micro-batch, relative norms, with float64 as the truth."""
    provider = HuggingFace(ModelSource.of(str(MODEL)))
    tokenizer = provider.tokenizer()
    plan = make_plan(tmp_path, model_name=str(MODEL))
    base = provider.base_model(plan)
    model = get_peft_model(base, provider.adapter_config(plan, base))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    batch = forward.collate(some_pairs(2, tokenizer), int(tokenizer.pad_token_id), base.device)
    labels = batch["labels"][:, 1:]
    scored = labels != shared_prompts.IGNORED
    shared_prompts.enable(base)

    def gradient(states: forward.States) -> torch.Tensor:
        scores = score_tokens(states(base, **batch), labels[scored], Head.of(base)).log_probs
        chosen, rejected = scores.new_zeros(scored.shape).masked_scatter(scored, scores).sum(dim=1).chunk(2)
        (-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected))).mean().backward()
        made = torch.cat([parameter.grad.flatten().double() for parameter in model.parameters() if parameter.requires_grad])
        model.zero_grad()
        return made

    plain, shared = gradient(forward.plain_states), gradient(forward.shared_states)
    model.double()
    truth = gradient(forward.plain_states)
    errors = {"plain": plain - truth, "shared": shared - truth, "shared against plain": shared - plain}
    relative = {name: float(error.norm() / truth.norm()) for name, error in errors.items()}
    print("\ngradient in float32:", ", ".join(f"{name} {value:.1e}" for name, value in relative.items()))
    for name, value in relative.items():
        record_property(f"{name}{'' if 'against' in name else ' against float64'}, gradient of a micro-batch", f"- {value:.3e}")
    assert relative["shared"] <= 1.2 * relative["plain"]
    assert relative["shared against plain"] <= 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_file(), reason="`make install` fetches the demo model")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_and_a_broken_layout_are_told_apart(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How far the paths are apart by rounding, by each way to break the layout, and what `choose` says of both."""
    provider = HuggingFace(ModelSource.of(str(MODEL)))
    base = provider.base_model(make_plan(tmp_path, model_name=str(MODEL), bf16=dtype == torch.bfloat16))
    tokenizer = provider.tokenizer()
    pairs = some_pairs(2, tokenizer)
    exact = forward.choose(base, pairs, int(tokenizer.pad_token_id), "auto")
    print(f"\n{dtype}: {exact.why}")
    assert exact.shared
    lay_out = shared_prompts.lay_out
    for break_it in BREAKS:
        monkeypatch.setattr(shared_prompts, "lay_out", lambda *rows, break_it=break_it: break_it(lay_out(*rows)))
        broken = forward.choose(base, pairs, int(tokenizer.pad_token_id), "auto")
        print(f"{break_it.__name__}: {broken.why}")
        assert not broken.shared
