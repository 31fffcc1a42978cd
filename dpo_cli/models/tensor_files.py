"""The tensors of safetensors files by their headers: whether files are whole, and whether they are those of a model. No torch.

A file is eight bytes that give the size of its header, the header as JSON, and the bytes of the tensors
(github.com/safetensors/safetensors). What is said here is sure; what only the architecture itself can tell is checked when the
model is loaded (providers/loaded_tensors.py).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_cli.models.quantised_files import text_part
from dpo_cli.storage.jsonio import read_object_if_there
from dpo_cli.storage.run_directory import WEIGHTS

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_HEADER_BYTES = 1 << 27
LFS_POINTER = b"version https://git-lfs"
PULL = "run `git lfs pull` where it was cloned, or download it again"
WHOLE_NUMBERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")  # dtypes, as headers word them
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


class PointerError(ValueError):
    """A file that Git LFS left in the place of another."""


@dataclass(frozen=True)
class TensorHeader:
    """What the header of a file says of the tensors in it, by their names."""

    shapes: dict[str, Shape]
    dtypes: dict[str, str]  # as headers word them
    places: dict[str, tuple[int, int]]  # in the file: first byte, and the one after the last


def read_header(path: Path) -> TensorHeader:
    """The header of the file at `path`. Raises ValueError for a file that is damaged or cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == LFS_POINTER[:8] and LFS_POINTER in start + file.read(len(LFS_POINTER)):
            raise PointerError(f"{path.name} is a Git LFS pointer: the file itself was not fetched")
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
    begin = 8 + length
    ends = {name: begin + tensor["data_offsets"][1] for name, tensor in header.items()}
    end = max(ends.values(), default=begin)
    if end != size:
        beyond = some(sorted((name for name, place in ends.items() if place > size), key=lambda name: ends[name]))
        message = f"{path.name} has {size:,} bytes, and its header describes {end:,}"
        raise ValueError(f"{message}: it is cut off, and lacks {beyond}" if beyond else f"{message}: it is damaged")
    return TensorHeader(
        {name: tuple(tensor["shape"]) for name, tensor in header.items()},
        {name: str(tensor["dtype"]) for name, tensor in header.items()},
        {name: (begin + tensor["data_offsets"][0], ends[name]) for name, tensor in header.items()},
    )


