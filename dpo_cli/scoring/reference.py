"""The reference of a preference loss: it gives log-probs, computed at the first visit of a pair, and then kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_cli.providers.policy import Policy
from dpo_cli.scoring.forward import States
from dpo_cli.scoring.lm_head import LOG_PROBS, Head, score_tokens
from dpo_cli.scoring.shared_prompts import IGNORED

PAIR = "pair"  # column of a micro-batch: the place of the pair in the training set
NOT_READ = ("completion_mask", "labels", PAIR)  # of a micro-batch: what the model does not take


class KeptReference:
    """A live reference whose log-probs are computed once for each pair of a training set, in the rows of its first visit.

    The policy runs in the same rows, so rounding cancels there; later epochs compute nothing. A checkpoint holds the log-probs,
    so a resumed run reads the same bits.
    """

    def __init__(self, live: LiveReference, pairs: int) -> None:
        self.live = live
        self.values = torch.zeros(pairs, 2)  # of chosen and rejected
        self.known = torch.zeros(pairs, dtype=torch.bool)

    def log_probs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Summed log-probs of the responses of a micro-batch of TRL, nats, without gradient: (2B,), the B chosen first."""
        places = batch[PAIR].chunk(2)[0].cpu()
        is_known = self.known[places]
        if not is_known.all():
            computed = self.live.log_probs(batch).cpu().view(2, -1).T
            self.values = self.values.to(computed.dtype)
            self.values[places[~is_known]] = computed[~is_known]
            self.known[places] = True
        return self.values[places].T.reshape(-1).to(batch["input_ids"].device)

    def state(self) -> dict[str, Tensor]:
        """A copy of what is known, for a checkpoint."""
        return {"values": self.values.clone(), "known": self.known.clone()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.values, self.known = state["values"], state["known"]


@dataclass(frozen=True)
class LiveReference:
    """The policy's model with its adapter off or a frozen one on, or a separate model: computed at each call.

    It scores as the policy does, so that both give the same bits before the first step, within the same autocast. It uses no
    trained weight, so autocast does not cache a copy without a gradient.
    """

    policy: Policy
    states: States

    def log_probs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """As those of `KeptReference`."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
        inputs = {name: value for name, value in batch.items() if name not in NOT_READ}
        scored = labels[:, 1:] != IGNORED
        with torch.no_grad(), self.policy.as_reference() as network:
            hidden = self.states(network, labels, **inputs)
            scores = score_tokens(hidden, labels[:, 1:][scored], Head.of(network), [LOG_PROBS])
        return scores.log_probs.new_zeros(scored.shape).masked_scatter(scored, scores.log_probs).sum(dim=1)
