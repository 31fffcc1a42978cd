"""The evaluation of a policy against its reference: `dpo eval` prints it and evaluation.json holds it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dpo_cli.data.encoded import Encoded
from dpo_cli.data.messages import Text, flat
from dpo_cli.data.ratings import BAD, GOOD
from dpo_cli.data.rows import Rating, question_of
from dpo_cli.evaluation.bootstrap import Array, Intervals, mean
from dpo_cli.evaluation.generation import (
    Answer,
    Rank,
    Sample,
    Sampling,
    answer_tokens,
    answers,
    first_of_each_prompt,
    paired,
    side_by_side,
)
from dpo_cli.evaluation.losses import is_known, trained_loss, trains_own_loss
from dpo_cli.evaluation.metrics import RatedScores, Rewards, Scores, figures, point_figures, reward_rows, score_rows
from dpo_cli.plan.cost import answered_prompts
from dpo_cli.plan.plan import Plan
from dpo_cli.providers.policy import Policy
from dpo_cli.results.intervals import Interval, Sides
from dpo_cli.results.judgement import Evaluation, Judged, JudgedRow, RowScores
from dpo_cli.runs.state_io import random_state_kept
from dpo_cli.scoring.forward import plain_states, states_of
from dpo_cli.scoring.mismatched import ratings_of, with_mismatched
from dpo_cli.storage.progress import working
from dpo_cli.storage.redaction import redact
from dpo_cli.strategies.figures import FIGURES
from dpo_cli.strategies.row_kinds import DEMONSTRATIONS, REWARDS

ACCURACY_LOW = "accuracy_low"  # key of an evaluation line
SAMPLES = 8  # answers that are kept
CATEGORIES, NONE, OTHERS = 20, "(none)", "(others)"  # a column of this name may be an id that differs in each row


def score(
    policy: Policy,
    rows: Sequence[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    dtype: torch.dtype | None = None,
) -> Scores:
    """The scores of rows; in the plan's dtype if no other is named."""
    batch_size, dtype = plan.config.per_device_eval_batch_size, dtype or getattr(torch, plan.dtype)
    room, pad_token_id = plan.evaluation_room(dtype.itemsize), int(tokenizer.pad_token_id)
    scored = with_mismatched(rows, plan.config.max_seq_length) if plan.strategy.mismatches else rows
    scores = score_rows(policy, scored, states_of(plan.scoring), pad_token_id, batch_size, dtype, room)
    return RatedScores.of_both(scores, ratings_of(rows)) if plan.strategy.mismatches else scores


