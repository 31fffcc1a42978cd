"""What can be known of a model without loading it: its shape, and whether it can be a base model at all. No torch."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from dpo_cli.errors import Problem
from dpo_cli.hardware import gguf

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
CAUSAL = ("CausalLM", "LMHead", "ConditionalGeneration")  # parts of the names of architectures that write text
# Names of base models: marked as such, or of families that mark those that answer instructions.
BASE = re.compile(
    r"[-_.](base|pt)\b|^(meta-)?llama-?[23][\d.]*-\d+b(-hf)?$|^(qwen(1\.5|2|2\.5)|gemma|gemma-[23]|smollm2?|olmo(-2)?|falcon|pythia)-[\d.]+[bm]"
    r"|^mistral-7b-v",
    re.IGNORECASE,
)
INSTRUCT = re.compile(r"instruct|chat|[-_.]it\b|sft|dpo|tulu|zephyr|hermes", re.IGNORECASE)


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


def problems(model_name: str, to_align: bool = True) -> Iterator[Problem]:
    """Why a local `model_name` cannot be trained, and advice; a hub id is only checked when it is fetched.

    With `to_align` it should answer instructions already.
    """
    wrong = list(_faults(model_name))
    yield from wrong or _advice(model_name, to_align)


def _faults(model_name: str) -> Iterator[Problem]:
    path = Path(model_name)
    if not os.path.exists(path):
        if "://" in model_name:
            fix = f'write the name alone: "{"/".join(model_name.split("/")[3:5])}"'
            yield _wrong("model-missing", f"{model_name} is an address, not a name", fix)
        elif (
            path.suffix == ".gguf" or model_name.startswith((".", "/", "~")) or model_name.count("/") > 1 or "\\" in model_name
        ):
            yield _wrong("model-missing", f"there is no model at {model_name}", "check the path, or name a hub id: owner/model")
        elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_name):
            yield _wrong("model-missing", f"{model_name!r} is neither a path nor a hub id", "a hub id is owner/model")
        elif "/" not in model_name or os.path.exists(path.parent):
            fix = "check the path; a hub id is owner/model"
            yield Problem(
                "warning", "model-not-here", f"there is no {model_name} here; the hub will be asked", fix, "model_name"
            )
    elif not path.is_dir() and not gguf.is_gguf(path):
        yield _wrong("model-not-gguf", f"{path} is not a GGUF file", "name a GGUF file or a model directory")
    elif (path / "adapter_config.json").is_file():
        fix = "name the base model; training on from an adapter does not work in this version"
        yield _wrong("model-is-adapter", f"{model_name} is an adapter, not a model", fix)
    elif path.is_dir() and not (path / "config.json").is_file():
        yield _wrong("model-incomplete", f"{model_name} has no config.json", "name a complete model directory")
    else:
        try:
            model_facts(model_name)
            if path.is_dir():
                yield from _directory_faults(path, _config_of(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever a damaged header makes of it
            yield _wrong("model-damaged", f"{path} is damaged: {error}", "download it again")


def _directory_faults(path: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    """What a model directory with a readable config.json lacks."""
    names = config.get("architectures") or []
    if config.get("is_encoder_decoder") or (names and not any(mark in name for name in names for mark in CAUSAL)):
        what = ", ".join(names) or "an encoder-decoder model"
        yield _wrong(
            "model-not-causal", f"{path} is no causal language model: {what}", "name an instruct model that writes text"
        )
    if not any(path.glob("*.safetensors")):
        fix = "convert its weights with `save_pretrained`: others than safetensors can run code when they are read"
        yield _wrong("model-no-weights", f"{path} has no .safetensors file", fix)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        yield _wrong("model-no-tokenizer", f"{path} has no tokenizer", f"copy the model's {TOKENIZER_FILES[0]} into it")


def _advice(model_name: str, to_align: bool) -> Iterator[Problem]:
    """Hints about a model that could be trained."""
    if not os.path.exists(model_name) and (near := common_name(model_name)):
        message = f"{model_name} is close to the common {near}; whether it is there is known when it is fetched"
        yield Problem("hint", "model-name-near", message, f'did you mean "{near}"?', "model_name")
    repacked = re.search(r"[-_](gguf|awq|gptq|exl2|mlx)\b", model_name, re.IGNORECASE)
    if repacked and not os.path.exists(model_name):
        message = f"{model_name} holds weights repacked for inference ({repacked[1].upper()})"
        fix = "name the repository it was made from, or download a GGUF file and name that"
        yield Problem("warning", "model-repacked", message, fix, "model_name")
    if to_align and not _answers_instructions(model_name):
        message = f"{Path(model_name).name} seems to be a base model: the documentation advises to start with SFT"
        fix = 'name its instruct version, or fine-tune it first with "strategy": "sft"'
        yield Problem("hint", "start-with-sft", message, fix, "model_name")


def common_name(model_name: str) -> str | None:
    """The common model that a name may be a misspelling of."""
    near = difflib.get_close_matches(model_name, known_models(), 1, cutoff=0.9)
    is_other_size = near and re.findall(r"\d+", near[0]) != re.findall(r"\d+", model_name)
    return near[0] if near and near[0] != model_name and not is_other_size else None


def _answers_instructions(model_name: str) -> bool:
    """Whether the model has a chat template; of a hub id, unless its name is that of a base model."""
    path = Path(model_name)
    if gguf.is_gguf(path):
        return "tokenizer.chat_template" in gguf.read_header(path).metadata
    if path.is_dir():
        config = path / "tokenizer_config.json"
        return (path / "chat_template.jinja").is_file() or (
            config.is_file() and "chat_template" in config.read_text(encoding="utf-8", errors="replace")
        )
    return BASE.search(path.name) is None or INSTRUCT.search(path.name) is not None


def _wrong(code: str, message: str, fix: str) -> Problem:
    return Problem("error", code, message, fix, "model_name")


def _config_of(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return loaded


def model_facts(model_name: str) -> ModelFacts | None:
    """The shape of a model: from a GGUF header, a local config.json or the table of common models; None when unknown."""
    path = Path(model_name)
    if gguf.is_gguf(path):
        return _gguf_facts(gguf.read_header(path))
    if (path / "config.json").is_file():
        return _config_facts(_config_of(path))
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
