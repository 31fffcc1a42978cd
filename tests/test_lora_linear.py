"""An adapted layer as one function: the outputs and gradients of PEFT's own forward, and PEFT's own forward elsewhere.

The file is long because the same helpers make the models of all cases.
"""

from __future__ import annotations

import copy
import json
import logging
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from builders import IDS, judged_json, norms_in_float64, randomised
from conftest import CONFIGS, Run, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from test_dpo import make_trainer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl.trainer.utils import use_adapter

from dpo_cli.commands.requests import Request
from dpo_cli.providers.precision import in_float32
from dpo_cli.scoring import lora_linear
from dpo_cli.scoring.forward import plain_states
from dpo_cli.scoring.lora_linear import _forward, fuse, narrow_adapters
from dpo_cli.ui.console import Console

TARGETS = {"llama": 14, "qwen2": 14, "qwen3": 14, "gemma3": 14, "mistral": 14, "phi3": 8}  # the linear layers of both blocks
ADAPTER = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": "all-linear"}


def adapted(model: nn.Module, dtype: torch.dtype = torch.float64, **options: Any) -> PeftModel:
    """A model with an adapter whose weights do something, in this dtype."""
    peft = get_peft_model(model, LoraConfig(**{**ADAPTER, **options}))  # type: ignore[arg-type]
    randomised(peft)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return peft


def exact(family: str, **options: Any) -> PeftModel:
    model = tiny_model(family)
    norms_in_float64(model)
    return adapted(model, **options)


def step(model: PeftModel, ids: Tensor = IDS) -> list[Tensor]:
    """The log-probs of a forward pass, and the gradients of all trained weights."""
    model.zero_grad()
    scores = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    scores[:, :-1].gather(-1, ids[:, 1:, None]).sum().backward()
    return [scores.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]


def require_same(one: list[Tensor], other: list[Tensor], allowed: float = 1e-10) -> None:
    """Each tensor of both is the same, relative to its size."""
    assert len(one) == len(other) > 1
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype and a.abs().max() > 0
        assert (a - b).norm() <= allowed * a.norm()


def fused(model: nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules() if isinstance(module, lora.LoraLayer))


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, lora.LoraLayer)]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", TARGETS)
def test_outputs_and_gradients_are_peft_s(family: str, rslora: bool) -> None:
    """In float64, to 1e-10; Qwen 2 has biases, Phi 3 one layer for queries, keys and values, and one for gate and up."""
    model = exact(family, use_rslora=rslora)
    plain = step(model)
    assert fuse(model) == TARGETS[family] == fused(model)
    require_same(plain, step(model))
    assert len(plain) == 1 + 2 * TARGETS[family]


def test_biases_of_all_layers() -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["llama"])
    config.attention_bias = config.mlp_bias = True
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    for parameter in base.parameters():
        parameter.data.normal_(std=0.2)
    norms_in_float64(base)
    model = adapted(base)
    plain = step(model)
    assert fuse(model) == 14
    require_same(plain, step(model))


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_gradient_checkpointing(is_reentrant: bool) -> None:
    model = exact("llama").train()
    model.enable_input_require_grads()
    plain = step(model)
    fuse(model)
    model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    require_same(plain, step(model))


def test_the_input_of_each_layer_gets_its_gradient() -> None:
    """Also of a layer whose adapter is frozen, and of one whose input needs none."""
    model = exact("llama")
    fuse(model)
    layer = layers(model)[0]
    for needs_x, needs_adapter in ((True, True), (True, False), (False, True)):
        a, b = (part["default"].weight.requires_grad_(needs_adapter) for part in (layer.lora_A, layer.lora_B))
        x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=needs_x)
        asked = [tensor for tensor in (x, a, b) if tensor.requires_grad]
        ways = [forward(layer, x) for forward in (type(layer).forward, _forward)]
        got = [[way.detach(), *torch.autograd.grad(way.square().sum(), asked)] for way in ways]
        require_same(*got)


def test_adapter_off_is_the_base_alone_to_the_bit() -> None:
    model = exact("llama")
    with model.disable_adapter():
        plain = model(input_ids=IDS, use_cache=False).logits
    fuse(model)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, plain)
    with use_adapter(model, None):
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, plain)
    assert not torch.allclose(model(input_ids=IDS, use_cache=False).logits, plain)