def score_rewards(policy: Policy, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Rewards:
    """The rewards of rows by a reward model."""
    batch_size, dtype = plan.config.per_device_eval_batch_size, getattr(torch, plan.dtype)
    room, pad_token_id = plan.evaluation_room(dtype.itemsize), int(tokenizer.pad_token_id)
    return reward_rows(policy, rows, plan.scoring.shared, pad_token_id, batch_size, dtype, room)


@dataclass(frozen=True)
class Measured:
    """What an evaluation computes with the model; everything else follows from it."""

    scores: Scores | Rewards
    kl: Array  # the samples of kl_sequence, nats per answer; empty if none are drawn
    unanswered: int = 0  # prompts without an answer: they fill the model's context
    rewards: Array = field(default_factory=lambda: np.zeros(0))  # of the same answers; empty if nothing scores them
    dtype: str | None = None  # of the scores, if it is not the plan's

    @property
    def log_probs(self) -> Scores:
        """The scores of a language model."""
        assert isinstance(self.scores, Scores)
        return self.scores


def measure(
    policy: Policy, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, plan: Plan, rank: Rank | None = None
) -> Measured:
    """Score the rows, and sample answers to their prompts; not for sft, nor from a policy whose log-probs are not finite.

    A reward model only gives rewards. `rank` scores the sampled answers.
    """
    with working("evaluating"):
        if plan.strategy.gives_rewards:
            return Measured(score_rewards(policy, rows, tokenizer, plan), np.zeros(0))
        scores = score(policy, rows, tokenizer, plan)
        samples_kl = plan.strategy.refers and bool(np.isfinite(scores.policy).all())
        return Measured(scores, *(sequence_kl(policy, tokenizer, rows, plan, rank) if samples_kl else (np.zeros(0), 0)))


def line_figures(measured: Measured, rows: Sequence[Encoded], plan: Plan) -> dict[str, float]:
    """The figures of an evaluation line of metrics.jsonl: plain means, and the trained loss if it is a different one.

    Of a reward model also the lower end of the interval of its accuracy, which says whether it guesses.
    """
    figures = point_figures(measured.scores, plan.config.beta)
    if isinstance(measured.scores, Rewards):
        accuracy = Intervals(_prompts(rows)).of(FIGURES["accuracy"].formulas[REWARDS](measured.scores.columns()))
        return {**figures, ACCURACY_LOW: accuracy.low}
    if plan.strategy.refers and is_known(plan.config) and not trains_own_loss(plan.config):
        figures["trained_loss"] = trained_loss(measured.scores, plan.config)
    of_answers = {"kl_sequence": measured.kl, "reward": measured.rewards}
    return {**figures, **{name: float(values.mean()) for name, values in of_answers.items() if len(values)}}


def answered(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], plan: Plan, count: int = 0
) -> list[Sample]:
    """Greedy answers of the reference and the policy to the first prompts of the rows: to as many as an evaluation needs, or
    to `count`. A reward model gives none."""
    if plan.strategy.gives_rewards:
        return []
    dtype = getattr(torch, plan.dtype)
    room = plan.evaluation_room(dtype.itemsize)
    return side_by_side(
        policy, tokenizer, rows, max(count, answered_prompts(plan.config)), plan.config.max_new_tokens, dtype, room
    )


def judge(
    rows: Sequence[Encoded],
    measured: Measured | None,
    samples: Sequence[Sample],
    plan: Plan,
    rank: Rank | None = None,
) -> Evaluation:
    """The evaluation of these rows; without figures if nothing is measured. `rank` scores the answers."""
    if measured is None:
        return Evaluation(plan.noun, 0, 0, None)
    scores, kl = measured.scores, measured.kl
    judged = _judged(rows, scores, plan)
    sides = judged.sides
    assert sides is not None
    answers = samples[: answered_prompts(plan.config)]
    sequence = Intervals([str(i) for i in range(len(kl))]).of(mean(kl)) if len(kl) else None
    rewards = answer_rewards(rows, answers, rank) if rank is not None else None
    own, base, gain = ({"answer_reward": rewards[side]} if rewards else {} for side in ("policy", "base", "gain"))
    table = row_figures(rows, scores, plan.config.beta)
    best, worst = extremes(rows, table)
    return Evaluation(
        judged.noun,
        judged.count,
        judged.prompts,
        Sides({**sides.policy, "kl_sequence": sequence, **own}, {**sides.base, **base}, {**sides.gain, **gain}),
        answer_tokens=answer_tokens(answers),
        # Both use the first of the same prompts: the longer list contains the other.
        unanswered=max(measured.unanswered, sum(sample.is_missing for sample in answers)),
        categories=_by_category(rows, scores, plan),
        samples=[sample.texts for sample in samples if not sample.is_missing][:SAMPLES],
        rows=table,
        best=best,
        worst=worst,
        dtype=measured.dtype or plan.dtype,
    )


def _prompts(rows: Sequence[Encoded]) -> list[str]:
    return [row.row.prompt_key for row in rows]


def prompt_digests(rows: Sequence[Encoded]) -> list[str]:
    """A short digest of the prompt of each row."""
    keys = [prompt.encode("utf-8", "surrogatepass") for prompt in _prompts(rows)]
    return [hashlib.blake2b(key, digest_size=8).hexdigest() for key in keys]


