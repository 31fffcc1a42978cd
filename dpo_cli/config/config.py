"""Config text to a checked, frozen `Config`: read, override, fill in defaults, and report every problem at once."""

from __future__ import annotations

import codecs
import difflib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

from dpo_cli.config import advice, documents, jsonc, other_tools, rules, stages
from dpo_cli.config.methods import Method, methods_of
from dpo_cli.config.options import Config
from dpo_cli.config.schema import defaults, options, profile_defaults, same
from dpo_cli.config.schema_checks import PAIR_KEYS, missing, value_problems
from dpo_cli.errors import InvalidInput, Problem, UsageError
from dpo_cli.strategies.strategies import STRATEGIES

Source = Literal["config", "override", "default", "profile", "measured"]
MAX_CONFIG_BYTES = 1 << 20
# JSON files next to the weights of a model or an adapter: two of their names, and keys that they hold.
BESIDE_WEIGHTS = ("config.json", "adapter_config.json")
OF_A_MODEL = frozenset(("architectures", "transformers_version", "tokenizer_class", "added_tokens", "weight_map", "peft_type"))


@dataclass(frozen=True)
class Loaded:
    """A config file as read: its values with defaults filled in, the source of each, and every problem.

    `config` is None when an error was found.
    """

    file: str
    values: dict[str, Any]
    sources: dict[str, Source]
    positions: Mapping[jsonc.Path, tuple[int, int]]
    problems: tuple[Problem, ...] = ()
    config: Config | None = None
    stage: int | None = None  # the number of the stage in a config with stages, from 1
    foundation: str | None = None  # the base model of the stages before this one, whose runs may not exist yet
    before: Loaded | None = None  # the stage that it starts from, if that one is valid
    rewarded_by: Loaded | None = None  # the stage whose run is its reward model, which may not exist yet; as `before`
    day: date | None = None  # the day of the run that a plan.json repeats, if its chat template writes the date
    round: int | None = None  # the number of the round in a config with rounds (rounds.py), from 1
    rounds: int = 0  # of how many
    notes: tuple[str, ...] = ()  # for its plan

    @property
    def is_ahead(self) -> bool:
        """Whether it is checked on the model of the first stage, because the stage before has not run yet."""
        return self.before is not None and self.values.get("model_name") == self.foundation

    @property
    def is_of_rewards(self) -> bool:
        """Whether it trains a reward model."""
        strategy = STRATEGIES.get(str(self.values.get("strategy")))
        return strategy is not None and strategy.gives_rewards

    @property
    def part(self) -> str:
        """Its stage and its round, in words; empty without both."""
        named = (f"stage {self.stage}" if self.stage else "", f"round {self.round}" if self.round else "")
        return ", ".join(filter(None, named))

    @property
    def label(self) -> str:
        return f"{self.file}, {self.part}" if self.part else self.file

    def placed(self, problem: Problem, path: jsonc.Path = ()) -> Problem:
        """The problem with its place in the file, or on the command line; `path` names a part of the value of its key."""
        if problem.key is not None and self.sources.get(problem.key) == "override":
            return replace(problem, file="command line")
        where = path or ((problem.key,) if problem.key else ())
        line, column = self.positions.get(where, (None, None)) if where else (None, None)
        if self.stage and line is None:
            problem = replace(problem, message=f"stage {self.stage}: {problem.message}")
        return replace(problem, file=self.file, line=line, column=column)

    def draft(self) -> Loaded:
        """The same with an empty dataset, if that is the only error: memory can be computed without the data."""
        errors = [(problem.code, problem.key) for problem in self.problems if problem.severity == "error"]
        if errors != [("missing-key", "dataset")]:
            return self
        others = tuple(problem for problem in self.problems if problem.severity != "error")
        return replace(self, problems=others, config=Config(**_normalised({**self.values, "dataset": ""})))

    def alone(self) -> Loaded:
        """The same for one process, which holds whole weights."""
        one = {"num_processes": 1, "fsdp": False}
        return replace(self, values={**self.values, **one}, config=self.config.replaced(one) if self.config else None)

    def on_foundation(self) -> Loaded:
        """The same with the base model of the earlier stages, to check this one before they have run."""
        if self.foundation is None:
            return self
        config = replace(self.config, model_name=self.foundation) if self.config else None
        return replace(self, values={**self.values, "model_name": self.foundation}, config=config)

    def require(self) -> Config:
        """The config, or `InvalidInput` with every problem."""
        if self.config is None:
            raise InvalidInput(self.problems)
        return self.config


# A config: the path of its file, or its values.
ConfigLike = str | Mapping[str, object]
VALUES = "config"  # the name of a config without a file


def load(path: ConfigLike, overrides: Sequence[str] = ()) -> Loaded:
    """Read, override and check the config at `path`; `-` is standard input.

    If it has stages, the first one that trains a policy, not a reward model.
    """
    stages = load_stages(path, overrides)
    return next((stage for stage in stages if not stage.is_of_rewards), stages[0])


