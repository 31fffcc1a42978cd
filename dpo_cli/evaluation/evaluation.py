"""What a run trained, judged against its reference: all that `dpo eval` prints and evaluation.json holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dpo_cli.data.tokens import Encoded
from dpo_cli.evaluation.bootstrap import Array, Intervals, mean
from dpo_cli.evaluation.divergence import sequence_kl
from dpo_cli.evaluation.generation import Sample, answer_tokens, side_by_side
from dpo_cli.evaluation.losses import trained_loss
from dpo_cli.evaluation.metrics import Scores, figures, point_figures, score_rows
from dpo_cli.evaluation.row_figures import extremes, row_figures
from dpo_cli.plan.plan import Plan
from dpo_cli.providers.policy import Policy
from dpo_cli.scoring.forward import states_of
from dpo_cli.storage.redaction import redact

ANSWERS, SAMPLES = 32, 8  # held-out prompts that an evaluation answers, and those whose answers it keeps
CATEGORIES, NONE, OTHERS = 20, "(none)", "(others)"  # a column called so may be an id, another one in each row
ROW_BY_ROW = ("rows", "best", "worst")  # what evaluation.json has beside what `eval --json` prints


def score(policy: Policy, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Scores:
    batch_size, dtype = plan.config.per_device_eval_batch_size, getattr(torch, plan.dtype)
    return score_rows(policy, rows, states_of(plan.scoring), int(tokenizer.pad_token_id), batch_size, dtype)


@dataclass(frozen=True)
class Measured:
    """What an evaluation computes with the model: the rest is counted from it."""

    scores: Scores
    kl: Array  # the samples of kl_sequence, nats an answer; empty where none are drawn
    unanswered: int = 0  # prompts asked for that have none: they fill the model's context


def measure(policy: Policy, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Measured:
    """Score the rows, and sample answers to their prompts; not of sft, nor from a policy whose log-probs are no numbers."""
    scores = score(policy, rows, tokenizer, plan)
    samples_kl = plan.config.strategy == "dpo" and bool(np.isfinite(scores.policy).all())
    return Measured(scores, *(sequence_kl(policy, tokenizer, rows, plan) if samples_kl else (np.zeros(0), 0)))


def line_figures(measured: Measured, plan: Plan) -> dict[str, float]:
    """The figures of an evaluation line of metrics.jsonl: plain means, and the loss that is trained where it is another."""
    made = point_figures(measured.scores, plan.config.beta)
    if plan.config.strategy == "dpo" and plan.config.loss_type not in ("sigmoid", ["sigmoid"]):
        made["trained_loss"] = trained_loss(measured.scores, plan.config)
    return {**made, "kl_sequence": float(measured.kl.mean())} if len(measured.kl) else made


def answered(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], plan: Plan, count: int = ANSWERS
) -> list[Sample]:
    """Greedy answers of the reference and the policy to the first prompts of the rows."""
    return side_by_side(policy, tokenizer, rows, count, plan.config.max_new_tokens, getattr(torch, plan.dtype))


def judge(rows: Sequence[Encoded], measured: Measured | None, samples: Sequence[Sample], plan: Plan) -> dict[str, Any]:
    """What evaluation.json holds: the figures of `eval --json`, null when nothing was measured, and the rows."""
    if measured is None:
        nothing: dict[str, Any] = dict.fromkeys(("policy", "base", "gain", "answer_tokens"))
        return (
            _counts([], plan) | nothing | {"unanswered": 0, "categories": {}, "samples": []} | {name: [] for name in ROW_BY_ROW}
        )
    beta, scores, kl = plan.config.beta, measured.scores, measured.kl
    made: dict[str, Any] = figures(scores, [row.row.prompt_key for row in rows], beta)
    made["policy"]["kl_sequence"] = Intervals([str(i) for i in range(len(kl))]).of(mean(kl)) if len(kl) else None
    table = row_figures(rows, scores, beta)
    return {
        **_counts(rows, plan),
        **made,
        "answer_tokens": answer_tokens(samples[:ANSWERS]),
        # Both ask the first of the same prompts: the longer list holds the other.
        "unanswered": max(measured.unanswered, sum(sample.is_missing for sample in samples[:ANSWERS])),
        "categories": _by_category(rows, scores, plan),
        "samples": [sample.to_json() for sample in samples if not sample.is_missing][:SAMPLES],
        "rows": table,
        **extremes(rows, table),
    }


def _counts(rows: Sequence[Encoded], plan: Plan) -> dict[str, Any]:
    return {plan.noun: len(rows), "prompts": len({row.row.prompt_key for row in rows})}


def _by_category(rows: Sequence[Encoded], scores: Scores, plan: Plan) -> dict[str, Any]:
    """The figures of the rows of each category, the largest first and many small ones as one; empty where no row has one."""
    names = [redact(row.row.category) or NONE for row in rows]  # which become keys, where nothing is redacted
    sizes = Counter(names)
    if set(sizes) == {NONE}:
        return {}
    told = [name for name, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))]
    told = told if len(told) <= CATEGORIES else [*told[: CATEGORIES - 1], OTHERS]
    places: dict[str, list[int]] = {name: [] for name in told}
    for i, name in enumerate(names):
        places.get(name, places[told[-1]]).append(i)
    of_one = ((name, [rows[i] for i in found], scores.of(found)) for name, found in places.items())
    return {
        name: _counts(own, plan) | figures(theirs, [row.row.prompt_key for row in own], plan.config.beta)
        for name, own, theirs in of_one
    }
