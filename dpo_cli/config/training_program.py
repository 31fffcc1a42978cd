"""The settings of a Python program or a notebook: the plain values in the calls that set up a training. Nothing is run."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from dpo_cli.config.tools import Tool, tools
from dpo_cli.errors import invalid

# Calls whose keywords are settings: the end of the name, and the key of the first value without a name.
CALLS = {
    "from_pretrained": "model_name", "get_peft_model": "", "LoraConfig": "", "BitsAndBytesConfig": "",
    "load_dataset": "dataset",
    "TrainingArguments": "output_dir", "DPOConfig": "output_dir", "KTOConfig": "output_dir", "SFTConfig": "output_dir",
    "RewardConfig": "output_dir", "ORPOConfig": "output_dir", "CPOConfig": "output_dir", "GRPOConfig": "output_dir",
    "DPOTrainer": "", "KTOTrainer": "", "SFTTrainer": "", "RewardTrainer": "", "ORPOTrainer": "", "CPOTrainer": "",
    "GRPOTrainer": "",
}  # fmt: skip
# Objects of the program, not settings.
OBJECTS = {
    "model", "args", "tokenizer", "processing_class", "train_dataset", "eval_dataset", "peft_config", "data_collator",
    "callbacks",
    "quantization_config", "config", "compute_metrics", "optimizers", "reward_funcs",
}  # fmt: skip
NOT_A_MODEL = re.compile(r"Tokenizer|Processor|Config|Peft|GenerationConfig")


def read(text: str, file: Path) -> tuple[dict[str, object], dict[str, str], Tool]:
    """The settings, those that the program computes, and the tool.

    `InvalidInput` if the file is not Python, or no notebook.
    """
    values: dict[str, object] = {}
    unread: dict[str, str] = {}
    constants: dict[str, object] = {}
    seen: set[str] = set()
    methods: list[str] = []
    is_of_unsloth = False
    for name, tree in _trees(text, file, unread):
        constants |= _constants(tree)
        for call, owner, kind in _calls(tree):
            seen.add(kind)
            is_of_unsloth |= owner in ("FastLanguageModel", "FastModel")
            if kind.endswith("Trainer"):
                methods.append(kind.removesuffix("Trainer").lower())
            if kind != "from_pretrained" or not NOT_A_MODEL.search(owner):
                _take(call, kind, constants, values, unread, name)
    if not values:
        return {}, unread, tools()["TRL"]
    if len(set(methods)) > 1:
        fix = "keep one trainer and its settings in a copy of the file, and import that"
        raise invalid(
            "import-nothing", f"{len(set(methods))} methods are in this file: {', '.join(methods)}", fix, file=str(file)
        )
    if methods:
        values = {"strategy": methods[-1], **values}
    tool = tools()["Unsloth" if is_of_unsloth else "TRL"]
    if "TrainingArguments" in seen:  # its default is another one than that of DPOConfig
        tool = replace(tool, defaults={**tool.defaults, "learning_rate": 5e-5}, source=f"{tool.source}; TrainingArguments")
    if seen & {"get_peft_model", "LoraConfig"}:
        tool = replace(tool, adapter_key="")
    return values, unread, tool


def _trees(text: str, file: Path, unread: dict[str, str]) -> Iterator[tuple[str, ast.Module]]:
    """The program, or each code cell of a notebook; cells that are not plain Python are named in `unread`."""
    if file.suffix.lower() == ".py":
        try:
            yield file.name, ast.parse(text)
        except SyntaxError as error:
            raise invalid(
                "import-unreadable", f"not Python: {error.msg}", "correct this line", None, str(file), error.lineno
            ) from None
        return
    try:
        cells = json.loads(text)["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError):
        raise invalid("import-unreadable", "this is not a Jupyter notebook", "name a .ipynb file", file=str(file)) from None
    for number, source in enumerate(sources, 1):
        if source.lstrip().startswith("%%"):
            continue  # a cell of another language, such as %%capture
        plain = "\n".join("pass" if re.match(r"[ \t]*[!%]", line) else line for line in source.split("\n"))
        plain = re.sub(r"(?m)^([ \t]+)[!%].*$", r"\1pass", plain)
        try:
            yield f"cell {number}", ast.parse(plain)
        except SyntaxError:
            unread[f"cell {number}"] = "it is not plain Python"


def _constants(tree: ast.Module) -> dict[str, object]:
    """Names that have one plain value, and are bound once: of another the value depends on where it is read."""
    found: dict[str, object] = {}
    bound = Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            if bound[node.targets[0].id] > 1:
                continue
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except (ValueError, TypeError):
                continue
    return found


def _calls(tree: ast.Module) -> Iterator[tuple[ast.Call, str, str]]:
    """The calls that set up a training: each with what it is called on, and its name.

    Those of the trainer come first: its max_length cuts rows, and max_seq_length of from_pretrained is that of the model.
    """
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = []
    for call in sorted(found, key=lambda node: (node.lineno, node.col_offset)):
        kind = (
            call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""
        )
        owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        if kind in CALLS:
            named.append((call, owner, kind))
    yield from sorted(named, key=lambda part: part[2] in ("from_pretrained", "get_peft_model"))


def _take(
    call: ast.Call, kind: str, constants: Mapping[str, object], values: dict[str, object], unread: dict[str, str], where: str
) -> None:
    """Add the settings of one call; the first value of a key stays, and the first dataset."""
    given = [(keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg]
    if CALLS[kind] and call.args:
        given.insert(0, (CALLS[kind], call.args[0]))
    found: dict[str, object] = {}
    for key, node in given:
        if key in OBJECTS and isinstance(node, ast.Call | ast.Name | ast.Attribute | ast.Subscript):
            continue
        try:
            value = constants[node.id] if isinstance(node, ast.Name) and node.id in constants else ast.literal_eval(node)
            found[key] = json.loads(json.dumps(value, allow_nan=False))
        except (ValueError, TypeError):  # computed, or a set, bytes or infinity
            unread.setdefault(key, f"the program computes its value ({where}, line {node.lineno}): {ast.unparse(node)[:60]}")
    if kind == "load_dataset":
        parts = {"path" if key == "dataset" else key: value for key, value in found.items()}
        if "path" in parts and values.setdefault("datasets", [parts]) != [parts]:
            unread[f"load_dataset({json.dumps(parts['path'])})"] = "one dataset is taken, the first"
        return
    for key, value in found.items():
        if values.get(key) is None:
            values[key] = value
            unread.pop(key, None)
