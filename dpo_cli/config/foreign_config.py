"""A file of another tool as plain settings: a config, the command line of a script, or the calls of a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dpo_cli.config import documents
from dpo_cli.config.schema import same
from dpo_cli.config.tools import Tool, tool_of
from dpo_cli.errors import InvalidInput, Problem, invalid

CONFIGS = (".json", ".jsonc", *documents.SUFFIXES)
# Parts of a config whose keys belong to the config itself.
SECTIONS = (
    "data", "model", "method", "output", "train", "eval", "training", "training_args", "training_arguments",
    "hyperparameters", "args", "config", "trainer", "dpo", "dpo_config", "lora", "peft", "lora_config", "peft_config",
    "quantization", "quantization_config", "bnb_config",
)  # fmt: skip


@dataclass(frozen=True)
class Foreign:
    """The settings of a file, the tool that it is of, and what of the file could not be read, with the reason."""

    file: Path
    values: Mapping[str, object]
    tool: Tool | None
    unread: Mapping[str, str] = field(default_factory=dict)


def read(path: Path) -> Foreign:
    """The settings of the file.

    `InvalidInput` if it cannot be read, or has no settings.
    """
    suffix = path.suffix.lower()
    if suffix in (".py", ".ipynb"):
        from dpo_cli.config import training_program

        values, unread, name = training_program.read(text_of(path), path)
        found = Foreign(path, values, name, unread)
    elif suffix in CONFIGS:
        values = read_config(path)
        found = Foreign(path, values, tool_of(values))
    else:
        from dpo_cli.config import training_command

        values, unread, tool = training_command.read(text_of(path), path)
        found = Foreign(path, values, tool, unread)
    if not found.values:
        raise invalid("import-nothing", "no setting of a training is in this file", "name the config itself", file=str(path))
    return found


def read_config(path: Path) -> dict[str, object]:
    """The keys and values of a YAML, TOML or JSON config; those of its sections are its own.

    `InvalidInput` with the problems of the file.
    """
    document = documents.parse(text_of(path), str(path))
    if document.problems:
        raise InvalidInput(document.problems)
    if not isinstance(document.value, dict):
        problem = Problem("error", "config-type", "a config is keys and values", "name a config", None, str(path), 1, 1)
        raise InvalidInput([problem])
    return _flat(document.value, path)


def text_of(path: Path) -> str:
    """The text of a file; `InvalidInput` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise invalid("config-unreadable", "file not found", "check the path", file=str(path)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise invalid("config-unreadable", f"cannot be read: {reason}", "name a readable text file", file=str(path)) from error


def _flat(values: Mapping[str, object], path: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in values.items():
        of_part = _flat(value, path) if key in SECTIONS and isinstance(value, dict) else {key: value}
        for name, part in of_part.items():
            if name in found and not same(found[name], part):
                raise invalid("duplicate-key", f'two sections set "{name}"', "keep one of them", name, str(path))
            found[name] = part
    return found