def test_a_second_frozen_adapter() -> None:
    """It is fused as well, in TRL's context; the trained one is back afterwards. Two at once are left to PEFT."""
    model = exact("llama")
    torch.manual_seed(1)
    model.add_adapter("ref", LoraConfig(**{**ADAPTER, "r": 2, "use_rslora": True}, init_lora_weights=False))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            parameter.requires_grad_(False).data = parameter.data.double()

    def both() -> list[Tensor]:
        with torch.no_grad(), use_adapter(model, "ref"):
            reference = model(input_ids=IDS, use_cache=False).logits
        return [reference, *step(model)]

    plain = both()
    assert fuse(model) == 14
    require_same(plain, both())
    assert not any(parameter.grad is not None for name, parameter in model.named_parameters() if ".ref." in name)
    model.base_model.set_adapter(["default", "ref"])
    together = step(model)
    for layer in layers(model):
        del layer.forward
    assert all(map(torch.equal, together, step(model)))


def test_a_fresh_adapter_changes_no_bit_in_bf16() -> None:
    """So that policy and reference are equal before the first step."""
    config = LlamaConfig(**CONFIGS["llama"].to_dict() | {"attention_bias": True, "mlp_bias": True})
    model = get_peft_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), LoraConfig(**ADAPTER))  # type: ignore[arg-type]
    assert fuse(model) == 14
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        on = model(input_ids=IDS, use_cache=False).logits
        with model.disable_adapter():
            assert torch.equal(on, model(input_ids=IDS, use_cache=False).logits)


