"""The LM head: from hidden states to log-probabilities of given tokens, without the full logits.

The (positions, vocabulary) logits, by far the largest tensor of a DPO step, are computed by chunks, forward and backward.
TRL 1.15 does the same with a Triton kernel, which needs a GPU; this runs on any device, and tests/test_lm_head.py compares it
with transformers' own logits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_cli.errors import RunFailed

# Logits held at a time, in elements (64 MiB in float32): large enough that the matrix products dominate.
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Head:
    """The map from hidden states to next-token logits, with the model family's own rescaling.

    logits = softcap(scale * (hidden @ weight.T + bias)) / temperature, with softcap(x) = cap * tanh(x / cap) in the families
    that have one (Gemma 2, arXiv:2408.00118, section 2).
    """

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, model: PreTrainedModel, temperature: float = 1.0) -> Head:
        """The head of a causal language model. Families have different names for their logit multiplier; each is read here.

        Raises `RunFailed` for a head that is not only its weight: with an adapter, or quantised.
        """
        config = model.config.get_text_config()
        linear = _plain_head(model)
        scale = 1.0
        for multiplier in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
            value = getattr(config, multiplier, None)
            scale = scale if value is None else value
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite; HyperCLOVA X multiplies by it
            scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(linear.weight, linear.bias, scale, softcap, temperature)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) hidden states to (n, V) logits in float32 or wider; the product runs in the dtype of `hidden`. No gradient."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        raw = nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.scale != 1.0:
            raw.mul_(self.scale)
        if self.softcap is not None:
            raw.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw if self.temperature == 1.0 else raw.div_(self.temperature)

    def raw_gradient(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """d loss / d logits, (n, V), to d loss / d (hidden @ weight.T + bias), in place; tanh' = 1 - tanh^2.

        `logits` are needed, and overwritten, if there is a soft-cap.
        """
        if self.softcap is not None and logits is not None:
            gradient.mul_(logits.mul_(self.temperature / self.softcap).square_().neg_().add_(1))
        factor = self.scale / self.temperature
        return gradient if factor == 1.0 else gradient.mul_(factor)

    def unit_gradient(self, probabilities: Tensor, targets: Tensor, logits: Tensor | None, dtype: torch.dtype) -> Tensor:
        """d log p(target) / d hidden, (n, H), from the (n, V) probabilities, which are overwritten; products run in `dtype`.

        `logits` are needed, and overwritten, if there is a soft-cap.
        """
        # onehot - p before the cast: for a confident token p is near 1, and 16 bits would round the difference away.
        one = probabilities.new_ones(()).expand(len(targets), 1)
        gradient = self.raw_gradient(probabilities.neg_().scatter_add_(-1, targets[:, None], one), logits)
        return gradient.to(dtype) @ self.weight.to(dtype)

    def chunks(self, positions: int) -> Iterator[slice]:
        """Slices of `positions` hidden states whose logits stay within `CHUNK_ELEMENTS`."""
        size = max(1, CHUNK_ELEMENTS // self.weight.shape[0])
        return (slice(start, start + size) for start in range(0, positions, size))


def _plain_head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that computes the logits; for a fully trained one (modules_to_save), the active copy."""
    head: Any = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        active = head.active_adapters[0] if head.active_adapters else ""
        is_trained = not head.disable_adapters and active in head.modules_to_save
        head = head.modules_to_save[active] if is_trained else head.original_module
    if type(head) is nn.Linear:
        return head
    if isinstance(head, BaseTunerLayer):
        message, fix = (
            "the adapter is also on the output head",
            "train or evaluate an adapter without lm_head in target_modules",
        )
    else:
        message, fix = (
            f"the output head is of the type {type(head).__name__}",
            "choose a model whose head is a plain linear layer",
        )
    raise RunFailed(f"{message}, and log-probs are computed from a plain weight", fix)


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, each (n,): log p(target), the entropy of the distribution (nats), the mean logit, target is argmax,
    and log of the sum of p squared over the vocabulary.

    What is not asked for is zero.
    """

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor


LOG_PROBS, ENTROPY, IS_TOP1, LOG_SQUARES = "log_probs", "entropy", "is_top1", "log_sum_sq_probs"
ALL = frozenset(field.name for field in fields(TokenScores))


class _LogProbs(torch.autograd.Function):
    """Log-probs whose gradient reaches only the hidden states: one pass over the logits gives both.

    With p = softmax(z) and t the target, d log p_t / dz = onehot(t) - p, so that for z = hidden @ weight.T
    d log p_t / d hidden = (onehot(t) - p) @ weight; the gradient of a loss is that row times d loss / d log p_t.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, with_top1: bool, with_squares: bool) -> Any:
        dtype = product_dtype(hidden)
        log_probs = torch.empty(len(hidden), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        is_top1 = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        log_squares = torch.zeros_like(log_probs)
        unit = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in head.chunks(len(hidden)):
            logits = head.logits(hidden[part].to(dtype))
            if with_top1:
                is_top1[part] = logits.argmax(dim=-1) == targets[part]
            log_p = logits.log_softmax(dim=-1)
            kept = None if head.softcap is None else logits
            del logits
            log_probs[part] = log_p.gather(-1, targets[part, None])[:, 0]
            if with_squares:
                log_squares[part] = (2 * log_p).logsumexp(dim=-1)
            if unit is not None:
                unit[part] = head.unit_gradient(log_p.exp_(), targets[part], kept, dtype)
            del log_p, kept
        ctx.save_for_backward(unit)
        ctx.mark_non_differentiable(is_top1, log_squares)
        return log_probs, is_top1, log_squares

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: object) -> Any:
        (unit,) = ctx.saved_tensors
        return (grad[:, None] * unit).to(unit.dtype), None, None, None, None


