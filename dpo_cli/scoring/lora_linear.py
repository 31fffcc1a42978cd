"""An adapted linear layer as one function: the frozen weight and its LoRA adapter, forward and backward.

PEFT 0.21 runs them apart: `result = base(x); x = x.to(float32); result + B(A(x)) * scaling`. Under autocast each layer then
keeps a copy of its input, and both products and their sum are rounded. Here layers that read the same tensor keep that tensor,
and the adapter's product is added in place.

`fuse` takes over the layers with plain LoRA of one adapter. All others, and each call that is not of that kind (merged, several
adapters, dropout in training, adapter off but for `_alone`), run PEFT's own forward.
"""

from __future__ import annotations

import copy
import functools
import logging
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from dpo_cli.providers.out_of_memory import is_out_of_memory
from dpo_cli.providers.sharding import whole_copy
from dpo_cli.scoring.lm_head import product_dtype
from dpo_cli.scoring.packed_linear import PackedLinear

FEW_ROWS = 64  # tokens of a product without gradient, as in sampling: one of each answer
BASE_SIZE = 0.5  # of the adapter's product, where that of a usual weight is 1: an error of either is seen
ALLOWANCE = 1e-3  # relative difference between both ways to run a layer that counts as rounding, in float32


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T, with s the scaling (LoRA, arXiv:2106.09685, section 4.1).

    Shapes: x (n, in), W (out, in), A (r, in), B (out, r), y (n, out). With h = x A^T and g = dL/dy:
    dL/dB = s g^T h, dL/dA = s (g B)^T x, dL/dx = g W + s (g B) A. W and bias are frozen.

    Products run in `product_dtype`, and their kernels sum in float32 or wider; s is applied after a sum, and never rounded by
    itself. The adapter's small product is computed first, and the frozen one is added to it within its sum, so that both are
    rounded once. In the other order, as PEFT has it, 16 bits round x W^T and then lose most of a change that is smaller than
    half of its last bit: in bfloat16 more than half of a new adapter's effect. A bias joins the adapter's product, so that a
    fresh adapter equals the base to the bit; a change below the last bit of a large bias is lost with it.

    x, h and the weights are kept for the backward pass, as they are; y is not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, base: nn.Module, scaling: float) -> Tensor:
        dtype = product_dtype(x)
        narrow = x.to(dtype)
        h = narrow @ a.to(dtype).T
        y = _adapted(narrow, h, b.to(dtype), base, scaling)
        _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_a else None, h if needs_b else None, weight, a, b)
        ctx.base, ctx.scaling, ctx.dtype = base, scaling, dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, h, weight, a, b = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        dtype, grad_x, grad_a, grad_b = ctx.dtype, None, None, None
        inner = grad @ b.to(dtype) if needs_x or needs_a else None  # g B
        if needs_b:
            grad_b = _summed(grad, h, ctx.scaling, b)
        if inner is not None and needs_a:
            grad_a = _summed(inner, x.to(dtype), ctx.scaling, a)
        if inner is not None and needs_x:
            grad_x = _product(inner, a.to(dtype), ctx.scaling)
            _add_product(grad_x, grad, weight, ctx.base, transposed=False)
        return grad_x, None, grad_a, grad_b, None, None


def _adapted(x: Tensor, h: Tensor, b: Tensor, base: Any, scaling: float, packed: PackedLinear | None = None) -> Tensor:
    """x W^T + bias + s h B^T, without gradients; `packed` is the base's product, if there is one."""
    y = _product(h, b.T, scaling)
    if isinstance(base.bias, Tensor):
        y.add_(base.bias)
    if packed is not None:
        return packed.plus(x, y)
    _add_product(y, x, base.weight, base, transposed=True)
    return y


def _sampled(x: Tensor, a: Tensor, b: Tensor, base: nn.Module, scaling: float, packed: PackedLinear | None = None) -> Tensor:
    """What `_LoraLinear` computes, where no gradient is needed; all in the dtype of the product."""
    h = x @ a.T
    if x.is_cuda and type(base) is not nn.Linear and len(x) <= FEW_ROWS:
        y: Tensor = base(x)  # bitsandbytes has a kernel for the tokens of sampled answers, without a whole W
        return y.addmm_(h, b.T, alpha=scaling)
    return _adapted(x, h, b, base, scaling, packed)


