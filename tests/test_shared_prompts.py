"""Each prompt once: the same log-probs and gradients as TRL's padded rows, in float64, for every family and shape of batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from builders import norms_in_float64
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.data.encoded import Encoded
from dpo_cli.data.rows import Pair
from dpo_cli.scoring import forward, shared_prompts
from dpo_cli.scoring.lm_head import Head, score_tokens

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2")  # windows of 4 and 5 tokens in five
PAD = 2
Ids = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


def collate(pairs: Sequence[Ids], device: str = "cpu") -> dict[str, torch.Tensor]:
    encoded = [Encoded(Pair("", "", "", 1), ids[0], tuple(ids[1:])) for ids in pairs]
    return forward.collate(encoded, PAD, torch.device(device))


def pair(prompt: int, chosen: int, rejected: int, seed: int = 0) -> Ids:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (prompt + chosen + rejected,), generator=random).tolist()
    return ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :]


BATCHES: dict[str, list[Ids]] = {
    "one pair": [pair(7, 5, 9)],
    "three of different lengths": [pair(12, 3, 8), pair(2, 9, 1, 1), pair(5, 5, 5, 2)],
    "no prompt": [pair(0, 4, 6), pair(3, 2, 2)],
    "responses share their first tokens": [([5, 6, 7], [8, 9, 10, 11], [8, 9, 12])],
    "one response begins the other": [([5, 6, 7], [8, 9], [8, 9, 10])],
    "a response repeats the prompt": [([5, 6, 7], [5, 6, 7], [7, 6, 5])],
    "a response cut away": [pair(6, 0, 4), pair(3, 2, 0)],
    "nothing but prompts": [pair(4, 0, 0), pair(6, 0, 0)],
    "the padding token within": [([5, PAD, 6], [PAD, 7, PAD], [8, PAD])],
    "longer than every window": [pair(3, 17, 14), pair(19, 6, 8)],
}


def log_probs_and_gradients(
    family: str, states: forward.States, batch: dict[str, torch.Tensor], exact_norms: bool, eager: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Per-token log-probs (n,) and the gradients of a fixed random combination of them."""
    model = tiny_model(family).to(batch["labels"].device)
    model.set_attn_implementation("eager" if eager else "sdpa")
    if exact_norms:
        norms_in_float64(model)
    if states is forward.shared_states:
        shared_prompts.enable(model)
    targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != shared_prompts.IGNORED]
    log_probs = score_tokens(states(model, **batch), targets, Head.of(model)).log_probs
    weights = torch.randn(len(targets), dtype=log_probs.dtype, generator=torch.Generator().manual_seed(4))
    (log_probs @ weights.to(log_probs.device)).backward()
    return log_probs.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_paths(
    family: str, batch: dict[str, torch.Tensor], tolerance: float, exact_norms: bool, eager: bool = False
) -> None:
    (plain, plain_grads), (shared, shared_grads) = (
        log_probs_and_gradients(family, states, batch, exact_norms, eager)
        for states in (forward.plain_states, forward.shared_states)
    )
    torch.testing.assert_close(shared, plain, rtol=0, atol=tolerance)
    assert plain_grads.keys() == shared_grads.keys()
    for name, grad in plain_grads.items():
        assert (shared_grads[name] - grad).norm() <= tolerance * max(1, grad.norm()), name


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_padded_rows(family: str, name: str) -> None:
    assert_equal_paths(family, collate(BATCHES[name]), 1e-9, exact_norms=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_with_the_norms_of_transformers(family: str) -> None:
    assert_equal_paths(family, collate(BATCHES["three of different lengths"]), 1e-6, exact_norms=False)


@pytest.mark.parametrize("name", ["one response begins the other", "responses share their first tokens", "even rows"])
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mistral"])
def test_equal_under_eager_attention(family: str, name: str) -> None:
    """Eager attention is what applies Gemma 2's soft-cap; its softmax is in float32.

    There a float64 mask overflows for a padding token that sees nothing, so these batches have less padding than a window.
    """
    batches = {**BATCHES, "even rows": [pair(9, 12, 12), pair(14, 7, 7, 1)]}
    assert_equal_paths(family, collate(batches[name]), 1e-6, exact_norms=True, eager=True)


TOKENS = st.lists(st.integers(3, 6), max_size=9)  # few different tokens, so that prompts and responses often start alike


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    pairs=st.lists(st.tuples(TOKENS, TOKENS, TOKENS).filter(lambda ids: sum(map(len, ids)) > 0), min_size=1, max_size=5),
    cut=st.one_of(st.none(), st.integers(2, 12)),
    from_start=st.booleans(),
)
def test_equal_for_any_batch(family: str, pairs: list[Ids], cut: int | None, from_start: bool) -> None:
    """Any lengths, any number of pairs, cut as TRL cuts: at the end, or at the start, where the prompts then differ."""
    if cut is not None and from_start:
        pairs = [_cut_start(ids, cut) for ids in pairs]
    batch = collate([ids for ids in pairs if ids[0] or (ids[1] and ids[2])] or [pair(1, 1, 1)])
    if cut is not None and not from_start:
        batch = {key: value[:, :cut] for key, value in batch.items()}
    assert_equal_paths(family, batch, 1e-9, exact_norms=True)


def _cut_start(ids: Ids, keep: int) -> Ids:
    """A pair whose prompt keeps only what leaves `keep` tokens next to the longer response, at least one."""
    prompt, chosen, rejected = ids
    return prompt[-max(1, keep - max(len(chosen), len(rejected))) :], chosen, rejected


def test_prompts_that_differ_share_what_is_equal() -> None:
    """Rows cut at different starts, as TRL's keep_end leaves them: prompts 5 6 7 and 6 7 have no first token in common."""
    ids = torch.tensor([[5, 6, 7, 8, 9], [6, 7, 10, 11, 12]])
    labels = torch.tensor([[-100, -100, -100, 8, 9], [-100, -100, 10, 11, 12]])
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    assert shared_prompts.lay_out(ids, batch["attention_mask"], labels).pairs == ((0, 5, 5),)
    assert_equal_paths("mistral", batch, 1e-9, exact_norms=True)


def test_layout_by_hand() -> None:
    """The drawing of scoring/shared_prompts.py: P P P C C R R R | P P C R, and the places of TRL's four rows in it."""
    batch = collate([([11, 12, 13], [21, 22], [31, 32, 33]), ([14, 15], [23], [34])])
    layout = shared_prompts.lay_out(batch["input_ids"], batch["attention_mask"], batch["labels"])
    assert layout.input_ids.tolist() == [[11, 12, 13, 21, 22, 31, 32, 33, 14, 15, 23, 34]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 2]]
    assert layout.pairs == ((3, 2, 3), (2, 1, 1))
    assert [layout.place[row, :size].tolist() for row, size in enumerate((5, 3, 6, 3))] == [
        [0, 1, 2, 3, 4],
        [8, 9, 10],
        [0, 1, 2, 5, 6, 7],
        [8, 9, 11],
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_layout_nothing_changes(family: str) -> None:
    """Logits and generation of an enabled model are those of the model before, to the bit."""
    batch = collate(BATCHES["three of different lengths"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model = tiny_model(family)
    implementation = model.config._attn_implementation
    logits = model(**inputs).logits
    answer = model.generate(batch["input_ids"][:1, :5], max_new_tokens=6, do_sample=False)
    shared_prompts.enable(model)
    shared_prompts.enable(model)
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(batch["input_ids"][:1, :5], max_new_tokens=6, do_sample=False), answer)
    shared_prompts.disable(model)
    assert model.config._attn_implementation == implementation
