"""The layers that `target_modules` names, and those that PEFT does not support, by a config.json. No torch.

The tables of PEFT say what it supports. They are read from its source, without importing it.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from dpo_cli.config.options import Config
from dpo_cli.errors import Problem, Severity
from dpo_cli.models.shape import ModelFacts
from dpo_cli.models.source import ModelSource
from dpo_cli.models.tensor_files import TensorFiles

ALL_LINEAR = "all-linear"
KEY = "target_modules"
HEAD = "lm_head"
EMBEDDINGS = ("embed_tokens", HEAD)
GROUP = re.compile(r"\?(?:P<\w+>|[:=]|<=|[a-zA-Z-]+:)")  # the start of a group whose alternatives match names


def names(wanted: str | Sequence[str], name: str) -> bool:
    """Whether target_modules selects the layer with this whole name: by a full match, or by its last parts (PEFT 0.21)."""
    if isinstance(wanted, str):
        return wanted == ALL_LINEAR or re.fullmatch(wanted, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in wanted)


def idle_parts(wanted: str | Sequence[str], known: Iterable[str]) -> list[str]:
    """The entries of a list, or the alternatives of a pattern, that match none of the `known` names."""
    known = list(known)
    if not isinstance(wanted, str):
        return [entry for entry in wanted if not any(names([entry], name) for name in known)]
    parts = [] if wanted == ALL_LINEAR else _alternatives(wanted)
    return [word for word, pattern in parts if not any(re.fullmatch(pattern, name) for name in known)]


def _alternatives(pattern: str) -> list[tuple[str, str]]:
    """Each alternative of a regular expression, and the expression with only it: for `(q|v)_proj` and `[qv]_proj` q, and v."""
    found = []
    for start, end, pieces in _choices(pattern):
        for piece in pieces:
            alone = pattern[:start] + piece + pattern[end:]
            try:
                re.compile(alone)
            except re.error:  # a group with a reference to it: unknown what this alternative matches
                continue
            found.append((piece, alone))
    return found


def _choices(pattern: str) -> Iterator[tuple[int, int, list[str]]]:
    """(start, end, alternatives) of each choice in a regular expression."""
    open_groups: list[tuple[int, list[int], bool]] = [(0, [], True)]
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif char == "[":
            end = pattern.index("]", at + 2)
            letters = pattern[at + 1 : end]
            if len(letters) > 1 and letters.isalnum():
                yield at, end + 1, list(letters)
            at = end
        elif char == "(":
            head = GROUP.match(pattern, at + 1)
            start = head.end() if head else at + 1
            stands_there = head is not None or pattern[at + 1] != "?"  # else it is a negative lookahead or similar
            open_groups.append((start, [], stands_there))
        elif char == "|":
            open_groups[-1][1].append(at)
        elif char == ")":
            yield from _divided(pattern, open_groups.pop(), at)
        at += 1
    yield from _divided(pattern, open_groups.pop(), len(pattern))


def _divided(pattern: str, group: tuple[int, list[int], bool], end: int) -> Iterator[tuple[int, int, list[str]]]:
    start, bars, counts = group
    if bars and counts:
        edges = [start - 1, *bars, end]
        yield start, end, [pattern[left + 1 : right] for left, right in pairwise(edges)]


def expert_names(model_type: str | None) -> dict[str, str]:
    """PEFT's names for weights of fused experts and of their router in such a model, with these weights.

    Empty if PEFT has none. transformers keeps the experts of a layer in one tensor, without linear layers.
    """
    patterns = _table("transformers", "conversion_mapping.py", "_MODEL_TO_CONVERSION_PATTERN")
    patterns = patterns | _table("peft", "utils/transformers_weight_conversion.py", "_MODEL_TO_CONVERSION_PATTERN")
    mapping = _table("peft", "utils/transformers_weight_conversion.py", "_MOE_TARGET_MODULE_MAPPING")
    found = mapping.get(str(patterns.get(model_type or "", "")))
    return found if isinstance(found, dict) else {}


def fused_names(experts: Mapping[str, str]) -> list[list[str]]:
    """Names that PEFT supports only together, because one tensor holds both."""
    return [group for weight in set(experts.values()) if len(group := [old for old in experts if experts[old] == weight]) > 1]


def refused_names(model_type: str | None) -> set[str]:
    """Names of layers that PEFT rejects in such a model: its kernels read their weights directly."""
    place = ("peft", "tuners/tuners_utils.py")
    if model_type not in _table(*place, "mamba_model_types"):
        return set()
    return set(_table(*place, "incompatible_modules"))


def problems(config: Config, source: ModelSource, label: str) -> Iterator[Problem]:
    """Problems of the targets of a fresh adapter, by the model's config.json and the names of its tensors."""
    model_type = source.files.config.get("model_type")
    family = model_type if isinstance(model_type, str) else None
    wanted = config.target_modules
    named = [wanted] if isinstance(wanted, str) else wanted
    last = {name.rpartition(".")[2] for name in named}
    if refused := sorted(last & refused_names(family)):
        yield state_space(label, refused)
    experts = expert_names(family)
    if isinstance(wanted, str):
        touches = wanted == ALL_LINEAR or any(names(wanted, f"model.layers.0.mlp.experts.{name}") for name in experts)
    else:
        touches = bool(last & experts.keys())
        for group in fused_names(experts):
            if 0 < len(last & set(group)) < len(group):
                yield half_fused(label, group)
    if experts and touches:
        yield from (on_experts(label, key) for key in ("lora_dropout", "use_dora") if getattr(config, key))
    if (facts := source.facts) is not None and wanted != ALL_LINEAR:
        yield from _unknown_names(wanted, label, facts, source.files.tensors)


