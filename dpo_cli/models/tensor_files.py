"""The tensors of safetensors files by their headers: whether files are whole, and whether they are those of a model. No torch.

A file is eight bytes that give the size of its header, the header as JSON, and the bytes of the tensors
(github.com/safetensors/safetensors). What is said here is sure; what only the architecture itself can tell is checked when the
model is loaded (providers/accounting.py).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.storage.jsonio import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_HEADER_BYTES = 1 << 27
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
# Put before every name by tools that wrap a model: DataParallel, torch.compile, FSDP, PEFT, Lightning.
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.", "pretrained_model.")
# Families of decoders (model_type) that name their layers alike in their files.
DENSE = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "olmo3", "granite", "cohere"}
    | {"smollm3", "mixtral", "qwen3_moe"}
)
SHOWN = 3  # names that a message gives

Shape = tuple[int, ...]
Wanted = tuple[int | None, ...]  # None: config.json leaves it to a default of its class


@dataclass(frozen=True)
class Fault:
    """What is wrong with files of weights, in words, and what to do."""

    message: str
    fix: str


def header_of(path: Path) -> dict[str, Shape]:
    """The shapes of the tensors in a file, by their names. Raises ValueError for a file that is damaged or cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(MOST_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{path.name} is cut off, or is no safetensors file: its header does not end within its {size:,} bytes"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path.name} is damaged: its header is not JSON") from error
    header.pop("__metadata__", None)
    ends = {name: 8 + length + tensor["data_offsets"][1] for name, tensor in header.items()}
    end = max(ends.values(), default=8 + length)
    if end != size:
        beyond = some(sorted((name for name, place in ends.items() if place > size), key=lambda name: ends[name]))
        message = f"{path.name} has {size:,} bytes, and its header describes {end:,}"
        raise ValueError(f"{message}: it is cut off, and lacks {beyond}" if beyond else f"{message}: it is damaged")
    return {name: tuple(tensor["shape"]) for name, tensor in header.items()}


