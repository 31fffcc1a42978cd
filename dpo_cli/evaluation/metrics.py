"""The scores of rows under a policy and its reference, or of a reward model, and their figures with 95 % bootstrap intervals
over prompts.

strategies/figures.py defines each figure and its formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from dpo_cli.data.encoded import Encoded
from dpo_cli.evaluation.bootstrap import Array, Intervals, Ratio, value_of
from dpo_cli.hardware.memory import EvaluationRoom
from dpo_cli.providers.policy import Policy
from dpo_cli.results.intervals import Figures, Sides
from dpo_cli.scoring.forward import States, collate
from dpo_cli.scoring.lm_head import Head, compare_tokens
from dpo_cli.scoring.oom import in_halves, list_halves
from dpo_cli.scoring.packing import Batch, filled
from dpo_cli.scoring.score_head import rewards
from dpo_cli.scoring.shared_prompts import IGNORED
from dpo_cli.storage.progress import working
from dpo_cli.strategies.figures import FIGURES, LINE_FIGURES, Columns, Figure
from dpo_cli.strategies.row_kinds import DEMONSTRATIONS, PAIRS, RATINGS, REWARDS, Rows


@dataclass(frozen=True)
class Scores:
    """Per row, in the order of the rows: (n, k) arrays, of a pair's chosen and rejected or of a completion."""

    policy: Array  # summed log-probs, nats
    reference: Array
    policy_right: Array  # tokens that are the model's most likely ones
    reference_right: Array
    tokens: Array  # response tokens
    kl: Array  # summed over the response's tokens, nats

    @property
    def kind(self) -> Rows:
        return PAIRS if self.policy.shape[1] == len(PAIRS.responses) else DEMONSTRATIONS

    def of(self, places: Sequence[int]) -> Scores:
        """The scores of these rows only."""
        return type(self)(**{name: column[list(places)] for name, column in vars(self).items()})

    def columns(self, beta: float, of_base: bool = False) -> Columns:
        """What the formulas of figures read, of the policy or of its base alone."""
        model, right = (self.reference, self.reference_right) if of_base else (self.policy, self.policy_right)
        return Columns(model, self.tokens, right, self.kl, beta * (model - self.reference))


@dataclass(frozen=True)
class RatedScores(Scores):
    """The scores of ratings, (n, 1), with what the reference point of KTO is estimated from (scoring/mismatched.py)."""

    is_good: Array  # 1 or 0, (n,)
    mismatched: Array  # log p - log p of the reference of the answer to another prompt, nats, (n,)

    kind = RATINGS

    @classmethod
    def of_both(cls, scores: Scores, is_good: Sequence[bool]) -> RatedScores:
        """From the scores of each answer and of the one to another prompt, (n, 2)."""
        own = {name: column[:, :1] for name, column in vars(scores).items()}
        ratio = (scores.policy - scores.reference)[:, 1]
        return cls(**own, is_good=np.array(is_good, dtype=np.float64), mismatched=ratio)

    @property
    def kl_baseline(self) -> float:
        """The estimate of the KL divergence at the reference point, nats: arXiv:2402.01306, section 4.2."""
        return max(0.0, float(self.mismatched.mean()))

    def columns(self, beta: float, of_base: bool = False) -> Columns:
        """As those of `Scores`."""
        return replace(super().columns(beta, of_base), is_good=self.is_good, baseline=beta * self.kl_baseline)


@dataclass(frozen=True)
class Rewards:
    """The rewards of pairs by a reward model, in the order of the rows: (n, 2), of chosen and rejected."""

    reward: Array

    kind = REWARDS

    def of(self, places: Sequence[int]) -> Rewards:
        """The rewards of these rows only."""
        return Rewards(self.reward[list(places)])

    def columns(self, beta: float = 1.0, of_base: bool = False) -> Columns:
        """As those of `Scores`: the reward alone, which has no scale; there is no base."""
        unknown = np.empty(0)
        return Columns(unknown, unknown, unknown, unknown, self.reward)


def score_rows(
    policy: Policy,
    rows: Sequence[Encoded],
    states: States,
    pad_token_id: int,
    batch_size: int,
    dtype: torch.dtype,
    room: EvaluationRoom | None = None,
    noun: str = "",
) -> Scores:
    """Score rows under the policy and under its reference, in evaluation mode and without gradient.

    `states` is the way of scoring (scoring/forward.py). A batch has at most `batch_size` rows, and not more than `room` holds.
    One that is out of memory is scored in halves. `noun` is what the rows are, if not what their kind says.
    """

    def sums(batch: Batch) -> list[Tensor]:
        return _score(policy, states, batch, dtype)

    return Scores(*_columns(policy, rows, sums, pad_token_id, batch_size, room, noun))