def _unknown_names(wanted: str | list[str], label: str, facts: ModelFacts, weights: TensorFiles) -> Iterator[Problem]:
    """Names that no linear layer has: an error if the model's tensors are known, else a warning."""
    by_facts = facts.linear_names()
    whole = [name for all_names in by_facts.values() for name in all_names]
    stored = {name.removesuffix(".weight"): shape for name, shape in weights.shapes.items() if name.endswith(".weight")}
    is_known = bool(stored) and stored.keys() >= set(whole)  # its tensors have the names of the loaded model
    # PEFT also supports the embedding if it is named; the head is rejected elsewhere.
    linear = {name for name, shape in stored.items() if len(shape) == 2 and not name.endswith(HEAD)} | set(whole)
    severity: Severity = "error" if is_known else "warning"
    fix = f"its layers are {', '.join(by_facts)}, with whole names like {by_facts['o_proj'][0]}"
    modules = {".".join(name.split(".")[: depth + 1]) for name in stored for depth in range(name.count(".") + 1)}
    idle = [part for part in idle_parts(wanted, linear) if isinstance(wanted, str) or part not in EMBEDDINGS]
    if isinstance(wanted, str) and not any(names(wanted, name) for name in linear | modules):
        idle = [wanted]
    if is_known and isinstance(wanted, str) and (other := sorted(name for name in modules - linear if names(wanted, name))):
        yield not_linear(label, [(name, "") for name in other], fix)
    elif idle and (not isinstance(wanted, str) or idle == [wanted]):
        yield Problem(severity, "no-such-layer", f"{label} has no linear layer named {', '.join(sorted(idle))}", fix, KEY)
    elif idle:
        yield Problem("warning", "no-such-layer", half_idle(label, idle), fix, KEY)


def head_adapter(name: str) -> Problem:
    message = f"an adapter on {name} would not be trained: the log-probs use its weight directly"
    return Problem("error", "lm-head-adapter", message, f"remove {name} from target_modules", KEY)


def half_idle(label: str, idle: Sequence[str]) -> str:
    return f"target_modules names {', '.join(idle)}, but this part of the pattern matches no linear layer of {label}"


def state_space(label: str, refused: Sequence[str]) -> Problem:
    what = ", ".join(refused)
    message = (
        f"an adapter on {what} of {label} would have no effect: the kernels of state-space blocks read these weights directly"
    )
    fix = f'remove it from target_modules, or write "target_modules": "{ALL_LINEAR}", which does not include it'
    return Problem("error", "state-space-target", message, fix, KEY)


def half_fused(label: str, group: Sequence[str]) -> Problem:
    message = f"the experts of {label} hold {' and '.join(group)} in one tensor, but target_modules does not name all of them"
    return Problem("error", "fused-target", message, f"name all of {' and '.join(group)}, or none", KEY)


def on_experts(label: str, key: str) -> Problem:
    what = {"lora_dropout": "dropout on the adapter's input", "use_dora": "DoRA"}[key]
    message = f"{key} does not work here: PEFT has no {what} for the fused experts of {label}, a mixture of experts"
    value = {"lora_dropout": "0", "use_dora": "false"}[key]
    fix = f'write "{key}": {value}, or name only attention layers in target_modules'
    return Problem("error", "adapter-on-experts", message, fix, key)


def not_linear(label: str, matched: Sequence[tuple[str, str]], fix: str) -> Problem:
    """The problem of modules that are not linear, with their classes if known."""
    first = ", ".join(f"{name} ({kind})" if kind else name for name, kind in matched[:3])
    more = f" and {len(matched) - 3} others" if len(matched) > 3 else ""
    message = f"target_modules matches {first}{more} of {label}, which are not linear layers"
    return Problem("error", "target-not-linear", message, fix, KEY)


@functools.cache
def _table(package: str, file: str, name: str) -> dict[str, object]:
    """The dict that is assigned to `name` in a file of an installed package, with later entries; a set becomes keys. Empty if
    another version has no such table: then only PEFT itself knows.
    """
    found = find_spec(package)
    assert found is not None and found.origin is not None  # a requirement of this package
    path = Path(found.origin).parent / file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    block = re.search(rf"^( *){name}\b[^=\n]* = (\{{[^\n]*\}}$|\{{$.*?^\1\}}$)", text, re.MULTILINE | re.DOTALL)
    literal = ast.literal_eval(block[2]) if block else {}
    entries = literal if isinstance(literal, dict) else dict.fromkeys(literal)
    return entries | dict(re.findall(rf'^{name}\["(\w+)"\] = "(\w+)"$', text, re.MULTILINE))
