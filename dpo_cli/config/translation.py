"""The settings of another tool as a config of this one; every key that is not taken is named, with the reason.

Other names, other values and what has no counterpart are those of the advice for unknown keys (other_tools.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dpo_cli.config import other_tools
from dpo_cli.config.foreign_config import Foreign
from dpo_cli.config.foreign_datasets import KEYS, datasets_of
from dpo_cli.config.schema import options, same
from dpo_cli.errors import Problem

# What says which method trains which weights: if it is not here, no other one is taken in its place.
OF_THE_METHOD = {
    "rl", "stage", "rlhf_type", "train_method", "training_method", "trainer_type", "strategy", "task", "loss_type", "dpo_loss",
    "pref_loss", "preference_loss", "adapter", "finetuning_type", "train_type", "tuner_type", "sft_type", "peft_type",
    "use_peft",
    "lora_r", "model_name", "model_name_or_path", "base_model", "model",
}  # fmt: skip
# The key that says the method, in tools that do supervised fine-tuning without it.
METHOD_KEYS = {"Axolotl": "rl", "LLaMA-Factory": "stage", "ms-swift": "rlhf_type"}
OWN = "dpo or ModelForge"

Group = Literal["same", "renamed", "translated", "left out", "stops", "default"]


@dataclass(frozen=True)
class Setting:
    """What became of one key: its value here, or the reason why it has none."""

    key: str
    value: object
    group: Group
    becomes: Mapping[str, object] = field(default_factory=dict)
    why: str = ""


@dataclass
class Translation:
    """A config of this tool with what became of every key."""

    config: dict[str, object] = field(default_factory=dict)
    settings: list[Setting] = field(default_factory=list)
    differs: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def of(self, *groups: Group) -> list[Setting]:
        return [setting for setting in self.settings if setting.group in groups]


def translated(foreign: Foreign) -> Translation:
    """The config of a file, with the defaults of its tool where those of this tool are others."""
    result = Translation()
    data = datasets_of(foreign)
    found = dict(foreign.values)
    method = METHOD_KEYS.get(foreign.tool.name) if foreign.tool is not None else None
    if method is not None and found.get(method) is None and "strategy" not in found:
        found = {**found, method: "sft"}
    for key, value in found.items():
        if key not in KEYS:
            _take(key, value, found, result, foreign)
    of_data = [key for key in KEYS if foreign.values.get(key) is not None and key not in data.left_out]
    for key in of_data:
        group: Group = "translated" if data.values else "stops"
        is_first = key == of_data[0]
        part_of = "" if is_first else f"with {of_data[0]}"
        result.settings.append(Setting(key, foreign.values[key], group, data.values if is_first else {}, part_of))
    _add_data(data.values, result)
    result.settings += [Setting(key, None, "left out", why=why) for key, why in {**data.left_out, **foreign.unread}.items()]
    result.problems += [*data.problems, *_computed(foreign)]
    _add_defaults(foreign, result)
    if foreign.tool is not None:
        result.differs = {key: text for key, text in foreign.tool.differs.items() if key in result.config}
    result.config = {key: result.config[key] for key in options() if key in result.config}
    return result


def _take(key: str, value: object, given: Mapping[str, object], result: Translation, foreign: Foreign) -> None:
    """Add one key to the config, or to those that are left out."""
    if value is None:
        result.settings.append(Setting(key, None, "left out", why="it is empty, which means the default"))
        return
    name = _name_of(key) if _name_of(key) in options() else None
    entry = other_tools.entry_of(key)
    if name is not None and options()[name].not_yet_words:
        _refuse(Setting(key, value, "left out", why="this version does not support it yet"), result, foreign)
        return
    if name is not None:
        taken = _number(name, other_tools.as_here(options()[name], value))
        taken = None if any(same(taken, word) for word in options()[name].unset) else taken
        if taken is None or other_tools.fits(name, taken):
            group: Group = "translated" if not same(taken, value) else "same" if name == key else "renamed"
            _set({name: taken} if taken is not None else {}, Setting(key, value, group), result, foreign)
            return
    instead = other_tools.replacement(entry, value, given) if entry else None
    if entry is not None and instead is not None:
        if instead:
            _set(instead, Setting(key, value, "translated", why=entry["why"]), result, foreign)
        else:
            result.settings.append(Setting(key, value, "left out", why=f"this is the default: {entry['why']}"))
        return
    if entry is not None:
        why = entry["why"]
    elif name is not None:
        why = f"{name} is {options()[name].type_words}"
    else:
        why = "dpo does not know this key"
    _refuse(Setting(key, value, "left out", why=why), result, foreign)
    if name is not None and entry is None and key not in OF_THE_METHOD:
        message = f"{key}: {json.dumps(value, ensure_ascii=False, default=str)} is not a value of {name}"
        fix = f"{why}: write one into the config, or remove the key from the file"
        result.problems.append(Problem("warning", "import-value", message, fix, name, str(foreign.file)))


def _number(name: str, value: object) -> object:
    """A number in quotes as a number, if the option is one: other tools read it so."""
    if not isinstance(value, str) or other_tools.fits(name, value):
        return value
    for kind in (int, float):
        try:
            number = kind(value)
        except ValueError:
            continue
        return number if other_tools.fits(name, number) else value
    return value


def _name_of(key: str) -> str:
    """The option of a key."""
    return key if key in options() else other_tools.names().get(key, key)


def _computed(foreign: Foreign) -> list[Problem]:
    """A warning for each option whose value a program or a shell computes: it is to be written by hand."""
    found = [(key, _name_of(key), why) for key, why in foreign.unread.items()]
    return [
        Problem("warning", "import-computed", f"{key}: {why}", f'write "{name}" into the config', name, str(foreign.file))
        for key, name, why in found
        if name in options()
    ]


def _set(values: Mapping[str, object], setting: Setting, result: Translation, foreign: Foreign) -> None:
    """Write options, if no other key has set them to something else."""
    precision = next((name for name in ("bf16", "fp16") if foreign.values.get(name) is True), None)
    if precision and setting.key not in options() and {"bf16", "fp16"} & values.keys() and precision not in values:
        result.settings.append(Setting(setting.key, setting.value, "left out", why=f"{precision} says how it computes"))
        return
    for name, value in values.items():
        if name in result.config and not same(result.config[name], value) and not (name == "lora_r" and value == 0):
            why = f"another key of the file sets {name} to {json.dumps(result.config[name])}"
            _refuse(Setting(setting.key, setting.value, "left out", why=why), result, foreign)
            return
    result.config |= values
    result.settings.append(Setting(setting.key, setting.value, setting.group, values, setting.why))


def _refuse(setting: Setting, result: Translation, foreign: Foreign) -> None:
    if setting.key not in OF_THE_METHOD or setting.value is False:
        result.settings.append(setting)
        return
    result.settings.append(Setting(setting.key, setting.value, "stops", why=setting.why))
    message = f"{setting.key}: {json.dumps(setting.value, ensure_ascii=False)} has no counterpart"
    fix = f"{setting.why}; write another value into the file"
    result.problems.append(Problem("error", "import-method", message, fix, setting.key, str(foreign.file)))


def _add_data(values: Mapping[str, object], result: Translation) -> None:
    for name, value in values.items():
        result.config.setdefault(name, value)


def _add_defaults(foreign: Foreign, result: Translation) -> None:
    """The defaults of the other tool that differ, and all weights where it trains no adapter by default."""
    if foreign.tool is None or foreign.tool.name == OWN:
        return
    key = foreign.tool.adapter_key
    why = f"{key} is not set: {foreign.tool.name} trains all weights then" if key and not foreign.values.get(key) else ""
    if why or any(part.becomes.get("lora_r") == 0 for part in result.settings):
        _drop_adapter(why or "all weights are trained", result)
    if why:
        result.settings.append(Setting("", None, "default", {"lora_r": 0}, why))
    needed = {"warmup_ratio": "warmup_steps", "use_4bit": "use_8bit"}
    strategy = str(result.config.get("strategy", "dpo"))
    unknown = {_name_of(key) for key in foreign.unread} | {problem.key for problem in result.problems}
    for name, value in foreign.tool.defaults_of(result.config).items():
        if (
            name in result.config
            or name in unknown
            or needed.get(name) in result.config
            or same(value, options()[name].default(strategy))
        ):
            continue
        result.config[name] = value
        result.settings.append(Setting("", None, "default", {name: value}, foreign.tool.source))


def _drop_adapter(why: str, result: Translation) -> None:
    """Leave out the options of an adapter, which do nothing where all weights are trained."""
    dropped = {name for name in result.config if (name.startswith("lora_") and name != "lora_r") or name == "target_modules"}
    for name in dropped:
        del result.config[name]
    ranks = [part for part in result.settings if part.becomes.get("lora_r") not in (None, 0)]
    gone = [part for part in result.settings if set(part.becomes) & dropped or part in ranks]
    kept = [part for part in result.settings if part not in gone]
    result.settings[:] = [*kept, *(Setting(part.key, part.value, "left out", why=why) for part in gone)]
    result.config["lora_r"] = 0