def files_of(folder: Path) -> list[Path]:
    """The files that hold the model of a folder, as transformers reads it; empty where there are none of its names."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        return []
    names = read_json(folder / INDEX)["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def stored_in(folder: Path) -> dict[str, Shape]:
    """The shapes of all tensors of the model in a folder. Raises ValueError or OSError for files that are not whole."""
    return {name: shape for file in files_of(folder) for name, shape in header_of(file).items()}


def faults(folder: Path, config: Mapping[str, Any]) -> Iterator[Fault]:
    """What is wrong with the files of the model in `folder`, whose config.json is `config`."""
    again = "download it again, or copy it whole"
    try:
        if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
            yield from _index_faults(folder, again)
        stored = stored_in(folder)
    except FileNotFoundError as error:
        yield Fault(f"{folder} has no {Path(error.filename).name}, which its {INDEX} names", again)
        return
    except (ValueError, KeyError, TypeError) as error:
        yield Fault(f"{folder}: {error}", again)
        return
    if wrapper := wrapper_of(stored):
        message = f"every tensor name in {folder} begins with {wrapper!r}: the model was saved inside a wrapper"
        yield Fault(message, f"save the model without the wrapper, or remove {wrapper!r} from the names")
        return
    if config.get("model_type") in DENSE and not config.get("quantization_config"):
        yield from _decoder_faults(folder, config, stored, again)
        return
    if gap := expert_gap(stored):
        yield Fault(f"{folder} {gap}", again)


def _decoder_faults(folder: Path, config: Mapping[str, Any], stored: Mapping[str, Shape], again: str) -> Iterator[Fault]:
    """What of the matrices of a decoder of `DENSE` is missing or has another shape."""
    short = {name.removeprefix("model."): shape for name, shape in stored.items()}  # as the model without its head is saved
    wanted = _decoder(config, short)
    absent = [name for name in wanted if name.removeprefix("model.") not in short]
    if absent:
        yield Fault(f"{folder} lacks {count(absent)}, which config.json asks for", again)
    other = [
        f"{name} {list(short[place])} instead of [{', '.join('?' if size is None else str(size) for size in shape)}]"
        for name, shape in wanted.items()
        if (place := name.removeprefix("model.")) in short and not _fits(short[place], shape)
    ]
    if other:
        yield Fault(f"tensors in {folder} have other shapes than config.json asks for: {some(other)}", again)
    layers = {int(number[1]) for name in short if (number := re.match(r"layers\.(\d+)\.", name))}
    total = config.get("num_hidden_layers")
    if total is not None and (beyond := sorted(layer for layer in layers if layer >= total)):
        message = f"{folder} holds a layer {beyond[0]}, and its config.json has num_hidden_layers {total}"
        yield Fault(message, "take config.json and weights from one model")


def adapter_faults(folder: Path, file: str, base: Mapping[str, Shape], is_dense: bool) -> Iterator[Fault]:
    """What is wrong with the weights of an adapter on a model whose files hold `base`.

    With `is_dense`, a layer has the same name in these files and in the adapter's.
    """
    try:
        own = header_of(folder / file)
    except ValueError as error:
        yield Fault(f"{folder}: {error}", "copy it again, or save it again with PEFT")
        return
    if difference := resized(own, base):
        yield Fault(f"the adapter in {folder} {difference}", RESIZED_FIX)
        return
    if gap := expert_gap(own):
        yield Fault(f"the adapter in {folder} {gap}", "copy it again, or save it again with PEFT")
    rows = max((shape[0] for shape in base.values() if len(shape) == 2), default=0)  # a table, which PEFT may save, has most
    own_config = read_json(folder / "adapter_config.json")
    of_layers = [name for name in of_base(own, own_config.get("modules_to_save")) if own[name][:1] != (rows,)]
    if of_layers:
        message = f"the adapter in {folder} holds {count(of_layers)} of its base itself, which would replace the model's"
        yield Fault(message, "remove these from the file, or merge it with PEFT into its base, and name the merged model")
    layers = {name.removeprefix("model.").removesuffix(".weight") for name in base} | {"lm_head"}  # which may be tied
    unknown = [name for name in own if ".lora_" in name and _layer_of(name).removeprefix("model.") not in layers]
    if is_dense and unknown:
        fix = "name the model that it was made on, or rename its tensors"
        yield Fault(f"the adapter in {folder} holds {count(unknown)} for layers that its base model does not have", fix)


RESIZED_FIX = "merge it with PEFT into the model with these tokens, and name the merged model"


def resized(adapter: Mapping[str, Shape], base: Mapping[str, Shape]) -> str | None:
    """Which table of tokens an adapter holds with other rows than its base, in words that follow "the adapter"; None: none."""
    for name, shape in adapter.items():
        place = place_of(name)
        there = base.get(place)
        if ".lora_" not in name and there is not None and len(shape) == 2 and shape[1:] == there[1:] and shape != there:
            added = shape[0] - there[0]
            when = f"after {added} tokens were added" if added > 0 else f"on a model with {-added} tokens less"
            return f"was made {when}: its {place} has {shape[0]} rows, and the model's has {there[0]}"
    return None


def of_base(names: Iterable[str], modules_to_save: Iterable[str] | None) -> list[str]:
    """The tensors in an adapter's file that PEFT puts into the base: neither LoRA's nor of a module that is trained whole."""
    whole = tuple(modules_to_save or ())
    kept = re.compile(r"\.(original_module|base_layer)\.")  # beside what is trained
    return [
        name
        for name in names
        if ".lora_" not in name
        if kept.search(name) or not any(module.endswith(whole) for module in _modules_above(name))
    ]


def _modules_above(name: str) -> list[str]:
    """The whole names of the modules that a tensor is in. PEFT 0.21 takes all for `modules_to_save` whose name ends so."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def place_of(name: str) -> str:
    """The name in the base of a tensor that an adapter wraps, or holds whole."""
    return re.sub(r"\.(modules_to_save|original_module|base_layer)(?=\.)", "", name).removeprefix("base_model.model.")


