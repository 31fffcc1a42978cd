"""Fast decoding on a CPU: the answers and logits of transformers' own, with nothing repeated and nothing copied."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.cache_utils import DynamicLayer

from dpo_cli.errors import RunFailed
from dpo_cli.evaluation import decoding, generation
from dpo_cli.evaluation.decoding import Drawing, RoomyLayer, drawn_tokens, fast_decoding, points_for, roomy_cache
from dpo_cli.evaluation.generation import Sampling
from dpo_cli.scoring import lora_linear, shared_prompts
from dpo_cli.scoring.lora_linear import fuse
from dpo_cli.scoring.packed_linear import PackedLinear, packed_linear, packs

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "mistral", "phi3", "granite", "cohere")
IDS = torch.tensor([[2, 2, 1, 7, 30, 299], [1, 12, 150, 66, 5, 9], [2, 2, 2, 2, 1, 40]])  # padded on the left with 2
needs_16_bits = pytest.mark.skipif(not packs(torch.bfloat16), reason="this processor has no products of 16 bits in oneDNN")
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
    with fast_decoding(model, model.dtype):
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
        with fast_decoding(model, model.dtype):
            assert torch.equal(logits(model), own)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_head_is_not_copied_for_each_sequence(is_frozen: bool) -> None:
    """A frozen head and a view with gaps make torch multiply in batches, with a copy of the weight for each sequence."""
    model = tiny_model("llama", torch.float32).eval().requires_grad_(not is_frozen)
    seen: list[bool] = []
    with fast_decoding(model, model.dtype):
        model.lm_head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0].is_contiguous()))
        logits(model)
    assert seen == [True] * 6


def test_an_adapted_model_decodes_in_this_way() -> None:
    model: Any = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")).eval()
    own = logits(model)
    with fast_decoding(model, model.dtype):
        assert model.get_base_model().config._attn_implementation.startswith(decoding.PREFIX)
        torch.testing.assert_close(logits(model), own, rtol=0, atol=1e-6)


def until(ends: list[int], row: list[int]) -> list[int]:
    """The row up to its first end token."""
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row)) + 1]


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "gpt2"])
def test_rows_that_have_ended_leave_the_batch(family: str) -> None:
    """The tokens are those of transformers' own batch, and no row is computed in a part after its end."""
    model = tiny_model(family).eval()
    settings = GenerationConfig(max_new_tokens=40, do_sample=False, pad_token_id=2)
    with torch.no_grad():
        whole = model.generate(input_ids=IDS, attention_mask=MASK, generation_config=settings)[:, IDS.shape[1] :].tolist()
    # The token that ends the rows at the most different times.
    end = max({token for row in whole for token in row}, key=lambda token: len({len(until([token], row)) for row in whole}))
    sizes: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    with torch.no_grad():
        rows = generation._continued(model, IDS, MASK, Sampling(40), [end], 2)
    assert [until([end], row) for row in rows] == [until([end], row) for row in whole]
    lengths = [len(until([end], row)) for row in rows]
    assert len(set(lengths)) > 1 and sorted(sizes, reverse=True) == sizes
    parts = [-(-length // generation.PART) for length in lengths]
    most = max(lengths)  # the last part ends with its last row
    assert sum(sizes) == sum(min(part * generation.PART, most) for part in parts), (lengths, sizes)


def test_a_model_that_drops_the_cache_on_the_way() -> None:
    """Phi 3 does where its positions change, from 12 tokens on here; rows may leave before and after."""
    model = tiny_model("phi3").eval()
    model.config.original_max_position_embeddings = 12
    with torch.no_grad():
        for end in range(300):
            rows = generation._continued(model, IDS, MASK, Sampling(24), [end], 2)
            if {len(row) == 24 for row in rows} == {True, False}:
                return
    pytest.fail("no row ended before another")


def test_a_model_without_such_a_cache_answers_in_one_part() -> None:
    model = tiny_model("llama").eval()
    calls: list[dict[str, Any]] = []

    def own_generate(**options: Any) -> Tensor:
        calls.append(options)
        made: Tensor = type(model).generate(model, **options)
        return made

    model.generate = own_generate  # as Unsloth does
    assert roomy_cache(model, 40) is None
    with torch.no_grad():
        rows = generation._continued(model, IDS, MASK, Sampling(40), [5], 2)
    assert len(calls) == 1 and "past_key_values" not in calls[0] and len(rows) == 3


def test_a_layer_with_room_by_hand() -> None:
    layer, plain = RoomyLayer(8), DynamicLayer()
    draw = torch.Generator().manual_seed(0)

    def add(sequences: int, tokens: int) -> None:
        new = [torch.randn(sequences, 1, tokens, 4, generator=draw) for _ in range(2)]
        for mine, theirs in zip(layer.update(*new), plain.update(*new), strict=True):
            assert torch.equal(mine, theirs)

    add(2, 3)
    place = layer.keys.data_ptr()
    add(2, 1)
    for one in (layer, plain):
        one.crop(-1)
    add(2, 1)
    assert layer.keys.data_ptr() == place and layer.get_seq_length() == 4  # nothing was copied
    for one in (layer, plain):
        one.batch_select_indices(torch.tensor([1]))
    add(1, 1)
    RoomyLayer(8).batch_select_indices(torch.tensor([0]))  # nothing is there yet


LONG = [[1, *range(5, 5 + size)] for size in (3, 40, 5, 22, 38, 4)]


def long_prompts() -> tuple[Tensor, Tensor]:
    width = max(map(len, LONG))
    ids = [[2] * (width - len(prompt)) + prompt for prompt in LONG]
    return torch.tensor(ids), torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in LONG])


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "gpt2"])
def test_short_prompts_are_not_padded_to_the_longest(family: str) -> None:
    model, (ids, mask) = tiny_model(family).eval(), long_prompts()
    settings = GenerationConfig(max_new_tokens=20, do_sample=False, pad_token_id=2)
    shapes: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        own = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, ids.shape[1] :].tolist()
        shapes.clear()
        rows = generation._continued(model, ids, mask, Sampling(20), [], 2)
    assert rows == own
    cache = roomy_cache(model, 80)
    if cache is not None and decoding.is_roomy(cache):  # 41, 39 and 23, 6, 5 and 4 tokens: widths of 41, 25 and 9
        assert shapes[:4] == [(3, 9), (1, 25), (2, 41), (6, 1)]
    else:
        assert shapes[0] == (6, 41)