def test_in_autocast_it_is_nearer_to_the_truth_than_peft() -> None:
    """A layer in bf16 against the same weights in float64: output and gradients are rounded less often."""
    torch.manual_seed(0)
    errors = []
    layer: Any = layers(adapted(nn.Sequential(nn.Linear(64, 96, dtype=torch.bfloat16)), torch.float32, task_type=None))[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, share = (torch.randn(200, size).bfloat16() for size in (64, 96))
    wide = copy.deepcopy(layer).double()

    def run(layer: Any, forward: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y = forward(layer, x)
        parts = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        return [y.detach(), *torch.autograd.grad(y, parts, share.to(y.dtype))]

    truth = run(wide, lora.Linear.forward, x.double())
    for forward in (lora.Linear.forward, _forward):
        with torch.autocast("cpu", torch.bfloat16):
            got = run(layer, forward, x)
        assert [tensor.dtype for tensor in got] == [torch.bfloat16, torch.bfloat16, a.dtype, b.dtype]
        errors.append([float((one.double() - other).norm() / other.norm()) for one, other in zip(got, truth, strict=True)])
    peft, ours = errors
    assert all(one < 0.95 * other for one, other in zip(ours, peft, strict=True))


def test_a_small_change_is_not_rounded_away_in_bf16() -> None:
    """The share that is left of a change below the last bit of the output: all of it, and less than 0.6 in PEFT's order."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)
    layer: Any = layers(adapted(nn.Sequential(linear), torch.float32, task_type=None))[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(4000, 64).bfloat16()
    change = layer.scaling["default"] * (x.double() @ a.double().T @ b.double().T)
    b.data *= 1e-4 / change.std().item()
    change *= 1e-4 / change.std()

    def kept(forward: Callable[..., Tensor]) -> float:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            apart = (forward(layer, x).double() - layer.base_layer(x).double()).flatten()
        return float(apart @ change.flatten() / change.pow(2).sum())

    assert kept(_forward) == pytest.approx(1, abs=0.05) and kept(lora.Linear.forward) < 0.6


def quantised(dtype: torch.dtype = torch.float32) -> PeftModel:
    """A tiny Llama with 4-bit layers, as the provider prepares them."""
    model = tiny_model("llama", dtype)
    for block in model.base_model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    own = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, compute_dtype=dtype)
                    own.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(parent, name, own.to("cpu"))
                    own.support_avx512bf16_for_cpu = False
    model.is_loaded_in_4bit = True
    return adapted(model, dtype)


def test_4bit_layers() -> None:
    """To the dtype's rounding, and a training step after an evaluation is the one without it."""
    model = quantised()
    plain = step(model)
    assert {type(layer) for layer in layers(model)} == {lora.Linear4bit}
    assert fuse(model) == 14 == fused(model)
    with torch.no_grad():
        evaluated = model.eval()(input_ids=IDS, use_cache=False).logits.log_softmax(-1)
    got = step(model.train())
    assert torch.equal(evaluated, got[0])
    require_same(plain, got, 1e-5)


def test_each_4bit_layer_in_bf16() -> None:
    """By itself, since the roundings of a whole model add up: to two steps of bf16."""
    torch.manual_seed(0)
    for layer in layers(quantised(torch.bfloat16)):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        x = torch.randn(30, a.shape[1], dtype=torch.bfloat16, requires_grad=True)
        share = torch.randn(30, b.shape[0], dtype=torch.bfloat16)
        ways = [forward(layer, x) for forward in (lora.Linear4bit.forward, _forward)]
        require_same(*([way.detach(), *torch.autograd.grad(way, (x, a, b), share)] for way in ways), allowed=2 * 2**-8)


def test_a_repacked_4bit_layer_is_left_to_peft() -> None:
    model = quantised()
    for layer in layers(model):
        layer.base_layer.support_avx512bf16_for_cpu = True
    assert fuse(model) == fused(model) == 0


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_bias": True}, {"target_modules": ["embed_tokens"]}],
    ids=lambda options: next(iter(options)),
)
def test_other_adapters_are_left_to_peft(options: dict[str, Any]) -> None:
    config = LlamaConfig(**CONFIGS["llama"].to_dict() | {"attention_bias": True, "mlp_bias": True})
    model = adapted(AutoModelForCausalLM.from_config(config, dtype=torch.float64), **options).train()
    torch.manual_seed(0)
    plain = step(model)
    assert fuse(model) == fused(model) == 0
    torch.manual_seed(0)
    assert all(map(torch.equal, plain, step(model)))


def test_dropout_is_left_to_peft() -> None:
    """In training: an evaluation is fused, because `dpo eval` loads the adapter without its dropout."""
    model = exact("llama", lora_dropout=0.5)
    evaluated = step(model.eval())
    torch.manual_seed(0)
    plain = step(model.train())
    assert fuse(model) == 14
    torch.manual_seed(0)
    assert all(map(torch.equal, plain, step(model)))
    require_same(evaluated, step(model.eval()))
    assert not any(map(torch.equal, plain, evaluated))
    assert any(name.startswith("_LoraLinear") for name in backward_nodes(model))
    assert not any(name.startswith("_LoraLinear") for name in backward_nodes(model.train()))


def backward_nodes(model: nn.Module) -> set[str]:
    """The names of the functions of a backward pass."""
    waiting, seen = [model(input_ids=IDS, use_cache=False).logits.grad_fn], set()
    while waiting:
        if (node := waiting.pop()) is not None and node not in seen:
            seen.add(node)
            waiting.extend(earlier for earlier, _ in node.next_functions)
    return {node.name() for node in seen}


def test_other_layers_are_left_to_peft() -> None:
    """GPT-2's Conv1D, a base that is trained, a layer that someone watches, and one that is called with more than its input."""
    assert fuse(adapted(tiny_model("gpt2"))) == 0
    model = exact("llama")
    trained, watched, called, *_ = layers(model)
    trained.base_layer.weight.requires_grad_()
    watched.lora_A["default"].register_forward_hook(lambda *_: None)
    assert fuse(model) == 12
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = lora.Linear.forward(called, x, adapter_names=["default", "__base__"])
    assert torch.equal(called.forward(x, adapter_names=["default", "__base__"]), expected)


def test_layers_that_compute_something_else_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As another version of PEFT might: the adapter counts twice, or its parts have other names."""
    original = lora.Linear.forward
    monkeypatch.setattr(lora.Linear, "forward", lambda self, x: 2 * original(self, x) - self.base_layer(x))
    model = exact("llama")
    with caplog.at_level(logging.WARNING, logger="dpo"):
        assert fuse(model) == fused(model) == 0
    assert [record.message for record in caplog.records] == [
        "an adapted layer computes something else as one function; PEFT runs it"
    ]

    def renamed(self: Any, x: Tensor) -> Tensor:
        raise AttributeError("lora_A")

    caplog.clear()
    monkeypatch.setattr(lora.Linear, "forward", renamed)
    assert fuse(model) == fused(model) == 0
    assert [record.message for record in caplog.records] == ["an adapted layer cannot run as one function; PEFT runs it"]


def test_fusing_changes_nothing_else() -> None:
    """Neither the weights, nor the random numbers that follow, nor what is saved."""
    model = exact("llama")
    torch.manual_seed(5)
    before, state = {name: weight.clone() for name, weight in model.state_dict().items()}, torch.get_rng_state()
    fuse(model)
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_merging_and_saving(tmp_path: Path) -> None:
    model = exact("llama")
    fuse(model)
    plain = model(input_ids=IDS, use_cache=False).logits
    model.merge_adapter()
    merged = model(input_ids=IDS, use_cache=False).logits
    with model.disable_adapter():
        off = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(merged, plain, rtol=0, atol=1e-9)
    assert not torch.allclose(off, plain)
    model.save_pretrained(str(tmp_path))
    base = tiny_model("llama")
    norms_in_float64(base)
    again = PeftModel.from_pretrained(base, str(tmp_path), autocast_adapter_dtype=False)
    whole = model.merge_and_unload()
    assert not layers(whole)
    torch.testing.assert_close(whole(input_ids=IDS, use_cache=False).logits, plain, rtol=0, atol=1e-9)
    torch.testing.assert_close(again.double()(input_ids=IDS, use_cache=False).logits, plain, rtol=0, atol=1e-9)


def test_a_copy_is_fused_with_its_own_weights() -> None:
    model = exact("llama")
    fuse(model)
    other = copy.deepcopy(model)
    for layer in layers(model):
        layer.lora_B["default"].weight.data.zero_()
    with other.disable_adapter():
        base = other(input_ids=IDS, use_cache=False).logits
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, base)
    assert not torch.allclose(other(input_ids=IDS, use_cache=False).logits, base)


def test_generated_answers_are_peft_s() -> None:
    model = exact("llama").eval()
    plain = model.generate(input_ids=IDS, max_new_tokens=12, do_sample=False)
    fuse(model)
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=12, do_sample=False), plain)


def test_in_float32() -> None:
    """A bf16 model computes in float32 for a while, fused or not, and is bf16 again afterwards."""
    model = adapted(tiny_model("llama", torch.bfloat16), torch.float32)

    def measured() -> list[Tensor]:
        with torch.no_grad(), in_float32(model):
            return [model(input_ids=IDS, use_cache=False).logits, model.base_model(input_ids=IDS, use_cache=False).logits]

    plain = measured()
    fuse(model)
    require_same(plain, measured(), 1e-5)
    assert {layer.base_layer.weight.dtype for layer in layers(model)} == {torch.bfloat16}
    with torch.no_grad():
        whole = copy.deepcopy(model).float()(input_ids=IDS, use_cache=False).logits
    assert (whole - plain[0]).norm() <= 1e-5 * whole.norm()


def test_in_float32_with_4_bits() -> None:
    """The products of 4-bit weights too, where an adapter is on them."""
    model = quantised(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    for layer in layers(exact):
        layer.base_layer.compute_dtype = torch.float32
    with torch.no_grad():
        whole = exact(input_ids=IDS, use_cache=False).logits
        with in_float32(model):
            widened = model(input_ids=IDS, use_cache=False).logits
    assert (whole - widened).norm() <= 1e-5 * whole.norm()
    assert {layer.base_layer.compute_dtype for layer in layers(model)} == {torch.bfloat16}


def kept(model: PeftModel) -> Counter[tuple[torch.dtype, tuple[int, ...]]]:
    """How many tensors of each dtype and shape a forward pass in autocast keeps, each place in memory once; no weights."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    seen: dict[int, tuple[torch.dtype, tuple[int, ...]]] = {}
    held: list[Tensor] = []  # so that no place in memory is used twice

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        if tensor.data_ptr() not in weights:
            seen.setdefault(tensor.data_ptr(), (tensor.dtype, tuple(tensor.flatten(0, -2).shape)))
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=IDS, use_cache=False)
    return Counter(seen.values())


