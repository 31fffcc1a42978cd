"""Part `right`: what dpo computes on the device is the same as a plain computation; trainings.py has whole trainings.

Figures are relative norms of a difference, of values and of gradients, and the limit of both.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from baseline import Column
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from dpo_cli.scoring import forward, lm_head, lora_linear, row_attention, shared_prompts
from dpo_cli.scoring.lm_head import Head, score_tokens
from dpo_cli.scoring.row_attention import Cuts
from gpu import trainings
from gpu.runner import CannotRun, Check, Part, Setting, most
from gpu.trainings import small_llama

ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 3e-3}
WORSE = 1.5  # times as far from float64 as the plain way in the same 16 bits, which rounds at other places
EXACT = 1e-9  # of two layouts of the same tokens in float64
PRODUCT = 2 * 2**-8  # two roundings of bfloat16


def apart(one: Tensor, truth: Tensor) -> float:
    """The norm of the difference, relative to that of `truth`, which is in float64."""
    return float((one.double() - truth).norm() / truth.norm())


def both(setting: Setting, case: str, values: float, gradients: float, limit: float, why: str = "") -> None:
    """Write the line of a comparison."""
    figures = {"values": values, "gradients": gradients, "limit": limit}
    setting.agrees(case, figures, {"values": limit, "gradients": limit}, why)


def drawn(setting: Setting, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that do not depend on the device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(setting.device, dtype)


def head(setting: Setting) -> None:
    """dpo's head against log_softmax of the full logits in float64, of the same rounded inputs; in four chunks."""
    rows, width, vocabulary = (40, 32, 300) if setting.is_small else (512, 2048, 128_256)
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(0)).to(setting.device)
    share = drawn(setting, rows, seed=1)
    for dtype in ROUNDING:
        for softcap in (None, 4.0):
            for is_trained in (False, True):
                hidden = drawn(setting, rows, width, seed=2, dtype=dtype).requires_grad_()
                weight = (drawn(setting, vocabulary, width, seed=3) / width**0.5).to(dtype).requires_grad_(is_trained)
                leaves = [hidden, weight] if is_trained else [hidden]
                outputs = lm_head.ALL if is_trained else ["log_probs", "is_top1"]
                with patch.object(lm_head, "CHUNK_ELEMENTS", rows // 4 * vocabulary):
                    scores = score_tokens(hidden, targets, Head(weight, softcap=softcap), outputs)
                    grads = torch.autograd.grad(scores.log_probs @ share.to(scores.log_probs.dtype), leaves)
                wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
                logits = wide[0] @ (wide[1] if is_trained else weight.double()).T
                logits = softcap * torch.tanh(logits / softcap) if softcap else logits
                truth = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
                exact = torch.autograd.grad(truth @ share.double(), wide)
                case = f"{_name(dtype)}{', soft-cap' * bool(softcap)}{', trained' * is_trained}"
                gradients = most(apart(one, other) for one, other in zip(grads, exact, strict=True))
                both(setting, case, apart(scores.log_probs.detach(), truth.detach()), gradients, ROUNDING[dtype])


def shared(setting: Setting) -> None:
    """Each prompt once against padded rows: in float64 for every family, in bf16 against padded rows in float64."""
    from test_shared_prompts import BATCHES, FAMILIES, collate, log_probs_and_gradients

    for family in FAMILIES:
        worst = [0.0, 0.0]
        for pairs in BATCHES.values():
            batch = collate(pairs, setting.device)
            (plain, plain_grads), (once, once_grads) = (
                log_probs_and_gradients(family, states, batch, exact_norms=True)
                for states in (forward.plain_states, forward.shared_states)
            )
            worst[0] = most([worst[0], *(once - plain).abs().tolist()])
            differences = ((once_grads[name] - grad).norm() / max(1, grad.norm()) for name, grad in plain_grads.items())
            worst[1] = most([worst[1], *map(float, differences)])
        both(setting, f"{family}, float64", *worst, EXACT)
    _shared_in_half(setting)


def _shared_in_half(setting: Setting) -> None:
    """In bf16, in the dtype and with the kernels of a training: as near to float64 as the padded rows."""
    from test_shared_prompts import collate, pair

    long = 8 if setting.is_small else 1
    sizes = ((1200 // long, 300 // long, 200 // long), (400 // long, 90 // long, 700 // long))
    batch = collate([pair(*size, seed) for seed, size in enumerate(sizes)], setting.device)

    def scored(dtype: torch.dtype, states: forward.States) -> tuple[Tensor, Tensor]:
        model = small_llama(setting.device, dtype)
        if states is forward.shared_states:
            shared_prompts.enable(model)
        targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != shared_prompts.IGNORED]
        scores = score_tokens(states(model, **batch), targets, Head.of(model), ["log_probs"]).log_probs
        (scores @ drawn(setting, len(scores), seed=4, dtype=scores.dtype)).backward()
        grads = [p.grad.double().flatten() for p in model.base_model.layers.parameters() if p.grad is not None]
        return scores.detach(), torch.cat(grads)

    truth = scored(torch.float64, forward.plain_states)
    plain = scored(torch.bfloat16, forward.plain_states)
    once = scored(torch.bfloat16, forward.shared_states)
    shares = [apart(one, exact) / apart(other, exact) for one, other, exact in zip(once, plain, truth, strict=True)]
    known = AttentionInterface()[f"{shared_prompts.PREFIX}sdpa"].args[1]  # by kind of layer, what `attend` has found out
    why = "attention in one call" if known and all(known.values()) else "attention of one sequence after another"
    both(setting, "llama, bf16, of the error of padded rows", *shares, WORSE, why)


def attention(setting: Setting) -> None:
    """Variable-length attention against one sequence after another in float64, as rows of real sizes need it."""
    sizes = ((150, 70, 90), (40, 0, 60), (7, 30, 5)) if setting.is_small else ((1500, 300, 420), (900, 0, 800), (64, 31, 7))
    is_real = row_attention._has_kernel(torch.device(setting.device), torch.bfloat16)
    for heads, groups, width, window in ((8, 8, 64, None), (32, 8, 64, None), (32, 8, 128, None), (8, 4, 128, 96)):
        cuts = Cuts(sizes, torch.device(setting.device))
        like = [(heads, width), (groups, width), (groups, width)]
        states = [drawn(setting, 1, n, cuts.tokens, d, seed=5 + i, dtype=torch.bfloat16) for i, (n, d) in enumerate(like)]
        share = drawn(setting, 1, cuts.tokens, heads, width, seed=8)
        case = f"{heads} heads of {width}, {groups} for keys{f', window of {window}' * bool(window)}"
        with written_out(not is_real):
            try:
                together = _attended(partial(row_attention._together, None, cuts, window), states, share, torch.bfloat16)
            except (RuntimeError, TypeError, ValueError, ImportError) as error:  # the product then runs one by one, and says so
                setting.not_run(case, f"this torch has no such kernel: {str(error).splitlines()[0]}")
                continue
            one = partial(_one_by_one, cuts, window)
            plain, truth = (_attended(one, states, share, dtype) for dtype in (torch.bfloat16, torch.float64))
        worst = [most(apart(a, b) for a, b in zip(got, truth, strict=True)) for got in (together, plain)]
        figures = {"values": apart(together[0], truth[0]), "gradients": worst[0], "limit": ROUNDING[torch.bfloat16]}
        why = "" if is_real else "the kernel's documentation, written out: it needs CUDA"
        setting.agrees(case, figures, dict.fromkeys(("values", "gradients"), figures["limit"]), why)


@contextmanager
def written_out(is_needed: bool) -> Iterator[None]:
    """Without CUDA there is no kernel: what its documentation says takes its place, as in the tests."""
    if not is_needed:
        yield
        return
    from test_row_attention import documented

    with patch.object(row_attention, "_kernel", lambda: documented):
        yield


def _one_by_one(cuts: Cuts, window: int | None, *states: Tensor) -> Tensor:
    """Each sequence by torch's own attention with an explicit mask, without dpo's code."""
    outputs, start = [], 0
    groups = states[0].shape[1] // states[1].shape[1]
    for prompt, chosen, rejected in cuts.pairs:
        prompts, firsts = slice(start, start + prompt), slice(start, start + prompt + chosen)
        lasts = slice(firsts.stop, firsts.stop + rejected)
        for queries, places in ((firsts, [firsts]), (lasts, [prompts, lasts])):
            query = states[0][:, :, queries]
            key, value = (torch.cat([each[:, :, place] for place in places], dim=2) for each in states[1:])
            at = torch.arange(key.shape[2], device=key.device)
            own = at[len(at) - query.shape[2] :, None]
            mask = (at <= own) & (at > own - (window or len(at)))
            key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
            outputs.append(torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask))
        start = lasts.stop
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attended(way: Callable[..., Tensor], states: list[Tensor], share: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [each.to(dtype).requires_grad_() for each in states]
    output = way(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, share.to(dtype))]


def layers(setting: Setting) -> None:
    """Adapted layers as one function against PEFT's own forward, in float64; then 4-bit layers against float64."""
    from builders import IDS
    from test_lora_linear import TARGETS, exact, fused, step

    for family, count in TARGETS.items():
        model = exact(family).to(setting.device)
        ids = IDS.to(setting.device)
        plain = step(model, ids)
        lora_linear.fuse(model)
        own = step(model, ids)
        gradients = most(apart(a, b) for a, b in zip(own[1:], plain[1:], strict=True))
        why = "" if fused(model) == count else f"{fused(model)} of {count} layers run as one function"
        both(setting, f"{family}, float64", apart(own[0], plain[0]), gradients if not why else float("inf"), EXACT, why)
    _layers_of_4_bits(setting)


def _layers_of_4_bits(setting: Setting) -> None:
    """Each by itself, since the roundings of a whole model add up; and the kernel for the few tokens of sampling."""
    from bitsandbytes.functional import dequantize_4bit

    model = get_peft_model(small_llama(setting.device, torch.bfloat16, bits=4), LoraConfig(r=8, target_modules="all-linear"))
    kinds = {}
    for module in model.modules():
        if isinstance(module, lora.LoraLayer):
            kinds.setdefault((module.base_layer.in_features, module.base_layer.out_features), module)
    values, gradients, few, off = 0.0, 0.0, 0.0, 0.0
    count, whole_count = lora_linear.fuse(model), sum(isinstance(module, lora.LoraLayer) for module in model.modules())
    why = "" if count == whole_count else f"{count} of {whole_count} layers run as one function"
    for layer in kinds.values():
        a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
        for weight, seed in ((a, 1), (b, 2)):
            weight.data = drawn(setting, *weight.shape, seed=seed, dtype=torch.bfloat16) / 8
        whole = dequantize_4bit(layer.base_layer.weight, layer.base_layer.weight.quant_state).double()
        x = drawn(setting, 300, a.shape[1], seed=6, dtype=torch.bfloat16)
        share = drawn(setting, 300, b.shape[0], seed=7, dtype=torch.bfloat16)
        leaves, wide = ([each.detach().to(dtype).requires_grad_() for each in (x, a, b)] for dtype in (x.dtype, torch.float64))
        a.data, b.data = leaves[1].data, leaves[2].data
        given = leaves[0]
        output = layer(given)
        own = torch.autograd.grad(output, (given, a, b), share)
        truth = wide[0] @ whole.T + layer.scaling["default"] * (wide[0] @ wide[1].T) @ wide[2].T
        exact = torch.autograd.grad(truth, wide, share.double())
        values = most([values, apart(output.detach(), truth.detach())])
        gradients = most([gradients, *(apart(one, other) for one, other in zip(own, exact, strict=True))])
        with torch.no_grad():
            few = most([few, apart(layer(x[:8]), truth[:8].detach())])
            b.data.zero_()
            fresh = layer(x)
            layer.enable_adapters(False)
            off = most([off, float((layer(x) - fresh).abs().max())])
    both(setting, "4-bit, bf16", values, gradients if not why else float("inf"), PRODUCT, why)
    both(setting, "4-bit, bf16, 8 tokens without gradient", few, 0.0, PRODUCT)
    both(setting, "4-bit, bf16, adapter off against a fresh one", off, 0.0, 0.0)


def liger(setting: Setting) -> None:
    """liger-kernel's norms, SwiGLU and rope against transformers' own, in float32."""
    from dpo_cli.providers import liger_kernels

    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not liger_kernels.is_installed() or (setting.is_small and not is_interpreted):
        raise CannotRun("liger-kernel is not installed, or there is no GPU: `make check-liger` runs this in an interpreter")
    logging.getLogger("dpo").setLevel(logging.WARNING)
    ids = torch.arange(2, 26 if setting.is_small else 402, device=setting.device)[None] % 512

    def states(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        output = model(input_ids=ids, use_cache=False).logits
        (grad,) = torch.autograd.grad(output, [model.get_input_embeddings().weight], drawn(setting, *output.shape, seed=3))
        return output.detach().double(), grad.double()

    plain = states(small_llama(setting.device, torch.float32))
    model = small_llama(setting.device, torch.float32)
    used = liger_kernels.use_kernels(model)
    found = states(model)
    limit = 1e-4 if used else -1.0  # none of the kernels is used: the log has the reason, and it is a fault on a GPU
    both(setting, "llama, float32", apart(found[0], plain[0]), apart(found[1], plain[1]), limit, f"used: {', '.join(used)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


DIFFERENCE: dict[str, Any] = {"unit": "relative", "shown": "{:.1e}"}
PART = Part(
    "right",
    "gpu-right",
    0.32,
    (
        Check("right/head", head, 20),
        Check("right/shared", shared, 30),
        Check("right/attention", attention, 20),
        Check("right/layers", layers, 20),
        Check("right/liger", liger, 30),
        *trainings.CHECKS,
    ),
    (
        Column("values", tolerance=(9.0, 0.0), **DIFFERENCE),
        Column("gradients", tolerance=(9.0, 0.0), **DIFFERENCE),
        Column("limit", **DIFFERENCE),
    ),
    at_once=3,
)
