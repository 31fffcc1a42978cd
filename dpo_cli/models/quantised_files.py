"""Weights that are stored quantised, by config.json: whether they can be trained, and how. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dpo_cli.errors import Problem

KNOWN = "bitsandbytes"
OPTIONS = {4: "use_4bit", 8: "use_8bit"}


@dataclass(frozen=True)
class Quantisation:
    """The quantisation of the weights in a model's files."""

    method: str
    bits: int

    def problem(self, model: str) -> Problem | None:
        """The problem of weights on which no adapter can be trained; None if one can."""
        if self.method == KNOWN and self.bits in OPTIONS:
            return None
        what = f"the files of {model} hold weights quantised by {self.method}"
        message = f"{what}, but an adapter can only be trained on 4-bit or 8-bit weights of {KNOWN}"
        fix = 'name the model that it was quantised from; "use_4bit": true quantises that when it is loaded'
        return Problem("error", "model-quantised", message, fix, "model_name")

    def problems(self, model: str, use_4bit: bool, use_8bit: bool, rank: int) -> Iterator[Problem]:
        """Problems of a config with options that these weights do not allow."""
        own = OPTIONS.get(self.bits)
        for key, is_on in (("use_4bit", use_4bit), ("use_8bit", use_8bit)):
            if is_on and key != own:
                message = f"{key} is true, but the weights in the files of {model} are {self.bits}-bit already"
                yield Problem("error", "quantised-already", message, f"remove {key}: the weights are used as they are", key)
        if rank == 0:
            message = (
                f"lora_r 0 trains every weight, but those in the files of {model} are {self.bits}-bit and cannot be trained"
            )
            yield Problem("error", "full-quantised", message, 'train an adapter: "lora_r": 16', "lora_r")


def stored_quantisation(config: Mapping[str, object]) -> Quantisation | None:
    """The quantisation in a config.json; None for plain weights."""
    settings = config.get("quantization_config") or text_part(config).get("quantization_config")
    if not isinstance(settings, Mapping):
        return None
    is_4bit, is_8bit = (settings.get(f"load_in_{bits}") or settings.get(f"_load_in_{bits}") for bits in ("4bit", "8bit"))
    method = str(settings.get("quant_method") or (KNOWN if is_4bit or is_8bit else "an unknown method"))
    bits = str(settings.get("bits"))  # "mixed" or a list if layers differ
    return Quantisation(method, 4 if is_4bit else 8 if is_8bit else int(bits) if bits.isdecimal() else 0)


def text_part(config: Mapping[str, object]) -> Mapping[str, object]:
    """The part of a config.json that describes the decoder: all of it, unless the model reads more than text."""
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else config
