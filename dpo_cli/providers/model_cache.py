"""Models that are made once and kept in the cache: from a GGUF file, and from an adapter merged into its base."""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gguf as gguf_library
import torch
import transformers
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, modeling_gguf_pytorch_utils
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dpo_cli.errors import RunFailed
from dpo_cli.models.gguf_header import Header
from dpo_cli.models.model_files import ModelFiles
from dpo_cli.providers.loaded_tensors import all_tensors, refuse, require_finite
from dpo_cli.storage.atomic import is_full, writing
from dpo_cli.storage.digests import sha256
from dpo_cli.storage.progress import working
from dpo_cli.storage.user_cache import CACHE_FIX, SOURCE, cache_dir, filling

MAKING = {"gguf": "dequantising", "merged": "merging"}  # by the kind of model
CONVERSION = 2  # of a GGUF file: increased when the conversion of a file changes
ROPE_FACTORS = "rope_freqs.weight"  # each frequency of the positions is divided by them
READ_BY_TRANSFORMERS = "gpt-oss"  # the only architecture with rope.scaling support
FIRST_FIX = (
    "call `dpo train CONFIG --dry-run` on this machine first, or let XDG_CACHE_HOME name a folder that all machines share"
)
MADE_FROM = "name the model that the file was made from"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def dequantised(file: ModelFiles) -> Path:
    """A GGUF file as a float32 model directory with safetensors, made once per content and transformers version."""
    path = file.path
    try:
        if (header := file.gguf) is None:
            raise ValueError("it does not start with GGUF")
        return made_once("gguf", str(path), f"{CONVERSION} {sha256(path)}", lambda work: _convert(path, header, work))
    except ValueError as error:
        raise RunFailed(f"{path} cannot be dequantised: {error}", "download it again") from error


