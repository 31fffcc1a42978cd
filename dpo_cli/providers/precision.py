"""The precision of products: whether bfloat16 is faster on this processor, a model in float32 for a while, and kernels that
give the same bits each time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from dpo_cli.config.options import Config
from dpo_cli.hardware.machine import WORTH_BF16, Machine
from dpo_cli.models.shape import ModelFacts
from dpo_cli.plan.decisions import device_of, leaves_precision_open
from dpo_cli.plan.plan import Plan

TOKENS = 256  # in a product, as in a row of a few short sequences
COMMON = (1024, 4096)  # the width of states and of the MLP where a model's are unknown
SMALLEST, LARGEST = 2**23, 2**25  # multiply-adds of a product; 2**25 take about 1 ms in float32
PRODUCT, PRODUCT_ON_GPU = 1024, 4096  # rows and columns of a large product; a GPU needs longer to start a smaller one
COPIED = 1 << 26  # bytes
TURNS, BUDGET_S = 15, 0.05  # the most turns, and the seconds of one dtype after which no other turn starts


def with_bf16_speed(machine: Machine, config: Config, facts: ModelFacts | None) -> Machine:
    """The machine with its measured speed of bfloat16, if a run with this config depends on it: a CPU decides its precision.

    `facts` is the shape of the model; None if it is unknown.
    """
    if machine.bf16_speed is not None or device_of(config, machine) != "cpu" or not leaves_precision_open(config):
        return machine
    return replace(machine, bf16_speed=_speed_for(facts))


def in_faster_precision(plan: Plan, decided: bool | None) -> Plan:
    """The plan of an augmentation, in bfloat16 if that is measured to be faster; `decided` is what its file was started with.

    Only if the machine decides: a CPU, and a config that names no precision.
    """
    config = plan.config
    if config.device != "cpu" or plan.sources.get("bf16") != "measured":
        return plan
    is_faster = decided if decided is not None else _speed_for(plan.model.facts) >= WORTH_BF16
    return replace(plan, config=replace(config, bf16=is_faster))


def _speed_for(facts: ModelFacts | None) -> float:
    return round(bf16_speed(*((facts.hidden_size, facts.intermediate_size) if facts else COMMON)), 2)


@contextmanager
def same_bits(plan: Plan) -> Iterator[None]:
    """Within, a GPU uses only kernels that give the same bits each time, if the plan says so.

    Those of the backward pass of attention do not by default. On a CPU all kernels of a training do.
    """
    is_asked = plan.config.full_determinism and plan.config.device == "cuda"
    before, module = torch.are_deterministic_algorithms_enabled(), cast(Any, torch.utils.deterministic)
    fills = module.fill_uninitialized_memory  # only for the search of errors, and slow
    if is_asked:
        torch.use_deterministic_algorithms(True)
        module.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        module.fill_uninitialized_memory = fills


def product_speed(plan: Plan) -> float:
    """Operations in a second of a large product in the precision of a plan, on its device: the fastest of several turns."""
    size = PRODUCT_ON_GPU if plan.config.device == "cuda" else PRODUCT
    one = torch.ones(size, size, dtype=getattr(torch, plan.dtype), device=plan.config.device)
    seconds: list[float] = []
    for _ in range(TURNS):
        start = time.perf_counter()
        torch.mm(one, one)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
        if len(seconds) > 1 and sum(seconds) > BUDGET_S:  # the first call chooses the kernels
            break
    return 2 * size**3 / min(seconds)


def copy_speed(plan: Plan) -> float | None:
    """Bytes a second of a copy from the RAM to the GPU, the fastest of several; None where a plan has none."""
    if not plan.config.cpu_offload or plan.config.device != "cuda":
        return None
    there = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    here = torch.empty(COPIED, dtype=torch.uint8, device=plan.config.device)
    seconds: list[float] = []
    for _ in range(TURNS):
        start = time.perf_counter()
        here.copy_(there)[0].item()  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    return COPIED / min(seconds)


def bf16_speed(hidden: int, intermediate: int) -> float:
    """How many times as fast as in float32 the products of an MLP are in bfloat16 on this CPU: the fastest of several turns.

    Not the median: other programs make a turn slower by a time slice, which is longer than a product, and never faster.
    The products are those of (TOKENS, hidden) states up to the intermediate width and back; of a large model, a part of that
    width. 1 for a tiny model: its time is not in its products, so float32 costs it nothing.
    """
    if TOKENS * hidden * intermediate < SMALLEST:
        return 1.0
    width = max(1, min(intermediate, LARGEST // (TOKENS * hidden)))
    sides = [
        (torch.ones(TOKENS, hidden, dtype=dtype), torch.ones(width, hidden, dtype=dtype), list[float]())  # no random draw
        for dtype in (torch.float32, torch.bfloat16)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other on a busy machine: that is the scheduler's time, not the products'
    try:
        for states, weight, _ in sides:
            _seconds(states, weight)  # the first call chooses the kernels
        for _ in range(TURNS):  # in turns, so that both see the same load
            for states, weight, seconds in sides:
                seconds.append(_seconds(states, weight))
            if max(sum(seconds) for _, _, seconds in sides) > BUDGET_S:
                break
    finally:
        torch.set_num_threads(threads)
    float32, bfloat16 = (min(seconds) for _, _, seconds in sides)
    return float32 / bfloat16


def _seconds(states: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        linear(linear(states, weight), weight.T)
    return time.perf_counter() - start


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let each module compute in float32 while it runs, for any dtype of its weights; one module at a time.

    A layer with an adapter is one module with its parts, because PEFT may join its weights. Quantised weights are not floats:
    4-bit weights are multiplied in their compute_dtype, 8-bit ones in the dtype of the input (providers/eight_bit.py).
    """
    held: dict[nn.Module, tuple[dict[nn.Parameter, Tensor], dict[nn.Module, object]]] = {}

    def widen(module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        if not isinstance(module, nn.Embedding):  # a lookup is exact in any dtype, and the table is large
            own = module.parameters(recurse=isinstance(module, BaseTunerLayer))
            narrow = [p for p in own if p.is_floating_point() and p.dtype.itemsize < 4]
            parts = module.modules() if isinstance(module, BaseTunerLayer) else [module]
            quantised = {part: part.compute_dtype for part in parts if hasattr(part, "compute_dtype")}
            held[module] = {p: p.data for p in narrow}, quantised
            for parameter in narrow:
                parameter.data = parameter.data.float()
            for part in quantised:
                _set_compute_dtype(part, torch.float32)
        return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() and a.dtype.itemsize < 4 else a for a in args)

    def restore(module: nn.Module) -> None:
        kept, quantised = held.pop(module, ({}, {}))
        for parameter, data in kept.items():
            parameter.data = data
        for part, compute_dtype in quantised.items():
            _set_compute_dtype(part, compute_dtype)

    def narrow_again(module: nn.Module, args: object, output: object) -> object:
        restore(module)
        return output.float() if isinstance(module, nn.Embedding) and isinstance(output, Tensor) else output

    whole = list(_units(model))
    hooks = [module.register_forward_pre_hook(widen) for module in whole]
    hooks += [module.register_forward_hook(narrow_again) for module in whole]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(held):  # modules that an exception interrupted
            restore(module)


def _set_compute_dtype(module: nn.Module, dtype: object) -> None:
    setattr(module, "compute_dtype", dtype)  # noqa: B010 - mypy does not know the attribute of bitsandbytes


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The layers with adapters, and all other modules with their own weights."""
    is_adapted = isinstance(module, BaseTunerLayer)
    if is_adapted or next(module.parameters(recurse=False), None) is not None:
        yield module
    for child in () if is_adapted else module.children():
        yield from _units(child)
