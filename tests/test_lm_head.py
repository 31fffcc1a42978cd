"""The head by itself: its backward, its chunks, the KL; tests/test_forward.py has it in models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.scoring import lm_head as heads


def test_head_gradients_are_exact() -> None:
    """The backward against torch's own autograd on the full logits, without a model around it: 1e-12."""
    torch.manual_seed(2)
    hidden = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 16, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(30, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(30, (7,))
    head = heads.Head(weight, bias, scale=0.5, softcap=4.0, temperature=0.8)
    scores = heads.score_tokens(hidden, targets, head)
    (scores.log_probs.sum() + 0.3 * scores.entropy.sum()).backward()
    got = [tensor.grad.clone() for tensor in (hidden, weight, bias)]
    for tensor in (hidden, weight, bias):
        tensor.grad = None
    log_p = (4 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 4) / 0.8).log_softmax(-1)
    (log_p.gather(-1, targets[:, None]).sum() - 0.3 * (log_p.exp() * log_p).sum()).backward()
    for mine, tensor in zip(got, (hidden, weight, bias), strict=True):
        torch.testing.assert_close(mine, tensor.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_gradient_of_the_states_is_exact(softcap: float | None) -> None:
    """Of a frozen head, whose gradient is made in the forward pass: 1e-12, with a different share of each token in the loss."""
    torch.manual_seed(2)
    hidden = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(30, 16, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    targets, shares = torch.randint(30, (7,)), torch.randn(7, dtype=torch.float64)
    head = heads.Head(weight, bias, scale=0.5, softcap=softcap, temperature=0.8)
    scores = heads.score_tokens(hidden, targets, head, ["log_probs", "is_top1"])
    (scores.log_probs @ shares).backward()
    mine, hidden.grad = hidden.grad, None
    raw = 0.5 * (hidden @ weight.T + bias)
    log_p = ((softcap * torch.tanh(raw / softcap) if softcap else raw) / 0.8).log_softmax(-1)
    (log_p.gather(-1, targets[:, None])[:, 0] @ shares).backward()
    torch.testing.assert_close(mine, hidden.grad, rtol=0, atol=1e-12)
    assert torch.equal(scores.is_top1, log_p.argmax(-1) == targets)
    assert not scores.entropy.any() and not scores.mean_logits.any()


@pytest.mark.parametrize("confidence", [0.5, 0.99, 0.999, 0.9999])
def test_the_gradient_of_a_confident_token_survives_16_bits(confidence: float) -> None:
    """onehot(t) - p is a small difference of numbers near 1, which bfloat16 rounds to 0 if each is rounded before."""
    torch.manual_seed(4)
    weight, targets = torch.randn(4096, 64).bfloat16(), torch.arange(8)
    hidden = weight[targets].float()
    logits = hidden @ weight.T.float()  # made confident: a factor that gives the target this probability
    low, high = torch.zeros(8, 1), torch.ones(8, 1)
    for _ in range(40):
        middle = (low + high) / 2
        is_less = (middle * logits).softmax(-1).gather(-1, targets[:, None]) < confidence
        low, high = torch.where(is_less, middle, low), torch.where(is_less, high, middle)
    hidden = (hidden * high).bfloat16().requires_grad_()
    heads.score_tokens(hidden, targets, heads.Head(weight), ["log_probs"]).log_probs.sum().backward()
    exact = hidden.detach().double().requires_grad_()
    (exact @ weight.double().T).log_softmax(-1).gather(-1, targets[:, None]).sum().backward()
    assert hidden.grad is not None and exact.grad is not None
    apart = (hidden.grad.double() - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert apart.mean() < 0.05


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 60),
    budget=st.integers(1, 400),
    passes=st.sampled_from([1, 2]),  # log-probs alone need one, with their gradient
)
def test_full_logits_never_exist(rows: int, vocabulary: int, budget: int, passes: int) -> None:
    """No product of hidden states and head is larger than the budget (or one row, where the vocabulary alone is)."""
    sizes: list[int] = []

    class Counting(heads.Head):
        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            sizes.append(len(hidden))
            return super().logits(hidden)

    before, heads.CHUNK_ELEMENTS = heads.CHUNK_ELEMENTS, budget
    try:
        hidden = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
        head = Counting(torch.randn(vocabulary, 4, dtype=torch.float64))
        outputs = ["log_probs"] if passes == 1 else heads.ALL
        heads.score_tokens(hidden, torch.randint(vocabulary, (rows,)), head, outputs).log_probs.sum().backward()
    finally:
        heads.CHUNK_ELEMENTS = before
    assert sum(sizes) == passes * rows
    assert max(sizes) <= max(1, budget // vocabulary)


@pytest.mark.parametrize("budget", [20, 1 << 24])
def test_both_models_are_compared_over_the_full_distributions(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one chunk, and in one for each token."""
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", budget)
    torch.manual_seed(3)
    head, ref_head = (heads.Head(torch.randn(20, 6, dtype=torch.float64)) for _ in range(2))
    policy, reference = torch.randn(2, 5, 6, dtype=torch.float64)
    targets = torch.tensor([3, 19, 0, 7, 7])
    p, q = (
        torch.distributions.Categorical(logits=states @ one.weight.T) for states, one in ((policy, head), (reference, ref_head))
    )
    both = heads.compare_tokens(policy, reference, targets, head, ref_head)
    expected = {
        "kl": torch.distributions.kl_divergence(p, q),
        "log_probs": p.log_prob(targets),
        "ref_log_probs": q.log_prob(targets),
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(both, name), values, rtol=0, atol=1e-12)
    assert torch.equal(both.is_top1, p.logits.argmax(-1) == targets)
    assert torch.equal(both.ref_is_top1, q.logits.argmax(-1) == targets)
    assert not heads.compare_tokens(policy, policy, targets, head, head).kl.any()
