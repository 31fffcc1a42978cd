"""What a report shows of a run, as plain values: the curves, the tables, the words. The templates only lay them out."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.console import json_text
from dpo_cli.runs.charts import DIGITS, Bars, Curve, Plot, histogram
from dpo_cli.runs.contents import Contents
from dpo_cli.runs.verdict import number, points, share

MOST_TEXT = 1500  # characters shown of one text
SHORT_HASH = 12


@dataclass(frozen=True)
class Term:
    """A figure in words. A `share` is shown in per cent; `less_is_better` says which gain is good."""

    label: str
    meaning: str
    is_share: bool = False
    less_is_better: bool = False

    def text(self, figure: Mapping[str, float] | None) -> str:
        return "" if figure is None else share(figure) if self.is_share else number(figure)

    def gain(self, figure: Mapping[str, float]) -> str:
        return points(figure) if self.is_share else number(figure, signed=True)


# Each figure of an evaluation, in the order in which they are shown.
TERMS = {
    "accuracy": Term(
        "reward accuracy",
        "The share of pairs whose chosen response has the larger reward, beta * (log p of the adapter - log p of the base); "
        "a tie counts half. It reaches 1 long before a model has changed, so read it with the margin.",
        is_share=True,
    ),
    "margin": Term("margin", "The reward of the chosen response minus that of the rejected one, on average."),
    "loss": Term(
        "loss", "Of pairs -log sigmoid(margin): ln 2 = 0.693 where nothing has moved. Of demonstrations nats a token.",
        less_is_better=True,
    ),  # fmt: skip
    "token_accuracy": Term("token accuracy", "The share of tokens that the model finds most likely.", is_share=True),
    "logp_accuracy": Term(
        "log-prob accuracy",
        "The share of pairs in which one model alone gives the chosen response the larger probability. The gain, adapter minus "
        "base on the same pairs, is what training changed.",
        is_share=True,
    ),
    "normalized_logp_accuracy": Term(
        "the same, by length", "Log-prob accuracy after dividing by the responses' tokens.", is_share=True
    ),
    "kl_sequence": Term(
        "KL an answer",
        "How far the policy has moved from its base: log p of both over answers that the policy samples, nats an answer. The "
        "documentation says below 10.",
        less_is_better=True,
    ),
    "kl_token": Term(
        "KL a token", "The exact KL divergence from the base at each token of the responses, nats.", less_is_better=True
    ),
}


@dataclass(frozen=True)
class Kind:
    """One plot: its words, and the keys of metrics.jsonl that are drawn, each with what it is called there."""

    title: str
    note: str
    keys: Mapping[str, str]


KINDS = (
    Kind("Loss", "Falls from ln 2 where preferences are learned. Held out it should not rise again.", {"loss": ""}),
    Kind("Accuracy", "Share of pairs with the larger reward for chosen. Read it with the margin.", {"accuracy": ""}),
    Kind("Token accuracy", "Share of tokens that the model finds most likely.", {"token_accuracy": ""}),
    Kind("Margin", "Reward of chosen minus reward of rejected.", {"margin": ""}),
    Kind(
        "Rewards",
        "Chosen may fall while the margin grows: common, and worth a look at the answers.",
        {"reward_chosen": "chosen", "reward_rejected": "rejected"},
    ),
    Kind("KL a token", "Distance from the base, nats.", {"kl_token": ""}),
    Kind("KL an answer", "Distance from the base over sampled answers, nats.", {"kl_sequence": ""}),
    Kind("Learning rate", "As the schedule had it.", {"learning_rate": ""}),
    Kind("Memory", "The most held so far, GB.", {"peak_memory_gb": ""}),
)
COMPARED = ("Loss", "Margin", "Accuracy", "Token accuracy", "KL a token", "KL an answer")


def levels(kind: Kind, run: Contents) -> list[tuple[float, str]]:
    """What the values of a plot compare with."""
    known: dict[str, tuple[float | None, str]] = {
        "Accuracy": (0.5, "chance"),
        "KL an answer": (run.max_kl, "max_kl"),
        "Memory": (((run.summary or {}).get("memory") or {}).get("predicted_gb"), "billed"),
    }
    if run.strategy == "dpo" and run.config["loss_type"] == "sigmoid":
        known["Loss"] = (math.log(2), "ln 2")
    value, name = known.get(kind.title, (None, ""))
    return [] if value is None else [(value, name)]


def plots(run: Contents) -> list[Plot]:
    """Every plot for which the run has lines."""
    made = []
    for kind in KINDS:
        curves = [
            Curve(name, split, run.points(split, key), colour)
            for colour, (key, name) in enumerate(kind.keys.items())
            for split in ("train", "eval")
        ]
        if kind.title == "Memory":  # one peak for both: that of the lines in their order is the whole curve
            curves = curves[:1]
        if any(curve.points for curve in curves):
            made.append(Plot(kind.title, kind.note, curves, levels(kind, run)))
    return made


def tiles(run: Contents) -> list[dict[str, str]]:
    """The figures that a reader looks for first; those that belong together stand together."""
    if run.judged is None:
        return []
    policy, gain = run.judged["policy"], run.judged["gain"]
    made = []
    for name in ("accuracy", "margin", "loss", "token_accuracy"):
        if name in policy:
            made.append(_tile(TERMS[name].label, TERMS[name].text(policy[name])))
    gained = "logp_accuracy" if "logp_accuracy" in gain else "loss"
    words = "gain in preferences" if gained == "logp_accuracy" else "loss against base"
    made.append(_tile(words, TERMS[gained].gain(gain[gained])))
    far = "kl_sequence" if policy.get("kl_sequence") else "kl_token"
    made.append(_tile(TERMS[far].label, TERMS[far].text(policy[far])))
    return made


def _tile(label: str, text: str) -> dict[str, str]:
    value, _, interval = text.partition(" [")
    return {"label": label, "value": value, "about": f"[{interval}" if interval else ""}


def against(run: Contents) -> list[dict[str, Any]]:
    """The rows of the table of base, adapter and gain."""
    assert run.judged is not None
    sides = run.judged
    rows = []
    for name, term in TERMS.items():
        if sides["policy"].get(name) is None:
            continue
        gain = sides["gain"].get(name)
        row = {"label": term.label, "base": term.text(sides["base"].get(name)), "policy": term.text(sides["policy"][name])}
        rows.append({**row, "gain": term.gain(gain) if gain else "", "whisker": gain, "good": not term.less_is_better})
    if run.evaluation and (tokens := run.evaluation.get("answer_tokens")):
        length = {side: lengths(tokens[side]) for side in ("base", "policy")}
        rows.append({"label": "answer tokens", **length, "gain": lengths(tokens["gain"], "+"), "whisker": None, "good": True})
    return rows


def lengths(figure: Mapping[str, float], sign: str = "") -> str:
    """Tokens, with one digit after the point."""
    return "{value:{form}} [{low:{form}}, {high:{form}}]".format(**figure, form=f"{sign}.1f")


def categories(run: Contents) -> dict[str, Any] | None:
    """A line for each category of the held-out rows, where they have some."""
    found = (run.evaluation or {}).get("categories")
    if not found:
        return None
    shown = [name for name in TERMS if any(part["policy"].get(name) for part in found.values()) and name != "kl_sequence"]
    rows = [
        (name, part[run.noun], [TERMS[figure].text(part["policy"].get(figure)) for figure in shown])
        for name, part in found.items()
    ]
    return {"names": [TERMS[name].label for name in shown], "rows": rows}


def spread(run: Contents) -> tuple[Bars | None, dict[str, str]]:
    """The histogram over the held-out rows, and its words."""
    if run.evaluation is None:
        return None, {}
    rows = run.evaluation["rows"]
    values = [value for row in rows if (value := row_value(row)) is not None]
    below = sum(value < 0 for value in values)
    if run.strategy == "sft":
        words = {
            "title": "Gain of each demonstration",
            "about": f"The base's loss minus the adapter's, nats a token. {below} of {len(values)} got worse.",
            "listed": "By how far the loss fell below the base's, nats a token.",
        }
    else:
        words = {
            "title": "Margins",
            "about": f"Of each held-out pair. {below} of {len(values)} are below zero: there the rejected response is preferred.",
            "listed": "By their margins. The worst are worth reading first: a wrong label, or something that was not learned.",
        }
    return (Bars(histogram(values)) if values else None), words


def row_value(row: Mapping[str, Any]) -> float | None:
    """What rows are sorted by: a pair's margin, or how far a demonstration's loss fell."""
    if "margin" in row:
        return None if row["margin"] is None else float(row["margin"])
    return None if row["loss"] is None or row["base_loss"] is None else float(row["base_loss"] - row["loss"])


def data(run: Contents) -> list[tuple[str, str]]:
    """What was counted before the training."""
    counts = run.plan["counts"]
    if counts is None:
        return []
    rows = [
        ("trained on", f"{counts['train_pairs']:,} {run.noun} of {counts['train_prompts']:,} prompts"),
        ("held out", f"{counts['eval_pairs']:,} {run.noun} of {counts['eval_prompts']:,} prompts"),
        ("longest", f"{counts['longest']:,} tokens ({counts['longest_at']})"),
        ("tokens an epoch", f"{counts['train_tokens']:,}"),
    ]
    told = {
        "cut": "prompts that lost their beginning to max_seq_length",
        "too_long": "left out: responses longer than max_seq_length",
        "parted": "prompts that the chat template renders otherwise before a response",
        "bad_rows": "left out: bad rows",
    }
    rows += [(words, f"{counts[name]:,}") for name, words in told.items() if counts[name]]
    said = run.plan.get("data") or {}
    if said.get("longer_chosen") is not None:
        rows.append(("longer one chosen", f"in {said['longer_chosen']:.0%} of pairs (AUC of length {said['length_auc']:.2f})"))
    return rows


def bill(run: Contents) -> dict[str, Any] | None:
    """The memory bill, beside what was measured."""
    memory = run.plan["memory"]
    if memory is None:
        return None
    largest = max(memory["components"].values()) or 1.0
    parts = [
        (name.replace("_", " "), f"{size:.2f}", round(300 * size / largest, 1))
        for name, size in memory["components"].items()
        if size
    ]
    known = (run.summary or {}).get("memory") or {}
    about = "What the plan billed for the fullest moment of a step"
    about += f", of {memory['budget_gb']:.1f} GB that were there." if memory["budget_gb"] else "."
    if known.get("measured_gb") and known.get("predicted_gb"):
        ratio = known["measured_gb"] / known["predicted_gb"]
        where = "the GPU's allocator" if run.config["device"] == "cuda" else "the whole process, with what malloc keeps"
        about += f" Measured: {known['measured_gb']:.2f} GB ({where}) against {known['predicted_gb']:.2f} billed for that, {ratio:.2f}x."
    return {"parts": parts, "total": f"{memory['total_gb']:.2f}", "about": about}


GIVEN = {"config": "config", "override": "command line"}
OTHERS = {"default": "default", "profile": "profile", "measured": "machine"}


def config(run: Contents) -> dict[str, list[tuple[str, str, str]]]:
    """What the user set, and the rest; each key with its value and where that came from."""
    sources = run.plan["sources"]
    given, rest = [], []
    for key, value in run.config.items():
        source = sources.get(key, "default")
        row = (key, json_text(value), {**GIVEN, **OTHERS}[source])
        (given if source in GIVEN else rest).append(row)
    return {"given": given, "rest": rest}


def command(run: Contents) -> str:
    """What trains the run again, beside it."""
    again = run.path.with_name(f"{run.name}-again")
    return f"dpo train {shlex.quote(str(run.path / 'plan.json'))} output_dir={shlex.quote(str(again))}"


def made_with(run: Contents) -> list[tuple[str, str]]:
    """Versions, hardware, hashes: what else has to be the same."""
    made = run.manifest
    hardware = made["hardware"]
    machine = f"{hardware['cores']} cores of {hardware['processor']}, {hardware['memory_gb']:g} GB"
    gpus = [str(gpu["name"]) for gpu in hardware["gpus"]]
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in made["versions"].items())),
        ("machine", ", ".join([*gpus, machine])),
        ("seed", str(made["seed"])),
        ("git commit", made["git_commit"] or "outside a repository"),
    ]
    rows += [(f"dataset {Path(file).name}", f"SHA-256 {digest}") for file, digest in made["dataset"].items()]
    rows += [(f"model {file}", f"SHA-256 {digest}") for file, digest in made["model"]["sha256"].items()]
    if run.summary:
        rows.append(("what was trained", f"SHA-256 {run.summary['adapter_sha256']}"))
    return rows


def facts(run: Contents) -> list[str]:
    """The run in a line."""
    settings = run.config
    model = Path(settings["model_name"]).name if Path(settings["model_name"]).is_absolute() else settings["model_name"]
    trained = "every weight" if run.is_whole else f"LoRA rank {settings['lora_r']}"
    made = [settings["strategy"], model, ", ".join(Path(file).name for file in run.manifest["dataset"]), trained]
    made.append(f"learning rate {settings['learning_rate']:g}")
    if run.strategy == "dpo":
        made.append(f"beta {settings['beta']:g}")
    if run.summary:
        made += [f"{run.summary['steps']:,} steps", duration(run.summary["seconds"])]
    return [fact for fact in made if fact]


def duration(seconds: float) -> str:
    """3 h 12 min, 4 min 10 s, 12 s"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def reading(value: float | None) -> str:
    """A value of a curve."""
    return "not finite" if value is None else f"{value:.{DIGITS}g}"


def said(prompt: str | Iterable[Mapping[str, Any]]) -> str:
    """A prompt or a response, which may be messages."""
    if isinstance(prompt, str):
        return prompt
    messages = list(prompt)
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def shortened(text: str) -> str:
    """A long text without its middle: of a prompt the end matters, of a response the beginning."""
    if len(text) <= MOST_TEXT:
        return text
    half = MOST_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