def test_first_tokens_of_a_model_that_drops_the_cache_for_some_prompts() -> None:
    """Phi 3 does for those of more than 12 tokens here. The others are computed again with them."""
    model, (ids, mask) = tiny_model("phi3").eval(), long_prompts()
    model.config.original_max_position_embeddings, model.config.sliding_window = 12, None
    cache = roomy_cache(model, 80)
    assert cache is not None and decoding.is_roomy(cache)
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=2)
    with torch.no_grad():
        own = [
            model.generate(input_ids=torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
            for prompt in LONG[1:2]  # the longest, which has no padding
        ]
        rows = generation._continued(model, ids, mask, Sampling(6), [], 2)
    assert [rows[1]] == own and all(len(row) == 6 for row in rows)


def test_batches_by_hand() -> None:
    assert generation._batches([41, 25, 26, 9, 3], 41) == [(9, [3, 4]), (25, [1]), (41, [0, 2])]


def packed_forwards(model: torch.nn.Module) -> int:
    return sum(isinstance(vars(module).get("forward"), PackedLinear) for module in model.modules())


@needs_16_bits
def test_a_head_in_16_bits_is_packed_and_the_same() -> None:
    model = tiny_model("llama", torch.float32).eval()
    with torch.autocast("cpu", torch.bfloat16):
        own = logits(model)
        with fast_decoding(model, torch.bfloat16):
            assert "forward" in vars(model.lm_head) and packed_forwards(model) == 1
            torch.testing.assert_close(logits(model), own, rtol=0.01, atol=0.01)
    assert packed_forwards(model) == 0
    with fast_decoding(model, torch.float32, copies_layers=True):
        assert packed_forwards(model) == 0


def adapted(dtype: torch.dtype) -> PeftModel:
    """A model with biases, and an adapter on three of the seven layers of each block, which run as one function."""
    torch.manual_seed(0)
    config = LlamaConfig(**tiny_model("llama").config.to_dict() | {"attention_bias": True, "dtype": dtype})
    network = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, weight in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model = get_peft_model(network, LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False))
    assert fuse(model.eval()) == 6
    return model


@needs_16_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_on", [True, False])
def test_layers_in_16_bits_are_packed_below_their_adapters(
    is_on: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, plus = adapted(dtype), list[Tensor](), PackedLinear.plus

    def counted(self: PackedLinear, x: Tensor, total: Tensor) -> Tensor:
        calls.append(x)
        return plus(self, x, total)

    monkeypatch.setattr(PackedLinear, "plus", counted)
    with nullcontext() if is_on else model.disable_adapter(), torch.autocast("cpu", torch.bfloat16):
        own = logits(model)
        with fast_decoding(model, torch.bfloat16, copies_layers=True):
            assert packed_forwards(model) == 1 + 2 * 7
            sampled = logits(model)
        assert packed_forwards(model) == 0 and logits(model).equal(own)
    assert len(calls) == (6 * 6 if is_on else 0)  # of the adapted layers, for six tokens
    torch.testing.assert_close(sampled, own, rtol=0.01, atol=0.01)


@needs_16_bits
def test_only_what_is_billed_and_runs_is_packed() -> None:
    """Neither an image encoder, nor the two versions of a layer that is trained whole."""
    model = tiny_model("llama").eval()
    whole = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["o_proj"])
    with fast_decoding(get_peft_model(model, whole), torch.bfloat16, copies_layers=True):
        assert packed_forwards(model) == 1 + 2 * 6
    model.vision = torch.nn.Linear(64, 64)
    with fast_decoding(model, torch.bfloat16, copies_layers=True):
        assert packed_forwards(model) == 1 + 2 * 6


