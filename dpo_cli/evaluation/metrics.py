"""The figures of an adapter against its base on preference pairs, each with a 95 % bootstrap interval over prompts.

For pair i with summed response log-probs pi (policy) and ref (reference), EOS included:
    reward r = beta * (pi - ref)        margin = r_chosen - r_rejected        loss = -log sigmoid(margin)
    accuracy: share with r_chosen > r_rejected; logp_accuracy: share with log p(chosen) > log p(rejected) under one model;
    normalized_logp_accuracy: the same after dividing each by its number of tokens. A tie counts one half.
    kl_token: KL(policy || reference) over the full vocabulary, averaged over response tokens, nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor

from dpo_cli.data.tokens import EncodedPair
from dpo_cli.training.head import Head, score_tokens, token_kl
from dpo_cli.training.parts import is_out_of_memory
from dpo_cli.training.scoring import States, collate
from dpo_cli.training.sharing import IGNORED

Array = NDArray[np.float64]

RESAMPLES = 2000
# A sum over pairs divided by a sum over pairs; with weights over prompts both sums are resampled together.
Ratio = tuple[Array, Array]


@dataclass(frozen=True)
class PairScores:
    """Per pair, in the order of the pairs: (n, 2) arrays with chosen first, rejected second."""

    policy: Array  # summed log-probs, nats
    reference: Array
    tokens: Array  # response tokens
    kl: Array  # summed over the response's tokens, nats


def score_pairs(
    model: PeftModel, pairs: Sequence[EncodedPair], states: States, pad_token_id: int, batch_size: int, dtype: torch.dtype
) -> PairScores:
    """Score pairs under the adapter and under the base model (adapter off), in evaluation mode and without gradient.

    `states` is the path of the run (training/scoring.py). A batch that is out of memory is scored in halves.
    """
    model.eval()
    base = model.get_base_model()
    head = Head.of(base)
    columns = np.zeros((4, len(pairs), 2))
    by_length = sorted(range(len(pairs)), key=lambda i: pairs[i].length)  # so that little is padded
    waiting = [by_length[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    while waiting:
        rows = waiting.pop(0)
        try:
            scores = _score(model, states, head, collate([pairs[i] for i in rows], pad_token_id, base.device), dtype)
        except RuntimeError as error:
            if len(rows) == 1 or not is_out_of_memory(error):
                raise
            waiting[:0] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
            continue
        for column, sums in zip(columns, scores, strict=True):
            column[rows] = sums.view(2, len(rows)).T.cpu().numpy()
    return PairScores(*columns)


def _score(model: PeftModel, states: States, head: Head, batch: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Sums over each row's response of the columns of `PairScores`, each (2B,), in float64."""
    base = model.get_base_model()
    with torch.no_grad(), torch.autocast(base.device.type, dtype, enabled=dtype != torch.float32):
        policy = states(base, **batch)
        with model.disable_adapter():
            reference = states(base, **batch)
        labels = batch["labels"][:, 1:]
        scored = labels != IGNORED
        values = [score_tokens(hidden, labels[scored], head).log_probs for hidden in (policy, reference)]
        values += [torch.ones_like(values[0]), token_kl(policy, reference, head)]
    return [value.new_zeros(scored.shape).masked_scatter(scored, value).double().sum(dim=1) for value in values]


def point_figures(scores: PairScores, beta: float) -> dict[str, float]:
    """The figures of an evaluation line of metrics.jsonl: plain means."""
    reward = beta * (scores.policy - scores.reference)
    columns = {
        **_policy_ratios(scores, beta),
        "reward_chosen": _mean(reward[:, 0]),
        "reward_rejected": _mean(reward[:, 1]),
        "logp_chosen": _mean(scores.policy[:, 0]),
        "logp_rejected": _mean(scores.policy[:, 1]),
    }
    names = (
        "loss",
        "accuracy",
        "margin",
        "reward_chosen",
        "reward_rejected",
        "logp_chosen",
        "logp_rejected",
        "kl_token",
    )
    return {name: float(columns[name][0].sum() / columns[name][1].sum()) for name in names}


def figures(scores: PairScores, prompts: Sequence[str], beta: float) -> dict[str, Any]:
    """`policy`, `base` and `gain` (policy - base, paired), every figure {"value", "low", "high"}."""
    policy = _policy_ratios(scores, beta)
    base = _logp_ratios(scores.reference, scores.tokens)
    gain = {name: (policy[name][0] - base[name][0], base[name][1]) for name in base}
    intervals = Intervals(prompts)
    made: dict[str, Any] = {
        group: {name: intervals.of(ratio) for name, ratio in ratios.items()}
        for group, ratios in {"policy": policy, "base": base, "gain": gain}.items()
    }
    made["policy"]["kl_sequence"] = None  # needs samples from the policy
    return made


def _policy_ratios(scores: PairScores, beta: float) -> dict[str, Ratio]:
    reward = beta * (scores.policy - scores.reference)
    margin = reward[:, 0] - reward[:, 1]
    return {
        "accuracy": _mean(_wins(reward)),
        "margin": _mean(margin),
        "loss": _mean(np.logaddexp(0, -margin)),
        "kl_token": (scores.kl.sum(axis=1), scores.tokens.sum(axis=1)),
        **_logp_ratios(scores.policy, scores.tokens),
    }


def _logp_ratios(log_probs: Array, tokens: Array) -> dict[str, Ratio]:
    return {"logp_accuracy": _mean(_wins(log_probs)), "normalized_logp_accuracy": _mean(_wins(log_probs / tokens))}


def _wins(scores: Array) -> Array:
    return np.sign(scores[:, 0] - scores[:, 1]) / 2 + 0.5


def _mean(values: Array) -> Ratio:
    return values, np.ones_like(values)


class Intervals:
    """95 % percentile bootstrap over prompts: pairs of one prompt are drawn together, since they are not independent."""

    def __init__(self, prompts: Sequence[str], seed: int = 0) -> None:
        _, self.group = np.unique(np.asarray(prompts, dtype=object), return_inverse=True)
        count = int(self.group.max()) + 1
        draws = np.random.default_rng(seed)
        self.weights = np.stack([np.bincount(draws.integers(count, size=count), minlength=count) for _ in range(RESAMPLES)])

    def of(self, ratio: Ratio) -> dict[str, float]:
        above, below = (np.bincount(self.group, weights=side) for side in ratio)
        low, high = np.percentile((self.weights @ above) / (self.weights @ below), [2.5, 97.5])
        return {"value": float(above.sum() / below.sum()), "low": float(low), "high": float(high)}
