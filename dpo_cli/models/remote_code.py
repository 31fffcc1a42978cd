"""Code inside the files of a model, a tokenizer or an adapter: reported, and never run. No torch.

transformers runs `auto_map` only for trusted code, and here none is trusted. So such a model loads only if transformers has
its classes itself.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from dpo_cli.errors import Problem

GENERIC = frozenset({"PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "PythonBackend"})
KNOWN_LIBRARIES = ("transformers", "peft")
FIX = "use a model that transformers supports itself: code of a model is never run, and no option changes that"


def problems(config: Mapping[str, object], tokenizer: Mapping[str, object], name: str) -> Iterator[Problem]:
    """Code that config.json and tokenizer_config.json ask for: an error if the model needs it, else a hint."""
    is_known = _has("auto_mappings.py", config.get("model_type"))
    unused = []
    if code := _named_code(config.get("auto_map")):
        if not is_known:
            message = f"{name} needs its own code ({code}): transformers has no model type {config.get('model_type')}"
            yield Problem("error", "model-code", message, FIX, "model_name")
        else:
            unused.append(code)
    if code := _named_code(tokenizer.get("auto_map")):
        made = str(tokenizer.get("tokenizer_class") or "")
        if not (_is_tokenizer(made) if made else is_known):
            message = f"the tokenizer of {name} needs its own code ({code}): transformers has no {made or 'class for it'}"
            yield Problem("error", "model-code", message, FIX, "model_name")
        else:
            unused.append(code)
    for key, value in _implementations(config):
        message = f"config.json of {name} names kernels from a repository ({key}: {value}), which are code"
        yield Problem("error", "model-code", message, f"remove {key} from config.json", "model_name")
    if unused:
        message = f"{name} includes code ({', '.join(unused)}), which is not run: transformers has these classes itself"
        yield Problem("hint", "model-code-unused", message, "no change is needed", "model_name")


def in_adapter(config: object) -> str | None:
    """The key of an adapter_config.json that makes PEFT import a module; None if there is none."""
    if not isinstance(config, Mapping):
        return None
    if config.get("megatron_config"):
        return f"megatron_core {config.get('megatron_core')}"
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, Mapping) else mapping
    if library and str(library).partition(".")[0] not in KNOWN_LIBRARIES:
        return f"parent_library {library}"
    return None


def unsafe_shards(index: Mapping[str, object]) -> list[str]:
    """Weight files that an index names and that are not safetensors in its folder."""
    places = index.get("weight_map")
    files = {str(file) for file in places.values()} if isinstance(places, Mapping) else set()
    return sorted(file for file in files if not file.endswith(".safetensors") or Path(file).name != file)


def is_causal(model_type: object) -> bool:
    """Whether transformers has a causal language model of this type; True if the type is not a string."""
    return _has_class("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", model_type)


def is_classifier(model_type: object) -> bool:
    """Whether transformers has a sequence classifier of this type; True if the type is not a string."""
    return _has_class("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", model_type)


def _has_class(name: str, model_type: object) -> bool:
    if not isinstance(model_type, str):
        return True
    block = re.search(rf"^{name} = OrderedDict\($.*?^\)$", _table("modeling_auto.py"), re.MULTILINE | re.DOTALL)
    return block is None or f'("{model_type}", ' in block[0]  # True if the table is not found


def _named_code(auto_map: object) -> str:
    """The modules that an auto_map names, as text; it is an object, or a list of a slow and a fast class."""
    classes = auto_map.values() if isinstance(auto_map, Mapping) else auto_map if isinstance(auto_map, list) else ()
    flat = [one for made in classes for one in (made if isinstance(made, list) else [made])]
    return ", ".join(sorted({f"{str(one).rpartition('.')[0] or one}.py" for one in flat if one}))


def _implementations(config: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Kernels that the config names in a repository: transformers fetches and runs names like owner/name."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _implementations(value) if not key.endswith("_implementation") else ((key, str(value)),)
        elif key.endswith("_implementation") and "/" in str(value):
            yield key, str(value)


def _is_tokenizer(name: str) -> bool:
    return name in GENERIC or any(_has("tokenization_auto.py", made) for made in (name, name.removesuffix("Fast")))


def _has(file: str, name: object) -> bool:
    """Whether a table of transformers has this name; the package is read, not imported."""
    return isinstance(name, str) and re.search(rf'"{re.escape(name)}"', _table(file)) is not None


@functools.cache
def _table(file: str) -> str:
    found = find_spec("transformers")
    assert found is not None and found.origin is not None  # a requirement of this package
    return (Path(found.origin).parent / "models" / "auto" / file).read_text(encoding="utf-8")
