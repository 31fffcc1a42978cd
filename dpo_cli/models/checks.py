"""Whether a model can be trained, by its files or its name, before it is loaded. No torch."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from dpo_cli.errors import Problem
from dpo_cli.models import generation_config, remote_code, tensor_files
from dpo_cli.models.model_files import CONFIG, GENERATION, SPECIAL_TOKENS, TOKENIZER, TOKENIZER_CONFIG, ModelFiles
from dpo_cli.models.shape import known_models
from dpo_cli.models.source import ModelSource

NO_EOS = "tokenizer-no-eos"
CONVERT = "convert its weights with `save_pretrained`: other formats than safetensors can run code when they are read"
TOKENIZER_FILES = (TOKENIZER, "tokenizer.model", TOKENIZER_CONFIG, "vocab.json", "tekken.json")
CAUSAL = ("CausalLM", "LMHead", "ConditionalGeneration")  # parts of the names of architectures that write text
# Names of base models: marked as such, or of families whose instruct models are marked.
BASE = re.compile(
    r"[-_.](base|pt)\b|^(meta-)?llama-?[23][\d.]*-\d+b(-hf)?$|^(qwen(1\.5|2|2\.5)|gemma|gemma-[23]|smollm2?|olmo(-2)?|falcon|pythia)-[\d.]+[bm]"
    r"|^mistral-7b-v",
    re.IGNORECASE,
)
INSTRUCT = re.compile(r"instruct|chat|[-_.]it\b|sft|dpo|tulu|zephyr|hermes", re.IGNORECASE)


def problems(source: ModelSource, to_align: bool = True) -> Iterator[Problem]:
    """Problems of a local model, and advice; a hub id is only checked when it is fetched.

    With `to_align` the model should already follow instructions.
    """
    wrong = list(_faults(source))
    yield from wrong
    if all(problem.severity == "hint" for problem in wrong):
        yield from _advice(source, to_align)


def _faults(source: ModelSource) -> Iterator[Problem]:
    model_name, files, path = source.name, source.own, Path(source.name)
    if not os.path.exists(path):
        if "://" in model_name:
            fix = f'write only the name: "{"/".join(model_name.split("/")[3:5])}"'
            yield _wrong("model-missing", f"{model_name} is a URL, not a name", fix)
        elif (
            path.suffix == ".gguf" or model_name.startswith((".", "/", "~")) or model_name.count("/") > 1 or "\\" in model_name
        ):
            yield _wrong("model-missing", f"model not found: {model_name}", "check the path, or name a hub id: owner/model")
        elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_name):
            yield _wrong("model-missing", f"{model_name!r} is neither a path nor a hub id", "a hub id is owner/model")
        elif "/" not in model_name or os.path.exists(path.parent):
            fix = "check the path; a hub id is owner/model"
            yield Problem(
                "warning", "model-not-here", f"{model_name} is not a local model; it is looked up on the hub", fix, "model_name"
            )
    elif not path.is_dir() and not files.is_gguf:
        yield _wrong("model-not-gguf", f"{path} is not a GGUF file", "name a GGUF file or a model directory")
    elif path.is_dir() and (source.fault or source.below or source.is_whole_run):
        yield from _faults_below(source)
    elif path.is_dir() and not files.has(CONFIG):
        yield _wrong("model-incomplete", f"{model_name} has no config.json", "name a complete model directory")
    else:
        try:
            is_whole = True
            for problem in _directory_faults(files) if path.is_dir() else ():
                is_whole &= problem.severity != "error"
                yield problem
            if is_whole:
                source.facts  # noqa: B018 - whose headers are read for it
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # errors of damaged headers
            yield _wrong("model-damaged", f"{path} is damaged: {error}", "download it again")


def _faults_below(source: ModelSource) -> Iterator[Problem]:
    """Problems of a run or an adapter, and of the models below it."""
    if fault := source.fault:
        yield _wrong("adapter-unusable", f"{source.name} cannot be trained on: {fault.message}", fault.fix)
        return
    adapter = source.adapter
    if adapter is not None:
        base = source.files
        if base.has(CONFIG):
            stored = base.tensors.shapes
            # The layers of experts have different names in the files and in the model.
            is_dense = base.config.get("model_type") in tensor_files.DENSE and not tensor_files.has_experts(stored)
            for wrong in tensor_files.adapter_faults(adapter.files.tensors, adapter.config, stored, is_dense):
                yield _wrong("adapter-unusable", wrong.message, wrong.fix)
        yield from remote_code.problems({}, adapter.files.json(TOKENIZER_CONFIG), str(adapter.directory))
    for problem in _faults(source.below or ModelSource(source.foundation, source.own)):
        if problem.code == NO_EOS and adapter is not None and adapter.has_tokenizer:
            continue
        yield replace(problem, message=f"the base model of {source.name}: {problem.message}")


def _directory_faults(files: ModelFiles) -> Iterator[Problem]:
    """Problems of a model directory with a readable config.json."""
    path, config, tokenizer = files.path, files.config, files.json(TOKENIZER_CONFIG)
    names = tensor_files.names_in(config.get("architectures"))
    if config.get("is_encoder_decoder") or (names and not any(mark in name for name in names for mark in CAUSAL)):
        what = ", ".join(names) or "an encoder-decoder model"
        yield _wrong(
            "model-not-causal", f"{path} is not a causal language model: {what}", "name an instruct model that generates text"
        )
    elif not config.get("model_type"):
        fix = "copy the config.json of these weights into it"
        yield _wrong("model-incomplete", f"config.json of {path} has no model_type", fix)
    elif not config.get("auto_map") and not remote_code.is_causal(family := config.get("model_type")):
        yield not_causal(str(path), str(family))
    yield from remote_code.problems(config, tokenizer, str(path))
    tensors = files.tensors
    if not any(path.glob("*.safetensors")):
        yield _wrong("model-no-weights", f"{path} has no .safetensors file", CONVERT)
    elif not tensors.has_index and not tensors.is_single:
        fix = (
            f"rename a single weight file to {tensor_files.SINGLE}; with several files the index is missing: download it again"
        )
        yield _wrong("model-no-weights", f"{path} has neither {tensor_files.SINGLE} nor {tensor_files.INDEX}", fix)
    elif tensors.has_index and (shards := remote_code.unsafe_shards(tensors.index)):
        message = f"{path / tensor_files.INDEX} names {', '.join(shards)}, which are not .safetensors files in its folder"
        yield _wrong("model-no-weights", message, CONVERT)
    else:
        yield from (_wrong("model-tensors", fault.message, fault.fix) for fault in tensor_files.faults(tensors, config))
    if (stored := files.quantisation) is not None and (problem := stored.problem(str(path))) is not None:
        yield problem
    yield from _token_faults(files)
    yield from _generation_advice(files)
    if without_eos(tokenizer, files.json(SPECIAL_TOKENS)):
        yield no_eos(str(path))
    if not any(map(files.has, TOKENIZER_FILES)):
        yield _wrong("model-no-tokenizer", f"{path} has no tokenizer", f"copy the model's {TOKENIZER} into it")


def _token_faults(files: ModelFiles) -> Iterator[Problem]:
    """Problems of a padding token, or of other tokens, without a row in the model's embedding."""
    rows = files.token_rows
    outside = {token: number for token, number in files.added_tokens.items() if rows is not None and number >= rows}
    if not outside:
        return
    total = max(outside.values()) + 1
    what = f"the tokenizer of {files.path} has {total} tokens, but the model's embedding has {rows} rows"
    padding = files.json(TOKENIZER_CONFIG).get("pad_token")
    padding = padding.get("content") if isinstance(padding, dict) else padding
    if padding in outside:
        fix = f"name another pad_token in {TOKENIZER_CONFIG}, or resize the model's embedding to {total} rows"
        yield _wrong("tokens-outside", f"{what}: the padding token {padding} ({outside[padding]}) has no row", fix)
        return
    first = min(outside, key=lambda token: outside[token])
    fix = f"resize the model's embedding to {total} rows; rows with such a token are refused"
    yield Problem("warning", "tokens-outside", f"{what}: {first} ({outside[first]}) has no row", fix, "model_name")