def _alone(x: Tensor, base: Any) -> Tensor:
    """x W^T + bias of a 4-bit W, as a fresh adapter has it to the bit, without a gradient.

    bitsandbytes 0.50.2 has, for up to 1,536 tokens without a gradient and on some cards, a kernel that sums in another order:
    a reference would differ from a policy that has not moved.
    """
    if x.is_cuda and len(x) <= FEW_ROWS:
        few: Tensor = base(x)  # as in `_sampled`
        return few
    y = x.new_zeros(len(x), base.out_features)
    if isinstance(base.bias, Tensor):
        y.add_(base.bias)
    _add_product(y, x, base.weight, base, transposed=True)
    return y


def _summed(left: Tensor, right: Tensor, scaling: float, like: Tensor) -> Tensor:
    """scaling * left^T right, a sum over n, in the dtype of the weight `like`."""
    return (left.T @ right).to(torch.promote_types(like.dtype, torch.float32)).mul_(scaling).to(like.dtype)


def _product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling * left right, rounded once."""
    empty = left.new_empty(len(left), right.shape[1])
    return empty.addmm_(left, right, beta=0, alpha=scaling)


def _add_product(total: Tensor, left: Tensor, weight: Tensor, base: Any, transposed: bool) -> None:
    """Add left W to `total` in place, or left W^T.

    A 4-bit W is dequantised to its compute_dtype, and multiplied in it, as in bitsandbytes' own forward (`gemm_4bit`).
    """
    if type(base) is nn.Linear:
        whole = weight.to(left.dtype)
    else:
        from bitsandbytes.functional import dequantize_4bit

        # A weight that was divided has none (providers/sharding.py).
        state = copy.copy(getattr(base.weight, "quant_state", None) or base.quant_state)
        state.dtype = base.compute_dtype or left.dtype  # else it is first rounded to the dtype that the model was loaded in
        whole = dequantize_4bit(weight.view(-1, 1), state)
    right = whole.T if transposed else whole
    if whole.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left.to(whole.dtype) @ right)


@functools.cache
def _bases() -> dict[type[nn.Module], type[nn.Module]]:
    """PEFT's layers that can be fused, with the type of the layer below."""
    bases: dict[type[nn.Module], type[nn.Module]] = {lora.Linear: nn.Linear}
    if is_bnb_4bit_available():
        from bitsandbytes.nn.modules import Linear4bit

        bases[lora.Linear4bit] = Linear4bit
    return bases


def _plain_adapter(module: nn.Module) -> str | None:
    """The active adapter of a layer, if the layer computes nothing but `_LoraLinear` when no dropout is drawn; else None."""
    return None if getattr(module, "disable_adapters", True) else _plain(module)


def _plain(module: nn.Module) -> str | None:
    """The same, whether the adapters are on or off."""
    layer: Any = module
    if type(module) not in _bases() or layer.merged or len(layer.active_adapters) != 1:
        return None
    base, (name,) = layer.base_layer, layer.active_adapters
    if type(base) is not _bases()[type(module)] or name not in layer.lora_A:
        return None
    parts = (base, layer.lora_A[name], layer.lora_B[name])
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts):
        return None  # someone has to see that part run, or has replaced it
    if any(weight.requires_grad for weight in base.parameters(recurse=False)) or layer.fan_in_fan_out:
        return None
    if getattr(base, "support_avx512bf16_for_cpu", False):  # repacked when it is first evaluated
        return None
    has_more = layer.use_dora[name] or layer.lora_bias[name] or name in layer.lora_variant
    return None if has_more or type(layer.lora_dropout[name]) not in (nn.Identity, nn.Dropout) else name


def _draws(dropout: nn.Module) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a fused layer, in place of PEFT's."""
    name = None if args or kwargs else _plain(self)
    is_packed = type(self.base_layer) is not nn.Linear
    # bitsandbytes answers in the dtype of the input, whatever autocast says.
    is_other = name is None or (is_packed and product_dtype(x) != x.dtype)
    if self.disable_adapters and is_packed and not is_other and not torch.is_grad_enabled():
        return _alone(x.reshape(-1, x.shape[-1]), self.base_layer).view(*x.shape[:-1], -1)
    if is_other or self.disable_adapters or _draws(self.lora_dropout[name]):
        peft_forward: Callable[..., Tensor] = type(self).forward
        return peft_forward(self, x, *args, **kwargs)
    a, b, base = self.lora_A[name].weight, self.lora_B[name].weight, self.base_layer
    rows = x.reshape(-1, x.shape[-1])  # here, because the function's result must not be a view: others may change it in place
    if torch.is_grad_enabled():
        y: Tensor = _LoraLinear.apply(rows, base.weight, a, b, base, self.scaling[name])  # type: ignore[no-untyped-call]
    else:
        dtype = product_dtype(x)
        y = _sampled(rows.to(dtype), a.to(dtype), b.to(dtype), base, self.scaling[name])
    return y.view(*x.shape[:-1], y.shape[-1])


