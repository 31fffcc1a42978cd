"""Reinforcement learning from human feedback: `validate` and `recommend` know it; this version cannot train it."""

from __future__ import annotations

from dataclasses import replace

from dpo_cli.strategies.dpo import DPO
from dpo_cli.strategies.reward import REWARD

RLHF = replace(
    DPO,
    name="rlhf",
    method="reinforcement learning from human feedback",
    generates=True,
    is_trained=False,
    aligns=False,
    adapter_rate=None,
    documented_profile=None,
    start_loss=None,
    rewarded_by=REWARD.name,
)
