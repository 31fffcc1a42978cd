"""The command line of a training in a shell script as settings: --key value, and the config that it names."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath

from dpo_cli.config import foreign_config, yaml_document
from dpo_cli.config.schema import same
from dpo_cli.config.tools import Tool, tool_of, tools
from dpo_cli.errors import invalid

# The programs that train, the tool of each, and what their subcommands mean.
PROGRAMS = {
    "swift": "ms-swift",
    "megatron": "ms-swift",
    "llamafactory-cli": "LLaMA-Factory",
    "axolotl": "Axolotl",
    "trl": "TRL",
}
METHODS = ("dpo", "kto", "sft", "reward", "grpo", "rloo", "orpo", "cpo", "online-dpo", "ppo", "gkd")
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")


def read(text: str, file: Path) -> tuple[dict[str, object], dict[str, str], Tool | None]:
    """The settings of the only training command in a script, those that a shell computes, and the tool.

    `InvalidInput` if the script cannot be read, has no such command, or several that differ.
    """
    variables: dict[str, str] = {}
    known: dict[str, str] = {}
    found: list[tuple[str | None, list[str]]] = []
    for words in _commands(text, file):
        rest = list(words)
        while rest and (assigned := _ASSIGNED.fullmatch(rest[0])) is not None:
            variables[assigned[1]] = assigned[2]
            rest = rest[1:]
        command = _training(rest)
        if command is not None and command not in found:
            found.append(command)
            known = dict(variables)  # those that are assigned before the command
    if len(found) != 1:
        what = "no training command is" if not found else f"{len(found)} training commands are"
        fix = "name the YAML config, or a script with one command: swift, llamafactory-cli, axolotl, trl, or python with --key"
        raise invalid("import-nothing", f"{what} in this file", fix, file=str(file))
    program, arguments = found[0]
    is_preference = arguments[:2] == ["--rlhf_type", ""]
    values, unread = _settings(arguments[2:] if is_preference else arguments, known, file)
    if is_preference and "rlhf_type" not in values:
        values["rlhf_type"] = "dpo"  # the default of `swift rlhf`
    return values, unread, tools()[PROGRAMS[program]] if program else tool_of(values)


def _commands(text: str, file: Path) -> list[list[str]]:
    """The words of each command; lines that end with a backslash are joined."""
    joined = re.sub(r"[ \t]*\\\r?\n", " ", re.sub(r"(?m)^[ \t]*#[^\n]*\n", "", text))
    commands: list[list[str]] = []
    for line in joined.splitlines():
        try:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
            lexer.whitespace_split, lexer.commenters = True, ""
            words = [*itertools.takewhile(lambda word: not word.startswith("#"), lexer)]  # within a word, # starts no comment
        except ValueError as error:
            if "--" in line:
                fix = "write the command on lines that end with \\"
                raise invalid("import-unreadable", f"a command cannot be read: {error}", fix, file=str(file)) from error
            continue
        commands.append([])
        for word in words:
            if set(word) <= set(";&|"):
                commands.append([])
            else:
                commands[-1].append(word)
    return commands


def _training(words: Sequence[str]) -> tuple[str | None, list[str]] | None:
    """The program and the arguments of a command that trains, the method first; None for another command."""
    for place, word in enumerate(words):
        name = PurePath(word).name
        rest = list(words[place + 1 :])
        if name in PROGRAMS and rest:
            method, *rest = rest
            if PROGRAMS[name] == "ms-swift" and method == "rlhf":
                return name, ["--rlhf_type", "", *rest]
            return name, [*(["--strategy", method] if name == "trl" and method in METHODS else []), *rest]
        if name.endswith(".py") or (place and words[place - 1] == "-m"):
            is_of_training = any(_is_flag(argument) or _is_config(argument) for argument in rest)
            stem = PurePath(name).stem.lower().removesuffix("_trainer")
            method = next((method for method in METHODS if method in re.split(r"[^a-z]+", stem)), "")
            return (None, [*(["--strategy", method] if method else []), *rest]) if is_of_training else None
    return None


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _is_config(word: str) -> bool:
    return PurePath(word).suffix.lower() in foreign_config.CONFIGS


def _settings(arguments: Sequence[str], variables: dict[str, str], file: Path) -> tuple[dict[str, object], dict[str, str]]:
    """Keys and values; a config file comes first, and arguments replace its values."""
    own: dict[str, object] = {}
    unread: dict[str, str] = {}
    values: dict[str, object] = {}
    for key, words in _parts(arguments):
        filled = [_VARIABLE.sub(lambda found: variables.get(found[1], found[0]), word) for word in words]
        if key in ("", "config") and len(filled) == 1 and _is_config(filled[0]):
            values |= foreign_config.read_config(_near(file, filled[0]))
        elif any("$" in word or "`" in word for word in filled):
            unread[key] = f"the shell computes its value, {' '.join(words)}"
        elif key == "":
            unread[" ".join(filled)] = "it does not have the form --key value"
        else:
            parsed = [_value(word) for word in filled]
            value = True if not parsed else parsed[0] if len(parsed) == 1 else parsed
            if key in own and not same(own[key], value):
                unread[key] = f"it is written twice; the first value is {own[key]}"
            else:
                own[key] = value
    return values | own, unread


def _parts(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each key with the words of its value; words without a key have the empty one."""
    parts: list[tuple[str, list[str]]] = []
    for word in arguments:
        assigned = re.match(r"(?:--)?([A-Za-z_][\w.-]*)=", word)
        if assigned is not None:
            parts.append((assigned[1].replace("-", "_"), [word[assigned.end() :]]))
        elif _is_flag(word):
            parts.append((word.lstrip("-").replace("-", "_"), []))
        elif parts and parts[-1][0] and not _is_complete(parts[-1][0], parts[-1][1]):
            parts[-1][1].append(word)
        else:
            parts.append(("", [word]))
    return parts


def _is_complete(key: str, words: Sequence[str]) -> bool:
    """Whether the key has one value only, and has it."""
    return key in ("config", "strategy") and len(words) == 1


def _near(file: Path, named: str) -> Path:
    """The config that a script names: from the folder of the script, else as it is."""
    near = file.parent / named
    return near if near.is_file() else Path(named)


def _value(word: str) -> object:
    """A word as YAML reads it: numbers, true and false, and lists in brackets; else the text."""
    document = yaml_document.parse(word, "argument")
    return word if document.problems or (document.value is None and word != "null") else document.value
