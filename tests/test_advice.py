"""Advice that is true when followed: every fix that can be applied is applied to the config or rows that brought it.

Then the problem is gone, no error is new, and what the fix does not name is as it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from bad_configs import CASES, Case, lay_out, pair

from dpo_cli.config import jsonc
from dpo_cli.config.config import Loaded, load
from dpo_cli.config.other_tools import as_here, entries, names
from dpo_cli.config.schema import options
from dpo_cli.errors import Problem
from dpo_cli.plan.preflight import Inspection, inspect

Values = dict[str, Any]
VALUE = r'(?:"(?:[^"\\]|\\.)*"|\[[^\]]*\]|-?[0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?|true|false|null)'
SETTING = rf'"([a-z_0-9]+)": ({VALUE})'
SETTINGS = re.compile(rf"{SETTING}(?:, {SETTING})*")
# What a program cannot do by the text of the fix alone: it asks for a choice, a name, a file, another machine, or for nothing.
BY_HAND = {
    "data-in-config", "json-nan", "json-number", "json-surrogate", "json-depth", "config-type", "config-unreadable",
    "missing-key", "duplicate-key", "default-model", "hub-id-missing", "output-is-input", "path-too-long",
    "path-control-character", "rank-incomplete", "rank-missing", "judge-url", "too-few-responses", "augment-too-long",
    "loss-weights", "weights-below-one", "stages-within", "beta", "epochs", "lora-rank", "lm-head-adapter", "model-missing",
    "model-not-gguf", "model-repacked", "model-not-here", "adapter-unusable", "model-incomplete", "model-damaged",
    "adapter-unmergeable", "tokenizer-no-eos",
    "method-name", "method-own-key", "method-rounds", "budget-missing",
    "model-no-classifier", "reward-model-missing", "not-a-reward-model",
    "model-not-causal", "model-no-weights", "model-no-tokenizer", "model-code", "model-tensors", "model-quantised",
    "tokens-outside", "generation-config", "model-code-unused", "no-such-layer", "target-not-linear", "fused-target",
    "host-memory", "memory-unknown", "small-memory", "dataset-format", "dataset-unreadable", "dataset-utf16", "dataset-empty",
    "dataset-on-hub", "dataset-damaged", "rows-read-as", "column-missing", "too-similar", "length-decides",
    "refusals-on-one-side", "mixed-languages", "few-pairs", "few-prompts", "repeated-pairs", "near-duplicates",
    "reversed-preference", "prompt-in-both", "pairs-too-long", "nothing-to-train", "nothing-held-out",
    "dataset-not-list", "dataset-pointer", "dataset-packed", "dataset-arrow", "dataset-split", "folder-files",
    "columns-disagree", "column-unread", "media-unread", "media-marker", "scores-contradict", "scores-tie", "label-unwanted",
    "label-suggested", "null-arguments", "one-rating", "repeated-ratings", "contradicting-ratings",
}  # fmt: skip


# Parts of fixes that leave a choice to the user, of codes that have others too.
CHOICES = (
    "increase per_device_train_batch_size, and lower",
    "remove the weight",
    "write a regular expression of",
    "check the path",
    "name a run or an adapter",
)


def steps(problem: Problem, given: Values) -> Iterator[Callable[[Values], None]]:
    """The ways that a fix gives, each as what it does to the values of a config."""

    def settings(text: str, instead: bool = False) -> Callable[[Values], None]:
        def apply(values: Values) -> None:
            if instead:
                values.pop(str(problem.key))
            inner = values["augment"] if problem.key == "augment" else values
            inner |= {name: json.loads(value) for name, value in re.findall(SETTING, text)}

        return apply

    def without(*keys: str) -> Callable[[Values], None]:
        def apply(values: Values) -> None:
            inner = values["augment"] if problem.key == "augment" else values
            for key in keys:
                inner.pop(key, None)

        return apply

    def renamed(name: str) -> Callable[[Values], None]:
        return lambda values: values.update({name: values.pop(str(problem.key))})

    if is_description(problem):
        return
    for way in re.split(r", or (?=write|remove|leave|set|train)|; for preference pairs (?=\")", problem.fix or ""):
        key = str(problem.key)
        if found := re.match(r'(?:did you mean "([a-z_0-9]+)"\?$|here it is called "([a-z_0-9]+)": )', way):
            yield renamed(found.group(1) or found.group(2))
        elif found := re.match(r"write it without quotes: (\S+)$", way):
            yield settings(f'"{key}": {found.group(1)}')
        elif found := re.match(r'did you mean "([^"]+/[^"]+)"\?$', way) or re.match(r"did you mean (\S+)\?$", way):
            yield settings(f'"{key}": "{found.group(1)}"')
        elif way.startswith(("remove the key", "remove it", "remove one of them", "keep one of them:")):
            yield without(key)
        elif way.startswith("remove these keys"):
            yield without(*(set(re.findall(r"[a-z_0-9]+", problem.message)) & given.keys() - {key}))
        elif found := re.match(r'(?:remove|leave) "?([a-z_0-9]+)"?(?: out|:|,|$)', way):
            yield without(found.group(1))
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
    given: Values = jsonc.parse(case.config.decode(), "").value
    ways = list(steps(problem, given))
    assert ways or is_open(problem), problem.fix
    for way in ways:
        values = deepcopy(given)
        way(values)
        after, then = look(case, json.dumps(values).encode())
        left = [other for other in named(then, case) if (other.severity, other.fix) == (problem.severity, problem.fix)]
        assert not left, (problem.fix, values)
        assert errors(then) <= errors(found) - {(case.code, case.key)}, (problem.fix, values, errors(then))
        kept = given.keys() & values.keys() & options().keys() - {case.key, *re.findall(r"[a-z_0-9]+", problem.fix or "")}
        assert {key: after.values[key] for key in kept} == {key: before.values[key] for key in kept}


def is_description(problem: Problem) -> bool:
    """Whether the fix says what an option is, and not what to write."""
    return problem.key == "$schema" or (problem.key in options() and problem.fix == options()[problem.key].description)


def is_open(problem: Problem) -> bool:
    """Whether the fix leaves the value to the user."""
    fix = problem.fix or ""
    is_bounded = any(f'here it is called "{name}", and is {option.type_words}' in fix for name, option in options().items())
    return is_description(problem) or is_bounded or any(text in fix for text in CHOICES)


def test_what_is_left_to_the_user_is_known() -> None:
    assert {case.code for case in CASES} >= BY_HAND


ROWS = [case for case in CASES if case.code.startswith("row-") and case.severity == "error" and case.fix == "delete these rows"]


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.code)
@pytest.mark.parametrize("way", ["delete", "skip"])
def test_a_fix_of_rows_is_true(case: Case, way: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    _, found = look(case, case.config)
    (problem,) = named(found, case)
    assert problem.fix == 'correct or delete these rows, or write "on_bad_rows": "skip"'
    kept = Path(case.file).read_bytes()
    text = case.config
    if way == "skip":
        text = json.dumps({**jsonc.parse(text.decode(), "").value, "on_bad_rows": "skip"}).encode()
    elif case.file.endswith(".parquet"):
        pytest.skip("a row that is not Parquet is the whole file")
    else:
        lines = kept.split(b"\n")
        Path(case.file).write_bytes(b"\n".join(lines[: problem.line - 1] + lines[problem.line :]))  # type: ignore[operator]
    _, then = look(case, text)
    Path(case.file).write_bytes(kept)
    told = [problem.severity for problem in named(then, case)]
    assert told == ([] if way == "delete" else ["warning"])
    if not case.file.endswith(".parquet"):
        assert errors(then) == set()
        assert then.data is not None and then.data.train.pairs == (1 if case.code in ("row-bom", "row-not-csv") else 2)


SYNTAX = [case for case in CASES if case.code == "json-syntax"]
TEXT_BY_HAND = (
    "a JSON number",
    "close it with a double quote",
    "write a decimal point",
    "write a value",
    "write {",
    "close the object",
)


def mended(text: str, problem: Problem) -> str | None:
    """The text with the fix done where the problem stands; None where the fix leaves a choice."""
    lines = text.split("\n")
    at = sum(len(line) + 1 for line in lines[: (problem.line or 1) - 1]) + (problem.column or 1) - 1
    before, after, fix = text[:at], text[at:], problem.fix or ""
    if any(words in fix for words in TEXT_BY_HAND) and not fix.startswith('write "key": value'):
        return None
    if fix == "add the comma":
        return before + "," + after
    if fix == "delete it":
        return before
    if fix.startswith("a comment starts with //"):
        return before + "//" + after[1:]
    if fix.startswith("write straight double quotes"):
        return re.sub("[\u201c\u201d]", '"', text)
    if fix.startswith("in a path write /"):
        return before + "/" + after[1:]
    if fix.startswith("write a space"):
        return before + " " + after[1:]
    if found := re.match("delete the ([a-z])$", fix):
        return before + after.removeprefix(found.group(1))
    if found := re.match('write ("[a-z_]+":)$', fix):
        return before + re.sub(r"^['\w]+ *:", found.group(1), after)
    if found := re.match(rf"write ({VALUE})$", fix):
        return before + re.sub(r"^('[^']*'|[^\s,}]+)", lambda _: found.group(1), after)
    return None


@pytest.mark.parametrize("case", SYNTAX, ids=lambda case: (case.own or case.config[:40].decode())[:60])
def test_a_fix_of_the_text_is_true(case: Case, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    before, found = look(case, case.config)
    (problem,) = named(found, case)
    text = mended(case.config.decode(), problem)
    if text is None:
        return
    after, then = look(case, text.encode())
    assert not [other for other in then.problems if other.code == "json-syntax"], (problem.fix, text)
    assert errors(then) <= errors(found), text
    assert {key: after.values[key] for key in before.values if key != case.key and before.positions.get((key,))} == {
        key: before.values[key] for key in before.values if key != case.key and before.positions.get((key,))
    }


def test_most_fixes_of_texts_can_be_applied() -> None:
    """So that the test above is about something."""
    done = [case for case in SYNTAX if mended(case.config.decode(), load_text(case)) is not None]
    assert len(done) >= 20


def load_text(case: Case) -> Problem:
    return next(problem for problem in jsonc.parse(case.config.decode(), "").problems if problem.code == "json-syntax")


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".yaml", "### model\nmodel_name: some/model\ndataset: pairs.jsonl\nbeta: 0.3\n"),
        (".toml", 'model_name = "some/model"\ndataset = "pairs.jsonl"\nbeta = 0.3\n'),
    ],
)
def test_another_format_has_its_own_name(suffix: str, text: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    Path("other.json").write_text(text, encoding="utf-8")
    (problem,) = load("other.json").problems
    assert f"ends in {suffix}" in str(problem.fix)
    Path("other.json").rename(f"other{suffix}")
    config = load(f"other{suffix}").require()
    assert (config.model_name, config.dataset, config.beta) == ("some/model", "pairs.jsonl", 0.3)


SAMPLES: Mapping[str, Any] = {"string": "me/some-name", "boolean": True, "number": 0.25, "integer": 3}


def sample(rule: Mapping[str, Any]) -> list[Any]:
    """Values that a schema of a case takes."""
    if "const" in rule or "enum" in rule:
        return list(rule.get("enum", ())) or [rule["const"]]
    return [SAMPLES[rule["type"]]]


FOREIGN = [
    (key.replace("*", "x"), value)
    for entry in entries()
    for key in entry["keys"]
    for value in [another for case in entry.get("cases", ()) for another in sample(case.get("if", {}))] + [{"some": "object"}]
]


def test_every_entry_of_other_tools_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_bytes(b"\n".join(map(pair, range(3))))
    for key, value in FOREIGN:
        given: Values = {"model_name": "m/m", "dataset": "d.jsonl", key: value}
        Path("c.json").write_text(json.dumps(given), encoding="utf-8")
        (problem,) = [found for found in load("c.json").problems if found.severity == "error"]
        assert problem.key == key
        ways = list(steps(problem, given))
        assert ways or (key in options() and is_description(problem)) or 'for example "task"' in (problem.fix or ""), problem
        for way in ways[:1]:
            values = dict(given)
            way(values)
            Path("c.json").write_text(json.dumps(values), encoding="utf-8")
            assert not [found for found in load("c.json").problems if found.severity == "error"], (key, value, problem.fix)


def test_every_other_name_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the default of each option, or a value that is not it."""
    monkeypatch.chdir(tmp_path)
    values = {
        "dataset": "d.jsonl",
        "eval_dataset": "e.jsonl",
        "output_dir": "runs/a",
        "revision": None,
        "columns": {"prompt": "p"},
    }
    values |= {"lora_alpha": 8, "modules_to_save": ["lm_head"], "early_stopping_patience": 3}
    for alias, name in names().items():
        value = values.get(name, options()[name].default())
        others = {"dataset": "d.jsonl", "model_name": "m/m"}
        given: Values = {**{key: text for key, text in others.items() if key != name}, alias: value}
        Path("c.json").write_text(json.dumps(given), encoding="utf-8")
        (problem,) = [found for found in load("c.json").problems if found.severity == "error"]
        (way,) = steps(problem, given)
        way(given)
        assert given[name] == as_here(options()[name], value)
        Path("c.json").write_text(json.dumps(given), encoding="utf-8")
        assert not [found for found in load("c.json").problems if found.severity == "error"], (alias, problem.fix)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"pref_beta": 0.5}, {"beta": 0.5}),
        ({"random_state": 3407}, {"seed": 3407}),
        ({"rpo_alpha": 0.3}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.3]}),
        ({"rpo_alpha": 0}, {"loss_type": "sigmoid", "loss_weights": None}),
        ({"lora_target": "all"}, {"target_modules": "all-linear"}),
        ({"lora_target": "q_proj, v_proj"}, {"target_modules": ["q_proj", "v_proj"]}),
        ({"quantization_bit": 4}, {"use_4bit": True}),
        ({"quantization": "none"}, {"use_4bit": False}),
        ({"finetuning_type": "full"}, {"lora_r": 0}),
        ({"warmup_steps": 0.1}, {"warmup_ratio": 0.1, "warmup_steps": None}),
        ({"warmup": 20}, {"warmup_steps": 20}),
        ({"torch_dtype": "float32"}, {"bf16": False, "fp16": False}),
        ({"use_gradient_checkpointing": "unsloth"}, {"gradient_checkpointing": True}),
        ({"task": "sft"}, {"strategy": "sft", "task": "text-generation"}),
        ({"pref_loss": "aot_pair"}, {"loss_type": "aot"}),
        ({"adapters": ["me/adapter"]}, {"model_name": "me/adapter"}),
        ({"use_peft": False}, {"lora_r": 0}),
    ],
)
def test_what_another_tool_says_means_the_same(theirs: Values, ours: Values, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    given = {"model_name": "m/m", "dataset": "d.jsonl", **theirs}
    path.write_text(json.dumps(given), encoding="utf-8")
    (problem,) = [found for found in load(str(path)).problems if found.severity == "error"]
    next(iter(steps(problem, given)))(given)
    path.write_text(json.dumps(given), encoding="utf-8")
    config = load(str(path)).require().to_json()
    assert {key: config[key] for key in ours} == ours


@pytest.mark.parametrize("key", ["ld_alpha", "pad_to_sequence_len", "sync_ref_model", "adapter_path", "use_lora", "data_seed"])
def test_near_spelling_is_not_near_meaning(key: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"model_name": "m/m", "dataset": "d.jsonl", key: True}), encoding="utf-8")
    (problem,) = [found for found in load(str(path)).problems if found.severity == "error"]
    assert "did you mean" not in (problem.fix or "")


@pytest.mark.parametrize("rate", [1e-5, 5e-5, 2e-4, 5e-4])
def test_a_sound_config_gets_no_word(rate: float, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    sound = Case("", None, f'"learning_rate": {rate}, "num_train_epochs": 3, "lora_r": 16, "lora_alpha": 32', "")
    _, found = look(sound, sound.config)
    assert [problem for problem in found.problems if problem.file == "config.json"] == []


def test_no_pattern_of_other_tools_takes_an_option() -> None:
    ours = {*options(), *names()}
    taken = {key for entry in entries() for key in entry["keys"] for name in ours if fnmatchcase(name, key)}
    assert taken == {"task", "warmup_steps"}  # whose values of other tools are meant
    assert len([key for entry in entries() for key in entry["keys"]]) == len({k for e in entries() for k in e["keys"]})
