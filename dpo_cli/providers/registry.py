"""The providers by their names in a config."""

from __future__ import annotations

from collections.abc import Callable

from dpo_cli.models.source import ModelSource
from dpo_cli.providers.base import Provider
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.providers.unsloth import Unsloth

PROVIDERS: dict[str, Callable[[ModelSource], Provider]] = {"huggingface": HuggingFace, "unsloth": Unsloth}
