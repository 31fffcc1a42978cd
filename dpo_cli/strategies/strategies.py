"""The strategies by their names in a config."""

from __future__ import annotations

from dpo_cli.strategies.dpo import DPO
from dpo_cli.strategies.kto import KTO
from dpo_cli.strategies.reward import REWARD
from dpo_cli.strategies.rlhf import RLHF
from dpo_cli.strategies.sft import SFT
from dpo_cli.strategies.strategy import Strategy

STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in (DPO, KTO, SFT, REWARD, RLHF)}
