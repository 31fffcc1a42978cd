"""The memory of the reward model of a run that samples answers. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from dpo_cli.config.options import Config
from dpo_cli.data.hub_datasets import is_hub_id
from dpo_cli.hardware.memory_inputs import Longest, Settings
from dpo_cli.hardware.weights import weight_bytes
from dpo_cli.models.quantised_files import OPTIONS
from dpo_cli.models.shape import ModelFacts
from dpo_cli.models.source import ModelSource
from dpo_cli.storage.run_directory import config_of_run
from dpo_cli.strategies.strategies import STRATEGIES


def with_reward_model(settings: Settings, config: Config, facts: ModelFacts) -> Settings:
    """The settings with the weights of the reward model; `facts` are those of the policy.

    A run is loaded as it was trained, in 4 or 8 bits or not; another model in the dtype of the policy. One that is not trained
    yet is a model like the policy. A model whose shape is not known counts nothing.
    """
    if not STRATEGIES[settings.strategy].generates or (config.reward_functions and config.reward_model is None):
        return settings
    name = config.reward_model
    own: Mapping[str, object] = config.to_json()
    if name is not None and (os.path.exists(name) or is_hub_id(name)):
        own = config_of_run(name) or {}
        known = ModelSource.of(str(own.get("model_name", name))).facts
        if known is None:
            return settings
        facts = known
    bits = {option: own.get(option, False) for option in OPTIONS.values()}
    like = config.replaced({**bits, "lora_r": 1, "strategy": STRATEGIES[settings.strategy].rewarded_by})  # without an LM head
    return replace(settings, reward_bytes=weight_bytes(facts, Settings.of(like, facts, Longest())))
