"""`make reference`: writes dpo_cli/config/options.pyi, and the tables of the pages; `--check` compares.

A table stands between two marks in README.md or a page below docs/, whichever has them. It is made from the schema, from the
cases of the tests, or from a baseline of a benchmark.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dpo_cli.config.config import load
from dpo_cli.config.schema import Option, options
from dpo_cli.errors import Problem
from dpo_cli.plan.preflight import inspect

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
from bad_configs import CARD, CASES, Case, lay_out  # noqa: E402
from bad_rows import FAULTS, Fault  # noqa: E402
from baseline import BASELINES, Baseline, block  # noqa: E402
from cluster import inputs  # noqa: E402
from suite import BENCHMARKS  # noqa: E402

STUB = ROOT / "dpo_cli" / "config" / "options.pyi"


def annotation(option: Option) -> str:
    """The Python type of an option's values."""
    rule = option.rule
    if "enum" in rule:
        words = [repr(choice) for choice in rule["enum"] if choice is not None]
        return f"Literal[{', '.join(words)}]" + (" | None" if None in rule["enum"] else "")
    names = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "array": "list[Any]", "null": "None"}
    types = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    return " | ".join({**names, "object": "dict[str, Any]"}[name] for name in types)


def stub() -> str:
    fields = "\n".join(f"    {name}: {annotation(option)}" for name, option in options().items())
    return f"""# Written by `make reference` from schema.json.
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

@dataclass(frozen=True)
class Config:
{fields}

    def replaced(self, values: Mapping[str, object]) -> Config: ...
    def to_json(self) -> dict[str, Any]: ...
"""


