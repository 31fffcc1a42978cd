"""The head against transformers' own full logits, in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import CONFIGS, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.training import scoring

TOLERANCE = 1e-10  # both sides run the same float64 backbone, so only the order of sums differs


def batch(rows: int = 4, length: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask, labels): row r has 2 + r % 3 prompt tokens and r % 2 tokens of padding."""
    torch.manual_seed(1)
    ids = torch.randint(3, 300, (rows, length))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 2 + row % 3] = scoring.IGNORED
        if row % 2:
            ids[row, -1], mask[row, -1], labels[row, -1] = 2, 0, scoring.IGNORED
    return ids, mask, labels


def full_log_probs(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double() / temperature
    return logits.log_softmax(dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_and_gradients_equal_full_logits(family: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 300 * 5)  # several chunks, the last one incomplete
    ids, mask, labels = batch()
    scored = labels[:, 1:] != scoring.IGNORED
    weights = torch.randn(scored.shape, dtype=torch.float64)[scored]

    plain = tiny_model(family)
    expected = full_log_probs(plain, ids, mask, temperature)[scored]
    targets = labels[:, 1:][scored]
    expected_log_probs = expected.gather(-1, targets[:, None])[:, 0]
    expected_entropy = -(expected.exp() * expected).sum(dim=-1)
    (expected_log_probs @ weights + expected_entropy @ weights.flip(0)).backward()

    ours = tiny_model(family)
    scoring.attach(ours, temperature)
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


def test_head_gradients_are_exact() -> None:
    """The backward against torch's own autograd on the full logits, without a model around it: 1e-12."""
    torch.manual_seed(2)
    hidden = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 16, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(30, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(30, (7,))
    head = scoring.Head(weight, bias, scale=0.5, softcap=4.0, temperature=0.8)
    scores = scoring.score_tokens(hidden, targets, head)
    (scores.log_probs.sum() + 0.3 * scores.entropy.sum()).backward()
    got = [tensor.grad.clone() for tensor in (hidden, weight, bias)]
    for tensor in (hidden, weight, bias):
        tensor.grad = None
    log_p = (4 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 4) / 0.8).log_softmax(-1)
    (log_p.gather(-1, targets[:, None]).sum() - 0.3 * (log_p.exp() * log_p).sum()).backward()
    for mine, tensor in zip(got, (hidden, weight, bias), strict=True):
        torch.testing.assert_close(mine, tensor.grad, rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), vocabulary=st.integers(2, 60), budget=st.integers(1, 400))
def test_full_logits_never_exist(rows: int, vocabulary: int, budget: int) -> None:
    """No product of hidden states and head is larger than the budget (or one row, where the vocabulary alone is)."""
    sizes: list[int] = []

    class Counting(scoring.Head):
        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            sizes.append(len(hidden))
            return super().logits(hidden)

    before, scoring.CHUNK_ELEMENTS = scoring.CHUNK_ELEMENTS, budget
    try:
        hidden = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
        head = Counting(torch.randn(vocabulary, 4, dtype=torch.float64))
        scoring.score_tokens(hidden, torch.randint(vocabulary, (rows,)), head).log_probs.sum().backward()
    finally:
        scoring.CHUNK_ELEMENTS = before
    assert sum(sizes) == 2 * rows  # each row once forward, once backward
    assert max(sizes) <= max(1, budget // vocabulary)


def test_no_labelled_token_gives_a_zero_gradient() -> None:
    model = tiny_model("llama")
    scoring.attach(model)
    ids, mask, labels = batch(2)
    model(
        input_ids=ids, attention_mask=mask, labels=labels.fill_(scoring.IGNORED), fused_lm_head=True
    ).log_probs.sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_other_calls_are_unchanged() -> None:
    model = tiny_model("llama")
    ids, mask, _ = batch()
    before = model(input_ids=ids, attention_mask=mask).logits
    scoring.attach(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert model.generate(input_ids=ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 12)


def test_token_kl_is_the_kl_of_the_full_distributions() -> None:
    torch.manual_seed(3)
    head = scoring.Head(torch.randn(20, 6, dtype=torch.float64))
    policy, reference = torch.randn(2, 5, 6, dtype=torch.float64)
    p, q = (torch.distributions.Categorical(logits=states @ head.weight.T) for states in (policy, reference))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(scoring.token_kl(policy, reference, head), expected, rtol=0, atol=1e-12)
    assert not scoring.token_kl(policy, policy, head).any()
