"""What can be known of a model without loading it: its shape, and whether it can be a base model at all. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from dpo_cli.errors import Problem
from dpo_cli.hardware import gguf


@dataclass(frozen=True)
class ModelFacts:
    """The shape of a decoder, by the names of its config.json."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    attn_logit_softcapping: float | None = None  # such attention runs without a fused kernel (Gemma 2)

    @property
    def linear_shapes(self) -> list[tuple[int, int]]:
        """(in, out) of each linear layer of one block: q, k, v, o, gate, up, down."""
        h, i = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]

    @property
    def linear_parameters(self) -> int:
        return self.num_hidden_layers * sum(a * b for a, b in self.linear_shapes)

    @property
    def other_parameters(self) -> int:
        """Embedding, head and norms, which stay unquantised."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + (2 * self.num_hidden_layers + 1) * self.hidden_size

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters


def problems(model_name: str) -> Iterator[Problem]:
    """Why a local `model_name` cannot be trained; a hub id is only checked when it is fetched."""
    path = Path(model_name)
    if not os.path.exists(path):
        looks_local = path.suffix == ".gguf" or model_name.startswith((".", "/", "~")) or model_name.count("/") != 1
        if looks_local or os.path.exists(path.parent):
            yield _wrong("model-missing", f"there is no model at {model_name}", "check the path, or name a hub id: owner/model")
    elif path.is_file() and not gguf.is_gguf(path):
        yield _wrong("model-not-gguf", f"{path} is not a GGUF file", "name a GGUF file or a model directory")
    elif (path / "adapter_config.json").is_file():
        fix = "name the base model; training on from an adapter does not work in this version"
        yield _wrong("model-is-adapter", f"{model_name} is an adapter, not a model", fix)
    elif path.is_dir() and not (path / "config.json").is_file():
        yield _wrong("model-incomplete", f"{model_name} has no config.json", "name a complete model directory")
    else:
        try:
            model_facts(model_name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever a damaged header makes of it
            yield _wrong("model-damaged", f"{path} is damaged: {error}", "download it again")


def _wrong(code: str, message: str, fix: str) -> Problem:
    return Problem("error", code, message, fix, "model_name")


def model_facts(model_name: str) -> ModelFacts | None:
    """The shape of a model: from a GGUF header, a local config.json or the table of common models; None when unknown."""
    path = Path(model_name)
    if gguf.is_gguf(path):
        return _gguf_facts(gguf.read_header(path))
    if (path / "config.json").is_file():
        return _config_facts(json.loads((path / "config.json").read_text(encoding="utf-8")))
    table: dict[str, dict[str, Any]] = known_models()
    return ModelFacts(**table[model_name]) if model_name in table else None


def known_models() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = json.loads(
        files("dpo_cli.hardware").joinpath("models.json").read_text(encoding="utf-8")
    )
    return loaded


def _config_facts(config: Mapping[str, Any]) -> ModelFacts | None:
    text = config.get("text_config", config)
    if any(text.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        return None  # a mixture of experts is larger than its dense shape
    names = [field.name for field in fields(ModelFacts) if field.default is MISSING]
    values = {name: text.get(name) for name in names}
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = values["num_key_value_heads"] or heads
    if values["hidden_size"] and heads:
        values["head_dim"] = values["head_dim"] or values["hidden_size"] // heads
    values["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)))
    if None in values.values():
        return None
    facts = ModelFacts(**values, attn_logit_softcapping=text.get("attn_logit_softcapping"))
    return facts if facts.parameters > 0 else None


def _gguf_facts(header: gguf.Header) -> ModelFacts | None:
    values = header.metadata
    family = values.get("general.architecture", "")
    if values.get(f"{family}.expert_count"):
        return None
    heads, hidden = values.get(f"{family}.attention.head_count"), values.get(f"{family}.embedding_length")
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return None
    return ModelFacts(
        hidden_size=hidden,
        num_hidden_layers=values[f"{family}.block_count"],
        intermediate_size=values[f"{family}.feed_forward_length"],
        num_attention_heads=heads,
        num_key_value_heads=values.get(f"{family}.attention.head_count_kv", heads),
        head_dim=values.get(f"{family}.attention.key_length", hidden // heads),
        vocab_size=values["tokenizer.ggml.tokens"],
        tie_word_embeddings="output.weight" not in header.tensors,
        attn_logit_softcapping=values.get(f"{family}.attn_logit_softcapping"),
    )
