"""What a provider does: load a tokenizer and a model, and put adapters on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpo_cli.plan import Plan
    from dpo_cli.providers.policy import Policy
    from dpo_cli.runs.directory import RunDirectory


class Provider(Protocol):
    """The seam to a library that loads models. A provider is made for one model and holds none itself."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with EOS and padding set."""

    def base_model(self, plan: Plan) -> PreTrainedModel:
        """The model below the adapter in training, on the plan's device, without dropout, quantised when the plan says so."""

    def adapter_config(self, plan: Plan, base: PreTrainedModel) -> LoraConfig | None:
        """The fresh adapter that the trainer puts on `base`; None where there is none: all weights are trained, or an adapter
        is trained on. `InvalidInput` when a target module is not in `base`."""

    def start(self, plan: Plan, base: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """What the trainer takes: `base`, with the adapter that the plan's model_name names where that is trained on."""

    def trained(self, plan: Plan, run: RunDirectory) -> Policy:
        """What a finished run trained, with its reference, in evaluation mode."""

    @property
    def local_dir(self) -> Path | None:
        """Where the model's safetensors are, None when it is on the hub."""