# What only a command that loads the model can find.
WHILE_RUNNING = {
    "yaml-syntax": (
        "error",
        "`beta:0.1` in a .yaml file",
        "the text is not YAML, or has a tag, several documents or a key that is not a text",
    ),
    "toml-syntax": ("error", "`use_4bit = True` in a .toml file", "the text is not TOML"),
    "import-nothing": (
        "error",
        "`dpo import` of a script without a training",
        "the file has no setting of a training, or several trainings",
    ),
    "import-unreadable": (
        "error",
        "`dpo import` of a program with a syntax error",
        "the file is not of the form that its name says",
    ),
    "import-method": ("error", "`dpo import` of `rl: orpo`", "a method that is not here; the config has no such key then"),
    "import-dataset": (
        "error",
        "`dpo import` of `dataset: dpo_en_demo`",
        "a dataset that the other tool knows by a name, and whose file is not found",
    ),
    "import-computed": (
        "warning",
        "`dpo import` of `--beta $BETA`",
        "a program or a shell computes the value, so it has to be written by hand",
    ),
    "import-value": (
        "warning",
        "`dpo import` of `hub_model_id: my-adapter`",
        "the value of a key that has a counterpart is not one here, so the key is left out",
    ),
    "stages-one-place": ("error", "two stages with one `output_dir`", "the second would replace the first"),
    "method-merges": (
        "error",
        '`dpo compare` of a method whose second stage has `"reference": "base"`',
        "the first stage would be merged into the base, and what is trained would not be an adapter of the base",
    ),
    "bitsandbytes-missing": ("warning", '`"use_4bit": true`', "bitsandbytes is not installed; stops a training"),
    "tracker-missing": ("warning", '`"report_to": "wandb"`', "the package of a tracker is not installed; stops a training"),
    "wandb-login": ("warning", '`"report_to": "wandb"`', "wandb has no key, or one that cannot be; stops a training"),
    "dataset-changed": ("error", "a file that is still being written", "its rows are not those that would be hashed"),
    "other-processes": (
        "error",
        '`torchrun --nproc-per-node 4` with `"num_processes": 2`',
        "a launcher has started another number of processes",
    ),
    "no-system-role": (
        "error",
        "`dpo chat --system TEXT`",
        "the chat template of the model rejects or omits a system message, or there is no template",
    ),
    "no-room-to-answer": (
        "error",
        "`dpo chat --max-new-tokens N`",
        "an answer of so many tokens leaves no room for the prompt in the model's context",
    ),
    "run-exists": ("error", "`dpo train` twice", "output_dir already holds a run; `--overwrite` replaces it"),
    "run-locked": ("error", "`dpo train` twice at once", "another process is using output_dir; it is named"),
    "resume-differs": (
        "error",
        "`dpo train --resume` with another `learning_rate`",
        "the run was started with other values, and would become another run; each difference is named",
    ),
    "disk-too-full": ("error", "a small disk", "the checkpoints and the adapter find no room where output_dir is; exit 4"),
    "run-unwritable": ("error", '`"output_dir": "/proc/run"`', "output_dir cannot be written"),
    "run-link": ("error", "a link in a run directory", "what is written there would be written elsewhere"),
    "not-a-run": ("error", "`dpo eval .`", "the folder is not a finished run"),
    "not-an-adapter": (
        "error",
        "`dpo eval my-config.json --adapter .`",
        "the folder is not a PEFT adapter that can be evaluated",
    ),
    "adapter-changed": ("error", "a changed file in `adapter/`", "the adapter has changed since the run wrote it"),
    "nothing-to-compare": (
        "error",
        '`dpo export` of a run with `"eval_split": 0`',
        "the merged model cannot be compared with the run: name a `--dataset`",
    ),
    "sweep-key": (
        "error",
        "`dpo sweep my-config.json seed=1,2`",
        "a sweep cannot vary this key: the settings could not be compared, or the choice would be of luck",
    ),
    "sweep-of-several": (
        "error",
        "`dpo sweep` of a config with `stages` or `rounds`",
        "a sweep varies one training: name the run of the stage before in `model_name`",
    ),
    "optuna-missing": (
        "error",
        "`dpo sweep my-config.json beta=0.1..1 --trials 9`",
        "Optuna is not installed; without `--trials`, a grid needs no package",
    ),
    "run-of-rewards": (
        "error",
        '`dpo export` or `dpo vote` of a run with `"strategy": "reward"`',
        "a reward model gives scores, and writes no answers",
    ),
    "votes-unreadable": ("error", "`dpo vote --tally gone.json`", "there is no such file, or it is damaged"),
    "not-votes": ("error", "`dpo vote --tally config.json`", "the file is another JSON file; the first place that differs"),
    "no-votes": ("error", "`dpo vote --tally votes.json`", "there are no votes yet"),
    "votes-of-people": (
        "error",
        "`dpo vote runs/my-run --judge`",
        "`votes.json` in the run directory holds votes of people, which would be replaced",
    ),
    "export-worse": (
        "error",
        "`dpo export` of a 4-bit run, or of a short one in 16 bits",
        "merged, the model is worse than its run: nothing is exported",
    ),
    "gguf-differs": (
        "error",
        "`dpo export --gguf q8_0`",
        "the GGUF file, read back, has other most likely tokens than the merged model, which is kept",
    ),
    "no-such-module": (
        "error",
        '`"target_modules": ["nope"]`',
        "the model has no linear layer of that name; those it has are named",
    ),
    "adapter-refused": (
        "error",
        '`"target_modules"` that PEFT does not take',
        "PEFT cannot put this adapter on the model: its reason, and the layers that exist",
    ),
    "target-unreached": (
        "error",
        '`"target_modules": ".*vision_tower.*_proj"`',
        "no text reaches the layers that are named: an adapter there would learn nothing",
    ),
    "tensors-unaccounted": (
        "error",
        "weights under other names",
        "a model or an adapter lacks tensors, or holds some without a place in the model; they are named",
    ),
    "weights-not-finite": ("error", "NaN in a model's file", "a model or an adapter holds NaN or infinity; tensors are named"),
    "adapter-damaged": ("error", "a cut `adapter_model.safetensors`", "the file cannot be read"),
    "adapter-unsupported": (
        "error",
        '`"bias": "all"` in an adapter_config.json',
        "the base of such an adapter is not its reference; the setting is named",
    ),
    "adapter-resized": ("error", "an adapter with new tokens", "its embedding has other rows than the model's"),
    "adapter-other-base": ("error", "an adapter on another model", "the adapter was made on a model of other layers or values"),
    "merge-differs": ("error", "an adapter that PEFT cannot merge", "merged, the model computes other log-probs"),
    "template-unbounded": (
        "error",
        "a chat template that loops for ever",
        "it does not end within 3 s on one conversation, or asks for a gibibyte",
    ),
    "template-refuses": ("error", "two user messages in a row, for Gemma", "the template's own words, and the rows"),
    "template-fails": (
        "error",
        "a number where the template joins texts",
        "a Python error inside the template, and the part of the message that it comes from",
    ),
    "template-leaves-out": (
        "warning",
        "reasoning before `</think>`, for R1-Distill",
        "the template leaves out a part of a message, which is named; an error where that is the whole response",
    ),
    "earlier-reasoning": (
        "hint",
        "reasoning in an earlier turn, for Qwen 3",
        "the template leaves out the reasoning of earlier turns, as it does when the model is used",
    ),
    "no-eos": (
        "warning",
        "a template that ends a turn with another token",
        "a response has no EOS, so the model does not learn where to stop",
    ),
    "no-chat-template": ("error", '`"use_chat_template": true`', "the model has no chat template"),
    "messages-without-template": (
        "error",
        '`"use_chat_template": false` and rows of messages',
        "such rows need a chat template",
    ),
    "hub-split": (
        "hint",
        '`"dataset": "owner/name"`',
        "which split of a fetched hub dataset is read, and how many files that is",
    ),
    "row-no-reference": ("error", '`"rank": "reference"`', "the prompts that have no reference (or chosen) to compare with"),
    "prompts-missing": ("error", "`dpo augment gone.txt`", "there is no such file"),
    "prompts-format": ("error", "`dpo augment prompts.doc`", "which files of prompts are read"),
    "prompts-unreadable": ("error", "`dpo augment folder.txt`", "the file cannot be read"),
    "no-prompts": ("error", "`dpo augment` of an empty file", "the file holds no prompt"),
    "out-changed": ("error", "an edited, unfinished `--out` file", "the file has changed since it was written"),
    "out-other-settings": ("error", "`dpo augment` continued with another seed", "each setting that differs, with both values"),
    "model-unknown": (
        "error",
        "`dpo recommend --model me/mine`",
        "the shape of the model is not known, so nothing can be billed",
    ),
}


