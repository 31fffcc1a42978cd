"""The providers by the names that a config has for them."""

from __future__ import annotations

from collections.abc import Callable

from dpo_cli.providers.base import Provider
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.providers.unsloth import Unsloth

PROVIDERS: dict[str, Callable[[str], Provider]] = {"huggingface": HuggingFace, "unsloth": Unsloth}
