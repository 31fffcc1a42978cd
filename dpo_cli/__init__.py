"""dpo: preference tuning of language models from a terminal."""

__version__ = "0.1.0"