@dataclass(frozen=True)
class TensorFiles:
    """The files of weights in a folder. Each header, and the index, is read once, and not before it is asked for."""

    folder: Path
    _headers: dict[str, TensorHeader] = field(default_factory=dict, repr=False, compare=False)

    def header(self, file: str) -> TensorHeader:
        """Raises ValueError for a file that is damaged or cut off, OSError for one that is not there."""
        if file not in self._headers:
            self._headers[file] = read_header(self.folder / file)
        return self._headers[file]

    def bytes_of(self, file: str, name: str) -> bytes:
        """The bytes of a tensor in a file."""
        first, end = self.header(file).places[name]
        with (self.folder / file).open("rb") as held:
            held.seek(first)
            return held.read(end - first)

    @property
    def is_single(self) -> bool:
        return (self.folder / SINGLE).is_file()

    @cached_property
    def index(self) -> Mapping[str, object]:
        """The index of several files; empty where there is none."""
        return read_object_if_there(self.folder / INDEX)

    @property
    def weight_map(self) -> dict[str, str]:
        """The file of each tensor, as the index has it."""
        places = self.index["weight_map"]
        if not isinstance(places, dict):
            raise ValueError(f"the weight_map of {INDEX} is not an object")
        return places

    @property
    def has_index(self) -> bool:
        return (self.folder / INDEX).is_file()

    @property
    def files(self) -> list[str]:
        """The names of the files that hold the model, as transformers reads it; empty where there are none of its names."""
        if self.is_single:
            return [SINGLE]
        return sorted(set(self.weight_map.values())) if self.has_index else []

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of all tensors of the model. Raises ValueError or OSError for files that are not whole."""
        return {name: shape for file in self.files for name, shape in self.header(file).shapes.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: dtype for file in self.files for name, dtype in self.header(file).dtypes.items()}


def faults(files: TensorFiles, config: Mapping[str, object]) -> Iterator[Fault]:
    """What is wrong with the files of a model, whose config.json is `config`."""
    folder, again = files.folder, "download it again, or copy it whole"
    try:
        if files.has_index and not files.is_single:
            yield from _index_faults(files, again)
        stored = files.shapes
    except FileNotFoundError as error:
        yield Fault(f"{folder} has no {Path(error.filename).name}, which its {INDEX} names", again)
        return
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield Fault(f"{folder}: {error}", PULL if isinstance(error, PointerError) else again)
        return
    quantised = config.get("quantization_config") or text_part(config).get("quantization_config")
    if fault := _unequal_twice(files, again) or _dtype_fault(files, quantised):
        yield fault
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


def _unequal_twice(files: TensorFiles, again: str) -> Fault | None:
    """A tensor that two of the files hold with different bytes, of which transformers takes either without a word."""
    holders: dict[str, str] = {}
    for file in files.files:
        for name in files.header(file).shapes:
            other = holders.setdefault(name, file)
            if other == file:
                continue
            headers = files.header(other), files.header(file)
            is_alike = headers[0].shapes[name] == headers[1].shapes[name] and headers[0].dtypes[name] == headers[1].dtypes[name]
            if not is_alike or files.bytes_of(other, name) != files.bytes_of(file, name):
                return Fault(f"{other} and {file} in {files.folder} both hold {name}, with other values", again)
    return None


def _dtype_fault(files: TensorFiles, quantised: object) -> Fault | None:
    """Weights of whole numbers without what says how large their steps are."""
    folder, dtypes = files.folder, files.dtypes
    whole = whole_numbers(dtypes)
    if not quantised:
        if not whole:
            return None
        message = f"{folder} holds {count(whole)} as whole numbers ({dtypes[whole[0]]}): they were quantised, and"
        fix = "name the model that it was quantised from, or copy the config.json that was saved with these files"
        return Fault(f"{message} its config.json has no quantization_config", fix)
    if not isinstance(quantised, Mapping) or quantised.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return None
    is_4bit = bool(quantised.get("load_in_4bit") or quantised.get("_load_in_4bit"))
    parts: tuple[str, ...] = (".absmax", ".quant_map", ".quant_state.bitsandbytes__") if is_4bit else ("SCB",)
    if is_4bit and quantised.get("bnb_4bit_use_double_quant"):
        parts += (".nested_absmax", ".nested_quant_map")
    for name in whole:
        stem = name if is_4bit else name.removesuffix("weight")
        if lost := [stem + part for part in parts if not any(held.startswith(stem + part) for held in dtypes)]:
            message = f"{folder} holds the quantised {name} and lacks {some(lost)}, by which it is read"
            return Fault(message, "download it again, or copy it whole")
    return None


def whole_numbers(dtypes: Mapping[str, str]) -> list[str]:
    """The weights among tensors that are whole numbers, by their dtypes; masks and positions have other names."""
    return [
        name
        for name, dtype in dtypes.items()
        if dtype in WHOLE_NUMBERS and (name.endswith(".weight") or ".experts." in name or ".lora_" in name)
    ]


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


def adapter_faults(
    files: TensorFiles, config: Mapping[str, object], base: Mapping[str, Shape], is_dense: bool
) -> Iterator[Fault]:
    """What is wrong with the weights of an adapter, whose adapter_config.json is `config`, on a model whose files hold `base`.

    With `is_dense`, a layer has the same name in these files and in the adapter's.
    """
    folder = files.folder
    try:
        header = files.header(WEIGHTS)
    except ValueError as error:
        yield Fault(f"{folder}: {error}", PULL if isinstance(error, PointerError) else AGAIN)
        return
    own = header.shapes
    if fault := lora_fault(own, header.dtypes, config):
        yield Fault(f"the adapter in {folder} {fault.message}", fault.fix)
        return
    if difference := resized(own, base):
        yield Fault(f"the adapter in {folder} {difference}", RESIZED_FIX)
        return
    if gap := expert_gap(own):
        yield Fault(f"the adapter in {folder} {gap}", AGAIN)
    rows = max((shape[0] for shape in base.values() if len(shape) == 2), default=0)  # a table, which PEFT may save, has most
    of_layers = [name for name in of_base(own, names_in(config.get("modules_to_save"))) if own[name][:1] != (rows,)]
    if of_layers:
        message = f"the adapter in {folder} holds {count(of_layers)} of its base itself, which would replace the model's"
        yield Fault(message, "remove these from the file, or merge it with PEFT into its base, and name the merged model")
    layers = {name.removeprefix("model.").removesuffix(".weight") for name in base} | {"lm_head"}  # which may be tied
    unknown = [name for name in own if ".lora_" in name and _layer_of(name).removeprefix("model.") not in layers]
    if is_dense and unknown:
        fix = "name the model that it was made on, or rename its tensors"
        yield Fault(f"the adapter in {folder} holds {count(unknown)} for layers that its base model does not have", fix)


def lora_fault(own: Mapping[str, Shape], dtypes: Mapping[str, str], config: Mapping[str, object]) -> Fault | None:
    """What of an adapter's own tensors is missing, or is not as its adapter_config.json says, in words after "the adapter"."""
    if whole := whole_numbers(dtypes):
        message = f"holds {count(whole)} as whole numbers ({dtypes[whole[0]]}), and an adapter is of numbers with fractions"
        return Fault(message, AGAIN)
    half = re.compile(r"\.lora_(embedding_)?(A|B)(?=\.|$)")
    other = {"A": "B", "B": "A"}
    halves = [half.sub(lambda part: f".lora_{part[1] or ''}{other[part[2]]}", name) for name in own if half.search(name)]
    if lost := [name for name in halves if name not in own and not name.endswith(".lora_A.bias")]:  # which only B has
        return Fault(f"lacks {count(lost)}, the other half of what it holds", AGAIN)
    if difference := _other_config(own, config):
        return Fault(f"{difference}: they are of two adapters", "copy adapter_config.json and weights from one adapter")
    return None