@contextmanager
def narrow_adapters(
    model: nn.Module,
    dtype: torch.dtype,
    products: Mapping[nn.Module, PackedLinear] = MappingProxyType({}),
    merges: bool = False,
) -> Iterator[None]:
    """Within, fused layers have their adapters in the dtype of the products already, and are not checked at each call.

    For sampling: each token goes through all layers. No gradient can be taken, and no weight may change. `products` are packed
    ones by base layer. `merges`: each layer is one product with a copy, W + s B A, in this dtype; in 16 bits that would round
    most of a small change away.
    """
    held: list[tuple[Any, Any]] = []
    try:
        for module in model.modules():
            layer: Any = module
            name = _plain_adapter(layer)
            is_fused = vars(layer).get("forward") == types.MethodType(_forward, layer) and name is not None
            if not is_fused or type(layer.base_layer) is not nn.Linear or _draws(layer.lora_dropout[name]):
                continue
            a, b = (part[name].weight.detach().to(dtype) for part in (layer.lora_A, layer.lora_B))
            held.append((layer, layer.forward))
            base, scaling = layer.base_layer, layer.scaling[name]
            if merges:
                whole = torch.addmm(base.weight.detach().to(dtype), b, a, alpha=scaling)
                layer.forward = partial(linear, weight=whole, bias=None if base.bias is None else base.bias.to(dtype))
            else:
                layer.forward = partial(_narrow_forward, a, b, base, scaling, products.get(base))
        yield
    finally:
        for layer, forward in held:
            layer.forward = forward


def _narrow_forward(a: Tensor, b: Tensor, base: nn.Module, scaling: float, packed: PackedLinear | None, x: Tensor) -> Tensor:
    y = _sampled(x.reshape(-1, x.shape[-1]).to(a.dtype), a, b, base, scaling, packed)
    return y.view(*x.shape[:-1], y.shape[-1])


def fuse(model: nn.Module) -> int:
    """Let the layers of a model whose active adapter is plain LoRA run as one function each; the number of these layers.

    One layer of each kind is run both ways before. Where they differ, PEFT's forward stays, with a line in the log.
    """
    kinds: dict[tuple[object, ...], list[Any]] = defaultdict(list)
    for module in model.modules():
        if _plain_adapter(module) is not None:
            base: Any = module.base_layer
            kinds[type(module), base.bias is None, base.weight.dtype, base.weight.device.type].append(module)
    count = 0
    for layers in kinds.values():
        if not _agrees(min(layers, key=lambda layer: layer.base_layer.weight.numel())):
            continue
        for layer in layers:
            layer.forward = types.MethodType(_forward, layer)
        count += len(layers)
    return count


def _agrees(module: nn.Module) -> bool:
    """Whether a layer gives the same output and gradients both ways: a copy in float32, with an adapter of random weights."""
    log = logging.getLogger("dpo")
    try:
        pairs = _both_ways(whole_copy(module))
    except Exception as error:  # another version of PEFT may fail in any way; its own forward is then used
        if is_out_of_memory(error):
            raise
        log.exception("an adapted layer cannot run as one function; PEFT runs it")
        return False
    is_same = all(bool((peft - fused).norm() <= ALLOWANCE * peft.norm()) for peft, fused in pairs)
    if not is_same:
        log.warning("an adapted layer computes something else as one function; PEFT runs it")
    return is_same


def _both_ways(layer: Any) -> list[tuple[Tensor, Tensor]]:
    """The output and the gradients of a layer, from PEFT's forward and fused; the floats of the layer are changed."""
    (name,) = layer.eval().active_adapters
    device, generator = layer.base_layer.weight.device, torch.Generator().manual_seed(0)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for weight, size in ((a, 1.0), (b, BASE_SIZE)):  # a fresh B is zero, and would hide A
        drawn = torch.randn(weight.shape, generator=generator) * size / weight.shape[1] ** 0.5
        weight.data = drawn.to(device)
        weight.requires_grad_()
    x = torch.randn(3, a.shape[1], generator=generator).to(device).requires_grad_()
    share = torch.randn(3, b.shape[0], generator=generator).to(device)
    results = []
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for forward in (type(layer).forward, _forward):
            y = forward(layer, x)
            results.append([y.detach(), *torch.autograd.grad(y, (x, a, b), share)])
    return list(zip(*results, strict=True))
