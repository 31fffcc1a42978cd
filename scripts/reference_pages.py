"""Writes the reference of the documentation, docs/reference/*.md, from what the program declares; `--check` compares.

Each page has a source in the program: the schema, the commands of Typer, the figures, the health rules, tests/contract.json.
Words that the program does not have stand here, and a name without words is an error.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import reference
import typer

import dpo_cli
from dpo_cli import api
from dpo_cli.app import app
from dpo_cli.config.schema import Option, options
from dpo_cli.errors import Exit
from dpo_cli.hardware.recommend import Recommendation
from dpo_cli.results.intervals import Interval, Sides
from dpo_cli.results.judgement import Evaluation
from dpo_cli.results.methods_compared import MethodRow, MethodsCompared
from dpo_cli.results.settings_swept import Best, SettingRow, SettingsSwept
from dpo_cli.results.summary import RunSummary
from dpo_cli.results.validation import Validation
from dpo_cli.strategies.figures import FIGURES, LINE_FIGURES, Figure
from dpo_cli.strategies.row_kinds import DEMONSTRATIONS, PAIRS
from dpo_cli.training.callbacks.health_rules import NOT_AT_REFERENCE, RULES, wrong_start

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "reference"
WRITTEN = "<!-- Written by `make reference`: change its source, not this page. -->"
LINE = 96  # characters of a line of a JSON shape
CONTRACT = ROOT / "tests" / "contract.json"

COMMANDS_INTRO = """\
`dpo COMMAND --help` prints the same. `key=value` after a config overrides a value of the file; the value is read as JSON
where it is JSON. `-` in place of CONFIG reads standard input."""

OPTIONS_INTRO = """\
A config is a flat JSON object. Comments and trailing commas are accepted. An unknown key is an error with a suggestion.
The file `dpo_cli/config/schema.json` declares every option; `dpo validate --schema` prints its path, for completion in an
editor (`"$schema"`). A default in parentheses applies to a strategy or to a `compute_specs` profile."""

CODES_INTRO = """\
Every problem has a code. Codes are stable: scripts may compare them. *error* stops the command, *warning* and *hint* do
not. `dpo validate --strict` treats warnings as errors. The messages below are those of the program for the example shown."""

ROWS_INTRO = """\
Faults of single rows. With `"on_bad_rows": "skip"` each is a warning, and the row is skipped."""

EXITS = {
    Exit.DONE: ("done", "The command finished. A validated config has no errors."),
    Exit.FAILED: ("failed while running", "Something outside the input failed: a download, an endpoint, a full disk."),
    Exit.USAGE: ("wrong usage", "The command line itself is wrong: an unknown option, a missing argument."),
    Exit.INVALID: ("config or data invalid", "At least one problem is an error. The output lists all of them."),
    Exit.UNFIT: ("does not fit the hardware", "The memory bill is over the budget, or the disk has too little space."),
    Exit.MISSED: (
        "a limit was missed",
        "A figure misses its `--fail-under` limit, the training was stopped as unhealthy, a round has no pairs, no setting of "
        "a sweep can win, or an export is worse than its run.",
    ),
    Exit.SIGINT: ("stopped by SIGINT (Ctrl-C)", "`dpo train` has saved a checkpoint and the adapter so far."),
    Exit.SIGTERM: ("stopped by SIGTERM", "The same, for a stop by a scheduler or `kill`."),
}

EXITS_INTRO = """\
Scripts can rely on these codes. A signal that arrives before the first step of a training, or during `dpo augment`, ends
the command at once; files that are written so far stay."""

# The files of a run, by pattern: when they are there, and what they hold.
RUN_FILES = {
    "plan.json": "Every resolved value with its source, token counts, the memory bill. `dpo train plan.json` repeats the run.",
    "manifest.json": "Versions, hardware, SHA-256 of dataset and model, seed, git commit.",
    "metrics.jsonl": "One line per logged step and per evaluation. Each line is flushed.",
    "metrics.json": "The summary: status, steps, seconds, figures, health events. CI reads this file.",
    "evaluation.json": "The evaluation at the end: figures by category, the scores of each held-out row, sample answers.",
    "report.html": "The report: one file, no network. Written last.",
    "train.log": "Messages and warnings of the libraries.",
    "run.lock": "The lock, and the process that has the directory or had it last.",
    "adapter/adapter_model.safetensors": "The weights of the adapter.",
    "adapter/adapter_config.json": "The adapter's settings in PEFT format.",
    "adapter/README.md": "The model card.",
    "adapter/*": "The tokenizer and its chat template.",
    "checkpoints/*/SHA256SUMS": "The digest of each other file of the checkpoint; `sha256sum -c SHA256SUMS` verifies it.",
    "checkpoints/*": "The state that `dpo train --resume` continues from. The two newest checkpoints are kept.",
}
SOMETIMES = {
    "model/": 'Instead of `adapter/`, with `"lora_r": 0`: every weight.',
    "side-by-side.html": "The page of `dpo vote`.",
    "votes.json": "The votes of a judge.",
    "chat-pairs.jsonl": "The pairs of votes in `dpo chat`; chat-pairs.jsonl.ties has the ties ([Chat](../guides/chat.md)).",
    "pairs.jsonl": "The pairs of a round, with their provenance ([Rounds](../guides/rounds.md)).",
    "held-out.jsonl": "The held-out pairs of all rounds.",
    "sampled.json": "What was sampled for a round: counts, mean score, the SHA-256 of its pairs.",
    "tensorboard/": 'Event files, with `"report_to": "tensorboard"`.',
}

JSON_INTRO = """\
With `--json` standard output holds exactly one JSON document. All other output goes to standard error. All keys below are
always present; a value that does not exist is `null`. New keys may be added in a minor version; keys are not removed or
renamed within a major version ([version policy](../changelog.md#version-policy)).

The shapes are those of real runs of a tiny model: a value is replaced by its kind (`number`, `text`, `bool`, `null`), a
list by the distinct shapes of its parts. Where a figure has an interval, `value` is the figure and `low` and `high` bound its
95 % bootstrap interval over prompts. `config` always holds the resolved [options](options.md) and is not repeated."""


def page(title: str, *parts: str) -> str:
    return "\n\n".join((f"# {title}", WRITTEN, *parts)).rstrip() + "\n"


def table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace(chr(10), ' ') for cell in line)} |" for line in lines)


def commands_page() -> str:
    group: Any = typer.main.get_command(app)
    parts = [_command(name, command) for name, command in group.commands.items() if not command.hidden]
    listed = [
        (f"[`dpo {name}`](#dpo-{name})", command.help.splitlines()[0])
        for name, command in group.commands.items()
        if not command.hidden
    ]
    own = [(f"`{parameter.opts[0]}`", _help(parameter)) for parameter in group.params if parameter.opts[0] != "--help"]
    top = "Options of `dpo` itself:\n\n" + table(("option", "meaning"), own)
    return page("Commands", COMMANDS_INTRO, table(("command", "purpose"), listed), top, *parts)


def _command(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(["dpo", name, *command.collect_usage_pieces(context)])
    parts = [f"## `dpo {name}` {{ #dpo-{name} }}", command.help, f"```text\n{usage}\n```"]
    arguments = [(_code(p.metavar or p.name.upper()), _help(p)) for p in command.params if not p.opts[0].startswith("-")]
    if arguments:
        parts.append(table(("argument", "meaning"), arguments))
    flags = [(_code(_flag(p)), _help(p)) for p in command.params if p.opts[0].startswith("-")]
    return "\n\n".join([*parts, table(("option", "meaning"), flags)])


def _flag(parameter: Any) -> str:
    """The option with the kind of its value: "--vram NUMBER"."""
    value = parameter.metavar or ""
    if not value and not parameter.is_flag:
        kind = parameter.type_descriptor.annotation
        kinds = {float: "NUMBER", int: "N", Path: "PATH", str: "TEXT"}
        value = "|".join(get_args(kind)) if get_origin(kind) is Literal else kinds[kind]
    return f"{', '.join(parameter.opts)} {value}".strip()


def _code(text: str) -> str:
    """Code in a cell of a table."""
    return f"`{text}`".replace("|", "\\|")


def _help(parameter: Any) -> str:
    required = " Required." if parameter.required and parameter.opts[0].startswith("-") else ""
    variable = f" Environment variable: `{parameter.envvar}`." if getattr(parameter, "envvar", None) else ""
    return f"{parameter.help or ''}{required}{variable}"


def options_page() -> str:
    groups = dict.fromkeys(option.group for option in options().values())
    parts = []
    for group in groups:
        parts.append(f"## {group}")
        parts += [_option(option) for option in options().values() if option.group == group]
    return page("Options", OPTIONS_INTRO, *parts)


def _option(option: Option) -> str:
    """A section: the meaning, then what the value may be and where it comes from."""
    free = [strategy for strategy in option.strategies if option.may_change(strategy)]
    where = "" if free == option.strategies else f" ({', '.join(free)})"
    facts = {
        "Value": option.type_words,
        "Default": option.default_words,
        "Strategies": ", ".join(option.strategies),
        "Source": option.source,
        "Names in other tools": ", ".join(f"`{name}`" for name in option.known_as),
        "Status": option.not_yet_words,
        "Resume": f"`dpo train --resume` accepts another value{where}" if free else "",
    }
    listed = "\n".join(f"- {name}: {words}" for name, words in facts.items() if words)
    section = f"### `{option.name}` {{ #{option.name} }}\n\n{option.description}\n\n{listed}"
    inner = option.rule.get("properties")
    if inner:
        rows = [(f"`{name}`", f"`{json.dumps(rule.get('default'))}`", _part_values(rule)) for name, rule in inner.items()]
        section += f"\n\n{table(('part', 'default', 'values'), rows)}"
    return section


def _part_values(rule: dict[str, Any]) -> str:
    if "enum" in rule:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in rule["enum"])
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    kinds = rule.get("type", "")
    kind = " or ".join(kinds) if isinstance(kinds, list) else kinds
    return ", ".join([kind, *(f"{words[bound]} {rule[bound]:,}" for bound in words if bound in rule)])


def codes_page() -> str:
    """The tables of codes, with an anchor for each: problem-codes.html#few-pairs."""
    titles = {"Config, data and commands": reference.code_table(), "Rows": f"{ROWS_INTRO}\n\n{reference.row_table()}"}
    text = "\n\n".join(f"## {title}\n\n{content}" for title, content in titles.items())
    text = text.replace("| code | is | for example | what it says |", "| code | severity | example | message and fix |")
    return page("Problem codes", CODES_INTRO, re.sub(r"^\| `([\w-]+)` \|", r"| `\1`{ #\1 } |", text, flags=re.MULTILINE))


def exits_page() -> str:
    rows = [(str(int(code)), *EXITS[code]) for code in Exit]
    return page("Exit codes", EXITS_INTRO, table(("code", "meaning", "when"), rows))


FIGURES_INTRO = """\
Each figure is reported with a 95 % bootstrap interval over prompts, computed on held-out rows. The reward of a response is
`beta * (log p(policy) - log p(reference))`. `dpo eval --fail-under` sets limits on any of them, and on `base.NAME` and
`gain.NAME` for those with *base and gain*. The *gain* is the paired difference adapter minus base on the same rows."""


def figures_page() -> str:
    rows = [
        (
            f"`{figure.name}`",
            figure.label,
            figure.meaning,
            _rows(figure),
            _better(figure),
            "yes" if figure.alone else "",
            ", ".join(_places(figure)),
        )
        for figure in {**FIGURES, **LINE_FIGURES}.values()
    ]
    header = ("figure", "label", "meaning", "strategies", "better", "base and gain", "also shown in")
    return page("Figures", FIGURES_INTRO, table(header, rows))


def _better(figure: Figure) -> str:
    """Which direction is better; nothing for a figure that only describes."""
    describes = not figure.formulas and not figure.limit_option
    return "" if describes else "larger" if figure.is_better_large else "smaller"


def _rows(figure: Figure) -> str:
    kinds = figure.formulas or figure.alone
    names = [name for kind, name in ((PAIRS, "dpo"), (DEMONSTRATIONS, "sft")) if kind in kinds]
    return ", ".join(names or ["dpo", "sft"])


def _places(figure: Figure) -> Iterator[str]:
    if figure.in_lines and figure.formulas:
        yield "`metrics.jsonl`"
    if figure.short:
        yield "live view"
    if figure.title:
        yield "curve in the report"
    if figure.limit_option:
        yield f"limit: option `{figure.limit_option}`"


HEALTH_INTRO = """\
`dpo train` checks each optimizer step and each evaluation against these rules. A rule reports at most once per run: on the
screen with its remedy, in `health` of `metrics.json`, and in the report. *stop* ends the training after the step, saves the
adapter and exits with 5. *warn* and *note* only report; `"stop_on": ["kl"]` makes a warning stop too."""


def health_page() -> str:
    rows = [(f"`{NOT_AT_REFERENCE}`", "stop", _when(wrong_start))]
    rows += [(f"`{name}`", action, _when(rule)) for name, (action, rule) in RULES.items()]
    parts = (table(("rule", "action", "when"), rows), _limits())
    return page("Health rules", HEALTH_INTRO, *parts)


def _when(rule: Any) -> str:
    """The first paragraph of a rule's docstring."""
    return inspect.cleandoc(rule.__doc__).split("\n\n")[0].replace("\n", " ")


def _limits() -> str:
    """The numbers that the rules compare with, each in the words of the comment behind it."""
    text = inspect.getsource(inspect.getmodule(wrong_start))  # type: ignore[arg-type]
    lines = re.findall(r"^([A-Z][A-Z_]+(?:, [A-Z_]+)*) = ([^#\n]+)  # (.+)$", text, re.MULTILINE)
    rows = [(f"`{names}`", f"`{values}`", words) for names, values, words in lines if re.search(r"\d", values)]
    return f"## Limits\n\n{table(('constant', 'value', 'meaning'), rows)}"


def run_page() -> str:
    """From the files that a real run leaves; one that no pattern explains is an error."""
    files: list[str] = json.loads(CONTRACT.read_text(encoding="utf-8"))["files of runs/dpo"]
    by_pattern: dict[str, list[str]] = {}
    for file in sorted(set(files) - SOMETIMES.keys()):
        pattern = next((pattern for pattern in RUN_FILES if fnmatch(file, pattern)), None)
        assert pattern, f"RUN_FILES has no words for {file}"
        by_pattern.setdefault(pattern, []).append(file)
    rows = [(_names(pattern, by_pattern.get(pattern, [])), words) for pattern, words in RUN_FILES.items()]
    intro = (
        "A run directory is `output_dir`; the default is `runs/` and the name of the config file. Each whole file is written "
        "under another name first and then renamed, so a reader never sees half a file. "
        "The keys of the JSON files are in [JSON documents](json.md#files-of-a-run)."
    )
    sometimes = table(("file", "content"), [(f"`{name}`", words) for name, words in SOMETIMES.items()])
    extra = f"## Only with some options\n\n{sometimes}"
    return page("Run directory", intro, table(("file", "content"), rows), extra)


def _names(pattern: str, files: list[str]) -> str:
    if "*" not in pattern:
        return f"`{pattern}`"
    names = dict.fromkeys(re.sub(r"step-\d+", "step-N", file) for file in files)
    return "<br>".join(f"`{name}`" for name in names) or f"`{pattern}`"


def json_page() -> str:
    contract: dict[str, Any] = json.loads(CONTRACT.read_text(encoding="utf-8"))
    parts = [JSON_INTRO, "## Documents of the commands"]
    by_shape: dict[str, list[str]] = {}  # commands that print the same shape share a section
    for name, value in contract.items():
        if isinstance(value, dict) and value.keys() == {"exit", "document"} and value["document"] is not None:
            by_shape.setdefault(_shape(value["document"]), []).append(name)
    parts += [f"### {' · '.join(f'`{name}`' for name in names)}\n\n{shape}" for shape, names in by_shape.items()]
    parts.append("## Files of a run")
    parts += [
        f"### `{name}`\n\n{_shape(value)}"
        for name, value in contract.items()
        if name.startswith("runs/") and name.endswith((".json", ".jsonl"))
    ]
    parts.append(f"### `export.json`\n\n{_shape(contract['whole/export.json'])}")
    return page("JSON documents", *parts)


def _shape(value: Any) -> str:
    return f"```text\n{_laid_out(_without_options(value))}\n```"


def _without_options(value: Any) -> Any:
    """A shape of the contract without its config, and with the kind of a value where the contract has the value."""
    if isinstance(value, dict):
        return {key: "options" if key == "config" and child else _without_options(child) for key, child in value.items()}
    if isinstance(value, list):
        shapes = [_without_options(child) for child in value]
        return [shape for i, shape in enumerate(shapes) if shape not in shapes[:i]]
    kinds = ("null", "bool", "number", "text", "object", "options")
    return value if value in kinds else {bool: "bool", int: "number", str: "text"}.get(type(value), "null")


def _laid_out(value: Any, indent: str = "") -> str:
    """JSON in which an object or list stands on one line where it fits."""
    line = json.dumps(value)
    if len(indent) + len(line) <= LINE or not isinstance(value, dict | list):
        return line
    deeper = indent + "  "
    if isinstance(value, list):
        return "[\n" + ",\n".join(deeper + _laid_out(part, deeper) for part in value) + f"\n{indent}]"
    parts = (f"{deeper}{json.dumps(key)}: {_laid_out(child, deeper)}" for key, child in value.items())
    return "{\n" + ",\n".join(parts) + f"\n{indent}}}"


API_POLICY = "These names follow the [version policy](../changelog.md)."
RESULTS = (
    *(Validation, Recommendation, api.TrainedRun, RunSummary, Evaluation, MethodsCompared, MethodRow),
    *(SettingsSwept, SettingRow, Best, Sides, Interval),
)


def api_page() -> str:
    names = [name for name in getattr(dpo_cli, "__all__", ()) if not name.startswith("_")]
    parts = []
    for name in names:
        value = getattr(dpo_cli, name)
        if callable(value):
            signature = str(inspect.signature(value)).replace("'", "")
            parts.append(f"## `{name}`\n\n```python\n{name}{signature}\n```\n\n{inspect.getdoc(value) or ''}")
    about, example, rest = (inspect.getdoc(api) or "").split("\n\n", 2)
    first, *more = (line.removeprefix(">>> ") for line in example.splitlines())
    code = "\n".join([first, "", *more])  # as ruff formats it
    results = [f"- `{kind.__name__}`: {', '.join(f'`{one.name}`' for one in fields(kind))}" for kind in RESULTS]
    return page("Python API", about, f"```python\n{code}\n```", rest, *parts, "## Results", "\n".join(results), API_POLICY)


MODULES_INTRO = """\
The first line of each module's docstring. [Architecture](../explanation/architecture.md) explains the folders."""


def modules_page() -> str:
    """Each module by its folder, in the words of its own docstring; one without a docstring is an error."""
    parts = [MODULES_INTRO]
    package = ROOT / "dpo_cli"
    for folder in (package, *sorted(path.parent for path in package.glob("*/__init__.py"))):
        rows = []
        for path in sorted(folder.rglob("*.py") if folder != package else folder.glob("*.py")):
            words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert words or path.name == "__init__.py", f"{path} has no docstring"
            if path.name != "__init__.py":
                rows.append((f"`{path.relative_to(ROOT)}`", (words or "").split("\n\n")[0].replace("|", "\\|")))
        parts.append(f"## `{folder.relative_to(ROOT)}/`\n\n{table(('module', 'purpose'), rows)}")
    return page("Modules", *parts)


def pages() -> dict[Path, str]:
    """Each page of the reference with the text it should have."""
    made = {
        "commands": commands_page,
        "options": options_page,
        "problem-codes": codes_page,
        "exit-codes": exits_page,
        "figures": figures_page,
        "health-rules": health_page,
        "run-directory": run_page,
        "json": json_page,
        "python-api": api_page,
        "modules": modules_page,
    }
    return {PAGES / f"{name}.md": build() for name, build in made.items()}


if __name__ == "__main__":
    sys.exit(reference.refresh(pages()))
