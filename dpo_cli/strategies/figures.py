"""The figures of an evaluation: names, formulas, formats, limits and meanings, each declared once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dpo_cli.strategies.row_kinds import DEMONSTRATIONS, PAIRS, RATINGS, REWARDS, Rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dpo_cli.results.intervals import Interval

    Array = NDArray[np.float64]


@dataclass(frozen=True)
class FigureText:
    """A figure as text: its value, and its interval, with a unit that is a word."""

    value: str
    about: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.about}".rstrip()


CONFIDENCE_BINS = 10  # of the calibration error
NOT_FINITE = FigureText("not finite")


def share(figure: Interval) -> FigureText:
    """98.8 % [96, 100]"""
    return FigureText(f"{100 * figure.value:.1f} %", f"[{100 * figure.low:.0f}, {100 * figure.high:.0f}]")


def points(figure: Interval, signed: bool = True) -> FigureText:
    """+14.1 points [+8, +21]: a difference of two shares."""
    one, whole = ("+.1f", "+.0f") if signed else (".1f", ".0f")
    return FigureText(f"{100 * figure.value:{one}}", f"points [{100 * figure.low:{whole}}, {100 * figure.high:{whole}}]")


def number(figure: Interval, signed: bool = False, digits: int = 3) -> FigureText:
    """1.401 [1.193, 1.620]"""
    form = f"{'+' if signed else ''}.{digits}f"
    return FigureText(f"{figure.value:{form}}", f"[{figure.low:{form}}, {figure.high:{form}}]")


@dataclass(frozen=True)
class Columns:
    """The scores of n rows under one model, each (n, k): of chosen and rejected, or of the completion of another row."""

    log_probs: Array  # of a response, nats, its EOS included
    tokens: Array  # of a response
    right: Array  # tokens that are the model's most likely ones
    kl: Array  # KL(model || reference) over the whole vocabulary, summed over the response's tokens, nats
    reward: (
        Array  # beta * (log p - log p of the reference): arXiv:2305.18290, equation 5 without its constant; or the score of a
    )
    # reward model, which has only this column

    # Of ratings: 1 for a good answer and 0 for a bad one, (n,), and the reward of the reference point (see `_loss_of_ratings`).
    is_good: Array | None = None
    baseline: float = 0.0


# A sum over rows divided by a sum over rows, each (n,): weights over prompts resample both sums together. Of (n, b) values
# above, in b bins, the sizes of the sums of the bins are added up.
Formula = Callable[[Columns], tuple["Array", "Array"]]


def _mean(values: Array) -> tuple[Array, Array]:
    import numpy as np

    return values, np.ones_like(values)


def _wins(values: Array) -> Array:
    """1 if the first of two is larger, one half if both are equal, else 0."""
    import numpy as np

    return np.sign(values[:, 0] - values[:, 1]) / 2 + 0.5


def _margin(columns: Columns) -> Array:
    return columns.reward[:, 0] - columns.reward[:, 1]


def _loss_of_pairs(columns: Columns) -> tuple[Array, Array]:
    """-log sigmoid(margin): arXiv:2305.18290, equation 7; of a reward model arXiv:2203.02155, equation 1."""
    import numpy as np

    return _mean(np.logaddexp(0, -_margin(columns)))


def _good(columns: Columns) -> tuple[Array, Array]:
    """The rewards of ratings, and which of them are good, each (n,)."""
    assert columns.is_good is not None
    return columns.reward[:, 0], columns.is_good


def _loss_of_ratings(columns: Columns) -> tuple[Array, Array]:
    """1 - sigmoid(reward - z) of a good answer, and 1 - sigmoid(z - reward) of a bad one: arXiv:2402.01306, equation 7.

    z is the reference point, beta * max(0, KL): the KL divergence is estimated by the mean of log p - log p of the reference
    over answers to other prompts.
    """
    import numpy as np

    reward, is_good = _good(columns)
    return _mean(1 / (1 + np.exp(np.where(is_good > 0, 1, -1) * (reward - columns.baseline))))


def _contrast(of_good: Array, of_bad: Array, is_good: Array) -> tuple[Array, Array]:
    """A figure that compares all good answers with all bad ones, as a mean over rows.

    `of_good` and `of_bad` (n,) are the parts of the figure that a row has as a good and as a bad answer, so that the figure is
    the mean of `of_good` over the good ones, and that of `of_bad` over the bad ones. The value of a row is the figure plus the
    influence of the row on it, n / n_good * (its part - the figure) and so on. Their mean is the figure, and a resample of
    prompts varies as it does to first order (DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988)).
    """
    import numpy as np

    good = is_good > 0
    count, parts = np.where(good, good.sum(), (~good).sum()), np.where(good, of_good, of_bad)
    figure = of_good[good].mean() if good.any() and not good.all() else np.nan
    return _mean(figure + len(good) / count * (parts - figure))


def _accuracy_of_ratings(columns: Columns) -> tuple[Array, Array]:
    """The share of all pairs of a good and a bad answer in which the good one has the larger reward; a tie counts half.

    That is the area under the ROC curve. A good answer's part is the share of bad ones below it.
    """
    import numpy as np

    reward, is_good = _good(columns)

    def share_below(values: Array, others: Array) -> Array:
        ordered = np.sort(others)
        below, up_to = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
        shares: Array = (below + up_to) / max(1, 2 * len(others))
        return shares

    good, bad = reward[is_good > 0], reward[is_good == 0]
    return _contrast(share_below(reward, bad), 1 - share_below(reward, good), is_good)


def _margin_of_ratings(columns: Columns) -> tuple[Array, Array]:
    """The mean reward of good answers minus that of bad ones."""
    reward, is_good = _good(columns)
    good, bad = reward[is_good > 0], reward[is_good == 0]
    middle = (good.mean() if len(good) else 0.0), (bad.mean() if len(bad) else 0.0)
    return _contrast(reward - middle[1], middle[0] - reward, is_good)


def _over(side: int) -> dict[Rows, Formula]:
    """The reward of chosen responses (0) or of rejected ones (1); of ratings that of good answers, or of bad ones."""

    def of_ratings(columns: Columns) -> tuple[Array, Array]:
        reward, is_good = _good(columns)
        weights = is_good if side == 0 else 1 - is_good
        return reward * weights, weights

    return {**dict.fromkeys((PAIRS, REWARDS), lambda columns: _mean(columns.reward[:, side])), RATINGS: of_ratings}


def _log_prob_over(side: int) -> dict[Rows, Formula]:
    """The same of log-probs."""

    def of_ratings(columns: Columns) -> tuple[Array, Array]:
        _, is_good = _good(columns)
        weights = is_good if side == 0 else 1 - is_good
        return columns.log_probs[:, 0] * weights, weights

    return {PAIRS: lambda columns: _mean(columns.log_probs[:, side]), RATINGS: of_ratings}


def _calibration(columns: Columns) -> tuple[Array, Array]:
    """The expected calibration error: sum over bins b of n_b / n * |accuracy of b - confidence of b|.

    arXiv:1706.04599, equation 3. By Bradley-Terry sigmoid(|margin|) is the confidence that the response with the larger reward
    is the preferred one: from 1/2 to 1, in bins of equal width. n_b cancels, so a bin adds |sum of (right - confidence)| / n.
    """
    import numpy as np

    confidence, count = 1 / (1 + np.exp(-np.abs(_margin(columns)))), CONFIDENCE_BINS
    bins = np.minimum((2 * count * (confidence - 0.5)).astype(int), count - 1)
    gaps = _wins(columns.reward) - confidence
    return np.where(bins[:, None] == np.arange(count), gaps[:, None], 0.0), np.ones_like(gaps)


def _kl_token(columns: Columns) -> tuple[Array, Array]:
    return columns.kl.sum(axis=1), columns.tokens.sum(axis=1)


@dataclass(frozen=True)
class Figure:
    """A figure of an evaluation, declared once for all code that computes, shows, limits or explains it."""

    name: str
    label: str
    meaning: str
    formulas: Mapping[Rows, Formula] = field(default_factory=dict)  # by kind of row; empty for figures of answers
    alone: tuple[Rows, ...] = ()  # kinds for which a single model has it: then the base has it too, and there is a gain
    in_steps: tuple[Rows, ...] = ()  # kinds for which a training line of metrics.jsonl has it as a mean over rows
    in_lines: bool = True  # whether an evaluation line of metrics.jsonl has it
    short: str = ""  # in the live view; empty if it is not shown there
    title: str = ""  # of its curve, with a note and a value to compare with; empty without a curve
    note: str = ""
    level: tuple[float, str] | None = None
    limit_option: str | None = None  # the option of a config that limits it
    from_zero: bool = False  # whether its curve starts at zero
    is_share: bool = False  # shown in per cent
    digits: int = 3
    is_better_large: bool = True
    of_answers: bool = False  # of sampled answers; a prompt may have no room for one
    of_samples: bool = False  # of the answers that a step of rlhf samples: only in lines of metrics.jsonl

    @property
    def heading(self) -> str:
        """The label, with the name for --fail-under and --json if that is another word."""
        return self.label if self.label == self.name else f"{self.label} ({self.name})"

    def text(self, value: Interval) -> FigureText:
        if not value.is_finite:
            return NOT_FINITE
        return share(value) if self.is_share else number(value, digits=self.digits)

    def gain(self, value: Interval) -> FigureText:
        if not value.is_finite:
            return NOT_FINITE
        return points(value) if self.is_share else number(value, signed=True, digits=self.digits)


_DECLARED = (
    Figure(
        "accuracy",
        "reward accuracy",
        "The share of pairs whose chosen response has the larger reward, beta * (log p after - log p before the training); "
        "a tie counts half. It reaches 1 long before a model has changed, so read it with the margin. The reward of a reward "
        "model is its score. Of ratings, the share of all pairs of a good and a bad answer in which the good one has the "
        "larger reward.",
        {
            **dict.fromkeys((PAIRS, REWARDS), lambda columns: _mean(_wins(columns.reward))),
            RATINGS: _accuracy_of_ratings,
        },
        in_steps=(PAIRS, REWARDS),
        short="accuracy",
        title="Accuracy",
        note="Share of pairs with the larger reward for chosen. Read it with the margin.",
        level=(0.5, "chance"),
        is_share=True,
    ),
    Figure(
        "margin",
        "margin",
        "The reward of the chosen response minus that of the rejected one, on average; of ratings the mean reward of good "
        "answers minus that of bad ones.",
        {**dict.fromkeys((PAIRS, REWARDS), lambda columns: _mean(_margin(columns))), RATINGS: _margin_of_ratings},
        in_steps=(PAIRS, REWARDS),
        short="margin",
        title="Margin",
        note="Reward of chosen minus reward of rejected.",
    ),
    Figure(
        "loss",
        "loss",
        "For pairs, -log sigmoid(margin): ln 2 = 0.693 before training. For demonstrations, nats per token. For ratings, "
        "1 - sigmoid(reward - z) of a good answer and 1 - sigmoid(z - reward) of a bad one, where z is the reward of the "
        "reference point: 1/2 before training.",
        {
            **dict.fromkeys((PAIRS, REWARDS), _loss_of_pairs),
            RATINGS: _loss_of_ratings,
            DEMONSTRATIONS: lambda columns: (-columns.log_probs[:, 0], columns.tokens[:, 0]),
        },
        alone=(DEMONSTRATIONS,),
        short="loss",
        title="Loss",
        note="The held-out loss should fall too. If it rises again, the model memorises the training rows.",
        is_better_large=False,
    ),
    Figure(
        "calibration_error",
        "calibration error",
        "The expected calibration error of a reward model: how far the share of pairs that it ranks as labelled is from its "
        "confidence, sigmoid of the size of the margin, on average over 10 bins of confidence. 0 is perfect; of few pairs it "
        "is above 0 by chance.",
        {REWARDS: _calibration},
        title="Calibration error",
        note="Distance between confidence and accuracy; smaller is better.",
        from_zero=True,
        is_better_large=False,
    ),
    Figure(
        "token_accuracy",
        "token accuracy",
        "The share of tokens that the model finds most likely.",
        {DEMONSTRATIONS: lambda columns: (columns.right[:, 0], columns.tokens[:, 0])},
        alone=(DEMONSTRATIONS,),
        in_steps=(DEMONSTRATIONS,),
        short="accuracy",  # the only accuracy of demonstrations
        title="Token accuracy",
        note="Share of tokens that the model finds most likely.",
        is_share=True,
    ),
    Figure(
        "kl_token",
        "KL per token",
        "The exact KL divergence from the model before training, per token of the responses, nats.",
        dict.fromkeys((PAIRS, DEMONSTRATIONS, RATINGS), _kl_token),
        short="KL/token",
        title="KL per token",
        note="Distance from the model before training, nats.",
        from_zero=True,
        is_better_large=False,
    ),
    Figure(
        "logp_accuracy",
        "log-prob accuracy",
        "The share of pairs in which one model alone gives the chosen response the larger probability. The gain, after "
        "minus before on the same pairs, is what training changed.",
        {PAIRS: lambda columns: _mean(_wins(columns.log_probs))},
        alone=(PAIRS,),
        in_lines=False,
        is_share=True,
    ),
    Figure(
        "normalized_logp_accuracy",
        "log-prob accuracy by length",
        "Log-prob accuracy after dividing by the responses' tokens.",
        {PAIRS: lambda columns: _mean(_wins(columns.log_probs / columns.tokens))},
        alone=(PAIRS,),
        in_lines=False,
        is_share=True,
    ),
    Figure(
        "kl_sequence",
        "KL per answer",
        "How far the training has moved the model: log p after - log p before, over answers sampled after it, nats. The "
        "documentation recommends a value below 10. An estimate from samples: below 0 it means that the model hardly moved.",
        short="KL/answer",
        title="KL per answer",
        note="Distance from the model before training, over sampled answers, nats.",
        limit_option="max_kl",
        from_zero=True,
        digits=1,
        is_better_large=False,
        of_answers=True,
    ),
    Figure(
        "answer_tokens",
        "tokens per answer",
        "The length of greedy answers to held-out prompts.",
        alone=(PAIRS, DEMONSTRATIONS, RATINGS),
        digits=1,
        of_answers=True,
    ),
    Figure(
        "answer_reward",
        "reward of answers",
        "The mean reward of greedy answers to held-out prompts, after rlhf, by what rewards its samples.",
        alone=(PAIRS,),
        in_lines=False,
        of_answers=True,
    ),
)
# The answers that rlhf samples, in training lines; `reward` is also in evaluation lines, of answers to held-out prompts.
_SAMPLED = (
    Figure(
        "reward",
        "reward",
        "The mean reward of sampled answers: in a training line of those that the step learns from, in an evaluation line of "
        "one answer to each held-out prompt (temperature 1).",
        short="reward",
        title="Reward",
        note="Mean reward of sampled answers.",
        of_samples=True,
    ),
    Figure(
        "reward_spread",
        "reward spread",
        "The standard deviation of the rewards within the samples of a prompt, on average. At 0 there is nothing to learn.",
        title="Reward spread",
        note="Standard deviation within the samples of a prompt.",
        from_zero=True,
        of_samples=True,
    ),
    Figure(
        "kl_sampled",
        "KL of samples",
        "log p - log p of the reference over the sampled answers that a step learns from, by the policy that drew them, nats "
        "per answer.",
        short="KL/sample",
        title="KL of samples",
        note="Distance from the reference over the samples of a step, nats per answer.",
        limit_option="max_kl",
        is_better_large=False,
        of_samples=True,
    ),
    Figure(
        "entropy",
        "entropy",
        "The entropy of the policy's next token, over the tokens of sampled answers, nats per token. It falls when answers "
        "become alike.",
        short="entropy",
        title="Entropy",
        note="Of the next token, over sampled answers, nats.",
        from_zero=True,
        of_samples=True,
    ),
    Figure(
        "sample_tokens",
        "tokens per sample",
        "The length of sampled answers.",
        short="tokens",
        title="Length of samples",
        note="Tokens of sampled answers.",
        digits=1,
        from_zero=True,
        of_samples=True,
    ),
    Figure(
        "length_correlation",
        "reward and length",
        "The correlation of the rewards with the lengths, within the samples of each prompt (Pearson). Near 1, length alone is "
        "rewarded.",
        of_samples=True,
    ),
)
# What lines of metrics.jsonl have in addition, as a mean over pairs: the parts of the margin.
_PARTS = (
    Figure(
        "reward_chosen",
        "reward of chosen",
        "beta * (log p after - log p before the training) of the chosen response. It may fall while the margin grows. Of "
        "ratings, that of good answers.",
        _over(0),
        in_steps=(PAIRS, REWARDS),
    ),
    Figure(
        "reward_rejected",
        "reward of rejected",
        "The same for the rejected response, or for bad answers.",
        _over(1),
        in_steps=(PAIRS, REWARDS),
        is_better_large=False,
    ),
    Figure(
        "logp_chosen",
        "log-prob of chosen",
        "The summed log-probability of the chosen response, nats; of ratings, that of good answers.",
        _log_prob_over(0),
        in_steps=(PAIRS,),
    ),
    Figure(
        "logp_rejected",
        "log-prob of rejected",
        "The same for the rejected response, or for bad answers.",
        _log_prob_over(1),
        in_steps=(PAIRS,),
        is_better_large=False,
    ),
    Figure(
        "kl_baseline",
        "reference point",
        "The z of the loss of ratings: beta * the KL divergence from the reference, estimated by answers to other prompts, and "
        "at least 0.",
        {RATINGS: lambda columns: _mean(_good(columns)[1] * 0 + columns.baseline)},
    ),
)
FIGURES = {figure.name: figure for figure in _DECLARED}
SAMPLE_FIGURES = tuple(figure.name for figure in _SAMPLED)
LINE_FIGURES = {figure.name: figure for figure in (*_DECLARED, *_SAMPLED, *_PARTS) if figure.in_lines}
DRAWN = sorted((*_DECLARED, *_SAMPLED), key=lambda figure: figure.name != "loss")  # the loss comes first


def step_figures(kind: Rows) -> tuple[str, ...]:
    """The figures of a training line in addition to its loss."""
    return tuple(name for name, figure in LINE_FIGURES.items() if kind in figure.in_steps)
