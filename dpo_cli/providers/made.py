"""Models that are made once and kept in the cache: of a GGUF file, and of an adapter merged into what it stands on."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf as gguf_library
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_cli.errors import RunFailed
from dpo_cli.hardware import gguf
from dpo_cli.providers.accounting import all_tensors, require_finite
from dpo_cli.providers.base import CACHE_FIX, cache_dir
from dpo_cli.runs.digests import sha256
from dpo_cli.runs.durable import is_full, writing


def dequantised(path: Path) -> Path:
    """The GGUF file as a float32 model directory with safetensors, made once per content and transformers version."""
    try:
        return made_once("gguf", sha256(path), lambda work: _convert(path, work))
    except ValueError as error:
        raise RunFailed(f"{path} cannot be dequantised: {error}", "download it again") from error


def made_once(kind: str, content: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, kept under a hash of all that decides its `content` and the transformers version."""
    digest = hashlib.sha256(content.encode()).hexdigest()[:32]
    target = cache_dir() / kind / f"{digest}-transformers-{transformers.__version__}"
    try:
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    except OSError as error:
        raise _unwritable(target.parent, error) from error
    try:
        with writing(work):
            make(work)
        work.rename(target)
    except OSError as error:
        if not target.is_dir():  # else another process finished first, and its copy serves
            if is_full(error) or str(error.filename).startswith(str(work)):
                raise _unwritable(target.parent, error) from error
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _unwritable(place: Path, error: OSError) -> RunFailed:
    """What a cache is told as that cannot be made or written, with the variable that moves it."""
    where = "XDG_CACHE_HOME" if os.environ.get("XDG_CACHE_HOME") else "the home folder, as XDG_CACHE_HOME is not set"
    return RunFailed(f"cannot write to the cache {place} (in {where}): {error.strerror or error}", CACHE_FIX)


def _convert(path: Path, target: Path) -> None:
    with _read_once(), tempfile.TemporaryDirectory() as alone:
        # What lies beside the file (a tokenizer, code for it) is not part of it.
        (Path(alone) / path.name).symlink_to(path.absolute())
        _dequantise(path, alone, target)


@contextmanager
def _read_once() -> Iterator[None]:
    """Within, the header of a GGUF file is read once. transformers 5.17 reads it four times, which takes seconds each time."""
    read = gguf_library.GGUFReader
    setattr(gguf_library, "GGUFReader", functools.cache(read))  # noqa: B010
    try:
        yield
    finally:
        setattr(gguf_library, "GGUFReader", read)  # noqa: B010


def _dequantise(path: Path, folder: str, target: Path) -> None:
    where: dict[str, Any] = {"pretrained_model_name_or_path": folder, "gguf_file": path.name}
    where |= {"trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers 5.17 guesses the special tokens of a GGUF (SmolLM2's EOS comes out as its BOS); the header knows them.
    header = gguf.read_header(path).metadata
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        token_id = header.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(target)
    with all_tensors(path.name):
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    require_finite(model, path.name, folder)
    # The weights are plain float32 now; with the GGUF quantisation config left in, save_pretrained refuses.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