class _ScoreTokens(torch.autograd.Function):
    """`score_tokens` with a backward that recomputes each chunk's logits instead of keeping them.

    With p = softmax(z), t the target and H the entropy, per position:
    d log p_t / dz = onehot(t) - p, and dH / dz = -p * (log p + H).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head) -> Any:
        dtype = product_dtype(hidden)
        wide = torch.promote_types(dtype, torch.float32)
        columns = [torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(4)]
        is_top1 = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        log_probs, entropy, mean_logits, log_squares = columns
        for part in head.chunks(len(hidden)):
            scores = _scores(head, hidden[part].to(dtype), targets[part])
            log_probs[part], entropy[part], mean_logits[part], is_top1[part], log_squares[part] = scores
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.head, ctx.dtype = head, dtype
        ctx.mark_non_differentiable(mean_logits, is_top1, log_squares)
        ctx.set_materialize_grads(False)
        return log_probs, entropy, mean_logits, is_top1, log_squares

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        grad_log_probs, grad_entropy = grads[:2]
        head: Head = ctx.head
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Sums over chunks are kept in float32 or wider, for any dtype of the products.
        grad_hidden = torch.zeros_like(hidden, dtype=entropy.dtype) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=entropy.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=entropy.dtype) if needs_bias else None
        for part in head.chunks(len(hidden)):
            chunk = hidden[part].to(ctx.dtype)
            shares = [None if grad is None else grad[part, None] for grad in (grad_log_probs, grad_entropy)]
            raw = _raw_gradient(head, chunk, targets[part], entropy[part, None], *shares)
            if grad_hidden is not None:
                grad_hidden[part] = raw @ head.weight.to(ctx.dtype)
            if grad_weight is not None:
                grad_weight += raw.T @ chunk
            if grad_bias is not None:
                grad_bias += raw.sum(dim=0, dtype=grad_bias.dtype)
            del raw
        cast = [(grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias)]
        return (*(None if grad is None else grad.to(like.dtype) for grad, like in cast), None, None)


# Functions of one chunk, which free its memory on return: at most two float32 tensors of (chunk, vocabulary) exist at a time.


def _scores(head: Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The fields of `TokenScores` of a chunk, each (n,)."""
    logits = head.logits(hidden)
    mean, is_top1 = logits.mean(dim=-1), logits.argmax(dim=-1) == targets
    log_p = logits.log_softmax(dim=-1)
    del logits
    entropy = -log_p.exp().mul_(log_p).sum(dim=-1)
    log_of_target = log_p.gather(-1, targets[:, None])[:, 0]
    return log_of_target, entropy, mean, is_top1, log_p.mul_(2).logsumexp(dim=-1)


