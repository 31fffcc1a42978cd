"""dpo: preference tuning of language models, from a terminal or from Python (`validate`, `train`, `evaluate`, ...)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo_cli.api import compare, evaluate, recommend, sweep, train, validate

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "evaluate", "recommend", "sweep", "train", "validate"]


def __getattr__(name: str) -> object:
    """The functions of api.py, imported on first use: the command line needs none of them."""
    if name in __all__:
        from dpo_cli import api

        return getattr(api, name)
    raise AttributeError(f"module 'dpo_cli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
