"""8-bit layers: the output of a token does not depend on the other tokens, in training and in evaluation mode."""

from __future__ import annotations

import logging
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from dpo_cli.providers.eight_bit import use_exact_product


def layer(bias: bool = True) -> tuple[Any, Tensor]:
    """An 8-bit layer, and the weight that its bytes stand for."""
    torch.manual_seed(0)
    plain, made = nn.Linear(32, 16, bias=bias), bnb.nn.Linear8bitLt(32, 16, bias=bias, has_fp16_weights=False, threshold=6.0)
    made.load_state_dict(plain.state_dict())
    made = made.to("cpu")
    weight = made.weight
    return made, weight.data.float() * weight.SCB[:, None] / 127


def tokens() -> Tensor:
    """Five tokens, of which the last has values that are rounded apart, and change how the others are rounded."""
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    x[4, 3] = 30.0
    x[0, 7] = 5.9
    return x


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_token_alone_and_among_others(is_trained: bool) -> None:
    made, weight = layer()
    use_exact_product(nn.ModuleList([made]).train(is_trained))
    x = tokens()
    torch.testing.assert_close(made(x), x @ weight.T + made.bias)
    assert all(torch.allclose(made(x[i : i + 1]), made(x)[i : i + 1], rtol=0, atol=1e-6) for i in range(5))


def test_bitsandbytes_own_product_depends_on_the_others() -> None:
    """The reason for ours; when this fails, ours can go."""
    made, _ = layer()
    made.eval()
    x = tokens()
    assert (made(x)[:1] - made(x[:1])).abs().max() > 1e-3


def test_gradients_and_the_log(caplog: pytest.LogCaptureFixture) -> None:
    made, weight = layer(bias=False)
    use_exact_product(nn.ModuleList([made]))
    x = tokens().requires_grad_()
    with caplog.at_level(logging.WARNING):
        made(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 32))
    assert not caplog.records
    assert made.weight.dtype == torch.int8 and made.state_dict().keys() >= {"weight", "SCB"}
