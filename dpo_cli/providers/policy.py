"""A model in training or evaluation, and its reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter

from dpo_cli.storage.world import ALONE, World

TRAINED, FROZEN = "default", "ref"  # TRL 1.15's names of an adapter in training, and of the frozen copy it started from


@dataclass(frozen=True)
class Policy:
    """The policy and its reference: the same model with its adapter off or frozen, or, without an adapter, a second model."""

    model: PeftModel | PreTrainedModel
    frozen: PreTrainedModel | None = None  # the reference of a model without an adapter
    world: World = ALONE  # the processes that hold a copy of it, and share its evaluations

    @property
    def network(self) -> PreTrainedModel:
        """The causal language model itself, below a PEFT wrapper; it computes with the active adapter."""
        return cast(PreTrainedModel, self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)

    @contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        """The causal language model as the reference, within the context."""
        if self.frozen is not None:
            yield self.frozen
        else:
            with use_adapter(self.model, FROZEN if FROZEN in self.model.peft_config else None):
                yield self.network
