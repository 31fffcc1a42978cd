"""Norms, SwiGLU and rope of a model as kernels of the package liger-kernel, where it is installed (dpo-cli[liger]).

They are Triton's kernels and need a GPU. Each replaces many small operations that read and write all states, and keeps less for
the backward pass. The package's losses are not used: scoring/lm_head.py is the head.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.providers.out_of_memory import is_out_of_memory

ROPE = "apply_rotary_pos_emb"  # the function in the module of a model family
NOT_USED = {"cross_entropy": False, "fused_linear_cross_entropy": False}
ALLOWANCE = 1e-3  # relative difference between both ways to run a part that counts as rounding, in float32
TOKENS = 24  # of the comparison
# A norm within heads (Qwen 3, Gemma 3) has other kernels from 32,768 rows on: tokens times heads.
WIDEST_HEAD, TOKENS_OF_HEADS = 256, 32_768

Forward = Callable[..., Any]


def is_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def use_kernels(model: PreTrainedModel) -> list[str]:
    """Let this model, and no other, run liger-kernel's norms, SwiGLU and rope; the names of the parts that do.

    A part of each kind is run both ways before. Where they differ, or where the package fails, transformers' part stays, with a
    line in the log; also, without one, where the package does not know the family of the model.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    family = sys.modules[type(model).__module__]
    plain, own = dict(vars(family)), {module: set(vars(module)) for module in model.modules()}
    try:
        _apply_liger_kernel_to_instance(model=model, **NOT_USED)
    except Exception:  # another version of the package may fail in any way
        logging.getLogger("dpo").exception("liger-kernel cannot run this model")
    rope = getattr(family, ROPE, None)
    vars(family).update(plain)  # the package also changes every model that is loaded later, for any device
    changed = defaultdict(list)
    for module, attributes in own.items():
        if "forward" in vars(module).keys() - attributes:
            changed[type(module), tuple(map(tuple, (p.shape for p in module.parameters(recurse=False))))].append(module)
    used = set()
    for (kind, _), modules in changed.items():
        if _agrees(kind.__name__, partial(_part, modules[0], model.config.get_text_config().hidden_size)):
            used.add(kind.__name__)
        else:
            for module in modules:
                del module.forward
    before = plain.get(ROPE)
    if rope is not before and rope is not None and before is not None:
        before = getattr(before, "plain", before)  # an earlier model of this family has changed it
        if _agrees("rope", partial(_rope, model.device, before, rope)):
            setattr(family, ROPE, _by_device(model.device.type, rope, before))
            used.add("rope")
    return sorted(used)


def _by_device(device: str, fast: Forward, plain: Forward) -> Forward:
    """`fast` on that device, for heads that are rotated whole; else `plain`.

    A later model of the same family may be on the CPU. Of a head that is rotated in part the kernel reads too many angles.
    """

    def rotated(query: Tensor, key: Tensor, cos: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_for_it = query.device.type == device and cos.shape[-1] == query.shape[-1]
        return (fast if is_for_it else plain)(query, key, cos, *args, **kwargs)

    rotated.plain = plain  # type: ignore[attr-defined]
    return rotated


def _agrees(name: str, both_ways: Callable[[], Iterator[list[Tensor]]]) -> bool:
    """Whether a part gives the same outputs and gradients both ways."""
    log = logging.getLogger("dpo")
    try:
        plain, fast = both_ways()
        apart = [float((a - b).norm() / a.norm()) for a, b in zip(plain, fast, strict=True)]
    except Exception as error:
        if is_out_of_memory(error):
            raise
        log.exception("liger-kernel cannot run %s; transformers runs it", name)
        return False
    is_same = all(one <= ALLOWANCE for one in apart)  # False for a NaN
    if not is_same:
        log.warning("liger-kernel's %s differs by %s of its size; transformers runs it", name, apart)
    return is_same


def _part(module: Any, hidden: int) -> Iterator[list[Tensor]]:
    """Output and gradients of a norm or an MLP in float32: from the forward of its class, and from its own."""
    part = copy.deepcopy(module)
    for parameter in part.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    own = [parameter for parameter in part.parameters(recurse=False) if parameter.is_floating_point()]
    width = len(own[0]) if own else hidden
    generator = torch.Generator().manual_seed(0)
    shape = (1, TOKENS_OF_HEADS if width <= WIDEST_HEAD else TOKENS, width)
    x, share = (torch.randn(shape, generator=generator).to(next(part.parameters()).device) for _ in range(2))
    for forward in (partial(type(part).forward, part), part.forward):
        yield _with_gradients(lambda x, *_, forward=forward: (forward(x),), (x,), own, share)


def _rope(device: torch.device, plain: Forward, fast: Forward) -> Iterator[list[Tensor]]:
    """The same for the rotation of queries and keys of two rows with other positions."""
    generator = torch.Generator().manual_seed(0)
    query, key, share = (torch.randn(2, heads, TOKENS, 64, generator=generator).to(device) for heads in (4, 2, 4))
    angles = torch.rand(2, TOKENS, 32, generator=generator).to(device).repeat(1, 1, 2)
    for forward in (plain, fast):
        yield _with_gradients(lambda q, k, forward=forward: forward(q, k, angles.cos(), angles.sin()), (query, key), (), share)


def _with_gradients(forward: Forward, inputs: Sequence[Tensor], own: Sequence[Tensor], share: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of the inputs and of a part's own weights.

    `share` is the gradient of the first output, and its start that of the others.
    """
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        outputs = forward(*(leaf * 1 for leaf in leaves))  # not the leaves: a kernel may write into its input
        grads = [share[:, : output.shape[1]].clone() for output in outputs]  # and into its gradient
        return [*(output.detach().clone() for output in outputs), *torch.autograd.grad(outputs, [*leaves, *own], grads)]
