"""The interface of a provider: load a tokenizer and a model, and add adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dpo_cli.storage.world import ALONE, World

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpo_cli.plan.plan import Adapted, Plan
    from dpo_cli.providers.policy import Policy


class Provider(Protocol):
    """The interface to a library that loads models. A provider is for one model, and does not keep it loaded."""

    notes: list[str]  # changes of the model during loading, for the user

    @property
    def no_sharing(self) -> str | None:
        """The reason why no model of it can share prompts; None if each model decides."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with EOS and padding set."""

    def token_rows(self) -> int | None:
        """Rows of the model's embedding, from its config; None if unknown."""

    def base_model(self, plan: Plan, world: World = ALONE) -> PreTrainedModel:
        """The model below the adapter in training, on the plan's device, without dropout, quantised if the plan says so.

        Its weights are divided over the processes of a `world` if the plan says so. A process alone has them whole, on the
        device or in the RAM.
        """

    def adapted(self, plan: Plan) -> Adapted | None:
        """What the plan trains, from the model's architecture only; None if that cannot be built.

        `InvalidInput` for an adapter that does not fit the model.
        """

    def adapter_config(self, plan: Plan, base: PreTrainedModel) -> LoraConfig | None:
        """The fresh adapter that the trainer adds to `base`; None if all weights are trained, or training continues an adapter.
        `InvalidInput` as for `adapted`."""

    def start(self, plan: Plan, base: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """The model for the trainer: `base`, with the adapter of the plan's model_name if training continues it."""

    def trained(self, plan: Plan, folder: Path) -> Policy:
        """The result of a training in `folder`, a PEFT adapter or a whole model, with its reference, in evaluation mode.

        `RunFailed` for an adapter of another model.
        """

    def ready(self, model: PreTrainedModel | PeftModel, plan: Plan) -> None:
        """Called after the trainer has added the adapter, and before the first step."""

    @property
    def local_dir(self) -> Path | None:
        """The folder of the model's safetensors, None for a model on the hub."""
