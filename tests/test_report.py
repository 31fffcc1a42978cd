"""The report: its verdict and its drawings on numbers worked by hand, its pages on a real run, and these in a real browser."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Page, browser
from conftest import ROOT, Run, made_row
from typer.testing import CliRunner

from dpo_cli.app import app
from dpo_cli.commands.train import train
from dpo_cli.config.config import load
from dpo_cli.errors import InvalidInput
from dpo_cli.hardware.machine import probe
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.preflight import inspect
from dpo_cli.report import comparison, curves
from dpo_cli.report.render import PAGES, report, write_comparison
from dpo_cli.report.run_data import Contents
from dpo_cli.report.svg import MOST_POINTS, Curve, Plot, histogram, mark_text, thinned, ticks
from dpo_cli.results.intervals import Figures, Interval, Sides
from dpo_cli.results.summary import Event, Line
from dpo_cli.runs.manifest import manifest
from dpo_cli.storage.run_directory import REPORT, RunDirectory
from dpo_cli.strategies import verdict as verdicts
from dpo_cli.strategies.dpo import DPO
from dpo_cli.strategies.sft import SFT
from dpo_cli.strategies.strategy import Strategy
from dpo_cli.strategies.verdict import Outcome, Verdict
from dpo_cli.ui.console import Console

NASTY = "</script><script>alert(1)</script>'\"&"


# --- the verdict


def verdict(outcome: Outcome, strategy: Strategy = DPO) -> Verdict:
    return verdicts.verdict(outcome, strategy.read)


def judged_pairs(margin: float, gain: float, kl_sequence: float | None) -> Sides:
    """An evaluation with intervals of 0.1 to both sides."""
    kl = None if kl_sequence is None else Interval(kl_sequence, kl_sequence - 0.1, kl_sequence + 0.1)
    policy: Figures = {
        "accuracy": Interval(0.988, 0.963, 1.0),
        "margin": Interval(margin, margin - 0.1, margin + 0.1),
        "loss": Interval(0.325, 0.3, 0.35),
        "kl_token": Interval(0.0456, 0.04, 0.05),
        "kl_sequence": kl,
    }
    return Sides(policy, {}, {"logp_accuracy": Interval(gain, gain - 0.1, gain + 0.1)})


WARNING = Event("kl", "warn", 3, "far", "less")
NOTE = replace(WARNING, action="note")
STOP = replace(WARNING, action="stop", message="loss of step 3 is not finite")
HEAD = "The adapter prefers the chosen response in 98.8 % [96, 100] of 85 held-out pairs, "
MARGIN = "by a margin of 1.400 [1.300, 1.500] at a loss of 0.325"


@pytest.mark.parametrize(
    ("margin", "gain", "kl", "health", "tone", "title", "tail"),
    [
        (
            *(1.4, 0.14, 4.0, (NOTE,), "good", "Clear gain over its base"),
            f"{MARGIN}; by its log-probs it prefers it in 14.0 points [4, 24] more of the pairs than the base does, "
            "and it is 4 nats per answer from the base (limit 10).",
        ),
        (
            *(1.4, 0.14, 12.0, (WARNING, NOTE), "doubtful", "Clear gain, but far from its base"),
            f"{MARGIN}; by its log-probs it prefers it in 14.0 points [4, 24] more of the pairs than the base does, "
            "and it is 12 nats per answer from the base (over the limit of 10); one warning was raised.",
        ),
        (
            *(1.4, 0.14, None, (WARNING, WARNING), "doubtful", "Clear gain, with a warning"),
            f"{MARGIN}; by its log-probs it prefers it in 14.0 points [4, 24] more of the pairs than the base does, "
            "and it is 0.046 nats per token from the base; two warnings were raised.",
        ),
        (
            *(1.4, 0.02, None, (), "doubtful", "No clear gain over its base"),
            f"{MARGIN}; by its log-probs it does not clearly prefer it in more pairs than the base does, "
            "+2.0 points [-8, +12], and it is 0.046 nats per token from the base.",
        ),
        (
            *(0.05, 0.2, None, (), "doubtful", "No clear effect"),
            "by a margin not clearly above zero, 0.050 [-0.050, 0.150] at a loss of 0.325; by its log-probs it "
            "prefers it in 20.0 points [10, 30] more of the pairs than the base does, "
            "and it is 0.046 nats per token from the base.",
        ),
        (
            *(1.4, -0.2, None, (), "bad", "Worse than its base"),
            f"{MARGIN}; by its log-probs it prefers it in 20.0 points [10, 30] fewer of the pairs than the base does, "
            "and it is 0.046 nats per token from the base.",
        ),
        (
            *(-0.5, 0.2, None, (), "bad", "Worse than its base"),
            "with a margin below zero, -0.500 [-0.600, -0.400] at a loss of 0.325; by its log-probs it "
            "prefers it in 20.0 points [10, 30] more of the pairs than the base does, "
            "and it is 0.046 nats per token from the base.",
        ),
    ],
)
def test_the_verdict_on_pairs(
    margin: float, gain: float, kl: float | None, health: tuple[Any, ...], tone: str, title: str, tail: str
) -> None:
    """Whether an interval is clear of zero decides, not its middle; and accuracy never stands alone."""
    said = verdict(Outcome("completed", 29, judged_pairs(margin, gain, kl), 85, 40, health, max_kl=10))
    assert (said.tone, said.title, said.sentence) == (tone, title, HEAD + tail)


def test_the_limit_of_the_config_decides_what_is_far() -> None:
    outcome = Outcome("completed", 29, judged_pairs(1.4, 0.2, 4.0), 85, 40, max_kl=3.0)
    assert verdict(outcome).title == "Clear gain, but far from its base"
    assert verdict(outcome).sentence.endswith("4 nats per answer from the base (over the limit of 3).")
    outcome = Outcome("completed", 29, judged_pairs(1.4, 0.2, 40.0), 85, 40)
    assert verdict(outcome).title == "Clear gain over its base"
    assert verdict(outcome).sentence.endswith("and it is 40 nats per answer from the base.")


@pytest.mark.parametrize(
    ("loss", "tone", "title", "told"),
    [
        (-0.45, "good", "Clear gain over its base", "below the base's by 0.450 [0.350, 0.550]"),
        (0.05, "doubtful", "No clear gain over its base", "not clearly different from the base's (+0.050 [-0.050, +0.150])"),
        (0.3, "bad", "Worse than its base", "above the base's by 0.300 [0.200, 0.400]"),
    ],
)
def test_the_verdict_on_demonstrations(loss: float, tone: str, title: str, told: str) -> None:
    """Of a loss, less is better."""
    policy: Figures = {
        "loss": Interval(1.3, 1.2, 1.4),
        "token_accuracy": Interval(0.611, 0.59, 0.63),
        "kl_token": Interval(0.3, 0.2, 0.4),
    }
    gain: Figures = {"loss": Interval(loss, loss - 0.1, loss + 0.1), "token_accuracy": Interval(0.05, 0.03, 0.07)}
    said = verdict(Outcome("completed", 58, Sides(policy, {}, gain), 20, 20), SFT)
    assert (said.tone, said.title) == (tone, title)
    assert said.sentence == (
        f"On 20 held-out demonstrations the adapter's loss is 1.300 [1.200, 1.400] nats per token, {told}; 61.1 % "
        "[59, 63] of their tokens are its most likely ones (+5.0 points [+3, +7]), and it is 0.3 nats per token from the base."
    )


@pytest.mark.parametrize(
    ("status", "rows", "health", "tone", "sentence"),
    [
        (
            *("completed", 0, (), "open"),
            "The training finished all of its 3 steps, but there are no held-out rows, so it is unknown whether the adapter "
            "is better than its base.",
        ),
        (
            *("completed", 9, (), "open"),
            "The training finished all of its 3 steps, but its evaluation did not finish (dpo eval repeats it), so "
            "it is unknown whether the adapter is better than its base.",
        ),
        (
            *("interrupted", 9, (), "open"),
            "The training was interrupted after step 3; the adapter is saved and not evaluated.",
        ),
        (
            *("unhealthy", 9, (WARNING, STOP), "bad"),
            "The training was stopped as unhealthy after step 3: loss of step 3 is not finite; the adapter is "
            "saved and not evaluated.",
        ),
        (
            *("unfinished", 9, (), "open"),
            "The training has not finished; its last step is 3, so it is not evaluated yet.",
        ),
    ],
)
def test_the_verdict_where_nothing_was_judged(
    status: str, rows: int, health: tuple[Any, ...], tone: str, sentence: str
) -> None:
    said = verdict(Outcome(status, 3, None, rows, rows, health))
    assert (said.tone, said.sentence) == (tone, sentence)


@pytest.mark.parametrize(("prompts", "told"), [(1, "only one prompt"), (19, "only 19 prompts")])
def test_figures_of_few_prompts_are_never_good(prompts: int, told: str) -> None:
    """The interval of one prompt is its value, which would be clear of zero."""
    said = verdict(Outcome("completed", 29, judged_pairs(1.4, 0.14, 4.0), 85, prompts))
    assert (said.tone, said.title) == ("doubtful", "Too few held-out prompts")
    assert said.sentence.startswith(f"{HEAD}{MARGIN}; ")
    assert said.sentence.endswith(f"; these figures are of {told}, too few for a conclusion (use 20 or more).")
    assert verdict(Outcome("completed", 29, judged_pairs(1.4, 0.14, 4.0), 85, 20)).tone == "good"


def test_what_it_started_from_is_called_by_its_name() -> None:
    said = verdict(Outcome("completed", 29, judged_pairs(1.4, 0.14, 4.0), 85, 40, base="starting adapter"))
    assert said.title == "Clear gain over its starting adapter"
    assert said.sentence.count("starting adapter") == 2 and "base" not in said.sentence


def test_an_unhealthy_run_that_was_judged_all_the_same_is_not_good() -> None:
    said = verdict(Outcome("unhealthy", 3, judged_pairs(1.4, 0.2, 4.0), 85, 40, (STOP,)))
    told = "The training was stopped as unhealthy after step 3: loss of step 3 is not finite; the adapter prefers"
    assert said.tone == "bad" and said.sentence.startswith(told)


def test_a_loss_that_is_not_finite_is_told() -> None:
    judged = judged_pairs(1.4, 0.2, None)
    judged.policy["loss"] = Interval(math.nan, math.nan, math.nan)
    said = verdict(Outcome("completed", 3, judged, 85, 40))
    told = "The training finished all of its 3 steps; on held-out rows its loss is not finite, so the adapter is broken."
    assert (said.tone, said.sentence) == ("bad", told)


# --- what is drawn


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0, 1, [0, 0.5, 1]),  # a quarter a stretch is not round; the next one is 0.5
        (0.03, 0.71, [0, 0.2, 0.4, 0.6, 0.8]),
        (-3.2, 1.1, [-4, -2, 0, 2]),
        (0, 5e-4, [0, 2e-4, 4e-4, 6e-4]),
        (5.009, 5.009, [0, 2, 4, 6]),  # one value is shown against zero
        (-2, -2, [-2, -1.5, -1, -0.5, 0]),
        (0, 0, [0, 0.5, 1]),
        (0, 100_000, [0, 50_000, 100_000]),
    ],
)
def test_ticks_are_round_and_span_the_values(low: float, high: float, marks: list[float]) -> None:
    assert ticks(low, high) == marks


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [
        (0.2, 0.2, "0.2"),
        (2, 1, "2"),
        (-0.05, 0.05, "-0.05"),
        (4e-4, 2e-4, "4e-4"),
        (40_000, 20_000, "40k"),
        (2e6, 1e6, "2M"),
        (-2e13, 1e13, "-2e13"),
    ],
)
def test_marks_have_the_digits_that_they_need(value: float, step: float, text: str) -> None:
    assert mark_text(value, step) == text


def test_thinning_keeps_spikes_ends_and_what_is_not_finite() -> None:
    points: list[tuple[float, float | None]] = [(float(step), step % 7 / 7) for step in range(100_000)]
    points[31_415] = (31_415.0, 99.0)
    points[27_182] = (27_182.0, -99.0)
    points[50_000] = (50_000.0, None)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS and kept == sorted(kept)
    assert {points[i] for i in (0, 27_182, 31_415, 50_000, 99_999)} <= set(kept)
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_a_curve_is_interrupted_where_it_was_not_finite() -> None:
    """Steps 0 to 4 over the 296 units from 48 to 344, values 0 to 1 over the 164 from 176 up to 12."""
    plot = Plot("Loss", "", [Curve("", "train", [(0, 0.0), (1, 0.5), (2, None), (3, 1.0), (4, 0.0)])])
    assert plot.path(plot.drawn[0]) == "M48 176L122 94M270 12L344 176"
    assert plot.broken == [196.0]


def test_a_distance_is_drawn_from_zero() -> None:
    """9.7 of a limit of 10 would else look like nothing."""
    curve, limit = Curve("", "eval", [(4, 9.7)]), [(10.0, "max_kl")]
    assert Plot("KL", "", [curve], limit, from_zero=True).y.marks == [0, 5, 10]
    assert Plot("Loss", "", [curve], limit).y.marks == [9.7, 9.8, 9.9, 10]


def test_the_bars_of_a_histogram_never_hold_both_signs() -> None:
    """Twenty stretches over 2.2 are 0.11 wide; the next round width is 0.2."""
    bins = histogram([-0.2, -0.1, 0.0, 0.1, 0.2, 1.95, 2.0])
    assert [(round(bin.low, 1), bin.count) for bin in bins if bin.count] == [(-0.2, 2), (0.0, 2), (0.2, 1), (1.8, 2)]
    assert sum(bin.count for bin in histogram([0.0, 0.0])) == 2


# --- the pages


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A run of four steps, judged on what it held out; copy it before changing it."""
    place = tmp_path_factory.mktemp("report")
    rows = [
        {**made_row(i), "prompt": f"question {i // 2} {NASTY}", "category": f"{'even' if i % 4 < 2 else NASTY}"}
        for i in range(24)
    ]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {"model_name": str(tiny_model_dir), "dataset": str(place / "pairs.jsonl"), "eval_split": 0.4, "max_steps": 4}
    values |= {"logging_steps": 1, "eval_steps": 2, "learning_rate": 1e-2, "lora_r": 4, "output_dir": str(place / "tiny")}
    values |= {"kl_prompts": 4, "max_new_tokens": 4, "device": "cpu", "bf16": False, "fp16": False}
    (place / "config.json").write_text(json.dumps(values), encoding="utf-8")
    loaded = load(str(place / "config.json"))
    train(loaded, inspect(loaded, probe()), probe(), Console(), overwrite=False, dry_run=False)
    return place / "tiny"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "tiny"))


