"""The figures of a policy against its reference, each with a 95 % bootstrap interval over prompts.

For pair i with summed response log-probs pi (policy) and ref (reference), EOS included:
    reward r = beta * (pi - ref)        margin = r_chosen - r_rejected        loss = -log sigmoid(margin)
    accuracy: share with r_chosen > r_rejected; logp_accuracy: share with log p(chosen) > log p(rejected) under one model;
    normalized_logp_accuracy: the same after dividing each by its number of tokens. A tie counts one half.
For demonstrations, under one model:
    loss: -log p averaged over the completions' tokens, nats; token_accuracy: share of them that the model finds most likely.
For both:
    kl_token: KL(policy || reference) over the full vocabulary, averaged over response tokens, nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_cli.data.tokens import Encoded
from dpo_cli.evaluation.bootstrap import Array, Intervals, Ratio, mean
from dpo_cli.providers.policy import Policy
from dpo_cli.scoring.forward import States, collate
from dpo_cli.scoring.lm_head import Head, score_tokens, token_kl
from dpo_cli.scoring.oom import in_halves, list_halves
from dpo_cli.scoring.shared_prompts import IGNORED


@dataclass(frozen=True)
class Scores:
    """Per row, in the order of the rows: (n, k) arrays, of a pair's chosen and rejected or a demonstration's completion."""

    policy: Array  # summed log-probs, nats
    reference: Array
    policy_right: Array  # tokens that the model finds most likely
    reference_right: Array
    tokens: Array  # response tokens
    kl: Array  # summed over the response's tokens, nats

    @property
    def of_pairs(self) -> bool:
        return bool(self.policy.shape[1] == 2)

    def of(self, places: Sequence[int]) -> Scores:
        """The scores of these rows alone."""
        return Scores(**{name: column[list(places)] for name, column in vars(self).items()})


def score_rows(
    policy: Policy, rows: Sequence[Encoded], states: States, pad_token_id: int, batch_size: int, dtype: torch.dtype
) -> Scores:
    """Score rows under the policy and under its reference, in evaluation mode and without gradient.

    `states` is the path of the run (training/scoring.py). A batch that is out of memory is scored in halves.
    """
    policy.model.eval()
    kinds = len(rows[0].responses)
    columns = np.zeros((6, len(rows), kinds))
    by_length = sorted(range(len(rows)), key=lambda i: rows[i].length)  # so that little is padded
    batches = [by_length[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    def scored(batch: list[int]) -> list[Tensor]:
        return _score(policy, states, collate([rows[i] for i in batch], pad_token_id, policy.network.device), dtype)

    for batch, scores in in_halves(batches, scored, list_halves):
        for column, sums in zip(columns, scores, strict=True):
            column[batch] = sums.view(kinds, len(batch)).T.numpy()
    return Scores(*columns)


def _score(policy: Policy, states: States, batch: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Sums over each row's response of the columns of `Scores`, each (kB,), in float64 on the CPU: Apple's GPUs have none."""
    labels = batch["labels"][:, 1:]
    scored = labels != IGNORED
    device = policy.network.device.type
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        hidden, head = states(policy.network, **batch), Head.of(policy.network)
        made = score_tokens(hidden, labels[scored], head)
        with policy.as_reference() as reference:
            ref_hidden, ref_head = states(reference, **batch), Head.of(reference)
            ref_made = score_tokens(ref_hidden, labels[scored], ref_head)
        values = [made.log_probs, ref_made.log_probs, made.is_top1, ref_made.is_top1, torch.ones_like(made.log_probs)]
        values.append(token_kl(hidden, ref_hidden, head, ref_head))
    on_cpu, scored = [value.cpu().double() for value in values], scored.cpu()
    return [value.new_zeros(scored.shape).masked_scatter(scored, value).sum(dim=1) for value in on_cpu]


def point_figures(scores: Scores, beta: float) -> dict[str, float]:
    """The figures of an evaluation line of metrics.jsonl: plain means."""
    columns = _policy_ratios(scores, beta)
    if scores.of_pairs:
        reward = beta * (scores.policy - scores.reference)
        for name in ("logp_accuracy", "normalized_logp_accuracy"):
            del columns[name]
        for kind, name in enumerate(("chosen", "rejected")):
            columns |= {f"reward_{name}": mean(reward[:, kind]), f"logp_{name}": mean(scores.policy[:, kind])}
    return {name: float(above.sum() / below.sum()) for name, (above, below) in columns.items()}


def figures(scores: Scores, prompts: Sequence[str], beta: float) -> dict[str, Any]:
    """`policy`, `base` and `gain` (policy - base, paired), every figure {"value", "low", "high"}."""
    policy, base = _policy_ratios(scores, beta), _base_ratios(scores)
    gain = {name: (policy[name][0] - base[name][0], base[name][1]) for name in base}
    intervals = Intervals(prompts)
    return {
        group: {name: intervals.of(ratio) for name, ratio in ratios.items()}
        for group, ratios in {"policy": policy, "base": base, "gain": gain}.items()
    }


def _policy_ratios(scores: Scores, beta: float) -> dict[str, Ratio]:
    kl_token = {"kl_token": (scores.kl.sum(axis=1), scores.tokens.sum(axis=1))}
    if not scores.of_pairs:
        return {**_token_ratios(scores.policy, scores.policy_right, scores.tokens), **kl_token}
    reward = beta * (scores.policy - scores.reference)
    margin = reward[:, 0] - reward[:, 1]
    preference = {"accuracy": mean(_wins(reward)), "margin": mean(margin), "loss": mean(np.logaddexp(0, -margin))}
    return {**preference, **kl_token, **_logp_ratios(scores.policy, scores.tokens)}


def _base_ratios(scores: Scores) -> dict[str, Ratio]:
    """What can be said of the reference alone."""
    if scores.of_pairs:
        return _logp_ratios(scores.reference, scores.tokens)
    return _token_ratios(scores.reference, scores.reference_right, scores.tokens)


def _token_ratios(log_probs: Array, right: Array, tokens: Array) -> dict[str, Ratio]:
    return {"loss": (-log_probs[:, 0], tokens[:, 0]), "token_accuracy": (right[:, 0], tokens[:, 0])}


def _logp_ratios(log_probs: Array, tokens: Array) -> dict[str, Ratio]:
    return {"logp_accuracy": mean(_wins(log_probs)), "normalized_logp_accuracy": mean(_wins(log_probs / tokens))}


def _wins(scores: Array) -> Array:
    return np.sign(scores[:, 0] - scores[:, 1]) / 2 + 0.5
