"""A model in training or judged, and what it is held close to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter

TRAINED, FROZEN = "default", "ref"  # TRL 1.15's names of an adapter in training, and of the frozen copy it started from


@dataclass(frozen=True)
class Policy:
    """The policy, and its reference: within it, its adapter off or a frozen one; beside it, where all weights are trained."""

    model: PeftModel | PreTrainedModel
    frozen: PreTrainedModel | None = None  # the reference of a model without an adapter

    @property
    def network(self) -> PreTrainedModel:
        """The causal language model itself, below a PEFT wrapper; it computes with whatever adapter is active."""
        return cast(PreTrainedModel, self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)

    @contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        """The causal language model that is the reference, while the context lasts."""
        if self.frozen is not None:
            yield self.frozen
        else:
            with use_adapter(self.model, FROZEN if FROZEN in self.model.peft_config else None):
                yield self.network
