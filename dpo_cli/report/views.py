"""The content of a report, as plain values: tables and lines. The templates only lay them out."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.report.run_data import Contents
from dpo_cli.report.svg import DIGITS
from dpo_cli.results.compared import compared
from dpo_cli.results.durations import in_words
from dpo_cli.results.intervals import Interval, required
from dpo_cli.results.summary import Memory
from dpo_cli.storage.jsonio import json_text
from dpo_cli.strategies.figures import FIGURES, FigureText, number

MOST_TEXT = 1500  # characters shown of one text


def tiles(run: Contents) -> list[tuple[str, FigureText]]:
    """The figures that a reader needs first; related figures are together."""
    if run.judged is None:
        return []
    policy, gain = run.judged.policy, run.judged.gain
    distance = ("kl_sequence",) if policy.get("kl_sequence") else run.method.distance
    shown, gained = [(name, required(policy, name)) for name in run.method.shown], run.method.gains[:1]
    return [
        *((FIGURES[name].label, FIGURES[name].text(value)) for name, value in shown),
        *((f"gain in {FIGURES[name].label}", FIGURES[name].gain(required(gain, name))) for name in gained),
        *((FIGURES[name].label, FIGURES[name].text(required(policy, name))) for name in distance),
    ]


@dataclass(frozen=True)
class ComparedFigure:
    """A row of the table of base, adapter and gain; with a whisker if the gain is finite."""

    label: str
    base: FigureText | None
    policy: FigureText
    gain: FigureText | None
    whisker: Interval | None
    good: bool  # whether a larger value is better


def against(run: Contents) -> list[ComparedFigure]:
    """The rows of the table."""
    assert run.judged is not None
    sides, rows = run.judged, []
    for name, figure in FIGURES.items():
        if (policy := sides.policy.get(name)) is None:
            continue
        base, gain = sides.base.get(name), sides.gain.get(name)
        row = ComparedFigure(
            figure.label,
            figure.text(base) if base else None,
            figure.text(policy),
            figure.gain(gain) if gain else None,
            gain if gain and gain.is_finite else None,
            figure.is_better_large,
        )
        rows.append(row)
    if run.evaluation and (tokens := run.evaluation.answer_tokens):
        gained = number(tokens["gain"], signed=True, digits=1)
        before, after = (number(tokens[side], digits=1) for side in ("base", "policy"))
        rows.append(ComparedFigure(FIGURES["answer_tokens"].label, before, after, gained, None, good=True))
    return rows


@dataclass(frozen=True)
class ByCategory:
    """A row for each category of the held-out rows: its name, its number of rows, and its figures in these columns."""

    names: Sequence[str]
    rows: Sequence[tuple[str, int, Sequence[FigureText]]]


def categories(run: Contents) -> ByCategory | None:
    """The figures by category, if the held-out rows have categories."""
    if run.evaluation is None or not run.evaluation.categories:
        return None
    shown, gained = run.method.shown, run.method.gains[:1]
    rows = []
    for name, part in run.evaluation.categories.items():
        assert part.sides is not None
        figures = [FIGURES[figure].text(required(part.sides.policy, figure)) for figure in shown]
        gains = [FIGURES[figure].gain(required(part.sides.gain, figure)) for figure in gained]
        rows.append((name, part.count, [*figures, *gains]))
    return ByCategory([FIGURES[name].label for name in shown] + [f"gain in {FIGURES[name].label}" for name in gained], rows)


def data(run: Contents) -> list[tuple[str, str]]:
    """The counts before the training."""
    counts = run.plan["counts"]
    if counts is None:
        return []
    rows = [
        ("trained on", f"{counts['train_pairs']:,} {run.noun} of {counts['train_prompts']:,} prompts"),
        ("held out", f"{counts['eval_pairs']:,} {run.noun} of {counts['eval_prompts']:,} prompts"),
        ("longest", f"{counts['longest']:,} tokens ({counts['longest_at']})"),
        ("tokens per epoch", f"{counts['train_tokens']:,}"),
    ]
    labels = {
        "cut": "prompts cut at the start to fit max_seq_length",
        "too_long": "skipped: responses longer than max_seq_length",
        "parted": "prompts that the chat template renders differently before a response",
        "bad_rows": "skipped: bad rows",
    }
    rows += [(words, f"{counts[name]:,}") for name, words in labels.items() if counts[name]]
    lint = run.plan.get("data") or {}
    if lint.get("longer_chosen") is not None:
        rows.append(
            ("longer response chosen", f"in {lint['longer_chosen']:.0%} of pairs (AUC of length {lint['length_auc']:.2f})")
        )
    return rows


@dataclass(frozen=True)
class MemoryTable:
    """The memory bill: each part with its size, GB, and the width of its bar."""

    parts: Sequence[tuple[str, str, float]]
    total: str
    about: str


def bill(run: Contents) -> MemoryTable | None:
    """The memory bill, and what was measured."""
    memory = run.plan["memory"]
    if memory is None:
        return None
    largest = max(memory["components"].values()) or 1.0
    parts = [
        (name.replace("_", " "), f"{size:.2f}", round(300 * size / largest, 1))
        for name, size in memory["components"].items()
        if size
    ]
    memory_of_run = run.summary.memory if run.summary else Memory()
    about = "The plan's bill for the peak of a step"
    total, budget = compared(memory["total_gb"], memory["budget_gb"] or 0.0, digits=2)
    about += f", of {budget} GB available." if memory["budget_gb"] else "."
    if memory_of_run.measured_gb and memory_of_run.predicted_gb:
        what, includes = "the whole process, including what malloc keeps", "libraries and the loading of the model included"
        if run.config["device"] == "cuda":
            what, includes = "the GPU's allocator", "CUDA's context and the allocator's slack not included"
        measured, billed = memory_of_run.measured_gb, memory_of_run.predicted_gb
        about += f" Measured: {measured:.2f} GB ({what}); billed for that: {billed:.2f} GB ({includes}); "
        about += f"ratio: {measured / billed:.2f}."
    return MemoryTable(parts, total, about)


GIVEN = {"config": "config", "override": "command line"}
OTHERS = {"default": "default", "profile": "profile", "measured": "machine"}


def config(run: Contents) -> dict[str, list[tuple[str, str, str]]]:
    """The options that the user set, and the rest; each key with its value and its source."""
    sources = run.plan["sources"]
    given: list[tuple[str, str, str]] = []
    rest: list[tuple[str, str, str]] = []
    for key, value in run.config.items():
        source = sources.get(key, "default")
        row = (key, json_text(value), {**GIVEN, **OTHERS}[source])
        (given if source in GIVEN else rest).append(row)
    return {"given": given, "rest": rest}


def command(run: Contents) -> str:
    """The command that trains the run again, in a new directory."""
    again = run.path.with_name(f"{run.name}-again")
    return f"dpo train {shlex.quote(str(run.path / 'plan.json'))} output_dir={shlex.quote(str(again))}"


def made_with(run: Contents) -> list[tuple[str, str]]:
    """Versions, hardware, hashes: everything else that must be the same."""
    manifest = run.manifest
    hardware = manifest["hardware"]
    machine = f"{hardware['cores']} cores of {hardware['processor']}, {hardware['memory_gb']:g} GB"
    gpus = [str(gpu["name"]) for gpu in hardware["gpus"]]
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())),
        ("machine", ", ".join([*gpus, machine])),
        ("seed", str(manifest["seed"])),
        ("git commit", manifest["git_commit"] or "outside a repository"),
    ]
    rows += [(f"dataset {Path(file).name}", f"SHA-256 {digest}") for file, digest in manifest["dataset"].items()]
    rows += [(f"model {file}", f"SHA-256 {digest}") for file, digest in manifest["model"]["sha256"].items()]
    if run.summary:
        rows.append(("what was trained", f"SHA-256 {run.summary.adapter_sha256}"))
    return rows


def facts(run: Contents) -> list[str]:
    """The run in one line."""
    settings = run.config
    model = Path(settings["model_name"]).name if Path(settings["model_name"]).is_absolute() else settings["model_name"]
    trained = "every weight" if run.is_whole else f"LoRA rank {settings['lora_r']}"
    parts = [settings["strategy"], model, ", ".join(Path(file).name for file in run.manifest["dataset"]), trained]
    parts.append(f"learning rate {settings['learning_rate']:g}")
    if run.takes("beta"):
        parts.append(f"beta {settings['beta']:g}")
    if run.summary:
        parts += [f"{run.summary.steps:,} steps", duration(run.summary.seconds)]
    return [fact for fact in parts if fact]


def duration(seconds: float) -> str:
    """The time in words, without line breaks."""
    return in_words(seconds).replace(" ", "\N{NO-BREAK SPACE}")


def reading(value: float | None) -> str:
    """A value of a curve."""
    return "not finite" if value is None else f"{value:.{DIGITS}g}"


def signed(value: float) -> str:
    """A reward, a margin."""
    return f"{value:+.3f}" if math.isfinite(value) else "not finite"


def shortened(text: str) -> str:
    """A long text without its middle: the end of a prompt matters, and the start of a response."""
    if len(text) <= MOST_TEXT:
        return text
    half = MOST_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