def code_table() -> str:
    """Markdown: each code with its first case in tests/bad_configs.py, and what `dpo validate` says of it."""
    rows = ["| code | is | for example | what it says |", "|---|---|---|---|"]
    of_rows = {fault.code for fault in FAULTS}
    first = {case.code: case for case in reversed(CASES) if case.code not in of_rows}
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        lay_out(Path(name))
        for case in sorted(first.values(), key=lambda case: CASES.index(case)):
            problem = _problem(case)
            says = f"{problem.message}. *{problem.fix}*"
            rows.append(f"| `{case.code}` | {problem.severity} | {_cell(f'`{_example(case)}`')} | {_cell(says)} |")
    rows += [f"| `{code}` | {severity} | {example} | {says} |" for code, (severity, example, says) in WHILE_RUNNING.items()]
    return "\n".join(rows)


def row_table() -> str:
    """Markdown: each fault of a row in tests/bad_rows.py, and what `dpo validate` says of it."""
    rows = ["| code | is | for example | what it says |", "|---|---|---|---|"]
    cases = {case.code: case for case in CASES}
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        lay_out(Path(name))
        for fault in FAULTS:
            problem = _problem(cases[fault.code])
            rows.append(f"| `{fault.code}` | {problem.severity} | {_cell(_shown(fault))} | {_cell(problem.message)} |")
    return "\n".join(rows)


def _shown(fault: Fault) -> str:
    return fault.shown or f"`{fault.row.decode(errors='replace')}`"


def _problem(case: Case) -> Problem:
    Path("config.json").write_bytes(case.config)
    found = inspect(load("config.json"), case.machine, case.vram_gb).problems
    named = [problem for problem in found if problem.code == case.code]
    assert named, f"no {case.code} is found in {case.config[:200]!r}, but {[problem.code for problem in found]}"
    return named[0]


