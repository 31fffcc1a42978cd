"""Advice that is true when followed: every fix that can be applied is applied to the config or rows that brought it.

Then the problem is gone, no error is new, and what the fix does not name is as it was.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from bad_configs import CARD, CASES, Case, lay_out, pair

from dpo_cli.config import reader
from dpo_cli.config.config import Loaded, load
from dpo_cli.config.other_tools import as_here, entries, names
from dpo_cli.config.schema import options
from dpo_cli.errors import Problem
from dpo_cli.inspection import Inspection, inspect

Values = dict[str, Any]
VALUE = r'(?:"(?:[^"\\]|\\.)*"|\[[^\]]*\]|-?[0-9.]+(?:e-?[0-9]+)?|true|false|null)'
SETTING = rf'"([a-z_0-9]+)": ({VALUE})'
SETTINGS = re.compile(rf"{SETTING}(?:, {SETTING})*")
# What a program cannot do by the text of the fix alone: it asks for a choice, a name, a file, another machine, or for nothing.
BY_HAND = {
    "data-in-config", "json-nan", "json-number", "json-surrogate", "json-depth", "config-type", "config-unreadable",
    "missing-key", "duplicate-key", "default-model", "hub-id-missing", "output-is-input", "path-too-long", "path-control-character",
    "rank-incomplete", "judge-url", "too-few-responses", "augment-too-long", "loss-weights", "weights-below-one", "stages-within",
    "beta", "epochs", "lora-rank", "lm-head-adapter",
    "model-missing", "model-not-gguf", "model-repacked", "model-not-here", "adapter-unusable", "model-incomplete", "model-damaged",
    "model-not-causal", "model-no-weights", "model-no-tokenizer", "model-code", "model-tensors", "model-quantised",
    "tokens-outside", "generation-config", "model-code-unused",
    "no-such-layer", "target-not-linear", "fused-target", "host-memory", "small-memory",
    "dataset-format", "dataset-unreadable", "dataset-utf16", "dataset-empty", "dataset-on-hub", "dataset-damaged",
    "rows-read-as", "column-missing", "too-similar", "length-decides", "refusals-on-one-side", "mixed-languages", "few-pairs",
    "few-prompts", "repeated-pairs", "near-duplicates", "reversed-preference", "prompt-in-both", "pairs-too-long",
    "nothing-to-train", "nothing-held-out",
}  # fmt: skip


def steps(fix: str, problem: Problem, given: Values) -> Iterator[Callable[[Values], None]]:
    """The ways that a fix gives, each as what it does to the values of a config."""

    def settings(text: str, instead: bool = False) -> Callable[[Values], None]:
        def apply(values: Values) -> None:
            if instead:
                values.pop(str(problem.key))
            values |= {name: json.loads(value) for name, value in re.findall(SETTING, text)}

        return apply

    def without(*keys: str) -> Callable[[Values], None]:
        return lambda values: [values.pop(key) for key in keys] and None

    def renamed(name: str) -> Callable[[Values], None]:
        return lambda values: values.update({name: values.pop(str(problem.key))})

    for way in re.split(r", or (?=write|remove|leave|set|train)|; for preference pairs (?=\")", fix):
        key = str(problem.key)
        if found := re.match(r'(?:did you mean|here it is called) "([a-z_0-9]+)"(?:\?$|: )', way):
            yield renamed(found.group(1))
        elif found := re.match(r"write it without quotes: (\S+)$", way):
            yield settings(f'"{key}": {found.group(1)}')
        elif found := re.match(r'did you mean "([^"]+/[^"]+)"\?$', way) or re.match(r"did you mean (\S+)\?$", way):
            yield settings(f'"{key}": "{found.group(1)}"')
        elif way.startswith(("remove the key", "remove it", "remove one of them", "keep one:")):
            yield without(key)
        elif found := re.match(r'(?:remove|leave) "?([a-z_0-9]+)"?(?: out|:|$)', way):
            yield without(found.group(1)) if found.group(1) in given else settings("")
        elif way.startswith("hold a share out"):
            yield settings(way, instead=True)
        elif (found := SETTINGS.search(way)) and not way.startswith("when"):
            after = way[found.end() :]
            yield settings(found.group(), instead=after.startswith(" instead"))


def look(case: Case, text: bytes) -> tuple[Loaded, Inspection]:
    Path("config.json").write_bytes(text)
    loaded = load("config.json")
    return loaded, inspect(loaded, case.machine, case.vram_gb)


def errors(found: Inspection) -> set[tuple[str, str | None]]:
    return {(problem.code, problem.key) for problem in found.problems if problem.severity == "error"}


def named(found: Inspection, case: Case) -> list[Problem]:
    return [problem for problem in found.problems if (problem.code, problem.key) == (case.code, case.key)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advice")
    lay_out(folder)
    return folder


WHOLE = [case for case in CASES if case.code != "json-syntax" and case.code not in BY_HAND and not case.code.startswith("row-")]


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: f"{case.code}-{case.own}"[:60])
def test_a_fix_of_values_is_true(case: Case, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    before, found = look(case, case.config)
    (problem,) = named(found, case)
    given: Values = reader.parse(case.config.decode(), "").value
    ways = list(steps(problem.fix or "", problem, given))
    assert ways or problem.fix == described(problem), problem.fix
    for way in ways:
        values = dict(given)
        way(values)
        after, then = look(case, json.dumps(values).encode())
        assert not named(then, case), (problem.fix, values)
        assert errors(then) <= errors(found) - {(case.code, case.key)}, (problem.fix, values, errors(then))
        kept = given.keys() & values.keys() & options().keys() - set(re.findall(r"[a-z_0-9]+", problem.fix or ""))
        assert {key: after.values[key] for key in kept} == {key: before.values[key] for key in kept}


def described(problem: Problem) -> str | None:
    """A fix that says what an option is, and not what to write."""
    return options()[problem.key].description if problem.key in options() else None