def test_no_layer_keeps_a_copy_of_its_input() -> None:
    """Two blocks of a tiny Llama on 8 tokens. The layers q, k and v read one tensor (8, 32), gate and up another, o what the
    attention keeps anyway: 2 a block. PEFT keeps a copy for each of these 6, and a copy of the weights of each adapter.
    What each of the 14 layers keeps by itself is h = x A^T, (8, 4)."""
    model = adapted(tiny_model("llama", torch.bfloat16), torch.float32)
    tokens, rank = IDS.numel(), 4
    before = kept(model)
    fuse(model)
    after = kept(model)
    inputs, products, norms = (torch.bfloat16, (tokens, 32)), (torch.bfloat16, (tokens, rank)), (torch.float32, (tokens, 32))
    assert (before[inputs], after[inputs]) == (12, 4)
    assert before[products] == after[products] == 14
    assert before[norms] == after[norms] == 4
    weights = [(torch.bfloat16, shape) for size in (16, 32, 48) for shape in ((size, rank), (rank, size))]
    assert (sum(before[kind] for kind in weights), sum(after[kind] for kind in weights)) == (25, 0)
    assert not after - before


def test_a_training_is_fused_except_for_unsloth(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer, _ = make_trainer(tmp_path, tokenizer, max_steps=1)
    assert fused(trainer.model) == 14
    trainer, _ = make_trainer(tmp_path, tokenizer, states=plain_states, max_steps=1, provider="unsloth")
    assert len(layers(trainer.model)) == 14 and fused(trainer.model) == 0


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}, {"use_4bit": True}, {"use_dora": True}], ids=str)
def test_eval_gives_the_figures_of_the_training(run: Run, options: dict[str, Any]) -> None:
    """In bf16, where another way to compute would show."""
    _, place = run(bf16=True, eval_split=0.5, max_steps=6, **options)
    stored = json.loads((place / "evaluation.json").read_text(encoding="utf-8"))
    again = judged_json(Request(str(place)), Console())
    assert again["policy"] == stored["policy"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_adapters_change_no_bit(dtype: torch.dtype) -> None:
    config = LlamaConfig(**CONFIGS["llama"].to_dict() | {"attention_bias": True})
    model = adapted(AutoModelForCausalLM.from_config(config, dtype=dtype), torch.float32)
    assert fuse(model) == 14
    model.eval()

    def both_ways() -> list[Tensor]:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            on = model(input_ids=IDS, use_cache=False).logits
            with model.disable_adapter():
                return [on, model(input_ids=IDS, use_cache=False).logits]

    before, gradients = both_ways()[0], step(model)[1:]
    with narrow_adapters(model, dtype):
        own = {id(layer.forward) for layer in layers(model)}
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            assert torch.equal(model(input_ids=IDS, use_cache=False).logits, before)
    assert len(own) == 14 and all(layer.forward == types.MethodType(_forward, layer) for layer in layers(model))
    assert all(map(torch.equal, step(model)[1:], gradients))
    off = both_ways()[1]
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with model.disable_adapter(), narrow_adapters(model, dtype), torch.no_grad(), autocast:
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, off)