def change(run: Path, name: str, **values: Any) -> None:
    """Replace values of one of the run's JSON files."""
    directory = RunDirectory(run)
    directory.write_json(name, {**directory.read_json(name), **values})


def test_a_training_ends_with_its_report(trained: Path) -> None:
    page = (trained / REPORT).read_text(encoding="utf-8")
    summary = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))
    assert "<title>tiny</title>" in page
    assert f'<div class="card verdict {Contents.read(trained).verdict.tone}">' in page
    margin = summary["eval"]["margin"]
    assert f"{margin['value']:.3f} [{margin['low']:.3f}, {margin['high']:.3f}]" in page
    assert (
        page.count('<svg class="drawing"') == 9
    )  # loss, accuracy, margin, rewards, two of KL, learning rate, gradient norm, memory
    assert summary["adapter_sha256"] in page and "output_dir=" in page


def test_text_of_the_data_stays_text(trained: Path) -> None:
    page = (trained / REPORT).read_text(encoding="utf-8")
    assert page.count("<script") == 1 and page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 20


def test_the_report_is_rebuilt_without_torch_to_the_same_bytes(copied: Path, trained: Path) -> None:
    (copied / REPORT).unlink()
    code = (
        "import sys\nfrom dpo_cli.app import app\n"
        f"app(['report', {str(copied)!r}, '--json'], standalone_mode=False)\n"
        "print('HEAVY', [name for name in ('torch', 'transformers', 'numpy', 'pyarrow') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    document, _, heavy = done.stdout.partition("HEAVY ")
    assert json.loads(document) == {"reports": [str(copied / REPORT)]} and heavy.strip() == "[]"
    again = (copied / REPORT).read_text(encoding="utf-8")
    assert again.replace(str(copied), str(trained)) == (trained / REPORT).read_text(encoding="utf-8")


def test_a_run_that_broke_off_has_a_report(copied: Path) -> None:
    """Unhealthy: the last values are null, nothing was judged. Unfinished: a torn last line, no summary."""
    event = {"rule": "not-finite", "action": "stop", "step": 4, "message": "loss is not finite", "remedy": "lower it"}
    change(copied, "metrics.json", status="unhealthy", eval=None, base=None, gain=None, health=[event])
    (copied / "evaluation.json").unlink()
    lines = RunDirectory(copied).read_lines()
    broken = [{**line, "loss": None} if line["step"] == 4 else line for line in lines]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in broken), encoding="utf-8")
    page = report(Contents.read(copied))
    assert "stopped as unhealthy after step 4: loss is not finite" in page and "lower it" in page
    assert page.count('class="broken"') == 1 and "<b>not finite</b>" in page
    assert "Against the base" not in page and "Best and worst" not in page
    (copied / "metrics.json").unlink()
    with (copied / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"split": "train", "ste')
    assert "its last step is 4" in report(Contents.read(copied))
    (copied / "metrics.jsonl").unlink()
    page = report(Contents.read(copied))
    assert "its last step is 0" in page and '<svg class="drawing"' not in page


def test_figures_of_a_later_evaluation_count(copied: Path) -> None:
    """A training that was stopped judges nothing; `dpo eval` writes evaluation.json, and the report with it."""
    change(copied, "metrics.json", status="interrupted", eval=None, base=None, gain=None)
    (copied / "evaluation.json").unlink()
    assert "the adapter is saved and not evaluated" in report(Contents.read(copied))
    done = CliRunner().invoke(app, ["eval", str(copied)])
    assert done.exit_code == 0 and f"report: {copied / REPORT}" in "".join(done.stdout.splitlines())
    page = (copied / REPORT).read_text(encoding="utf-8")
    assert "was interrupted after step 4; the adapter prefers" in page and "not evaluated" not in page
    assert page.count("<dt>") > 4 and "Against the base" in page


def test_a_judging_that_broke_off_is_not_nothing_held_out(copied: Path) -> None:
    change(copied, "metrics.json", eval=None, base=None, gain=None)
    (copied / "evaluation.json").unlink()
    page = report(Contents.read(copied))
    assert "its evaluation did not finish" in page and "there are no held-out rows" not in page


def test_a_run_from_an_adapter_is_compared_with_that_adapter(copied: Path) -> None:
    config = RunDirectory(copied).read_json("plan.json")["config"]
    change(copied, "plan.json", config={**config, "reference": "adapter"})
    page = report(Contents.read(copied))
    assert "Against the starting adapter" in page and '<th class="n">starting adapter</th>' in page
    text = re.sub(r"<(style|script)>.*?</\1>|<[^>]+>", " ", page, flags=re.S)
    assert not re.search(r"\bbase\b(?! *config)", text.split("Config")[0])


def test_another_loss_than_dpos_own_is_drawn_apart(trained: Path) -> None:
    """The loss of ipo starts at 25 with beta 0.1, that of an evaluation at ln 2."""
    run = Contents.read(trained)
    ipo = replace(run, plan={**run.plan, "config": {**run.config, "loss_type": "ipo"}})
    splits = {plot.title: [curve.split for curve in plot.curves if curve.points] for plot in curves.plots(ipo)}
    assert (splits["Loss"], splits["Training loss"]) == (["eval"], ["train"])
    assert "Training loss" not in {plot.title for plot in curves.plots(run)}
    levels = {plot.title: [name for _, name in plot.levels] for plot in curves.plots(ipo)}
    assert (levels["Loss"], levels["Training loss"]) == (["ln 2"], [])
    assert any(warning.startswith("loss_type differs") for warning in comparison.warnings([run, ipo]))


def test_the_rounding_of_16_bits_is_drawn_below_the_margin(trained: Path) -> None:
    """Of a pair 0.3 nats: of the mean of 4 pairs, times beta 0.1, 0.3 * 0.1 / 2 = 0.015."""
    run = Contents.read(trained)
    config = {**run.config, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "beta": 0.1}
    rounded = replace(run, plan={**run.plan, "config": config, "rounding": {"response": 0.2, "pair": 0.3}})
    levels = {plot.title: plot.levels for plot in curves.plots(rounded)}
    (level,) = [level for level in levels["Margin"] if level[1] == "rounding"]
    assert level[0] == pytest.approx(0.015)
    assert "rounding" not in {name for plot in curves.plots(run) for _, name in plot.levels}


def test_a_figure_that_is_not_finite_has_no_interval(trained: Path) -> None:
    run = Contents.read(trained)
    assert run.summary is not None and run.summary.sides is not None
    nothing = Interval(math.nan, math.nan, math.nan)
    sides = replace(run.summary.sides, policy=dict.fromkeys(run.summary.sides.policy, nothing))
    broken = replace(run, summary=replace(run.summary, sides=sides))
    assert report(broken).count("<dd>not finite</dd></div>") == 4  # accuracy, margin, loss, KL: and nothing after it


def test_an_older_plan_without_max_kl_tells_no_limit(trained: Path) -> None:
    run = Contents.read(trained)
    older = replace(run, plan={**run.plan, "config": {key: value for key, value in run.config.items() if key != "max_kl"}})
    assert "limit" in run.verdict.sentence and "limit" not in older.verdict.sentence


def test_the_findings_about_config_and_data_are_shown(copied: Path) -> None:
    """As `dpo validate` tells them of the run's own plan."""
    found = inspect(load(str(copied / "plan.json")), probe())
    assert found.data is not None and "few-pairs" in {problem.code for problem in found.problems}
    change(copied, "plan.json", problems=[problem.to_json() for problem in found.problems], data=found.data.to_json())
    page = report(Contents.read(copied))
    assert page.count('<span class="tag hint">') == sum(problem.severity == "hint" for problem in found.problems)
    assert all(f"<code>{problem.code}</code>" in page for problem in found.problems)
    assert f"in {found.data.said['longer_chosen']:.0%} of pairs" in page


def test_a_run_of_sft_has_its_own_figures(run: Run, copied: Path) -> None:
    summary, place = run(strategy="sft", eval_split=0.4)
    page = (place / REPORT).read_text(encoding="utf-8")
    loss = summary["eval"]["loss"]
    assert f"loss is {loss['value']:.3f} [{loss['low']:.3f}, {loss['high']:.3f}] nats per token" in page
    assert page.count('<svg class="drawing"') == 6  # loss, token accuracy, KL, learning rate, gradient norm, memory
    assert "Gain of each demonstration" in page and "ln 2</text>" not in page
    both = comparison.compared([Contents.read(place), Contents.read(copied)])
    assert [group["strategy"] for group in both["groups"]] == ["sft", "dpo"]
    assert any(warning.startswith("The strategies differ") for warning in both["warnings"])


def test_a_long_run_has_a_small_page(trained: Path) -> None:
    """100,000 lines, of which every one differs."""
    run = Contents.read(trained)
    names = [name for name, value in run.lines[0].figures.items() if isinstance(value, float)]
    many = [Line("train", i, 0.0, run.lines[0].figures | dict.fromkeys(names, (i * 0.618034) % 1)) for i in range(1, 100_001)]
    assert len(report(replace(run, lines=many)).encode()) < 300_000


def test_what_is_no_run_is_told(copied: Path, tmp_path: Path) -> None:
    (copied / "metrics.json").write_text('{"status": "comp', encoding="utf-8")
    for place, told in ((tmp_path, "it has no plan.json and no manifest.json"), (copied, "is damaged")):
        done = CliRunner().invoke(app, ["report", str(place), "--json"])
        problem = json.loads(done.stdout)["problems"][0]
        assert (done.exit_code, problem["code"]) == (3, "not-a-run") and told in problem["message"]
    assert CliRunner().invoke(app, ["report", str(copied), "--out", str(tmp_path / "page.html")]).exit_code == 2


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "metrics.json", "evaluation.json", "metrics.jsonl"])
@pytest.mark.parametrize("text", ["{}", "[1]", '{"step": "one", "split": "train"}', "{"])
def test_a_damaged_file_is_named(copied: Path, name: str, text: str) -> None:
    (copied / name).write_text(f"{text}\n", encoding="utf-8")
    with pytest.raises(InvalidInput, match="is damaged: ") as caught:
        Contents.read(copied)
    assert f"{name} is damaged" in caught.value.problems[0].message