def _raw_gradient(head: Head, hidden: Tensor, targets: Tensor, entropy: Tensor, g: Tensor | None, c: Tensor | None) -> Tensor:
    """d loss / d (hidden @ weight.T + bias) of a chunk, (n, V), in the dtype of `hidden`; g and c are (n, 1).

    With the gradients g of log p_t and c of the entropy H: d loss / dz = onehot(t) * g - p * (g + c * (log p + H)).
    """
    logits = head.logits(hidden)
    log_p = logits.log_softmax(dim=-1)
    kept = None if head.softcap is None else logits
    del logits
    factor: Tensor | float = 0.0 if g is None else g
    if c is not None:
        factor = (log_p + entropy).mul_(c).add_(factor)
    gradient = log_p.exp_().mul_(factor).neg_()
    if g is not None:
        gradient.scatter_add_(-1, targets[:, None], g)
    return head.raw_gradient(gradient, kept).to(hidden.dtype)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of an autograd function's products. Autocast does not apply to those, so it is read here."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def score_tokens(hidden: Tensor, targets: Tensor, head: Head, outputs: Collection[str] = ALL) -> TokenScores:
    """Scores of the tokens `targets` (n,) given the hidden states (n, H) that predict them, without their full logits.

    `outputs` are the fields that are computed.
    """
    is_frozen = not (head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad))
    if is_frozen and not {*outputs} - {LOG_PROBS, IS_TOP1, LOG_SQUARES}:
        asked = (IS_TOP1 in outputs, LOG_SQUARES in outputs)
        log_probs, is_top1, log_squares = _LogProbs.apply(hidden, targets, head, *asked)  # type: ignore[no-untyped-call]
        nothing = log_probs.detach().new_zeros(()).expand_as(log_probs)
        return TokenScores(log_probs, nothing, nothing, is_top1, log_squares)
    return TokenScores(*_ScoreTokens.apply(hidden, head.weight, head.bias, targets, head))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class ComparedTokens:
    """Per scored token, each (n,): log p(target) and whether it is the argmax, of policy and reference, and the KL in nats."""

    log_probs: Tensor
    ref_log_probs: Tensor
    is_top1: Tensor
    ref_is_top1: Tensor
    kl: Tensor


def compare_tokens(policy: Tensor, reference: Tensor, targets: Tensor, head: Head, ref_head: Head) -> ComparedTokens:
    """Both models on the tokens `targets` (n,), from their hidden states (n, H) and heads; one product of each head.

    KL(policy || reference) = sum_v p(v) * (log p(v) - log q(v)) is exact, over the full vocabulary. No gradient.
    """
    parts: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for part in head.chunks(len(policy)):
            own, ref = (
                _log_softmax(one, states[part], targets[part]) for one, states in ((head, policy), (ref_head, reference))
            )
            log_p, log_q = own[0], ref[0]
            log_probs, ref_log_probs = (log.gather(-1, targets[part, None])[:, 0] for log in (log_p, log_q))
            gap = torch.sub(log_p, log_q, out=log_q)
            parts.append((log_probs, ref_log_probs, own[1], ref[1], log_p.exp_().mul_(gap).sum(dim=-1)))
    return ComparedTokens(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _log_softmax(head: Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log p over the vocabulary (n, V), whether the target is the argmax (n,)) of a chunk."""
    logits = head.logits(hidden.to(product_dtype(hidden)))
    return logits.log_softmax(dim=-1), logits.argmax(dim=-1) == targets
