"""The reference of a preference loss: it gives log-probs, computed or stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpo_cli.providers.policy import Policy
from dpo_cli.scoring.forward import States
from dpo_cli.scoring.lm_head import LOG_PROBS, Head, score_tokens
from dpo_cli.scoring.shared_prompts import IGNORED

NOT_READ = ("completion_mask", "labels")  # of a micro-batch: what the model does not take


class Reference(Protocol):
    def log_probs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Summed log-probs of the responses of a micro-batch of TRL, nats, without gradient: (2B,), the B chosen first."""


@dataclass(frozen=True)
class LiveReference:
    """The policy's model with its adapter off or a frozen one on, or a separate model: computed at each call.

    It scores as the policy does, so that both give the same bits before the first step, within the same autocast. It uses no
    trained weight, so autocast does not cache a copy without a gradient.
    """

    policy: Policy
    states: States

    def log_probs(self, batch: Mapping[str, Tensor]) -> Tensor:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
        inputs = {name: value for name, value in batch.items() if name not in NOT_READ}
        scored = labels[:, 1:] != IGNORED
        with torch.no_grad(), self.policy.as_reference() as network:
            hidden = self.states(network, labels, **inputs)
            scores = score_tokens(hidden, labels[:, 1:][scored], Head.of(network), [LOG_PROBS])
        return scores.log_probs.new_zeros(scored.shape).masked_scatter(scored, scores.log_probs).sum(dim=1)
