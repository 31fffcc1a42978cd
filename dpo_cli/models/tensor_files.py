"""The tensors of safetensors files by their headers: whether files are complete, and whether they fit a model. No torch.

A file is eight bytes that give the size of its header, the header as JSON, and the bytes of the tensors
(github.com/safetensors/safetensors). Faults reported here are certain; what depends on the architecture is checked when the
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
PULL = "run `git lfs pull` in its clone, or download it again"
WHOLE_NUMBERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")  # dtypes as headers name them
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
# Prefixes of tools that wrap a model: DataParallel, torch.compile, FSDP, PEFT, Lightning.
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.", "pretrained_model.")
# Families of decoders (model_type) with the same names of layers in their files.
DENSE = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "olmo3", "granite", "cohere"}
    | {"smollm3", "mixtral", "qwen3_moe"}
)
SHOWN = 3  # number of names in a message

Shape = tuple[int, ...]
Wanted = tuple[int | None, ...]  # None: unknown, a default of the model's class


@dataclass(frozen=True)
class Fault:
    """A fault of weight files, in words, and its fix."""

    message: str
    fix: str


class PointerError(ValueError):
    """A Git LFS pointer instead of a file."""


@dataclass(frozen=True)
class TensorHeader:
    """The header of a file: its tensors by name."""

    shapes: dict[str, Shape]
    dtypes: dict[str, str]  # as headers name them
    places: dict[str, tuple[int, int]]  # in the file: the first byte, and the byte after the last


def read_header(path: Path) -> TensorHeader:
    """The header of the file at `path`. Raises ValueError for a file that is damaged or cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == LFS_POINTER[:8] and LFS_POINTER in start + file.read(len(LFS_POINTER)):
            raise PointerError(f"{path.name} is a Git LFS pointer: the file itself was not downloaded")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(MOST_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{path.name} is cut off, or not a safetensors file: its header does not end within its {size:,} bytes"
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
        message = f"{path.name} has {size:,} bytes, but its header describes {end:,}"
        raise ValueError(f"{message}: it is cut off, and {beyond} is missing" if beyond else f"{message}: it is damaged")
    return TensorHeader(
        {name: tuple(tensor["shape"]) for name, tensor in header.items()},
        {name: str(tensor["dtype"]) for name, tensor in header.items()},
        {name: (begin + tensor["data_offsets"][0], ends[name]) for name, tensor in header.items()},
    )


@dataclass(frozen=True)
class TensorFiles:
    """The weight files of a folder. Each header, and the index, is read once, at its first use."""

    folder: Path
    _headers: dict[str, TensorHeader] = field(default_factory=dict, repr=False, compare=False)

    def header(self, file: str) -> TensorHeader:
        """Raises ValueError for a damaged or cut file, OSError for a missing one."""
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
        """The index of several files; empty without one."""
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
        """The names of the model's files, as transformers reads them; empty if there are none."""
        if self.is_single:
            return [SINGLE]
        return sorted(set(self.weight_map.values())) if self.has_index else []

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of all tensors of the model. Raises ValueError or OSError for damaged or missing files."""
        return {name: shape for file in self.files for name, shape in self.header(file).shapes.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: dtype for file in self.files for name, dtype in self.header(file).dtypes.items()}


def faults(files: TensorFiles, config: Mapping[str, object]) -> Iterator[Fault]:
    """The faults of the files of a model with the config.json `config`."""
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
    """A tensor that two files hold with different bytes; transformers silently uses one of them."""
    holders: dict[str, str] = {}
    for file in files.files:
        for name in files.header(file).shapes:
            other = holders.setdefault(name, file)
            if other == file:
                continue
            headers = files.header(other), files.header(file)
            is_alike = headers[0].shapes[name] == headers[1].shapes[name] and headers[0].dtypes[name] == headers[1].dtypes[name]
            if not is_alike or files.bytes_of(other, name) != files.bytes_of(file, name):
                return Fault(f"{other} and {file} in {files.folder} both hold {name}, with different values", again)
    return None


def _dtype_fault(files: TensorFiles, quantised: object) -> Fault | None:
    """Weights that are whole numbers without their quantisation scales."""
    folder, dtypes = files.folder, files.dtypes
    whole = whole_numbers(dtypes)
    if not quantised:
        if not whole:
            return None
        message = f"{folder} holds {count(whole)} as whole numbers ({dtypes[whole[0]]}): they were quantised, but"
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
            message = f"{folder} holds the quantised {name}, but lacks {some(lost)}, which is needed to read it"
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
    """Matrices of a decoder of `DENSE` that are missing or have another shape."""
    short = {
        name.removeprefix("model."): shape for name, shape in stored.items()
    }  # the names of a model that was saved without its head
    wanted = _decoder(config, short)
    absent = [name for name in wanted if name.removeprefix("model.") not in short]
    if absent:
        yield Fault(f"{folder} lacks {count(absent)}, required by config.json", again)
    other = [
        f"{name} {list(short[place])} instead of [{', '.join('?' if size is None else str(size) for size in shape)}]"
        for name, shape in wanted.items()
        if (place := name.removeprefix("model.")) in short and not _fits(short[place], shape)
    ]
    if other:
        yield Fault(f"tensors in {folder} have other shapes than config.json requires: {some(other)}", again)
    layers = {int(number[1]) for name in short if (number := re.match(r"layers\.(\d+)\.", name))}
    total = config.get("num_hidden_layers")
    if total is not None and (beyond := sorted(layer for layer in layers if layer >= total)):
        message = f"{folder} holds layer {beyond[0]}, but its config.json has num_hidden_layers {total}"
        yield Fault(message, "use config.json and weights of the same model")


def adapter_faults(
    files: TensorFiles, config: Mapping[str, object], base: Mapping[str, Shape], is_dense: bool
) -> Iterator[Fault]:
    """Faults of the weights of an adapter with adapter_config.json `config`, on a model with the tensors `base`.

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
    rows = max(
        (shape[0] for shape in base.values() if len(shape) == 2), default=0
    )  # an embedding, which PEFT may save, has most rows
    of_layers = [name for name in of_base(own, names_in(config.get("modules_to_save"))) if own[name][:1] != (rows,)]
    if of_layers:
        message = f"the adapter in {folder} holds {count(of_layers)} of its base, which would replace those of the model"
        yield Fault(message, "remove them from the file, or merge it into its base with PEFT, and name the merged model")
    layers = {name.removeprefix("model.").removesuffix(".weight") for name in base} | {"lm_head"}  # lm_head may be tied
    unknown = [name for name in own if ".lora_" in name and _layer_of(name).removeprefix("model.") not in layers]
    if is_dense and unknown:
        fix = "name the model that it was trained on, or rename its tensors"
        yield Fault(f"the adapter in {folder} holds {count(unknown)} for layers that its base model does not have", fix)


def lora_fault(own: Mapping[str, Shape], dtypes: Mapping[str, str], config: Mapping[str, object]) -> Fault | None:
    """A fault of an adapter's own tensors, or a difference from its adapter_config.json, in words after "the adapter"."""
    if whole := whole_numbers(dtypes):
        message = f"holds {count(whole)} as whole numbers ({dtypes[whole[0]]}), but an adapter needs floating-point numbers"
        return Fault(message, AGAIN)
    half = re.compile(r"\.lora_(embedding_)?(A|B)(?=\.|$)")
    other = {"A": "B", "B": "A"}
    halves = [half.sub(lambda part: f".lora_{part[1] or ''}{other[part[2]]}", name) for name in own if half.search(name)]
    if lost := [name for name in halves if name not in own and not name.endswith(".lora_A.bias")]:  # only B may have a bias
        return Fault(f"lacks {count(lost)}, the other half of its LoRA pairs", AGAIN)
    if difference := _other_config(own, config):
        return Fault(f"{difference}: they are from two adapters", "copy adapter_config.json and weights from the same adapter")
    return None


def _other_config(own: Mapping[str, Shape], config: Mapping[str, Any]) -> str:
    """A difference between the tensors of an adapter and its adapter_config.json, in words; empty if there is none.

    Experts are checked at loading: PEFT names and sizes them differently in files and in the model.
    """
    names = [name for name in own if ".lora_" in name and ".experts" not in name]
    says = "but its adapter_config.json has"
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
    """The embedding or head in an adapter with other rows than in its base, in words that follow "the adapter"; else None."""
    for name, shape in adapter.items():
        place = place_of(name)
        there = base.get(place)
        if ".lora_" not in name and there is not None and len(shape) == 2 and shape[1:] == there[1:] and shape != there:
            added = shape[0] - there[0]
            when = f"after {added} tokens were added" if added > 0 else f"on a model with {-added} fewer tokens"
            return f"was made {when}: its {place} has {shape[0]} rows, but the model's has {there[0]}"
    return None


def of_base(names: Iterable[str], modules_to_save: Iterable[str] | None) -> list[str]:
    """The tensors in an adapter's file that PEFT loads into the base: neither LoRA tensors nor modules_to_save."""
    whole = tuple(modules_to_save or ())
    kept = re.compile(r"\.(original_module|base_layer)\.")  # copies of the base next to trained weights
    return [
        name
        for name in names
        if ".lora_" not in name
        if kept.search(name) or not any(module.endswith(whole) for module in _modules_above(name))
    ]


def _modules_above(name: str) -> list[str]:
    """The whole names of the modules around a tensor. PEFT 0.21 matches `modules_to_save` with the end of these names."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def place_of(name: str) -> str:
    """The name in the base of a tensor of an adapter."""
    return re.sub(r"\.(modules_to_save|original_module|base_layer)(?=\.)", "", name).removeprefix("base_model.model.")


def _layer_of(name: str) -> str:
    """The layer of a LoRA tensor, by its name in the base."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def wrapper_of(names: Iterable[str]) -> str | None:
    """The prefix of a wrapper that every name has; None if there is none."""
    names = list(names)
    return next((wrapper for wrapper in WRAPPERS if names and all(name.startswith(wrapper) for name in names)), None)


def names_in(value: object) -> list[str]:
    """The names in a list of a JSON file; empty if it is not a list."""
    return [str(name) for name in value] if isinstance(value, list) else []


def count(names: Sequence[str]) -> str:
    """The number of tensors, with the first names."""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({some(names)})"


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _index_faults(files: TensorFiles, again: str) -> Iterator[Fault]:
    folder, named = files.folder, files.weight_map
    held = set(named.values())
    shards = {file.name for file in folder.glob("model-*.safetensors") if SHARD.fullmatch(file.name)}
    if left := [shard for shard in sorted(shards - held) if _belongs(files, shard)]:
        tensors = list(files.header(left[0]).shapes)
        yield Fault(f"{INDEX} in {folder} omits {some(left)}, with {count(tensors)}, which would not be loaded", again)
    for file in files.files:
        own = files.header(file).shapes
        if lost := [name for name, place in named.items() if place == file and name not in own]:
            yield Fault(f"{file} in {folder} lacks {count(lost)}, which {INDEX} places there", again)


def _belongs(files: TensorFiles, shard: str) -> bool:
    """Whether a file that the index does not name belongs to the model, and is not left over from an earlier save."""
    named = files.weight_map
    same_division = shard.partition("-of-")[2] in {file.partition("-of-")[2] for file in named.values()}
    return same_division or not files.header(shard).shapes.keys() <= named.keys()


def has_experts(stored: Iterable[str]) -> bool:
    """Whether the tensors are of a mixture of experts; transformers joins experts when it loads them."""
    return any(".experts." in name for name in stored)


def expert_gap(names: Iterable[str]) -> str | None:
    """An expert that is missing before a later one, in words that follow the name of the files.

    transformers and PEFT join experts in the order of their numbers, also with gaps.
    """
    for place, numbers in _experts(names).items():
        if gaps := set(range(max(numbers))) - numbers:
            there, gap = (place.replace("*", str(number)) for number in (max(numbers), min(gaps)))
            return f"holds {there} but lacks {gap}: the experts would be joined in the wrong order"
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
    """Names and shapes of the matrices of a decoder of `DENSE`, without norms, biases and other tensors.

    `short` are the names in its files without "model."; experts may be stored separately or joined.
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