def reward_rows(
    policy: Policy,
    rows: Sequence[Encoded],
    shared: bool,
    pad_token_id: int,
    batch_size: int,
    dtype: torch.dtype,
    room: EvaluationRoom | None = None,
) -> Rewards:
    """The rewards of pairs by a reward model, with each prompt once if `shared`; the rest as for `score_rows`."""
    network = policy.network

    def scored(batch: Batch) -> list[Tensor]:
        with torch.no_grad(), torch.autocast(network.device.type, dtype, enabled=dtype != torch.float32):
            return [rewards(network, shared, **batch).cpu().double()]

    return Rewards(*_columns(policy, rows, scored, pad_token_id, batch_size, room))


def _columns(
    policy: Policy,
    rows: Sequence[Encoded],
    sums: Callable[[Batch], Sequence[Tensor]],
    pad_token_id: int,
    batch_size: int,
    room: EvaluationRoom | None,
    noun: str = "",
) -> list[Array]:
    """Columns of numbers of each response, (n, k): `sums` gives those of a batch of `collate`, each (kB,)."""
    policy.model.eval()
    kinds = len(rows[0].responses)
    columns: list[Array] = []
    by_length = sorted(range(len(rows)), key=lambda i: rows[i].length)  # for little padding

    def fits(batch: Sequence[int]) -> bool:
        tokens = kinds * len(batch) * max(rows[i].length for i in batch)
        scored = sum(rows[i].response_length for i in batch)
        return len(batch) <= batch_size and (room is None or room.holds_rows(tokens, scored))

    def scored(batch: list[int]) -> Sequence[Tensor]:
        return sums(collate([rows[i] for i in batch], pad_token_id, policy.network.device))

    world, batches = policy.world, filled(by_length, fits)
    own = batches[world.rank :: world.size]

    def of_process() -> list[tuple[list[int], list[Array]]]:
        done = []
        with working("scoring", sum(map(len, own)), noun or rows[0].row.kind.noun) as work:
            for batch, scores in in_halves(own, scored, list_halves):
                done.append((batch, [values.view(kinds, len(batch)).T.numpy() for values in scores]))
                work.add(len(batch))
        return done

    for batch, scores in chain.from_iterable(world.each(of_process)):
        columns = columns or [np.zeros((len(rows), kinds)) for _ in scores]
        for column, values in zip(columns, scores, strict=True):
            column[batch] = values
    return columns


def _score(policy: Policy, states: States, batch: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Sums over each row's response of the columns of `Scores`, each (kB,), in float64 on the CPU: Apple's GPUs have none."""
    labels = batch["labels"][:, 1:]
    scored = labels != IGNORED
    device = policy.network.device.type
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        hidden, head = states(policy.network, **batch), Head.of(policy.network)
        with policy.as_reference() as reference:
            ref_hidden, ref_head = states(reference, **batch), Head.of(reference)
        both = compare_tokens(hidden, ref_hidden, labels[scored], head, ref_head)
    values = [both.log_probs, both.ref_log_probs, both.is_top1, both.ref_is_top1, torch.ones_like(both.kl), both.kl]
    on_cpu, scored = [value.cpu().double() for value in values], scored.cpu()
    return [value.new_zeros(scored.shape).masked_scatter(scored, value).sum(dim=1) for value in on_cpu]


def point_figures(scores: Scores | Rewards, beta: float) -> dict[str, float]:
    """The figures of an evaluation line of metrics.jsonl: plain means; for pairs also rewards and log-probs."""
    ratios = _ratios(scores, beta, LINE_FIGURES)
    return {name: value_of(ratio) for name, ratio in ratios.items()}


def figures(scores: Scores | Rewards, prompts: Sequence[str], beta: float) -> Sides:
    """The figures of the policy, of its base, and the paired differences, each with its interval."""
    policy, base = _ratios(scores, beta, FIGURES), _ratios(scores, beta, FIGURES, of_base=True)
    gain = {name: (policy[name][0] - base[name][0], base[name][1]) for name in base}
    intervals = Intervals(prompts)

    def of(ratios: Mapping[str, Ratio]) -> Figures:
        return {name: intervals.of(ratio) for name, ratio in ratios.items()}

    return Sides(of(policy), of(base), of(gain))


def _ratios(scores: Scores | Rewards, beta: float, figures: Mapping[str, Figure], of_base: bool = False) -> dict[str, Ratio]:
    """Each figure of these rows, as a sum divided by a sum; for the base, the figures that one model has."""
    columns, kind = scores.columns(beta, of_base), scores.kind
    declared = ((name, figure) for name, figure in figures.items() if kind in (figure.alone if of_base else figure.formulas))
    return {name: figure.formulas[kind](columns) for name, figure in declared if kind in figure.formulas}