def load_stages(path: ConfigLike, overrides: Sequence[str] = ()) -> list[Loaded]:
    """The configs in the file at `path`: one, or one per stage; overrides apply to each. A bad file raises nothing."""
    changes = parse_overrides(overrides)
    name, document, problems = _document(path)
    if document is None:
        return [Loaded(name, {}, {}, {}, problems)]
    return _of_stages(name, document, changes)


def load_methods(path: ConfigLike, overrides: Sequence[str] = ()) -> tuple[Loaded, list[tuple[Method, list[Loaded]]]]:
    """The config at `path`, and the methods that it compares, each with its configs: one, or one per stage.

    A method whose own keys are wrong has these problems. There are no methods if `compare` itself is wrong.
    """
    changes = parse_overrides(overrides)
    name, document, problems = _document(path)
    if document is None:
        return Loaded(name, {}, {}, {}, problems), []
    whole = _of_stages(name, document, changes)[0]
    if any(problem.severity == "error" and problem.key == "compare" for problem in whole.problems) or not document.complete:
        return whole, []
    methods = methods_of(_object(document), document, changes)
    parts = [replace(document, value=method.values, positions=dict(method.positions)) for method in methods]
    return whole, [(method, _of_stages(name, part, {})) for method, part in zip(methods, parts, strict=True)]


def load_settings(path: ConfigLike, overrides: Sequence[str], settings: Sequence[Mapping[str, object]]) -> list[list[Loaded]]:
    """The config at `path` with each of these settings as further values of the command line: one config, or one per stage.

    The file is read once.
    """
    changes = parse_overrides(overrides)
    name, document, problems = _document(path)
    if document is None:
        return [[Loaded(name, {}, {}, {}, problems)] for _ in settings]
    return [_of_stages(name, document, {**changes, **setting}) for setting in settings]


def _document(path: ConfigLike) -> tuple[str, jsonc.Document | None, tuple[Problem, ...]]:
    """The name of a config and its document, which is an object; None with the problems for what is not a config."""
    text: str | None
    problems: tuple[Problem, ...]
    if isinstance(path, Mapping):
        text, problems, path = json.dumps(path, indent=2, default=os.fspath), (), VALUES
    else:
        text, problems = _read_text(path)
    if text is None:
        return path, None, problems
    document = documents.parse(text, path)
    values, problems = document.value, document.problems
    is_data = isinstance(values, dict) and problems and len(PAIR_KEYS & values.keys()) > 1
    if is_data or not isinstance(values, dict):
        return path, None, (problems if not is_data else ()) or (_not_an_object(path, values),)
    if OF_A_MODEL & values.keys() and {"dataset", "model_name"}.isdisjoint(values):
        model = "MODEL_FOLDER" if path == "-" else str(Path(path).parent)
        return path, None, (_of_a_model(path, model),)
    return path, document, ()


def _object(document: jsonc.Document) -> dict[str, object]:
    assert isinstance(document.value, dict)
    return document.value


def _of_stages(name: str, document: jsonc.Document, changes: Mapping[str, object]) -> list[Loaded]:
    """The configs of a document, each with the one it starts from."""
    configs: list[Loaded] = []
    for written in stages.written(name, _object(document), document, changes):
        checked = _checked(written, document)
        before, rewarded_by = (_valid(configs, place) for place in (written.starts_on, written.rewarded_by))
        configs.append(replace(checked, before=before, rewarded_by=rewarded_by))
    return configs


def _valid(configs: Sequence[Loaded], place: int | None) -> Loaded | None:
    return configs[place] if place is not None and configs[place].config is not None else None


def _checked(written: stages.Written, document: jsonc.Document) -> Loaded:
    """A written config with its defaults and every problem."""
    path, values, positions, origin = written.path, written.values, written.positions, written.origin
    changes = written.changes
    authored = frozenset(key for key in values if origin.get(key) in (None, "config", "override")) | changes.keys()
    damaged = written.damaged - changes.keys()
    given = {key: value for key, value in {**values, **changes}.items() if key not in damaged and not _says_default(key, value)}
    given = {key: _at_home(key, value) for key, value in given.items()}
    resolved, sources = _resolved(given, changes, origin)
    loaded = Loaded(path, resolved, sources, positions, document.problems, stage=written.stage, foundation=written.foundation)
    loaded = replace(loaded, day=written.day)
    problems = [loaded.placed(problem, place) for place, problem in value_problems(given)]
    if document.complete:
        named = {**given, **dict.fromkeys(damaged | other_tools.meant_by(given))}
        wrong = {problem.key for problem in problems if problem.severity == "error"} | damaged
        stated = {key: value for key, value in named.items() if key in authored or key not in values}
        sound = {key: value for key, value in resolved.items() if key not in wrong}
        related = [*missing(named), *rules.check(sound, stated), *advice.check(sound, stated)]
        problems += map(loaded.placed, related)
    ordered = tuple(sorted((*document.problems, *problems), key=lambda p: (p.line is None, p.line or 0, p.column or 0)))
    failed = any(problem.severity == "error" for problem in ordered)
    return replace(loaded, problems=ordered, config=None if failed else Config(**_normalised(resolved)))