def _generation_advice(files: ModelFiles) -> Iterator[Problem]:
    """Settings of generation_config.json that are omitted: transformers cannot load, save or run the model with them."""
    settings = files.json(GENERATION)
    if wrong := generation_config.invalid(settings, files.token_rows):
        reasons = "; ".join(f"{name} {json.dumps(settings[name])} {why}" for name, why in wrong.items())
        fix = f"no change is needed: {', '.join(wrong)} is omitted when the model is saved"
        yield Problem("hint", "generation-config", f"{GENERATION} of {files.path}: {reasons}", fix, "model_name")


def _advice(source: ModelSource, to_align: bool) -> Iterator[Problem]:
    """Hints about a model that can be trained."""
    model_name = source.name
    if not os.path.exists(model_name) and (near := common_name(model_name)):
        message = f"{model_name} is similar to the common {near}; it is only checked when it is fetched"
        yield Problem("hint", "model-name-near", message, f'did you mean "{near}"?', "model_name")
    repacked = re.search(r"[-_](gguf|awq|gptq|exl2|mlx)\b", model_name, re.IGNORECASE)
    if repacked and not os.path.exists(model_name):
        message = f"{model_name} holds weights converted for inference ({repacked[1].upper()})"
        fix = "name the repository that it was converted from, or download a GGUF file and name that file"
        yield Problem("warning", "model-repacked", message, fix, "model_name")
    if to_align and not _answers_instructions(source):
        message = f"{Path(model_name).name} seems to be a base model: the documentation recommends SFT first"
        fix = 'name its instruct version, or first train it with "strategy": "sft"'
        yield Problem("hint", "start-with-sft", message, fix, "model_name")


