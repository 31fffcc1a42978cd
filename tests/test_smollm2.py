"""On the demo model, where rounding is that of a real model: `make exact`, some minutes on two cores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT
from made import conversation_pairs
from test_dpo import make_plan
from test_scoring import BREAKS

from dpo_cli.data.formats import to_pair
from dpo_cli.data.tokens import encode
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.training import scoring, sharing
from dpo_cli.training.dpo import build_trainer

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS = 20


def train(
    tmp_path: Path, prompt_sharing: bool, optimizer: str = "adamw_torch", swapped: bool = False
) -> tuple[list[float], torch.Tensor]:
    """Twenty steps over forty multi-turn pairs in float32: the loss of each step, and the update of the whole adapter.

    With `swapped` the two pairs of each micro-batch change places, which changes nothing but the order of sums.
    """
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": STEPS, "learning_rate": 2e-4}
    plan = make_plan(tmp_path, model_name=str(MODEL), **options)
    provider = HuggingFace(str(MODEL))
    tokenizer = provider.tokenizer()
    pairs = encode([to_pair(row, i + 1) for i, row in enumerate(conversation_pairs(2 * STEPS, 8, 8))], tokenizer)
    base = provider.base_model(plan)
    path = scoring.choose_path(base, pairs, int(tokenizer.pad_token_id), prompt_sharing)
    assert path.shares == prompt_sharing
    torch.manual_seed(plan.config.seed)
    trainer = build_trainer(
        base, provider.adapter_config(plan, base), tokenizer, plan, pairs, [], path.states, lambda model: {}
    )
    trainer.args.optim = optimizer
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: collate(rows[::-1] if swapped else rows)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    before = torch.cat([parameter.detach().flatten() for parameter in trained])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    return losses, torch.cat([parameter.detach().flatten() for parameter in trained]) - before


def compare(name: str, one: tuple[list[float], torch.Tensor], other: tuple[list[float], torch.Tensor]) -> tuple[float, float]:
    """The largest difference of a step's loss, and the norm of the adapters' difference over that of the update."""
    apart = max(abs(a - b) for a, b in zip(one[0], other[0], strict=True))
    relative = float((one[1] - other[1]).norm() / other[1].norm())
    print(f"\n{name}: losses differ by {apart:.1e} at most, adapters by {relative:.1e} of the update's norm")
    return apart, relative


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_file(), reason="`make install` fetches the demo model")
def test_twenty_steps_are_the_same_on_both_paths(tmp_path: Path) -> None:
    """Plain gradient descent carries a gradient's rounding over as it is; AdamW divides each element by its own size.

    So an element that is nearly zero turns its rounding into a whole step. How much that makes on one and the same path is
    seen by swapping the pairs of each micro-batch; the other path may differ from it by no more than three times that.
    """
    plain, shared = train(tmp_path, False, "sgd"), train(tmp_path, True, "sgd")
    assert max(compare("shared against plain, SGD", shared, plain)) <= 1e-5
    plain, shared = train(tmp_path, False), train(tmp_path, True)
    apart, relative = compare("shared against plain, AdamW", shared, plain)
    assert max(plain[0]) - min(plain[0]) > 0.01  # it has moved
    assert apart <= 1e-5
    _, rounding = compare("plain against itself, pairs swapped, AdamW", train(tmp_path, False, swapped=True), plain)
    assert relative <= 3 * rounding


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_file(), reason="`make install` fetches the demo model")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_and_a_broken_layout_are_told_apart(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `TOLERANCE` stands between: how far the paths are apart by rounding, and by each way to break the layout."""
    provider = HuggingFace(str(MODEL))
    base = provider.base_model(make_plan(tmp_path, model_name=str(MODEL), bf16=dtype == torch.bfloat16))
    tokenizer = provider.tokenizer()
    pairs = encode([to_pair(row, i + 1) for i, row in enumerate(conversation_pairs(2, 8, 8))], tokenizer)
    batch = scoring.collate(pairs, int(tokenizer.pad_token_id), base.device)
    plain = scoring.response_log_probs(base, scoring.plain_states, batch)
    sharing.enable(base)

    def apart() -> float:
        return scoring.disagreement(plain, scoring.response_log_probs(base, scoring.shared_states, batch), batch)

    rounding = apart()
    lay_out = sharing.lay_out
    broken = {}
    for break_it in BREAKS:
        monkeypatch.setattr(sharing, "lay_out", lambda *rows, break_it=break_it: break_it(lay_out(*rows)))
        broken[break_it.__name__] = apart()
    print(f"\n{dtype}: rounding {rounding:.1e} nats a token;", ", ".join(f"{k} {v:.2f}" for k, v in broken.items()))
    assert rounding < scoring.TOLERANCE[dtype] < min(broken.values())
