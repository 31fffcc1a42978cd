"""The rounding of a 16-bit run: what its figures show of a policy that has not moved, and evaluations without it.

A policy that equals its reference is rounded in the same way, so its log-ratios are exactly 0. After the smallest change they
are rounded differently, and a log-ratio is a sum over all tokens and layers of such differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from dpo_cli.data.encoded import Encoded
from dpo_cli.evaluation.evaluation import Measured, score
from dpo_cli.evaluation.metrics import Rewards, point_figures
from dpo_cli.plan.plan import Plan, Rounding
from dpo_cli.providers.out_of_memory import is_out_of_memory
from dpo_cli.providers.policy import Policy
from dpo_cli.providers.precision import in_float32
from dpo_cli.runs.state_io import random_state_kept
from dpo_cli.strategies.row_kinds import PAIRS

# Standard deviation of the change of each weight: so small that in float32 a log-ratio hardly moves, and large enough that 16
# bits round most products differently.
PERTURBATION = 1e-5
LARGEST_SHARE = 0.1  # of a mean margin: more rounding than this, and it is computed in float32


def rounding_of(policy: Policy, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Rounding | None:
    """The rounding of a policy before its first step, over these pairs; None in float32, or if it is not finite.

    The weights and the random state are the same afterwards, to the bit.
    """
    if plan.dtype == "float32" or not plan.strategy.refers:
        return None
    before = None if plan.starts_at_reference else score(policy, rows, tokenizer, plan).policy
    with _perturbed(policy):
        scores = score(policy, rows, tokenizer, plan)
    ratios = scores.policy - (scores.reference if before is None else before)
    response = float(np.sqrt(np.mean(np.square(ratios))))
    if not np.isfinite(response):
        return None
    if scores.kind is not PAIRS:  # a margin compares the means of two halves of the rows, each of half as many
        return Rounding(response, 2 * response)
    return Rounding(response, float(np.sqrt(np.mean(np.square(ratios[:, 0] - ratios[:, 1])))))


@contextmanager
def _perturbed(policy: Policy) -> Iterator[None]:
    """Within, the trained weights are perturbed. Without an adapter only norms and biases: a copy of all is too large."""
    trained = [weight for weight in policy.model.parameters() if weight.requires_grad]
    moved = trained if isinstance(policy.model, PeftModel) else [weight for weight in trained if weight.ndim == 1]
    kept = [weight.detach().clone() for weight in moved]
    try:
        with random_state_kept(), torch.no_grad():
            torch.manual_seed(0)
            for weight in moved:
                weight.add_(torch.randn_like(weight), alpha=PERTURBATION)
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(moved, kept, strict=True):
                weight.copy_(before)


def without_rounding(
    policy: Policy,
    rows: Sequence[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    measured: Measured,
    tell: Callable[[str], None],
) -> Measured:
    """An evaluation, with its rows scored again in float32 if rounding is more than a tenth of the mean margin: `tell` says so.

    Sampled answers and `kl_sequence` keep the dtype of the run. One that was scored again already is returned as it is.
    """
    scores = measured.scores
    if measured.dtype is not None or plan.rounding is None or plan.dtype == "float32":
        return measured
    if isinstance(scores, Rewards) or "margin" not in plan.strategy.shown:
        return measured
    margin = point_figures(scores, plan.config.beta)["margin"]
    if not plan.rounding.of_mean(len(rows), plan.config.beta) > LARGEST_SHARE * abs(margin):  # a NaN is computed once
        return measured
    tell(f"the rows are scored again in float32: rounding in {plan.dtype} is more than a tenth of the margin {margin:.2g}")
    try:
        with ExitStack() as changed:
            policy.world.together(lambda: changed.enter_context(in_float32(policy.network)))  # all of them, or none
            exact = score(policy, rows, tokenizer, plan, torch.float32)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        tell("there is no memory for that: the figures keep their rounding; `dpo eval` on a larger device has none")
        return measured
    return replace(measured, scores=exact, dtype="float32")