def made_once(kind: str, source: str, content: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, kept under a hash of `content` and the transformers version; `source` is for people."""
    digest = hashlib.sha256(content.encode()).hexdigest()[:32]
    target = cache_dir() / kind / f"{digest}-transformers-{transformers.__version__}"
    try:
        if target.is_dir():
            with suppress(OSError):  # a cache that can only be read
                os.utime(target)  # the last use, for `dpo cache`
            return target
        with filling(target) as work, working(f"{MAKING[kind]} {source}"), writing(work):
            make(work)
            if not any(work.glob("*.safetensors")):  # transformers writes no weights in a process that is not the first one
                raise RunFailed(f"this process does not write {source} into the cache of its machine", FIRST_FIX)
            (work / SOURCE).write_text(source, encoding="utf-8")
    except OSError as error:
        if is_full(error) or _is_in_cache(str(error.filename), target.parent):
            raise _unwritable(target.parent, error) from error
        raise
    return target


def _is_in_cache(name: str, folder: Path) -> bool:
    """Whether a file is in a folder of the cache, or is a folder above that one which cannot be made."""
    return name.startswith(str(folder)) or str(folder).startswith(name)


def _unwritable(place: Path, error: OSError) -> RunFailed:
    """The error for a cache that cannot be created or written, with the variable that moves it."""
    where = "XDG_CACHE_HOME" if os.environ.get("XDG_CACHE_HOME") else "the home folder, as XDG_CACHE_HOME is not set"
    return RunFailed(f"cannot write to the cache {place} (in {where}): {error.strerror or error}", CACHE_FIX)


def _convert(path: Path, header: Header, target: Path) -> None:
    with _read_once(), tempfile.TemporaryDirectory() as alone:
        # Other files in the folder (a tokenizer, code) are not part of the model.
        (Path(alone) / path.name).symlink_to(path.absolute())
        _dequantise(path, header, alone, target)


@contextmanager
def _read_once() -> Iterator[None]:
    """Within, the header of a GGUF file is read once. transformers 5.17 reads it four times, which takes seconds each time."""
    read = gguf_library.GGUFReader
    setattr(gguf_library, "GGUFReader", functools.cache(read))  # noqa: B010
    try:
        yield
    finally:
        setattr(gguf_library, "GGUFReader", read)  # noqa: B010


def _dequantise(path: Path, header: Header, folder: str, target: Path) -> None:
    where: dict[str, Any] = {"pretrained_model_name_or_path": folder, "gguf_file": path.name}
    where |= {"trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers 5.17 guesses the special tokens of a GGUF (SmolLM2 gets its BOS as EOS); the header has them.
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        token_id = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(target)
    with all_tensors(path.name), _all_placed(path.name, header):
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    require_finite(model, path.name, Path(folder))
    _scale_positions(model.config, path, header)
    # The weights are plain float32 now; with the GGUF quantisation config left in, save_pretrained refuses.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)


@contextmanager
def _all_placed(name: str, header: Header) -> Iterator[None]:
    """Within, transformers loads all tensors of a GGUF file, or `InvalidInput` names those that it would ignore.

    `load_gguf_checkpoint` (transformers 5.17) ignores each one that has no place in `get_gguf_hf_weights_map`, also without its
    suffix, as for experts. Other architectures are loaded and checked as safetensors are.
    """
    before = modeling_gguf_pytorch_utils.get_gguf_hf_weights_map
    places: set[str] = set()

    def noting(*args: object, **options: object) -> dict[str, str]:
        found: dict[str, str] = before(*args, **options)
        places.update(found)
        return found

    modeling_gguf_pytorch_utils.get_gguf_hf_weights_map = noting
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.get_gguf_hf_weights_map = before
    if places:
        tensors = header.tensors - {ROPE_FACTORS}
        unplaced = [tensor for tensor in tensors if tensor not in places and tensor.rpartition(".")[0] not in places]
        refuse(name, (), unplaced, (), MADE_FROM, "model_name")


def _scale_positions(config: PretrainedConfig, path: Path, header: Header) -> None:
    """Write the position scaling of a GGUF file into `config`, which transformers does not read; `RunFailed` if unsupported."""
    family = header.metadata["general.architecture"]
    key = f"{family}.rope.scaling.type"
    scaling: Mapping[str, object] | None = None
    if (kind := header.metadata.get(key, "none")) != "none" and family != READ_BY_TRANSFORMERS:
        factor = header.metadata.get(f"{family}.rope.scaling.factor")
        if kind != "linear" or factor is None:
            raise RunFailed(f"{path.name} scales positions by {kind} ({key}), which is not supported", MADE_FROM)
        scaling = {"rope_type": "linear", "factor": factor}
    if ROPE_FACTORS in header.tensors:
        factors = next(tensor.data for tensor in GGUFReader(path).tensors if tensor.name == ROPE_FACTORS)
        if scaling is not None or (scaling := _scaling(config, torch.from_numpy(factors.copy()))) is None:
            raise RunFailed(
                f"{path.name} scales positions by factors ({ROPE_FACTORS}) that are not those of Llama 3", MADE_FROM
            )
    if scaling is not None:
        config.rope_parameters = {**config.rope_parameters, **scaling}


def _scaling(config: PretrainedConfig, factors: torch.Tensor) -> dict[str, object] | None:
    """The rope_parameters that divide the frequencies by these factors; None if none are known."""

    def frequencies(scaling: dict[str, object]) -> torch.Tensor:
        tried = copy.deepcopy(config)
        tried.rope_parameters = {**config.rope_parameters, **scaling}
        result: torch.Tensor = ROPE_INIT_FUNCTIONS[str(scaling["rope_type"])](tried, torch.device("cpu"))[0]
        return result

    largest = float(factors.max())
    plain = frequencies({"rope_type": "linear", "factor": 1.0})
    for scaling in ({"rope_type": "linear", "factor": largest}, {"rope_type": "llama3", "factor": largest, **LLAMA3}):
        ratio = plain / frequencies(scaling)
        if ratio.shape == factors.shape and torch.allclose(ratio, factors, rtol=1e-4):
            return scaling
    return None