JUDGED_PAIRS = 100  # held-out pairs on which what scores samples is judged


def reward_accuracy(rows: Sequence[Encoded], rank: Rank) -> Interval | None:
    """The share of pairs whose chosen response has the larger reward, ties one half, over the first; None without pairs."""
    scored, prompts = [], []
    with working("judging the reward", len(rows[:JUDGED_PAIRS]), "pairs") as work:
        for row in rows[:JUDGED_PAIRS]:
            chosen, rejected = (
                Answer(flat(text), len(ids), True, tuple(ids))
                for text, ids in zip(row.row.responses, row.responses, strict=True)
            )
            one, other = rank(question_of(row.row), [chosen, rejected])
            scored.append(np.sign(one - other) / 2 + 0.5)
            prompts.append(row.row.prompt_key)
            work.add(1)
    return Intervals(prompts).of(mean(np.array(scored))) if scored else None


def answer_rewards(rows: Sequence[Encoded], samples: Sequence[Sample], rank: Rank) -> dict[str, Interval] | None:
    """Mean rewards of the answers of `base` and of `policy` to the first prompts of the rows, and `gain`, with intervals.

    A missing answer does not count.
    """
    first = first_of_each_prompt(rows, len(samples))
    answered = [(row, sample) for row, sample in zip(first, samples, strict=True) if not sample.is_missing]
    if not answered:
        return None
    scored = np.array([rank(question_of(row.row), (sample.base, sample.adapter)) for row, sample in answered])
    return paired(scored[:, 0], scored[:, 1])


def _judged(rows: Sequence[Encoded], scores: Scores | Rewards, plan: Plan) -> Judged:
    prompts = _prompts(rows)
    return Judged(plan.noun, len(rows), len(set(prompts)), figures(scores, prompts, plan.config.beta))


def _by_category(rows: Sequence[Encoded], scores: Scores | Rewards, plan: Plan) -> dict[str, Judged]:
    """The figures of each category, the largest first, and small ones as one; empty if no row has a category."""
    names = [redact(row.row.category) or NONE for row in rows]  # names become keys of JSON, which are not redacted
    sizes = Counter(names)
    if set(sizes) == {NONE}:
        return {}
    shown = [name for name, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))]
    shown = shown if len(shown) <= CATEGORIES else [*shown[: CATEGORIES - 1], OTHERS]
    places: dict[str, list[int]] = {name: [] for name in shown}
    for i, name in enumerate(names):
        places.get(name, places[shown[-1]]).append(i)
    return {name: _judged([rows[i] for i in own], scores.of(own), plan) for name, own in places.items()}


def sequence_kl(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], plan: Plan, rank: Rank | None = None
) -> tuple[Array, int, Array]:
    """log pi(y) - log ref(y) of one answer y to each of the first `kl_prompts` prompts: (n,), nats a sequence.

    Also the number of those prompts that leave no room for an answer, which are not among the n; and the rewards of the
    answers by `rank`, (n,), or none.

    y is drawn from the policy itself (temperature 1, top-p 1, at most `max_new_tokens`), so the mean estimates
    KL(policy || reference) = E[log pi(y) - log ref(y)]; a single value may be negative. The same seed draws the same answers,
    and the random state of a training does not change.
    """
    config, dtype = plan.config, getattr(torch, plan.dtype)
    batch_size, room = config.per_device_eval_batch_size, plan.evaluation_room(dtype.itemsize)
    first_rows = first_of_each_prompt(rows, config.kl_prompts)
    nothing = np.zeros(0)
    if not first_rows:
        return nothing, 0, nothing
    with random_state_kept():
        torch.manual_seed(config.seed)
        sampling = Sampling(config.max_new_tokens, temperature=1.0)
        prompts = [row.prompt_ids for row in first_rows]
        samples = answers(policy.network, tokenizer, prompts, sampling, dtype, room, world=policy.world)
    both = [(row, answer) for row, answer in zip(first_rows, samples, strict=True) if not answer.is_missing]
    sampled = [replace(row, responses=(list(answer.ids),)) for row, answer in both]
    if not sampled:
        return nothing, len(first_rows), nothing
    # A sampled answer ends where the policy ended it: with an end token, or without one at the limit.
    scores = score_rows(policy, sampled, plain_states, int(tokenizer.pad_token_id), batch_size, dtype, room, "answers")
    difference: Array = (scores.policy - scores.reference)[:, 0]
    rewards = [rank(question_of(row.row), [answer])[0] for row, answer in both] if rank is not None else []
    return difference, len(first_rows) - len(sampled), np.array(rewards)


