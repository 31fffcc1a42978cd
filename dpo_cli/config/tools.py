"""The tools whose configs are imported: how each is recognised, and its defaults. All of it is in tools.json."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Tool:
    """A tool: its name, the keys that only it has, and its defaults under the names of this tool's options."""

    name: str
    marks: tuple[str, ...]
    defaults: Mapping[str, object]
    full: Mapping[str, object]  # defaults where all weights are trained
    adapter_key: str  # the key without which it trains all weights; empty if it trains an adapter by default
    source: str
    differs: Mapping[str, str]  # what an option means there

    def defaults_of(self, values: Mapping[str, object]) -> dict[str, object]:
        """Its defaults for a config of this tool; those of an adapter are missing where all weights are trained."""
        rank = values.get("lora_r", self.defaults.get("lora_r"))
        found = {name: self._filled(value, rank) for name, value in self.defaults.items()}
        if rank != 0:
            return found
        return {name: value for name, value in found.items() if not name.startswith("lora_")} | dict(self.full)

    @staticmethod
    def _filled(value: object, rank: object) -> object:
        return 2 * rank if value == "twice:lora_r" and isinstance(rank, int) else value


@functools.cache
def tools() -> dict[str, Tool]:
    """Every tool by its name; tools.json says what its parts hold."""
    loaded = json.loads(files("dpo_cli.config").joinpath("tools.json").read_text(encoding="utf-8"))
    return {entry["name"]: Tool(**{**entry, "marks": tuple(entry["marks"])}) for entry in loaded["tools"]}


def tool_of(keys: Iterable[str]) -> Tool | None:
    """The tool with the most marks among the keys, the first one of several; None if no key is a mark."""
    given = set(keys)
    found = max(tools().values(), key=lambda tool: len(given.intersection(tool.marks)))
    return found if given.intersection(found.marks) else None
