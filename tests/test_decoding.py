"""Fast decoding on a CPU: the answers and logits of transformers' own, with nothing repeated and nothing copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GenerationConfig

from dpo_cli.evaluation import decoding
from dpo_cli.evaluation.decoding import fast_decoding
from dpo_cli.scoring import shared_prompts

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "mistral", "phi3", "granite", "cohere")
IDS = torch.tensor([[2, 2, 1, 7, 30, 299], [1, 12, 150, 66, 5, 9], [2, 2, 2, 2, 1, 40]])  # padded on the left with 2
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])


def logits(model: Any, steps: int = 6) -> Tensor:
    """The logits of each greedy step, (steps, rows, vocabulary)."""
    config = GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=2, output_logits=True)
    config.return_dict_in_generate = True
    with torch.no_grad():
        return torch.stack(model.generate(input_ids=IDS, attention_mask=MASK, generation_config=config).logits)


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_transformers(family: str, is_shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family).eval()
    if is_shared:
        shared_prompts.enable(model)
    before, own, grouped = model.config._attn_implementation, logits(model), list[torch.Size]()
    attention = decoding.scaled_dot_product_attention

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        grouped.append(query.shape)
        return attention(query, *args, **kwargs)

    monkeypatch.setattr(decoding, "scaled_dot_product_attention", counted)
    with fast_decoding(model):
        torch.testing.assert_close(logits(model), own, rtol=0, atol=1e-6)
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    assert grouped == [(3, groups, heads // groups, grouped[0][-1])] * (5 * 2)  # five decoded tokens, two layers
    assert model.config._attn_implementation == before


def test_a_model_without_groups_and_one_with_its_own_attention_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "scaled_dot_product_attention", None)  # a call would fail
    for family, attention in (("gpt2", "sdpa"), ("gemma2", "eager")):
        model = tiny_model(family, torch.float32).eval()
        model.set_attn_implementation(attention)
        own = logits(model)
        with fast_decoding(model):
            assert torch.equal(logits(model), own)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_head_is_not_copied_for_each_sequence(is_frozen: bool) -> None:
    """A frozen head and a view with gaps make torch multiply in batches, with a copy of the weight for each sequence."""
    model = tiny_model("llama", torch.float32).eval().requires_grad_(not is_frozen)
    seen: list[bool] = []
    with fast_decoding(model):
        model.lm_head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0].is_contiguous()))
        logits(model)
    assert seen == [True] * 6


def test_an_adapted_model_decodes_in_this_way() -> None:
    model: Any = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")).eval()
    own = logits(model)
    with fast_decoding(model):
        assert model.get_base_model().config._attn_implementation.startswith(decoding.PREFIX)
        torch.testing.assert_close(logits(model), own, rtol=0, atol=1e-6)
