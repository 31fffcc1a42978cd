"""Whether a model can be trained, as far as its files or its name tell before it is loaded. No torch."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_cli.errors import Problem
from dpo_cli.models import generation_config, gguf_header, remote_code, tensor_files
from dpo_cli.models.quantised_files import stored_quantisation, text_part
from dpo_cli.models.shape import known_models, model_facts
from dpo_cli.models.source import ADAPTER_CONFIG, adapter_at, folders_below, foundation, model_of
from dpo_cli.storage.jsonio import read_object_if_there
from dpo_cli.storage.run_directory import PLAN, WEIGHTS

TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
NO_EOS = "tokenizer-no-eos"
CONVERT = "convert its weights with `save_pretrained`: others than safetensors can run code when they are read"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", TOKENIZER_CONFIG, "vocab.json", "tekken.json")
CAUSAL = ("CausalLM", "LMHead", "ConditionalGeneration")  # parts of the names of architectures that write text
# Names of base models: marked as such, or of families that mark those that answer instructions.
BASE = re.compile(
    r"[-_.](base|pt)\b|^(meta-)?llama-?[23][\d.]*-\d+b(-hf)?$|^(qwen(1\.5|2|2\.5)|gemma|gemma-[23]|smollm2?|olmo(-2)?|falcon|pythia)-[\d.]+[bm]"
    r"|^mistral-7b-v",
    re.IGNORECASE,
)
INSTRUCT = re.compile(r"instruct|chat|[-_.]it\b|sft|dpo|tulu|zephyr|hermes", re.IGNORECASE)


def problems(model_name: str, to_align: bool = True) -> Iterator[Problem]:
    """Why a local `model_name` cannot be trained, and advice; a hub id is only checked when it is fetched.

    With `to_align` it should answer instructions already.
    """
    wrong = list(_faults(model_name))
    yield from wrong
    if all(problem.severity == "hint" for problem in wrong):
        yield from _advice(model_name, to_align)


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
    elif not path.is_dir() and not gguf_header.is_gguf(path):
        yield _wrong("model-not-gguf", f"{path} is not a GGUF file", "name a GGUF file or a model directory")
    elif path.is_dir() and ((path / PLAN).is_file() or (path / ADAPTER_CONFIG).is_file()):
        yield from _adapter_faults(model_name)
    elif path.is_dir() and not (path / "config.json").is_file():
        yield _wrong("model-incomplete", f"{model_name} has no config.json", "name a complete model directory")
    else:
        try:
            is_whole = True
            for problem in _directory_faults(path, read_object_if_there(path / "config.json")) if path.is_dir() else ():
                is_whole &= problem.severity != "error"
                yield problem
            if is_whole:
                model_facts(model_name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever a damaged header makes of it
            yield _wrong("model-damaged", f"{path} is damaged: {error}", "download it again")


def _adapter_faults(model_name: str) -> Iterator[Problem]:
    """Why a run or an adapter cannot be trained on; what it stands on is looked at too."""
    try:
        folders_below(model_name)  # which ends where one stands on itself
        adapter = adapter_at(model_name)
    except (OSError, ValueError) as error:
        fix = getattr(error, "fix", "name the directory of a finished run, or of a complete adapter")
        yield _wrong("adapter-unusable", f"{model_name} cannot be trained on: {error}", fix)
        return
    if adapter is not None:
        base = Path(foundation(adapter.model_name))
        if (base / "config.json").is_file():
            stored = tensor_files.stored_in(base)
            # The layers of experts have other names in the files than in the model.
            family = read_object_if_there(base / "config.json").get("model_type")
            is_dense = family in tensor_files.DENSE and not tensor_files.has_experts(stored)
            for fault in tensor_files.adapter_faults(adapter.directory, WEIGHTS, stored, is_dense):
                yield _wrong("adapter-unusable", fault.message, fault.fix)
        tokenizer = read_object_if_there(adapter.directory / TOKENIZER_CONFIG)
        yield from remote_code.problems({}, tokenizer, str(adapter.directory))
    has_tokenizer = adapter is not None and (adapter.directory / TOKENIZER_CONFIG).is_file()  # which is taken then
    for problem in _faults(adapter.model_name if adapter else model_of(model_name)):
        if has_tokenizer and problem.code == NO_EOS:
            continue
        yield replace(problem, message=f"{model_name} stands on another model: {problem.message}")


def _directory_faults(path: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    """What a model directory with a readable config.json lacks."""
    names = config.get("architectures") or []
    if config.get("is_encoder_decoder") or (names and not any(mark in name for name in names for mark in CAUSAL)):
        what = ", ".join(names) or "an encoder-decoder model"
        yield _wrong(
            "model-not-causal", f"{path} is no causal language model: {what}", "name an instruct model that writes text"
        )
    elif not config.get("model_type"):
        fix = "copy the config.json that belongs to these weights into it"
        yield _wrong("model-incomplete", f"config.json of {path} has no model_type", fix)
    elif not config.get("auto_map") and not remote_code.is_causal(family := config.get("model_type")):
        yield not_causal(str(path), str(family))
    yield from remote_code.problems(config, read_object_if_there(path / TOKENIZER_CONFIG), str(path))
    index = path / tensor_files.INDEX
    if not any(path.glob("*.safetensors")):
        yield _wrong("model-no-weights", f"{path} has no .safetensors file", CONVERT)
    elif not index.is_file() and not (path / tensor_files.SINGLE).is_file():
        fix = f"rename a single file of weights to {tensor_files.SINGLE}; of several, the index is missing: download it again"
        yield _wrong("model-no-weights", f"{path} has neither {tensor_files.SINGLE} nor {tensor_files.INDEX}", fix)
    elif index.is_file() and (files := remote_code.unsafe_shards(read_object_if_there(index))):
        message = f"{index} names {', '.join(files)}, which are no .safetensors files beside it"
        yield _wrong("model-no-weights", message, CONVERT)
    else:
        yield from (_wrong("model-tensors", fault.message, fault.fix) for fault in tensor_files.faults(path, config))
    if (stored := stored_quantisation(config)) is not None and (problem := stored.problem(str(path))) is not None:
        yield problem
    yield from _token_faults(path, config)
    yield from _generation_advice(path, text_part(config).get("vocab_size"))
    if without_eos(read_object_if_there(path / TOKENIZER_CONFIG), read_object_if_there(path / SPECIAL_TOKENS)):
        yield no_eos(str(path))
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        yield _wrong("model-no-tokenizer", f"{path} has no tokenizer", f"copy the model's {TOKENIZER_FILES[0]} into it")


def _token_faults(path: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    """A padding token that the tokenizer has and the model has no row for, and others that rows may hold."""
    rows = text_part(config).get("vocab_size")
    added = read_object_if_there(path / "tokenizer.json").get("added_tokens") or []
    outside = {token["content"]: token["id"] for token in added if isinstance(rows, int) and token["id"] >= rows}
    if not outside:
        return
    total = max(outside.values()) + 1
    what = f"the tokenizer of {path} has {total} tokens, and the model {rows} rows for them"
    padding = read_object_if_there(path / TOKENIZER_CONFIG).get("pad_token")
    padding = padding.get("content") if isinstance(padding, dict) else padding
    if padding in outside:
        fix = f"name another pad_token in {TOKENIZER_CONFIG}, or resize the model's embedding to {total} rows"
        yield _wrong("tokens-outside", f"{what}: the padding token {padding} ({outside[padding]}) has none", fix)
        return
    first = min(outside, key=lambda token: outside[token])
    fix = f"resize the model's embedding to {total} rows; rows with such a token are refused"
    yield Problem("warning", "tokens-outside", f"{what}: {first} ({outside[first]}) has none", fix, "model_name")


def _generation_advice(path: Path, rows: Any) -> Iterator[Problem]:
    """What of generation_config.json is left out, since transformers would not load or save the model, or answer, with it."""
    settings = read_object_if_there(path / generation_config.FILE)
    if wrong := generation_config.invalid(settings, rows if isinstance(rows, int) else None):
        told = "; ".join(f"{name} {json.dumps(settings[name])} {why}" for name, why in wrong.items())
        fix = f"nothing is to be done: {', '.join(wrong)} is left out of what is saved"
        yield Problem("hint", "generation-config", f"{generation_config.FILE} of {path}: {told}", fix, "model_name")


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
    if os.path.exists(model_name) and foundation(model_name) != model_name:
        return True  # a run, or an adapter, was trained on something already
    path = Path(model_name)
    if gguf_header.is_gguf(path):
        return "tokenizer.chat_template" in gguf_header.read_header(path).metadata
    if path.is_dir():
        config = path / "tokenizer_config.json"
        return (path / "chat_template.jinja").is_file() or (
            config.is_file() and "chat_template" in config.read_text(encoding="utf-8", errors="replace")
        )
    return BASE.search(path.name) is None or INSTRUCT.search(path.name) is not None


def without_eos(tokenizer: Mapping[str, Any], special: Mapping[str, Any]) -> bool:
    """Whether a tokenizer surely has no EOS token: its files name none, and its class has none of its own."""
    has_plain_class = tokenizer.get("tokenizer_class") in remote_code.GENERIC
    return has_plain_class and not tokenizer.get("eos_token") and not special.get("eos_token")


def no_eos(label: str) -> Problem:
    """The problem of a model that would never learn where an answer ends."""
    message = f"the tokenizer of {label} names no EOS token, with which a response ends"
    return _wrong(NO_EOS, message, f'write "eos_token" into {TOKENIZER_CONFIG}, or take an instruct model')


def not_causal(label: str, model_type: str) -> Problem:
    """The problem of a model that transformers loads as something else, or not at all."""
    message = f"{label} is of the type {model_type}, of which transformers has no causal language model"
    fix = "take a model that reads and writes text alone: image-text models of this kind cannot be trained here"
    return _wrong("model-not-causal", message, fix)


def _wrong(code: str, message: str, fix: str) -> Problem:
    return Problem("error", code, message, fix, "model_name")