EXTREMES = 10


def row_figures(rows: Sequence[Encoded], scores: Scores | Rewards, beta: float) -> list[JudgedRow]:
    """Place and figures of each row: margin and rewards of a pair, loss of a demonstration with and without training, reward of
    a rating, which counts against its margin if the answer is bad."""
    if isinstance(scores, RatedScores):
        signed = zip(scores.columns(beta).reward[:, 0].tolist(), scores.is_good.tolist(), strict=True)
        figures_of_rows = [{"margin": reward if good else -reward, "reward": reward} for reward, good in signed]
    elif isinstance(scores, Rewards) or scores.kind is not DEMONSTRATIONS:
        rewards = scores.columns(beta).reward.tolist()
        figures_of_rows = [
            {"margin": chosen - rejected, "reward_chosen": chosen, "reward_rejected": rejected} for chosen, rejected in rewards
        ]
    else:
        losses = zip((-scores.policy / scores.tokens)[:, 0], (-scores.reference / scores.tokens)[:, 0], strict=True)
        figures_of_rows = [{"loss": float(policy), "base_loss": float(base)} for policy, base in losses]
    return [
        JudgedRow(Path(row.row.file).name, row.row.line, row.row.category or None, figures_of_row, scores=scores_of_row)
        for row, figures_of_row, scores_of_row in zip(rows, figures_of_rows, row_scores(rows, scores), strict=True)
    ]


def row_scores(rows: Sequence[Encoded], scores: Scores | Rewards) -> list[RowScores]:
    """The scores of each row, with a digest of its prompt."""
    prompts = prompt_digests(rows)
    if isinstance(scores, Rewards):
        return [RowScores(prompt, own) for prompt, own in zip(prompts, scores.columns().reward.tolist(), strict=True)]
    sides = (side.tolist() for side in (scores.policy, scores.reference, scores.tokens))
    good = scores.is_good.tolist() if isinstance(scores, RatedScores) else [None] * len(rows)
    return [RowScores(*row) for row in zip(prompts, *sides, good, strict=True)]


def extremes(rows: Sequence[Encoded], table: Sequence[JudgedRow]) -> tuple[list[JudgedRow], list[JudgedRow]]:
    """The rows with the largest and the smallest gain: at most ten each, none in both, with their texts."""
    order = sorted(range(len(table)), key=lambda i: -table[i].gain)
    count = min(EXTREMES, (len(order) + 1) // 2)
    best, worst = (
        [replace(table[i], texts=_texts(rows[i]), scores=None) for i in ends]
        for ends in (order[:count], order[count:][-EXTREMES:][::-1])
    )
    return best, worst


def _texts(encoded: Encoded) -> dict[str, str]:
    responses = zip(encoded.row.kind.responses, encoded.row.responses, strict=True)
    row = encoded.row
    rating = {"rating": GOOD if row.is_good else BAD} if isinstance(row, Rating) else {}
    return {"prompt": as_text(row.prompt), **{name: as_text(text) for name, text in responses}, **rating}


def as_text(text: Text) -> str:
    """A readable text: one message without its role, several with their roles."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return str(text[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in text)
