"""liger-kernel: what is used is the same as transformers' own, and only this model is changed.

`make check-liger` runs the package's real kernels in Triton's interpreter. The other tests are of what a package may do wrong.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_shared_prompts import BATCHES, collate
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from dpo_cli.hardware.machine import installed_versions
from dpo_cli.providers import liger_kernels
from dpo_cli.scoring import forward, shared_prompts

FAMILIES = {
    "llama": "LlamaMLP LlamaRMSNorm rope",
    "qwen3": "Qwen3MLP Qwen3RMSNorm rope",
    "mistral": "MistralMLP MistralRMSNorm rope",
}
FAMILIES |= {"phi3": "Phi3MLP Phi3RMSNorm rope", "gemma3": "Gemma3MLP Gemma3RMSNorm rope"}

runs_kernels = importlib.util.find_spec("liger_kernel") is not None and os.environ.get("TRITON_INTERPRET") == "1"
needs_package = pytest.mark.skipif(not runs_kernels, reason="make check-liger installs it, and runs this")


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow."""
    monkeypatch.setattr(liger_kernels, "TOKENS_OF_HEADS", 512)


@pytest.fixture
def whole_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter lacks: scalars with the methods of a tensor, and the functions of the GPU's library."""
    import liger_kernel.ops.geglu as geglu
    import liger_kernel.ops.rms_norm as rms_norm
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(argument: object) -> object:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: 1 / tl.sqrt(x))
    monkeypatch.setattr(geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


def states(model: PreTrainedModel) -> list[torch.Tensor]:
    """The states that predict the responses of a row with shared prompts, and the gradient of the embeddings."""
    shared_prompts.enable(model)
    hidden = forward.shared_states(model, **collate(BATCHES["three of different lengths"]))
    share = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(hidden, [model.get_input_embeddings().weight], share)
    return [hidden.detach(), gradient]


@needs_package
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("whole_interpreter")
def test_the_kernels_compute_the_same(family: str) -> None:
    model = tiny_model(family).float()
    plain = states(model)
    assert liger_kernels.use_kernels(model) == FAMILIES[family].split()
    for a, b in zip(plain, states(model), strict=True):
        assert 0 < (a - b).norm() / a.norm() <= 1e-5  # other roundings: other kernels


@needs_package
@pytest.mark.usefixtures("whole_interpreter")
def test_later_models_are_as_before() -> None:
    assert liger_kernels.use_kernels(tiny_model("llama").float())
    later = tiny_model("llama")
    assert {type(module).__module__ for module in later.modules()} <= {
        "torch.nn.modules." + name for name in ("linear", "sparse", "container", "activation")
    } | {"transformers.models.llama.modeling_llama", "transformers.activations"}
    states(later.to(torch.float64))  # in a dtype that the kernels do not have


def test_the_package_is_among_the_versions_where_it_is_installed() -> None:
    assert ("liger-kernel" in installed_versions()) == liger_kernels.is_installed()


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """A package liger_kernel that does this to a model."""

    def installed(patch: Callable[..., None]) -> None:
        name = "liger_kernel.transformers.monkey_patch"
        module = types.ModuleType(name)
        module._apply_liger_kernel_to_instance = patch  # type: ignore[attr-defined]
        for part in ("liger_kernel", "liger_kernel.transformers"):
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        monkeypatch.setitem(sys.modules, name, module)

    return installed


def _bind(module: torch.nn.Module, forward: Callable[..., Any]) -> None:
    module.__dict__["forward"] = types.MethodType(forward, module)


def test_what_differs_is_not_used_and_the_rest_is(
    package: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Norms with a wrong epsilon, a right MLP, and a rope with the other sign; and classes changed for all later models."""

    def patch(model: Any, cross_entropy: bool, fused_linear_cross_entropy: bool) -> None:
        assert not (cross_entropy or fused_linear_cross_entropy)
        modeling_llama.LlamaRMSNorm = torch.nn.Identity  # type: ignore[misc, assignment]
        rope = modeling_llama.apply_rotary_pos_emb
        modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin: rope(q, k, cos, -sin)
        for layer in model.base_model.layers:
            _bind(
                layer.input_layernorm,
                lambda self, x: self.weight * x / (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5 + 0.1),
            )
            _bind(layer.mlp, lambda self, x: self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x))))

    before = {name: getattr(modeling_llama, name) for name in ("LlamaRMSNorm", liger_kernels.ROPE)}
    package(patch)
    model = tiny_model("llama").float()
    plain = states(model)
    assert liger_kernels.use_kernels(model) == ["LlamaMLP"]
    assert {name: getattr(modeling_llama, name) for name in before} == before
    assert "forward" in vars(model.base_model.layers[0].mlp) and "forward" not in vars(
        model.base_model.layers[0].input_layernorm
    )
    assert "LlamaRMSNorm differs by" in caplog.text and "rope differs by" in caplog.text
    for a, b in zip(plain, states(model), strict=True):
        torch.testing.assert_close(a, b)


def test_a_wrong_gradient_is_not_used(package: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    def patch(model: Any, **_: object) -> None:
        for layer in model.base_model.layers:  # the right output, and a gate without gradient
            _bind(layer.mlp, lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)).detach() * self.up_proj(x)))

    package(patch)
    assert liger_kernels.use_kernels(tiny_model("llama").float()) == []
    assert "LlamaMLP differs by" in caplog.text


@pytest.mark.parametrize("where", ["the package", "its kernel"])
def test_what_fails_is_not_used(where: str, package: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    def patch(model: Any, **_: object) -> None:
        for layer in model.base_model.layers:
            _bind(layer.mlp, fails)
        if where == "the package":
            fails()

    package(patch)
    model = tiny_model("llama").float()
    plain = states(model)
    assert liger_kernels.use_kernels(model) == []
    assert "0 active drivers" in caplog.text
    for a, b in zip(plain, states(model), strict=True):
        assert torch.equal(a, b)


def test_rope_of_another_device_and_of_a_part_of_a_head_is_that_of_transformers() -> None:
    rotated = liger_kernels._by_device("cpu", lambda *_: "fast", lambda *_: "plain")
    elsewhere = liger_kernels._by_device("cuda", lambda *_: "fast", lambda *_: "plain")
    query, whole, part = torch.ones(1, 2, 3, 8), torch.ones(1, 3, 8), torch.ones(1, 3, 6)
    assert [rotated(query, query, whole, whole), rotated(query, query, part, part)] == ["fast", "plain"]
    assert elsewhere(query, query, whole, whole) == "plain"


def test_a_gradient_that_is_not_a_number_is_not_used(package: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    def patch(model: Any, **_: object) -> None:
        for layer in model.base_model.layers:  # the square root of zero has no gradient
            _bind(layer.mlp, lambda self, x: type(self).forward(self, x) + 0 * (x - x.detach()).square().sum().sqrt())

    package(patch)
    assert liger_kernels.use_kernels(tiny_model("llama").float()) == []
    assert "nan" in caplog.text


def test_the_gradient_of_a_norms_weight_is_compared(package: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    def patch(model: Any, **_: object) -> None:
        def frozen(self: Any, x: torch.Tensor) -> torch.Tensor:
            return (
                self.weight.detach() * x * (x.square().mean(dim=-1, keepdim=True) + self.variance_epsilon).rsqrt()
                + 0 * self.weight
            )

        for layer in model.base_model.layers:
            _bind(layer.input_layernorm, frozen)

    package(patch)
    assert liger_kernels.use_kernels(tiny_model("llama").float()) == []
    assert "LlamaRMSNorm differs by" in caplog.text
