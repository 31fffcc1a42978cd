"""Several runs side by side, as plain values: their curves, their figures, and their differences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from dpo_cli.config.schema import names_where
from dpo_cli.report.curves import KINDS, levels
from dpo_cli.report.run_data import Contents
from dpo_cli.report.svg import Curve, Plot
from dpo_cli.report.views import duration
from dpo_cli.storage.jsonio import json_text
from dpo_cli.strategies.figures import FIGURES

PLACES = names_where(lambda option: option.place == "output")  # they always differ between runs


def compared(runs: Sequence[Contents]) -> dict[str, object]:
    """The content of the comparison page."""
    names = distinct_names(runs)
    by_strategy: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        by_strategy.setdefault(run.strategy, []).append(number)
    groups = [
        {
            "strategy": strategy,
            "names": [names[number] for number in numbers],
            "plots": _plots(runs, names, numbers),
            "figures": _figures([runs[number] for number in numbers]),
        }
        for strategy, numbers in by_strategy.items()
    ]
    keys = [Curve(name, "eval", [], colour) for colour, name in enumerate(names)]
    content = {"runs": runs, "names": names, "keys": keys, "groups": groups}
    return {**content, "warnings": warnings(runs), "differing": differing(runs)}


def distinct_names(runs: Sequence[Contents]) -> list[str]:
    """The names of the run directories; with their parent folders if two have the same name."""
    count = Counter(run.name for run in runs)
    return [run.name if count[run.name] == 1 else f"{run.path.parent.name}/{run.name}" for run in runs]


def _plots(runs: Sequence[Contents], names: Sequence[str], numbers: Sequence[int]) -> list[Plot]:
    plots, end = [], max((line.step for number in numbers for line in runs[number].lines), default=0)
    for kind in KINDS:
        if not kind.is_compared:
            continue
        curves = [
            Curve(names[number], split, runs[number].points(split, key), number)
            for key in kind.keys
            for number in numbers
            for split in ("train", "eval")
        ]
        if any(curve.points for curve in curves):
            shared = {level for number in numbers for level in levels(kind, runs[number])}
            common = list(shared) if len(shared) == 1 else []
            plots.append(Plot(kind.title, kind.note, curves, common, end, kind.from_zero))
    return plots


def _figures(runs: Sequence[Contents]) -> list[tuple[str, list[str]]]:
    """A row for each figure that a run has."""
    rows = []
    base = " or ".join(sorted({run.base for run in runs}))
    for side, words in (("policy", "{}"), ("base", f"{{}}, {base}"), ("gain", "gain in {}")):
        for name, term in FIGURES.items():
            figures = [run.judged.of(side).get(name) if run.judged else None for run in runs]
            if any(figures):
                show = term.gain if side == "gain" else term.text
                cells = [
                    str(show(figure)) if figure else "" if run.judged else "not evaluated"
                    for figure, run in zip(figures, runs, strict=True)
                ]
                rows.append((words.format(term.label), cells))
    summaries = [run.summary for run in runs]
    rows.append(("status", [summary.status if summary else "unfinished" for summary in summaries]))
    rows.append(("steps", [f"{summary.steps:,}" if summary else "" for summary in summaries]))
    rows.append(("time", [duration(summary.seconds) if summary else "" for summary in summaries]))
    peaks = [summary.memory.measured_gb if summary else None for summary in summaries]
    rows.append(("peak memory", [f"{peak:.2f} GB" if peak else "" for peak in peaks]))
    return rows


def differing(runs: Sequence[Contents]) -> list[tuple[str, list[str]]]:
    """The keys of the config that have different values."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [(key, [json_text(run.config.get(key)) for run in runs]) for key in keys if key not in PLACES]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def warnings(runs: Sequence[Contents]) -> list[str]:
    """The reasons why figures are not comparable."""
    reasons = []
    if others := _held_out_otherwise(runs):
        reasons.append(
            f"The held-out sets differ (in {', '.join(others)}), so the figures are not comparable: "
            "evaluate each run on one file with dpo eval --dataset."
        )
    if differ(runs, lambda run: run.strategy):
        reasons.append("The strategies differ: a loss of pairs and a loss of demonstrations are different quantities.")
    elif differ(runs, lambda run: run.config.get("beta")):
        reasons.append("beta differs. It scales rewards, margins and losses: compare accuracies, gains and KL.")
    pairs = [run for run in runs if run.takes("loss_type")]
    if differ(pairs, lambda run: run.config["loss_type"]):
        reasons.append("loss_type differs: the training losses are different quantities; the held-out losses are all sigmoid.")
    if differ(pairs, lambda run: [run.config[key] for key in ("kl_prompts", "max_new_tokens")]):
        reasons.append(
            "kl_prompts or max_new_tokens differ, and decide which answers are sampled: KL per answer is not comparable."
        )
    if differ(runs, lambda run: (run.manifest["model"], run.base)):
        reasons.append("The runs started from different models: rewards, KL and gains are each relative to another model.")
    return reasons


def differ(runs: Sequence[Contents], what: Callable[[Contents], object]) -> bool:
    return len({json_text(what(run)) for run in runs}) > 1


def _held_out_otherwise(runs: Sequence[Contents]) -> list[str]:
    """The differences of the held-out sets, in words: in their files, or in what decides a share of the dataset."""
    decides: dict[str, Callable[[Contents], object]]
    if any(run.config.get("eval_dataset") for run in runs):
        decides = {"eval_dataset": _eval_files}
    else:
        decides = {
            "the data files": lambda run: sorted(run.manifest["dataset"].values()),
            "eval_split": lambda run: run.config["eval_split"],
            "split_seed": lambda run: run.config.get("split_seed", run.config["seed"]),
        }
    decides["the number of held-out rows"] = lambda run: run.held_out
    return [name for name, what in decides.items() if differ(runs, what)]


def _eval_files(run: Contents) -> object:
    """The hashes of the files of eval_dataset; their paths for a run without hashes."""
    hashes = run.manifest.get("eval_dataset")
    return run.config.get("eval_dataset") if hashes is None else sorted(hashes.values())
