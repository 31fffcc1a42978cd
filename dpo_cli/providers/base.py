"""What a provider does: load a tokenizer and a model, and put adapters on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dpo_cli.errors import RunFailed

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpo_cli.plan.plan import Adapted, Plan
    from dpo_cli.providers.policy import Policy


CACHE_FIX = "set XDG_CACHE_HOME to a folder that you may write, with room for a model; then run the same command again"


class Provider(Protocol):
    """The seam to a library that loads models. A provider is made for one model and holds none itself."""

    notes: list[str]  # what loading changed of a model, for the user

    @property
    def no_sharing(self) -> str | None:
        """Why none of its models can share prompts; None where each model decides."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with EOS and padding set."""

    def token_rows(self) -> int | None:
        """Rows of the model's embedding, as its config has it; None where it does not say."""

    def base_model(self, plan: Plan) -> PreTrainedModel:
        """The model below the adapter in training, on the plan's device, without dropout, quantised when the plan says so."""

    def adapted(self, plan: Plan) -> Adapted | None:
        """What the plan trains, by the model's architecture alone; None where that cannot be built.

        `InvalidInput` for an adapter that the model cannot have.
        """

    def adapter_config(self, plan: Plan, base: PreTrainedModel) -> LoraConfig | None:
        """The fresh adapter that the trainer puts on `base`; None where there is none: all weights are trained, or an adapter
        is trained on. `InvalidInput` as for `adapted`."""

    def start(self, plan: Plan, base: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """What the trainer takes: `base`, with the adapter that the plan's model_name names where that is trained on."""

    def trained(self, plan: Plan, folder: Path) -> Policy:
        """What a training left in `folder`, a PEFT adapter or a whole model, with its reference, in evaluation mode.

        `RunFailed` for an adapter that is not the model's.
        """

    def ready(self, model: PreTrainedModel | PeftModel, plan: Plan) -> None:
        """Called once the trainer has put on the adapter, and before the first step."""

    @property
    def local_dir(self) -> Path | None:
        """Where the model's safetensors are, None when it is on the hub."""


def cache_dir() -> Path:
    """Where this program keeps what it can make again: $XDG_CACHE_HOME/dpo or ~/.cache/dpo."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "dpo"
    try:
        return Path.home() / ".cache" / "dpo"
    except RuntimeError as error:  # neither HOME nor an account that has one
        raise RunFailed("this user has no home folder to keep the cache in", CACHE_FIX) from error