@pytest.mark.parametrize("is_on", [True, False])
def test_adapters_are_merged_into_copies_in_float32(is_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(torch.float32)
    weights = [weight.clone() for weight in model.parameters()]
    with nullcontext() if is_on else model.disable_adapter():
        own = logits(model)
        with fast_decoding(model, torch.float32, copies_layers=True), monkeypatch.context() as patch:
            if is_on:  # neither a product of an adapter nor one of a base
                patch.setattr(lora_linear, "_sampled", None)
                patch.setattr(lora_linear, "_add_product", None)
            merged = logits(model)
        assert logits(model).equal(own)
    torch.testing.assert_close(merged, own, rtol=0, atol=1e-5)
    assert all(map(torch.equal, model.parameters(), weights))


@needs_16_bits
def test_no_layer_stays_packed_where_a_copy_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, number = tiny_model("llama").eval(), iter(range(1000))

    def failing(layer: torch.nn.Module, dtype: torch.dtype) -> PackedLinear | None:
        return packed_linear(layer, dtype) if next(number) < 20 else torch.empty(1 << 60)  # type: ignore[return-value]

    monkeypatch.setattr(decoding, "packed_linear", failing)
    with pytest.raises(RuntimeError, match="can't allocate memory"), fast_decoding(model, torch.bfloat16, copies_layers=True):
        pass
    assert packed_forwards(model) == 0 and not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("vocabulary", [7, 64, 300])
def test_tokens_are_drawn_by_their_probability(vocabulary: int) -> None:
    torch.manual_seed(0)
    scores = torch.randn(vocabulary) * 2
    scores[1:5] = -torch.inf
    expected, count = scores.double().softmax(-1), 100_000
    drawn = torch.bincount(drawn_tokens(scores.expand(count, -1), points_for(count, 1)[:, 0]), minlength=vocabulary)
    assert drawn.shape == (vocabulary,) and not drawn[1:5].any()
    square = ((drawn - count * expected) ** 2 / (count * expected).clamp(min=1e-300)).sum()  # of Pearson, about normal
    freedom = vocabulary - 5
    assert abs(square - freedom) < 5 * (2 * freedom) ** 0.5


def test_a_rare_token_is_not_lost_after_many_likely_ones() -> None:
    torch.manual_seed(0)
    scores = torch.full((1, 1000), 20.0)
    scores[:, -640:] = 0.0  # together 3.7e-09: one float32 sum of all would not move
    point = 1 - 1e-9
    rows = scores.softmax(-1)
    assert rows.cumsum(-1)[0, -1] == rows.cumsum(-1)[0, 359]  # in float32
    assert 360 <= int(drawn_tokens(scores, torch.full((1, 2), point, dtype=torch.float64))[0]) < 1000


@pytest.mark.parametrize("vocabulary", [128, 130])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_no_token_is_drawn_from_scores_that_are_not_finite(wrong: float, vocabulary: int) -> None:
    scores = torch.zeros(3, vocabulary)
    scores[1, slice(None) if wrong < 0 else 5] = wrong
    with pytest.raises(RunFailed, match="not finite"):
        drawn_tokens(scores, points_for(3, 1)[:, 0])


def test_each_row_has_a_token_of_its_own_scores() -> None:
    wanted = torch.randperm(130)[:40]
    scores = torch.full((40, 130), -torch.inf).scatter(1, wanted[:, None], 3.0)
    assert drawn_tokens(scores, points_for(40, 1)[:, 0]).equal(wanted)
    drawing = Drawing(0.5, 0.9, points_for(40, 1))
    drawing.next_are(range(40), width=1)
    assert drawing.processors(torch.zeros(40, 1), scores).argmax(-1).equal(wanted)


@pytest.mark.parametrize(
    ("temperature", "top_p", "shares"),
    [(1.0, 1.0, [0.5, 0.3, 0.2]), (0.5, 1.0, [25 / 38, 9 / 38, 4 / 38]), (1.0, 0.7, [5 / 8, 3 / 8, 0.0])],
)
def test_temperature_and_top_p_come_before_the_draw(temperature: float, top_p: float, shares: list[float]) -> None:
    torch.manual_seed(0)
    scores = torch.tensor([0.5, 0.3, 0.2]).log().expand(50_000, -1)
    drawing = Drawing(temperature, top_p, points_for(50_000, 1))
    drawing.next_are(range(50_000), width=1)
    drawn = torch.bincount(drawing.processors(torch.zeros(50_000, 1), scores).argmax(-1), minlength=3) / 50_000
    assert not drawn[torch.tensor(shares) == 0].any()
    torch.testing.assert_close(drawn, torch.tensor(shares), rtol=0, atol=0.012)  # five times the spread of a share
