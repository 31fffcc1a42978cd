"""The state of an optimizer, a schedule and random generators: nested containers with tensors, as JSON and safetensors.

torch.save would write a pickle, and reading one may run code. Here only text and numbers are read, so any file is safe.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_cli.storage.jsonio import read_json


def save_state(place: Path, state: Any) -> None:
    """Write `state` to `place`.json, its tensors to `place`.safetensors; TypeError for an unknown kind of value."""
    tensors: dict[str, Tensor] = {}
    names: dict[Any, str] = {}  # of tensors by address: bitsandbytes has the same one in many places

    def written(value: Any) -> Any:
        if isinstance(value, Tensor):
            own = value.detach()
            name = names.setdefault((own.data_ptr(), own.shape, own.stride(), own.dtype, own.device), str(len(names)))
            tensors[name] = own.cpu().contiguous()
            return {"tensor": name}
        if isinstance(value, np.ndarray):
            return {"array": value.tolist(), "dtype": str(value.dtype)}
        if isinstance(value, dict):  # the keys need not be text
            return {"dict": [[written(key), written(part)] for key, part in value.items()]}
        if isinstance(value, tuple | list):
            return {"tuple" if isinstance(value, tuple) else "list": [written(part) for part in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a {type(value).__name__} in the state of a training")

    text = json.dumps(written(state))
    if tensors:
        save_file(tensors, place.with_suffix(".safetensors"))
    place.with_suffix(".json").write_text(text, encoding="utf-8")


def load_state(place: Path) -> Any:
    """The state that `save_state` wrote to `place`, with its tensors on the CPU."""
    file = place.with_suffix(".safetensors")
    tensors = load_file(file) if file.is_file() else {}

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kind, content = next(iter(value.items()))
        if kind == "tensor":
            return tensors[content]
        if kind == "array":
            return np.array(content, dtype=value["dtype"])
        if kind == "dict":
            return {read(key): read(part) for key, part in content}
        return {"tuple": tuple, "list": list}[kind](map(read, content))

    return read(read_json(place.with_suffix(".json")))


def random_state() -> dict[str, Any]:
    """The random generators of torch, on the CPU and on the GPU in use, and of Python and numpy, which libraries use."""
    uses_cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if uses_cuda else [],  # the other GPUs belong to other processes
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    for generator in state["cuda"][:1]:
        torch.cuda.set_rng_state(generator)
    for generator in state.get("mps", []):
        torch.mps.set_rng_state(generator)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Within, random draws leave no trace. torch's own `fork_rng` does not know the generator of Apple's GPUs."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