def _layer_of(name: str) -> str:
    """The layer that a tensor of a LoRA adapter is for, by its name in the base."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def wrapper_of(names: Iterable[str]) -> str | None:
    """The prefix of a wrapper that every name has; None where there is none."""
    names = list(names)
    return next((wrapper for wrapper in WRAPPERS if names and all(name.startswith(wrapper) for name in names)), None)


def count(names: Sequence[str]) -> str:
    """So many tensors, with the first names."""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({some(names)})"


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _index_faults(folder: Path, again: str) -> Iterator[Fault]:
    named: Mapping[str, str] = read_json(folder / INDEX)["weight_map"]
    files = set(named.values())
    shards = {file.name for file in folder.glob("model-*.safetensors") if SHARD.fullmatch(file.name)}
    if left := [shard for shard in sorted(shards - files) if _belongs(folder / shard, named)]:
        held = list(header_of(folder / left[0]))
        yield Fault(f"{INDEX} in {folder} leaves out {some(left)}, with {count(held)}: they would not be loaded", again)
    for file in sorted(files):
        own = header_of(folder / file)
        if lost := [name for name, place in named.items() if place == file and name not in own]:
            yield Fault(f"{file} in {folder} lacks {count(lost)}, which {INDEX} places there", again)


def _belongs(shard: Path, named: Mapping[str, str]) -> bool:
    """Whether a file that an index does not name is of its model, and not left over from a division into other files."""
    same_division = shard.name.partition("-of-")[2] in {file.partition("-of-")[2] for file in named.values()}
    return same_division or not header_of(shard).keys() <= named.keys()


def has_experts(stored: Iterable[str]) -> bool:
    """Whether the tensors are those of a mixture of experts, which transformers joins when it loads them."""
    return any(".experts." in name for name in stored)


def expert_gap(names: Iterable[str]) -> str | None:
    """The expert that files do not hold although they hold a later one, in words that follow what the files are of.

    transformers and PEFT join experts in the order of their numbers, whatever these are.
    """
    for place, numbers in _experts(names).items():
        if gaps := set(range(max(numbers))) - numbers:
            there, gap = (place.replace("*", str(number)) for number in (max(numbers), min(gaps)))
            return f"holds {there} and lacks {gap}: the experts would be joined in another order"
    return None


def _experts(stored: Iterable[str]) -> dict[str, set[int]]:
    """The numbers of the experts, by their tensors' names with * for the number."""
    numbers: dict[str, set[int]] = {}
    for name in stored:
        if found := NUMBER.search(name):
            numbers.setdefault(f"{name[: found.start()]}*{name[found.end() :]}", set()).add(int(found[0]))
    return numbers


def _fits(shape: Shape, wanted: Wanted) -> bool:
    return len(shape) == len(wanted) and all(size in (None, there) for there, size in zip(shape, wanted, strict=True))


def _times(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one * other


def _decoder(config: Mapping[str, Any], short: Container[str]) -> dict[str, Wanted]:
    """Names and shapes of the matrices of a decoder of `DENSE`; norms, biases and whatever else it has are not told.

    `short` are the names in its files without "model.": experts may be stored one by one, or joined.
    """
    hidden, head = config.get("hidden_size"), config.get("head_dim")
    q, kv = (_times(config.get(name), head) for name in ("num_attention_heads", "num_key_value_heads"))
    table = (config.get("vocab_size"), hidden)
    shapes: dict[str, Wanted] = {"model.embed_tokens.weight": table}
    writes_text = all(name.endswith("ForCausalLM") for name in config.get("architectures") or ())  # a reward model has no head
    if config.get("tie_word_embeddings") is False and writes_text:
        shapes["lm_head.weight"] = table
    for layer in range(config.get("num_hidden_layers") or 0):
        block = f"model.layers.{layer}."
        attention: dict[str, Wanted] = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
        if config["model_type"] == "phi3":
            attention = {"qkv_proj": (None if q is None or kv is None else q + 2 * kv, hidden)}
        for name, shape in {**attention, "o_proj": (hidden, q)}.items():
            shapes[f"{block}self_attn.{name}.weight"] = shape
        is_joined = any(f"layers.{layer}.mlp.experts.{name}" in short for name in ("gate_up_proj", "down_proj"))
        shapes |= {f"{block}{name}": shape for name, shape in _feed_forward(config, layer, is_joined).items()}
    return shapes


def _feed_forward(config: Mapping[str, Any], layer: int, is_joined: bool) -> dict[str, Wanted]:
    """The matrices of one block's MLP or experts."""
    family, hidden, inner = config["model_type"], config.get("hidden_size"), config.get("intermediate_size")
    experts = config.get("num_local_experts") or config.get("num_experts")
    is_sparse = family == "qwen3_moe" and (layer + 1) % config.get("decoder_sparse_step", 1) == 0
    if family == "mixtral" or (is_sparse and layer not in (config.get("mlp_only_layers") or ())):
        inner = inner if family == "mixtral" else config.get("moe_intermediate_size")
        if is_joined:
            weights = {"gate_up_proj": (experts, _times(2, inner), hidden), "down_proj": (experts, hidden, inner)}
            return {"mlp.gate.weight": (experts, hidden)} | {f"mlp.experts.{name}": shape for name, shape in weights.items()}
        names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        place = "block_sparse_moe" if family == "mixtral" else "mlp"
        own = dict(zip(names, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True))
        numbers = range(experts or 0)
        each = {f"{place}.experts.{i}.{name}.weight": shape for i in numbers for name, shape in own.items()}
        return {f"{place}.gate.weight": (experts, hidden), **each}
    if family == "phi3":
        return {"mlp.gate_up_proj.weight": (_times(2, inner), hidden), "mlp.down_proj.weight": (hidden, inner)}
    return {f"mlp.{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")} | {
        "mlp.down_proj.weight": (hidden, inner)
    }