def common_name(model_name: str) -> str | None:
    """The common model with a similar name, which may be meant."""
    near = difflib.get_close_matches(model_name, known_models(), 1, cutoff=0.9)
    is_other_size = near and re.findall(r"\d+", near[0]) != re.findall(r"\d+", model_name)
    return near[0] if near and near[0] != model_name and not is_other_size else None


def _answers_instructions(source: ModelSource) -> bool:
    """Whether the model has a chat template; for a hub id, whether its name is not that of a base model."""
    if source.foundation != source.name:
        return True  # a run or an adapter is already trained
    path = Path(source.name)
    if os.path.exists(path):
        return source.own.has_chat_template
    return BASE.search(path.name) is None or INSTRUCT.search(path.name) is not None


def without_eos(tokenizer: Mapping[str, object], special: Mapping[str, object]) -> bool:
    """Whether a tokenizer certainly has no EOS token: neither its files nor its class name one."""
    has_plain_class = tokenizer.get("tokenizer_class") in remote_code.GENERIC
    return has_plain_class and not tokenizer.get("eos_token") and not special.get("eos_token")


def no_eos(label: str) -> Problem:
    """The problem of a model that cannot learn where an answer ends."""
    message = f"the tokenizer of {label} has no EOS token, which must end a response"
    return _wrong(NO_EOS, message, f'write "eos_token" into {TOKENIZER_CONFIG}, or use an instruct model')


def not_causal(label: str, model_type: str) -> Problem:
    """The problem of a model that transformers cannot load as a causal language model."""
    message = f"{label} has the type {model_type}, for which transformers has no causal language model"
    fix = "use a text-only model: image-text models of this type are not supported"
    return _wrong("model-not-causal", message, fix)


def no_classifier(label: str, model_type: str) -> Problem:
    """The problem of a model that cannot become a reward model."""
    message = f"{label} has the type {model_type}, for which transformers has no sequence classifier with a score head"
    fix = "train the reward model on a model of another family, such as Llama, Qwen or Gemma"
    return _wrong("model-no-classifier", message, fix)


def _wrong(code: str, message: str, fix: str) -> Problem:
    return Problem("error", code, message, fix, "model_name")
