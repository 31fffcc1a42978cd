"""The trained loss on held-out pairs: each loss of `loss_type` as a function of log-probs.

TRL 1.15 computes them only in its training step, from a model; here they come from the `Scores` of an evaluation
(tests/test_steps.py compares the two). With log-ratios c = log pi - log ref of the chosen response and r of the rejected one,
z = beta * (c - r), and e the label smoothing. A loss that sorts pairs sorts all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_cli.config.options import Config
from dpo_cli.config.schema import names_where, options
from dpo_cli.evaluation.metrics import RatedScores, Scores
from dpo_cli.strategies.strategies import STRATEGIES

DISCOPOP_TAU = 0.05  # TRL 1.15, DPOConfig


def _alpha(ratio: Tensor, alpha: float) -> Tensor:
    """(t^(alpha - 1) - 1) / (alpha - 1) of t = exp(ratio); its limit at alpha 1 is the log."""
    return ratio if abs(alpha - 1) < 1e-6 else torch.expm1((alpha - 1) * ratio) / (alpha - 1)


# f'(t) by divergence, of the log-ratio log t, with f'(1) = 0: arXiv:2309.16240, table 1, and TRL 1.15.
DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda ratio, alpha: ratio,
    "forward_kl": lambda ratio, alpha: 1 - torch.exp(-ratio),
    "js_divergence": lambda ratio, alpha: math.log(2) + logsigmoid(ratio),
    "alpha_divergence": _alpha,
}


@dataclass(frozen=True)
class Pairs:
    """Log-probs of n pairs in nats, (n, 2) with the chosen response first, and its tokens."""

    pi: Tensor
    ref: Tensor
    tokens: Tensor
    beta: float
    smoothing: float
    divergence: str = "reverse_kl"
    alpha: float = 0.5  # of the alpha divergence

    @property
    def scores(self) -> Tensor:
        """f'(pi / ref), (n, 2), without its constant: arXiv:2309.16240, table 1; the log-ratios for the reverse KL of DPO."""
        return DIVERGENCES[self.divergence](self.pi - self.ref, self.alpha)

    @property
    def rewards(self) -> tuple[Tensor, Tensor]:
        chosen, rejected = (self.beta * (self.pi - self.ref)).unbind(dim=1)
        return chosen, rejected

    @property
    def z(self) -> Tensor:
        chosen, rejected = (self.beta * self.scores).unbind(dim=1)
        return chosen - rejected

    @property
    def per_token(self) -> Tensor:
        """c - r, each divided by its number of tokens."""
        chosen, rejected = (self.scores / self.tokens.clamp(min=1)).unbind(dim=1)
        return chosen - rejected

    def smoothed(self, delta: Tensor) -> Tensor:
        z = self.beta * delta
        return -logsigmoid(z) * (1 - self.smoothing) - logsigmoid(-z) * self.smoothing


@dataclass(frozen=True)
class Ratings:
    """Rewards of n rated answers, (n,), with 1 for a good and -1 for a bad one, and the reward of the reference point."""

    reward: Tensor
    sign: Tensor
    baseline: float


def exo_pair(pairs: Pairs) -> Tensor:
    """KL((s(z), s(-z)) || (1 - e, e)), arXiv:2402.00856, equation 16."""
    e = torch.tensor(pairs.smoothing, dtype=torch.float64)
    won, lost = logsigmoid(pairs.z), logsigmoid(-pairs.z)
    return won.exp() * (won - torch.log1p(-e)) + lost.exp() * (lost - torch.log(e))


def nca_pair(pairs: Pairs) -> Tensor:
    """arXiv:2402.05369, for two responses."""
    chosen, rejected = pairs.rewards
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust(pairs: Pairs) -> Tensor:
    """arXiv:2403.00409: unbiased where a share e of the labels is flipped."""
    e = pairs.smoothing
    return (-(1 - e) * logsigmoid(pairs.z) + e * logsigmoid(-pairs.z)) / (1 - 2 * e)


def bco_pair(pairs: Pairs) -> Tensor:
    """arXiv:2404.04656, without the shift."""
    chosen, rejected = pairs.rewards
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard(pairs: Pairs) -> Tensor:
    """(c - 1 / 2 beta)^2 + (r + 1 / 2 beta)^2, arXiv:2405.00675, equation 4.7 with P = 1."""
    chosen, rejected = (pairs.pi - pairs.ref).unbind(dim=1)
    return (chosen - 0.5 / pairs.beta) ** 2 + (rejected + 0.5 / pairs.beta) ** 2