def test_4_bits_with_a_fresh_adapter_in_float32_are_the_base() -> None:
    """The weight is dequantised to float32 for both; rounded to bfloat16 first, the two are different models."""
    model = quantised(torch.bfloat16)
    assert fuse(model) == 14
    for layer in layers(model):
        nn.init.zeros_(layer.lora_B["default"].weight)
    model.eval()
    with torch.no_grad(), in_float32(model):
        on = model(input_ids=IDS, use_cache=False).logits
        with model.disable_adapter():
            off = model(input_ids=IDS, use_cache=False).logits
    assert on.dtype == torch.float32
    torch.testing.assert_close(on, off, rtol=0, atol=1e-5)


def test_a_base_product_that_is_a_little_wrong_is_seen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add = lora_linear._add_product

    def wrong(total: Tensor, left: Tensor, weight: Tensor, base: Any, transposed: bool) -> None:
        add(total, left, weight * 1.01, base, transposed)

    monkeypatch.setattr(lora_linear, "_add_product", wrong)
    assert fuse(adapted(tiny_model("llama"), torch.float32)) == 0 and "computes something else" in caplog.text


def test_adapters_are_not_left_narrow_by_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is out of memory: the layers before it must train again."""
    model = adapted(tiny_model("llama"), torch.float32)
    assert fuse(model) == 14
    plain, number = lora_linear._plain_adapter, iter(range(1000))

    def failing(module: nn.Module) -> str | None:
        if plain(module) is not None and next(number) == 4:
            raise torch.OutOfMemoryError("no memory is left")
        return plain(module)

    monkeypatch.setattr(lora_linear, "_plain_adapter", failing)
    with pytest.raises(torch.OutOfMemoryError), narrow_adapters(model, torch.bfloat16):
        pass
    assert all(layer.forward == types.MethodType(_forward, layer) for layer in layers(model))
