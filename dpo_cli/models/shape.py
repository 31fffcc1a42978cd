"""A model's shape without loading it: from the table of common models, a config.json or a GGUF header. No torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from importlib.resources import files
from math import prod
from typing import Any

from dpo_cli.models.gguf_header import Header
from dpo_cli.models.quantised_files import text_part
from dpo_cli.models.tensor_files import TensorFiles
from dpo_cli.storage.jsonio import read_json

# Traits of families, by their `model_type` in transformers 5.17.
FUSED = frozenset({"phi3"})  # q, k, v in one linear layer, gate and up in another
QK_NORM = frozenset({"qwen3", "gemma3", "gemma3_text", "olmo2", "olmo3"})  # queries and keys are normalised too
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # keys of a config.json with the number of experts
FOUR_NORMS = frozenset({"gemma2", "gemma3", "gemma3_text"})  # around attention and MLP, before and after; others have two


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block, and the states that it reads: layers with the same input share it."""

    name: str
    inputs: int
    outputs: int
    reads: str

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs


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
    model_type: str = "llama"
    attn_logit_softcapping: float | None = None  # such attention runs without a fused kernel (Gemma 2)
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None  # the window of (most) layers, in tokens
    max_position_embeddings: int | None = None  # maximum tokens of a sequence
    extra_parameters: int = 0  # outside the decoder: an image encoder
    from_gguf: bool = False  # its file is dequantised when it is loaded

    @property
    def q(self) -> int:
        """The width of queries."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv(self) -> int:
        """The width of keys, and of values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def norms(self) -> int:
        """Norms of a block over the hidden states."""
        return 4 if self.model_type in FOUR_NORMS else 2

    @property
    def has_qk_norm(self) -> bool:
        return self.model_type in QK_NORM

    @functools.cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one block."""
        h, i = self.hidden_size, self.intermediate_size
        last = (Linear("o_proj", self.q, h, "attention"), Linear("down_proj", i, h, "product"))
        if self.model_type in FUSED:
            return Linear("qkv_proj", h, self.q + 2 * self.kv, "block"), Linear("gate_up_proj", h, 2 * i, "mlp"), *last
        first = (("q_proj", self.q), ("k_proj", self.kv), ("v_proj", self.kv))
        gated = (("gate_proj", i), ("up_proj", i))
        return (
            *(Linear(name, h, size, "block") for name, size in first),
            *(Linear(name, h, size, "mlp") for name, size in gated),
            *last,
        )

    def linear_names(self) -> dict[str, list[str]]:
        """The whole names of each linear layer, in all blocks."""
        attention = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
        part = {linear.name: "self_attn" if linear.name in attention else "mlp" for linear in self.linears}
        blocks = range(self.num_hidden_layers)
        return {name: [f"model.layers.{block}.{within}.{name}" for block in blocks] for name, within in part.items()}

    @property
    def linear_parameters(self) -> int:
        return self.num_hidden_layers * sum(linear.parameters for linear in self.linears)

    @property
    def other_parameters(self) -> int:
        """Embedding, head, norms and everything outside the decoder; none of them is quantised."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + (self.norms * self.num_hidden_layers + 1) * self.hidden_size + self.extra_parameters

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters


@functools.cache
def known_models() -> Mapping[str, ModelFacts]:
    """The table of common models."""
    table = read_json(files("dpo_cli.models").joinpath("models.json"))
    return {name: ModelFacts(**shape) for name, shape in table.items()}


def is_mixture(config: Mapping[str, object]) -> bool:
    """Whether a config.json is of a mixture of experts."""
    return any(text_part(config).get(name) for name in EXPERTS)


def config_facts(config: Mapping[str, Any], weights: TensorFiles | None = None) -> ModelFacts | None:
    """The facts of a config.json; with the headers of the weights also parameters outside the decoder."""
    text: Mapping[str, Any] = text_part(config)
    if is_mixture(config):
        return None  # it is larger than its dense shape
    names = [field.name for field in fields(ModelFacts) if field.default is MISSING]
    values: dict[str, Any] = {name: text.get(name) for name in names}
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = values["num_key_value_heads"] or heads
    if values["hidden_size"] and heads:
        values["head_dim"] = values["head_dim"] or values["hidden_size"] // heads
    values["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)))
    if None in values.values():
        return None
    caps: dict[str, Any] = {name: text.get(name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    caps["max_position_embeddings"] = text.get("max_position_embeddings")
    facts = ModelFacts(**values, **caps, sliding_window=window, model_type=text.get("model_type", "llama"))
    if facts.parameters <= 0:
        return None
    stored = sum(map(prod, weights.shapes.values())) if weights else 0
    extra = stored - facts.parameters
    # A quantised file stores different tensors; biases and the like are too few to count.
    is_plain = not config.get("quantization_config") and extra > facts.parameters // 100
    return replace(facts, extra_parameters=extra) if is_plain else facts


def is_gguf_mixture(header: Header) -> bool:
    """Whether a GGUF file is of a mixture of experts."""
    return bool(header.metadata.get(f"{header.metadata.get('general.architecture', '')}.expert_count"))


def gguf_facts(header: Header) -> ModelFacts | None:
    """The facts of the header of a GGUF file."""
    values = header.metadata
    family = values.get("general.architecture", "")
    if is_gguf_mixture(header):
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
        model_type=family,
        attn_logit_softcapping=values.get(f"{family}.attn_logit_softcapping"),
        max_position_embeddings=values.get(f"{family}.context_length"),
        sliding_window=values.get(f"{family}.attention.sliding_window"),
        final_logit_softcapping=values.get(f"{family}.final_logit_softcapping"),
        from_gguf=True,
    )