def test_a_comparison_tells_what_differs_and_what_does_not_compare(copied: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(copied, tmp_path / "other" / "tiny"))
    runs = [Contents.read(copied), Contents.read(other)]
    assert comparison.distinct_names(runs) == [f"{tmp_path.name}/tiny", "other/tiny"]
    assert comparison.differing(runs) == [] and comparison.warnings(runs) == []
    config = RunDirectory(other).read_json("plan.json")["config"]
    change(other, "plan.json", config={**config, "beta": 0.5, "seed": 1, "split_seed": 1, "output_dir": "elsewhere"})
    change(other, "manifest.json", dataset={"pairs.jsonl": "0" * 64})
    runs = [runs[0], Contents.read(other)]
    assert comparison.differing(runs) == [("seed", ["42", "1"]), ("beta", ["0.1", "0.5"]), ("split_seed", ["42", "1"])]
    data, beta = comparison.warnings(runs)
    assert "(in the data files, split_seed)" in data and beta.startswith("beta differs")
    done = CliRunner().invoke(app, ["report", str(copied), str(other), "--out", str(tmp_path / "two.html"), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout) == {"reports": [str(tmp_path / "two.html")]}
    page = (tmp_path / "two.html").read_text(encoding="utf-8")
    assert page.count("curve eval") >= 2 * 4 and "2 runs compared" in page


def with_config(run: Contents, files: dict[str, str] | None = None, **config: Any) -> Contents:
    """The run with other options, and with these hashes of its eval_dataset; None as an older run has it."""
    manifest = {key: value for key, value in run.manifest.items() if key != "eval_dataset"}
    manifest |= {} if files is None else {"eval_dataset": files}
    return replace(run, plan={**run.plan, "config": {**run.config, **config}}, manifest=manifest)


def test_held_out_sets_are_compared_by_what_decides_them(trained: Path) -> None:
    """A file of its own by its hash, whatever the seed and the dataset; a share of the dataset by these."""
    run = Contents.read(trained)
    one, same, other = ({f"/{name}.jsonl": digest * 64} for name, digest in (("a", "0"), ("b", "0"), ("c", "1")))
    first = with_config(run, one, eval_dataset="/a.jsonl", seed=1)
    assert comparison.warnings([first, with_config(run, same, eval_dataset="/b.jsonl", seed=2)]) == []
    for second in (with_config(run, other, eval_dataset="/c.jsonl", seed=1), with_config(run, {}, seed=1)):
        (told,) = comparison.warnings([first, second])
        assert "(in eval_dataset)" in told
    older = [with_config(run, None, eval_dataset=name) for name in ("/a.jsonl", "/a.jsonl", "/c.jsonl")]
    assert comparison.warnings(older[:2]) == [] and len(comparison.warnings(older)) == 1


@pytest.mark.parametrize(("changed", "told"), [({"max_new_tokens": 5}, "KL per answer"), ({"kl_prompts": 1}, "KL per answer")])
def test_answers_sampled_otherwise_do_not_compare(trained: Path, changed: dict[str, int], told: str) -> None:
    run = Contents.read(trained)
    (warning,) = comparison.warnings([run, with_config(run, {}, **changed)])
    assert told in warning


def test_a_comparison_with_another_start_says_so(trained: Path) -> None:
    run = Contents.read(trained)
    runs = [run, with_config(run, {}, reference="adapter")]
    (warning,) = comparison.warnings(runs)
    assert warning.startswith("The runs started from different models")
    (group,) = comparison.compared(runs)["groups"]
    assert "log-prob accuracy, base or starting adapter" in dict(group["figures"])


def test_the_manifest_names_what_is_judged_on_by_its_hash(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "eval.jsonl"
    file.write_text(json.dumps(made_row(99)) + "\n", encoding="utf-8")
    loaded = load(str(trained / "plan.json"), ["eval_split=0", f"eval_dataset={file}"])
    hashes = manifest(resolve(loaded, probe()), probe(), None)["eval_dataset"]
    assert hashes == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}


def test_a_comparison_replaces_its_own_pages_alone(copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    write_comparison([copied, copied], out)
    write_comparison([copied, copied], out)
    out.write_text("mine", encoding="utf-8")
    done = CliRunner().invoke(app, ["report", str(copied), str(copied), "--out", str(out)])
    assert done.exit_code == 2 and out.read_text(encoding="utf-8") == "mine"
    assert (
        CliRunner().invoke(app, ["report", str(copied), str(copied), "--out", str(tmp_path / "no" / "page.html")]).exit_code
        == 2
    )


# --- in a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    folder = tmp_path_factory.mktemp("browser")
    with browser(folder) as started:
        yield started.page(folder)


def test_the_pages_draw_say_nothing_and_ask_for_nothing(page: Page, copied: Path, tmp_path: Path) -> None:
    """Both pages at two widths and in both schemes; no page is wider than the window."""
    two = write_comparison([copied, copied], tmp_path / "two.html")
    for file, plots in ((copied / REPORT, 9), (two, 5)):
        for width, height, dark in ((390, 844, False), (1200, 900, True)):
            page.console.clear()
            page.requests.clear()
            page.look(width, height, dark)
            page.open(file.as_uri())
            assert page.console == [] and page.requests == [file.as_uri()]
            assert page.js("document.querySelectorAll('svg.drawing').length") == plots
            assert page.js("[...document.querySelectorAll('.curve')].every(curve => curve.getTotalLength() > 0)")
            assert page.js("document.documentElement.scrollWidth") == width
            assert page.picture().startswith(b"\x89PNG")


def test_a_curve_tells_its_values_under_the_pointer(page: Page, trained: Path) -> None:
    """Half of the way is step 2 of 4, the arrow leads to step 3; away from the curve the legend has the last values again."""
    lines = {(line["split"], line["step"]): line["loss"] for line in RunDirectory(trained).read_lines()}
    page.look(1200, 900)
    page.open((trained / REPORT).as_uri())
    plot = "document.querySelector('[data-curves]')"
    said = f"[{plot}.querySelector('.at'), ...{plot}.querySelectorAll('.legend b')].map(part => part.textContent)"
    final = page.js(said)
    box = page.js(
        f"(() => {{ {plot}.scrollIntoView(); return {plot}.querySelector('svg.drawing').getBoundingClientRect().toJSON() }})()"
    )
    middle = (48 + (344 - 48) / 2) / 360 * box["width"] + box["x"]
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=middle, y=box["y"] + box["height"] / 2)
    step, *values = page.js(said)
    assert step == "step 2"
    assert [float(value) for value in values] == pytest.approx([lines["train", 2], lines["eval", 2]], rel=5e-3)
    page.js(f"{plot}.querySelector('svg.drawing').focus()")
    page.press("ArrowRight")
    step, *values = page.js(said)
    assert step == "step 3"  # where nothing held out was judged, so that the last judgement stays
    assert [float(value) for value in values] == pytest.approx([lines["train", 3], lines["eval", 2]], rel=5e-3)
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert page.js(said) == final and final[0] == "at the end"


def test_the_page_forbids_itself_the_network(page: Page, trained: Path) -> None:
    page.open((trained / REPORT).as_uri())
    blocked = """new Promise((resolve) => {
      addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
      document.body.append(Object.assign(document.createElement("img"), { src: "http://127.0.0.1:9/x.png" }));
    })"""
    assert page.js(blocked) == "img-src"


def test_text_and_curves_stand_out_in_both_schemes() -> None:
    """WCAG AA: 4.5 to 1 for text, 3 to 1 for lines, against every ground that they are drawn on."""
    css = (PAGES / "page.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)[:2]
    )
    assert light.keys() == dark.keys() and len(light) == 21
    for scheme in (light, dark):
        for ground in ("paper", "card", "code"):
            assert all(contrast(scheme[name], scheme[ground]) >= 4.5 for name in ("ink", "soft"))
        assert all(contrast(scheme[tone], scheme[f"{tone}-back"]) >= 4.5 for tone in ("good", "doubtful", "bad", "open"))
        assert all(contrast(scheme[f"c{i}"], scheme["card"]) >= 3 for i in range(6))


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: (L1 + 0.05) / (L2 + 0.05) of the relative luminances, the lighter one first."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    less, more = sorted((luminance(one), luminance(other)))
    return (more + 0.05) / (less + 0.05)