def _other_config(own: Mapping[str, Shape], config: Mapping[str, Any]) -> str:
    """What the tensors of an adapter, and its adapter_config.json, say otherwise; empty where there is nothing.

    Experts are left to the loading: PEFT names and sizes them otherwise in its files than in the model.
    """
    names = [name for name in own if ".lora_" in name and ".experts" not in name]
    says = "and its adapter_config.json has"
    ranks = {name: own[name][0] for name in names if ".lora_A." in name and len(own[name]) == 2}
    if not config.get("rank_pattern") and (other := [name for name, rank in ranks.items() if rank != config.get("r", 8)]):
        return f"has rank {ranks[other[0]]} in {count(other)}, {says} r {config.get('r', 8)}"
    targets, numbers = config.get("target_modules"), config.get("layers_to_transform")
    if isinstance(targets, list) and not config.get("target_parameters"):
        ends = tuple(f".{target}" for target in targets)
        if other := [name for name in names if not f".{_layer_of(name)}".endswith(ends)]:
            return f"holds {count(other)}, {says} target_modules {', '.join(map(str, targets))}"
    wanted = {numbers} if isinstance(numbers, int) else set(numbers or ())
    layers = {name: re.search(r"\.(\d+)\.", _layer_of(name)) for name in names}
    if wanted and (other := [name for name, layer in layers.items() if layer and int(layer[1]) not in wanted]):
        return f"holds {count(other)}, {says} layers_to_transform {numbers}"
    has_magnitudes = any(".lora_magnitude_vector" in name for name in names)
    if ranks and has_magnitudes != bool(config.get("use_dora")):
        has, value = ("holds", "false") if has_magnitudes else ("lacks", "true")
        return f"{has} the magnitudes of DoRA, {says} use_dora {value}"
    return ""


AGAIN = "copy it again, or save it again with PEFT"
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


def names_in(value: object) -> list[str]:
    """The names in a list of a JSON file; none where it is no list."""
    return [str(name) for name in value] if isinstance(value, list) else []


def count(names: Sequence[str]) -> str:
    """So many tensors, with the first names."""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({some(names)})"


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _index_faults(files: TensorFiles, again: str) -> Iterator[Fault]:
    folder, named = files.folder, files.weight_map
    held = set(named.values())
    shards = {file.name for file in folder.glob("model-*.safetensors") if SHARD.fullmatch(file.name)}
    if left := [shard for shard in sorted(shards - held) if _belongs(files, shard)]:
        tensors = list(files.header(left[0]).shapes)
        yield Fault(f"{INDEX} in {folder} leaves out {some(left)}, with {count(tensors)}: they would not be loaded", again)
    for file in files.files:
        own = files.header(file).shapes
        if lost := [name for name, place in named.items() if place == file and name not in own]:
            yield Fault(f"{file} in {folder} lacks {count(lost)}, which {INDEX} places there", again)


def _belongs(files: TensorFiles, shard: str) -> bool:
    """Whether a file that the index does not name is of its model, and not left over from a division into other files."""
    named = files.weight_map
    same_division = shard.partition("-of-")[2] in {file.partition("-of-")[2] for file in named.values()}
    return same_division or not files.header(shard).shapes.keys() <= named.keys()


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