def aot(pairs: Pairs) -> Tensor:
    """arXiv:2406.05882: the sorted log-ratios of chosen to rejected, of the policy against those of the reference."""
    pi, ref = (column[:, 0] - column[:, 1] for column in (pairs.pi, pairs.ref))
    return pairs.smoothed(pi.sort().values - ref.sort().values)


def aot_unpaired(pairs: Pairs) -> Tensor:
    """arXiv:2406.05882: the sorted log-ratios of chosen responses against those of rejected ones."""
    chosen, rejected = (pairs.pi - pairs.ref).unbind(dim=1)
    return pairs.smoothed(chosen.sort().values - rejected.sort().values)


def apo_zero(pairs: Pairs) -> Tensor:
    """arXiv:2408.06266, equation 7."""
    chosen, rejected = pairs.rewards
    return 1 - chosen.sigmoid() + rejected.sigmoid()


def apo_down(pairs: Pairs) -> Tensor:
    """arXiv:2408.06266, equation 8."""
    return pairs.rewards[0].sigmoid() + 1 - pairs.z.sigmoid()


def discopop(pairs: Pairs) -> Tensor:
    """arXiv:2406.08414, equation 5: logistic and exponential loss, blended by s(z / tau)."""
    blend = (pairs.z / DISCOPOP_TAU).sigmoid()
    return -logsigmoid(pairs.z) * (1 - blend) + torch.exp(-pairs.z) * blend


LOSSES: dict[str, Callable[[Pairs], Tensor]] = {
    "sigmoid": lambda pairs: -logsigmoid(pairs.z),
    "hinge": lambda pairs: (1 - pairs.z).relu(),
    "ipo": lambda pairs: (pairs.per_token - 0.5 / pairs.beta) ** 2,  # arXiv:2310.12036, equation 17, a token
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": lambda pairs: -pairs.pi[:, 0].sum() / pairs.tokens[:, 0].sum(),  # over all tokens
    "sigmoid_norm": lambda pairs: -logsigmoid(pairs.beta * pairs.per_token),
}


def kto(ratings: Ratings) -> Tensor:
    """arXiv:2402.01306, equation 7."""
    return 1 - (ratings.sign * (ratings.reward - ratings.baseline)).sigmoid()


def apo_zero_unpaired(ratings: Ratings) -> Tensor:
    """arXiv:2408.06266, equation 7 for single answers: without a reference point."""
    return 1 - (ratings.sign * ratings.reward).sigmoid()


LOSSES_OF_RATINGS: dict[str, Callable[[Ratings], Tensor]] = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired}


def trains_own_loss(config: Config) -> bool:
    """Whether the trained loss is the figure `loss` of its strategy."""
    own = STRATEGIES[config.strategy].own_loss
    named = names_where(lambda option: option.is_of_loss and config.strategy in option.strategies)
    return config.loss_type in (own, [own]) and all(getattr(config, name) == options()[name].default() for name in named)


def is_known(config: Config) -> bool:
    """Whether an evaluation can compute the trained loss: not where it weighs single tokens, which are not kept."""
    return config.ld_alpha is None and not config.use_weighting


def trained_loss(scores: Scores, config: Config) -> float:
    """The mean over these rows of the weighted sum of the losses of `loss_type`; the rows of ratings are weighted too."""
    if isinstance(scores, RatedScores):
        columns, good = scores.columns(config.beta), torch.as_tensor(scores.is_good)
        ratings = Ratings(torch.as_tensor(columns.reward[:, 0]), 2 * good - 1, columns.baseline)
        weights = good * config.desirable_weight + (1 - good) * config.undesirable_weight
        return float((weights * LOSSES_OF_RATINGS[str(config.loss_type)](ratings)).mean())
    pi, ref, tokens = (torch.as_tensor(column).double() for column in (scores.policy, scores.reference, scores.tokens))
    divergence = (config.f_divergence_type, config.f_alpha_divergence_coef)
    pairs = Pairs(pi, ref, tokens, config.beta, config.label_smoothing, *divergence)
    named = [config.loss_type] if isinstance(config.loss_type, str) else config.loss_type
    of_losses = config.loss_weights or [1.0] * len(named)
    return float(sum(weight * LOSSES[name](pairs).mean() for name, weight in zip(named, of_losses, strict=True)))