def _resolved(
    given: Mapping[str, object], changes: Mapping[str, object], origin: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Source]]:
    """The values with the defaults of their strategy and profile, and the source of each; a plan gives them in `origin`."""
    strategy, profile = (str(given.get(key)) for key in ("strategy", "compute_specs"))
    read_as: dict[str, object] = {}
    if strategy == "qlora":
        read_as = {"strategy": "sft", "use_4bit": given.get("use_4bit", True)}
    elif given.get("use_8bit") is True and "use_4bit" not in given:
        read_as = {"use_4bit": False}  # instead of the profile's value
    values: dict[str, Any] = {**defaults(str(read_as.get("strategy", strategy)), profile), **given, **read_as}
    values.pop("$schema", None)
    sources: dict[str, Source] = dict.fromkeys(values, "default")
    sources |= dict.fromkeys(profile_defaults(profile), "profile")
    sources |= dict.fromkeys([*given, *read_as], "config")
    sources |= {key: source for key, source in origin.items() if key in values}
    sources |= dict.fromkeys(changes, "override")
    if sources.get("split_seed") == "default" or values.get("split_seed") is None:
        values["split_seed"] = values.get("seed")
    return values, sources


def _says_default(key: str, value: object) -> bool:
    return key in options() and any(same(value, word) for word in options()[key].unset)


def _at_home(key: str, value: object) -> object:
    """A path with its ~ expanded."""
    is_path = key in options() and options()[key].place is not None
    return str(Path(value).expanduser()) if is_path and isinstance(value, str) and value.startswith("~/") else value


def _not_an_object(path: str, value: object) -> Problem:
    row = value[0] if isinstance(value, list) and value else value
    is_data = isinstance(row, dict) and PAIR_KEYS & row.keys()
    fix = 'this looks like a dataset: name it in the "dataset" of a config' if is_data else 'write { "dataset": "..." }'
    return Problem("error", "config-type", "a config is one object of keys and values", fix, None, path, 1, 1)


def _of_a_model(path: str, model: str) -> Problem:
    """The problem of a file or a folder that is a model or a part of one."""
    what = "a model" if model == path else "a part of a model"
    fix = f'name it in a config: "model_name": {json.dumps(model, ensure_ascii=False)}'
    return Problem("error", "config-unreadable", f"this is {what}, not a config", fix, file=path)


def _read_text(path: str) -> tuple[str | None, tuple[Problem, ...]]:
    def unreadable(message: str, fix: str) -> tuple[None, tuple[Problem, ...]]:
        return None, (Problem("error", "config-unreadable", message, fix, file=path),)

    try:
        if Path(path).is_dir() and any((Path(path) / name).is_file() for name in BESIDE_WEIGHTS):
            return None, (_of_a_model(path, path),)
        data = sys.stdin.buffer.read(MAX_CONFIG_BYTES + 1) if path == "-" else _read_bounded(Path(path))
    except FileNotFoundError:
        near = difflib.get_close_matches(Path(path).name, [file.name for file in _siblings(path)], 1, cutoff=0.75)
        fix = f"did you mean {Path(path).parent / near[0]}?" if near else "check the path; see configs/ for examples"
        return unreadable("file not found", fix)
    except (OSError, ValueError) as error:  # a directory, a file without read permission, an invalid file name
        return unreadable(f"cannot be read: {getattr(error, 'strerror', None) or error}", "name a readable config")
    if data.startswith(b"GGUF"):
        return None, (_of_a_model(path, path),)
    if Path(path).suffix == ".safetensors":
        return None, (_of_a_model(path, str(Path(path).parent)),)
    if len(data) > MAX_CONFIG_BYTES:
        return unreadable(f"more than {MAX_CONFIG_BYTES:,} bytes", "is this the dataset?")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
        return unreadable("the text is UTF-16 or UTF-32, or it is not a text file", "save it as UTF-8")
    try:
        return data.decode("utf-8"), ()
    except UnicodeDecodeError as error:
        return unreadable(f"not UTF-8 (byte {error.start})", "save it as UTF-8")


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_CONFIG_BYTES + 1)


def _siblings(path: str) -> Iterator[Path]:
    parent = Path(path).parent
    return parent.iterdir() if parent.is_dir() else iter(())


def is_override(word: str) -> bool:
    """Whether a word of the command line is key=value, and not the name of an existing file."""
    return re.match(r"[A-Za-z_]\w*=", word) is not None and not os.path.exists(word)


def parse_overrides(overrides: Sequence[str]) -> dict[str, object]:
    """`key=value` words to values: JSON if it parses (5e-5, true, ["q_proj"]), else the text itself."""
    parsed: dict[str, object] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r} is not an override", "write key=value, for example learning_rate=5e-5")
        document = jsonc.parse(text, word)
        is_text = document.problems or (other_tools.fits(key, text) and not other_tools.fits(key, document.value))
        parsed[key] = text if is_text else document.value
    return parsed


def _normalised(values: Mapping[str, object]) -> dict[str, Any]:
    """JSON Schema accepts 3.0 as an integer; convert it to a Python int."""
    whole = {name for name, option in options().items() if "integer" in option.rule.get("type", "")}
    return {key: int(value) if key in whole and isinstance(value, float) else value for key, value in values.items()}
