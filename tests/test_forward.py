"""Scoring in models: the head against transformers' own full logits in float64, and the choice of a path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, NO_HEAD_DIM, SHAPE, tiny_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DogeConfig,
    GptOssConfig,
    Lfm2Config,
    MambaConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    NemotronConfig,
    Phi3Config,
    PreTrainedConfig,
)

from dpo_cli.data.encoded import Encoded
from dpo_cli.data.rows import Pair
from dpo_cli.errors import RunFailed
from dpo_cli.scoring import forward, row_attention, shared_prompts
from dpo_cli.scoring import lm_head as heads

TOLERANCE = 1e-10  # both sides run the same float64 backbone, so only the order of sums differs


def batch(rows: int = 4, length: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask, labels): row r has 2 + r % 3 prompt tokens and r % 2 tokens of padding."""
    torch.manual_seed(1)
    ids = torch.randint(3, 300, (rows, length))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 2 + row % 3] = shared_prompts.IGNORED
        if row % 2:
            ids[row, -1], mask[row, -1], labels[row, -1] = 2, 0, shared_prompts.IGNORED
    return ids, mask, labels


def full_log_probs(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double() / temperature
    return logits.log_softmax(dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_and_gradients_equal_full_logits(family: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", 300 * 5)  # several chunks, the last one incomplete
    ids, mask, labels = batch()
    scored = labels[:, 1:] != shared_prompts.IGNORED
    weights = torch.randn(scored.shape, dtype=torch.float64)[scored]

    plain = tiny_model(family)
    expected = full_log_probs(plain, ids, mask, temperature)[scored]
    targets = labels[:, 1:][scored]
    expected_log_probs = expected.gather(-1, targets[:, None])[:, 0]
    expected_entropy = -(expected.exp() * expected).sum(dim=-1)
    (expected_log_probs @ weights + expected_entropy @ weights.flip(0)).backward()

    ours = tiny_model(family)
    forward.attach(ours, forward.plain_states, temperature)
    out = ours(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    (out.log_probs[scored] @ weights + out.entropy[scored] @ weights.flip(0)).backward()

    torch.testing.assert_close(out.log_probs[scored], expected_log_probs, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(out.entropy[scored], expected_entropy, rtol=0, atol=TOLERANCE)
    assert torch.equal(out.is_top1[scored], expected.argmax(dim=-1) == targets)
    assert not out.log_probs[~scored].any()
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        # transformers computes norms in float32, and their backward with it
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    head, full_head = ours.get_output_embeddings().weight.grad, plain.get_output_embeddings().weight.grad
    torch.testing.assert_close(head, full_head, rtol=0, atol=1e-6)


def test_no_labelled_token_gives_a_zero_gradient() -> None:
    model = tiny_model("llama")
    forward.attach(model, forward.plain_states)
    ids, mask, labels = batch(2)
    model(
        input_ids=ids, attention_mask=mask, labels=labels.fill_(shared_prompts.IGNORED), fused_lm_head=True
    ).log_probs.sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_other_calls_are_unchanged() -> None:
    model = tiny_model("llama")
    ids, mask, _ = batch()
    before = model(input_ids=ids, attention_mask=mask).logits
    forward.attach(model, forward.plain_states)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert model.generate(input_ids=ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 12)


def pairs(sizes: list[tuple[int, int, int]]) -> list[Encoded]:
    """Pairs of random ids with these numbers of prompt, chosen and rejected tokens."""
    random = torch.Generator().manual_seed(6)
    rows = [[torch.randint(3, 300, (size,), generator=random).tolist() for size in row] for row in sizes]
    return [Encoded(Pair("", "", "", 1), row[0], tuple(row[1:])) for row in rows]


PAIRS = pairs([(9, 7, 8), (2, 3, 1), (5, 6, 2)])


def test_sinks_and_experts_share_prompts() -> None:
    """GPT-OSS has attention sinks and windows (and only eager attention), Mixtral experts."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    for config in (GptOssConfig(**SHAPE, **experts, sliding_window=4), MixtralConfig(**SHAPE, **experts)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        assert forward.choose(model, PAIRS, 2, "auto").shared, config.model_type


def test_nothing_to_compare_is_no_agreement() -> None:
    decided = forward.choose(tiny_model("llama"), pairs([(5, 0, 0)]), 2, "auto")
    assert not decided.shared


@pytest.mark.parametrize("family", CONFIGS)
def test_attention_models_share_prompts(family: str) -> None:
    decided = forward.choose(tiny_model(family, torch.float32), PAIRS, 2, "auto")
    assert decided.shared and decided.why.startswith("each prompt once")
    assert "checked against padded rows" in decided.why


def test_false_takes_the_plain_path_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prompts, "lay_out", lambda *_: pytest.fail("prompts were laid out"))
    decided = forward.choose(tiny_model("llama"), PAIRS, 2, False)
    assert not decided.shared and '"prompt_sharing" is false' in decided.why


def rejected_sees_chosen(layout: shared_prompts.Layout) -> shared_prompts.Layout:
    return replace(layout, pairs=tuple((prompt, chosen + rejected, 0) for prompt, chosen, rejected in layout.pairs))


def pairs_see_each_other(layout: shared_prompts.Layout) -> shared_prompts.Layout:
    return replace(layout, pairs=((0, layout.input_ids.shape[1], 0),))


def positions_run_on(layout: shared_prompts.Layout) -> shared_prompts.Layout:
    return replace(layout, position_ids=torch.arange(layout.input_ids.shape[1])[None])


def one_token_late(layout: shared_prompts.Layout) -> shared_prompts.Layout:
    return replace(layout, place=layout.place.roll(1, dims=1))


def rejected_one_late(layout: shared_prompts.Layout) -> shared_prompts.Layout:
    """The positions of the first pair's rejected response begin one after they should."""
    prompt, chosen, rejected = layout.pairs[0]
    late = layout.position_ids.clone()
    late[:, prompt + chosen : prompt + chosen + rejected] += 1
    return replace(layout, position_ids=late)


def rejected_after_chosen(layout: shared_prompts.Layout) -> shared_prompts.Layout:
    """The first token of each rejected response is predicted from the last chosen token: one token a response is wrong."""
    place, start = layout.place.clone(), 0
    for i, (prompt, chosen, rejected) in enumerate(layout.pairs):
        place[len(layout.pairs) + i, prompt - 1] = start + prompt + chosen - 1
        start += prompt + chosen + rejected
    return replace(layout, place=place)


BREAKS = [
    rejected_after_chosen,
    rejected_one_late,
    rejected_sees_chosen,
    pairs_see_each_other,
    positions_run_on,
    one_token_late,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("break_it", BREAKS)
def test_a_broken_layout_is_seen_and_not_used(
    break_it: Callable[[shared_prompts.Layout], shared_prompts.Layout], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out = shared_prompts.lay_out
    monkeypatch.setattr(shared_prompts, "lay_out", lambda *rows: break_it(lay_out(*rows)))
    model = tiny_model("qwen3", dtype)
    decided = forward.choose(model, PAIRS, 2, "auto")
    assert not decided.shared
    assert decided.why.startswith("each prompt twice") and "of their size" in decided.why
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(RunFailed, match="of their size"):
        forward.choose(model, PAIRS, 2, True)


def test_a_window_that_is_not_told_to_attention_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose layers did not say their window would attend too far: only the longest pair shows it."""
    mask = row_attention._mask
    monkeypatch.setattr(row_attention, "_mask", lambda *args: mask(*args[:-1], None))
    assert not forward.choose(tiny_model("mistral", torch.float32), PAIRS, 2, "auto").shared
    short = pairs([(1, 2, 2)])
    assert forward.choose(tiny_model("mistral", torch.float32), short, 2, "auto").shared


@pytest.mark.parametrize("break_it", [None, *BREAKS])
def test_long_responses_in_bf16_hide_nothing(
    break_it: Callable[[shared_prompts.Layout], shared_prompts.Layout] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 rounding is larger than the effect of a position that is off by one; the check runs in float32 for that reason."""
    lay_out = shared_prompts.lay_out
    if break_it is not None:
        monkeypatch.setattr(shared_prompts, "lay_out", lambda *rows: break_it(lay_out(*rows)))
    model = tiny_model("llama", torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert forward.choose(model, pairs([(60, 120, 80), (9, 40, 30)]), 2, "auto").shared == (break_it is None)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, before[name]), name


def test_a_pair_as_long_as_the_model_can_read() -> None:
    """GPT-2 has a position embedding for each of its positions and none beyond."""
    config = copy.deepcopy(CONFIGS["gpt2"])
    config.n_positions = 24
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert forward.choose(model, pairs([(10, 14, 9), (2, 3, 1)]), 2, "auto").shared


def test_rope_that_depends_on_the_length_of_the_batch() -> None:
    """Phi-3's long RoPE scales by the longest position of a batch: sharing equals the padded rows, not each row alone."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    config = Phi3Config(**NO_HEAD_DIM, max_position_embeddings=64, original_max_position_embeddings=12, rope_parameters=factors)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert forward.choose(model, pairs([(9, 9, 8), (2, 3, 1)]), 2, "auto").shared


def test_attention_with_a_mask_of_its_own_is_measured() -> None:
    """Doge adds a learned term of the keys to its mask; a row by itself has no mask and attends to what follows it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DogeConfig(**SHAPE), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".A"):
                parameter.normal_(std=2.0)
    assert not forward.choose(model, PAIRS, 2, "auto").shared


def test_attention_that_never_sees_the_layout_is_named() -> None:
    """Nemotron's decoder layers do not hand keyword arguments on."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(NemotronConfig(**SHAPE), dtype=torch.float32).eval()
    decided = forward.choose(model, PAIRS, 2, "auto")
    assert not decided.shared and "does not pass the layout" in decided.why


@pytest.mark.parametrize("prompt_sharing", ["auto", False])
def test_a_head_that_does_more_than_a_product_is_refused(prompt_sharing: bool | str) -> None:
    """ModernBERT's decoder has a dense layer and a norm before its decoder matrix: our log-probs would be wrong on any path."""
    config = ModernBertDecoderConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=2
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    with pytest.raises(RunFailed, match="not supported"):
        forward.choose(model, PAIRS, 2, prompt_sharing)


def test_a_model_that_fails_on_a_layout_is_scored_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_argument(*_: object) -> dict[str, object]:
        raise TypeError("forward() got an unexpected keyword argument 'layout'")

    monkeypatch.setattr(shared_prompts.Layout, "inputs", no_such_argument)
    decided = forward.choose(tiny_model("llama"), PAIRS, 2, "auto")
    assert not decided.shared and "unexpected keyword argument" in decided.why


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4), "linear_attention"),
        (Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]), "(conv)"),
        (BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4), "attention"),
    ],
)
def test_models_without_plain_attention_take_the_plain_path(config: PreTrainedConfig, reason: str) -> None:
    """State-space and convolution layers, and ALiBi, whose distances are read off the mask."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    decided = forward.choose(model, PAIRS, 2, "auto")
    assert not decided.shared and reason in decided.why
    with pytest.raises(RunFailed, match="prompt_sharing"):
        forward.choose(model, PAIRS, 2, True)