def _example(case: Case) -> str:
    """The text that is wrong, and the machine where it is the machine that is."""
    text = case.own if case.text is None else case.text[:40].decode(errors="replace")
    if case.code == "config-unreadable":
        return "a config in UTF-16"
    if case.vram_gb is not None:
        return f"{text} with --vram {case.vram_gb:g}"
    hosts = {True: f"with {case.machine.memory_gb:g} GB of memory", False: "without such a GPU"}
    if case.machine.is_apple:
        return f"{text} on a Mac with Apple silicon"
    return text if case.machine is CARD else f"{text} on a machine {hosts[case.code == 'small-memory']}"


def _cell(text: str) -> str:
    """Text for a cell of a table, on one line and not too long."""
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))
    closing = "`" if text.startswith("`") else "*"
    return (text if len(text) <= 240 else text[:236] + "..." + closing).replace("|", "\\|")


def proof_table() -> str:
    """Markdown: this tool against plain TRL, by the kept baselines of its speed and of what both do after a crash."""
    ours, theirs, speed = (_by_first_cell(name) for name in ("torture", "torture-trl", "speed"))

    def span(column: str) -> str:
        values = [row[column] for row in speed.values()]
        return f"{min(values):.1f} to {max(values):.1f}"

    def passed(table: Mapping[str, Mapping[str, Any]], start: str, column: str) -> str:
        (row,) = (row for name, row in table.items() if name.startswith(start))
        return f"{row[column]} of {row['tries']}"

    rows = ["| | plain TRL | `dpo` | prints it |", "|---|---|---|---|"]
    rows.append(f"| speed of a training | 1 | {span('faster')} | `make speed` |")
    rows.append(f"| peak memory of it | 1 | {span('of the memory')} | `make speed` |")
    crashes = {
        "killed at a random moment, then resumed to the same bits": ("SIGKILL at a random", "SIGKILL at a random"),
        "a damaged checkpoint is seen, and the run resumed": ("the newest checkpoint", "a file of the newest"),
        "several starts in one directory: one runs": ("2 to 4 starts", "2 to 4 starts"),
        "a full disk, then room, and resumed": ("a disk of", "a disk that"),
    }
    for what, (own, other) in crashes.items():
        both = passed(theirs, other, "the same adapter"), passed(ours, own, "passed")
        rows.append(f"| {what} | {both[0]} | {both[1]} | `make torture-trl`, `make torture` |")
    return "\n".join(rows)


def _by_first_cell(name: str) -> dict[str, dict[str, Any]]:
    """The rows of a kept baseline by their first cell, each with its cells by column."""
    table = Baseline.read(BASELINES / f"{name}.json").table
    names = [column.name for column in table.columns]
    return {str(row[0]): dict(zip(names, row, strict=True)) for row in table.rows}


# What stands between the marks of a section.
SECTIONS: dict[str, Callable[[], str]] = {
    "proofs": proof_table,
    "inputs of scaling": inputs,
    **{f"baseline {name}": partial(block, name) for name in BENCHMARKS},
}
MARKED = re.compile(
    r"(<!-- (?P<section>[a-z -]+): written by `make reference` -->\n).*?(<!-- end of (?P=section) -->)", re.DOTALL
)


def pages() -> dict[Path, str]:
    """The pages that have sections."""
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))}
    return {path: text for path, text in texts.items() if MARKED.search(text)}


def sections_of(text: str) -> list[str]:
    """The sections that a page has."""
    return [mark["section"] for mark in MARKED.finditer(text)]


def filled(text: str) -> str:
    """A page with the content of its sections."""
    return MARKED.sub(lambda mark: f"{mark[1]}{SECTIONS[mark['section']]()}\n{mark[3]}", text)


def written() -> dict[Path, str]:
    """Each file that is made from something else, with the text it should have."""
    return {STUB: stub(), **{path: filled(text) for path, text in pages().items()}}


def refresh(files: dict[Path, str]) -> int:
    """Write the files whose text is another one; with --check only print them: 1 if there are some."""
    stale = {path: text for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        print(f"{'stale' if '--check' in sys.argv else 'wrote'}: {path.relative_to(ROOT)}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(refresh(written()))
