"""The input of `dpo recommend`, a card and the lengths of a dataset, and the config that it writes. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import typer

from dpo_cli.config.documents import Comment, Setting, written
from dpo_cli.config.schema import options
from dpo_cli.data.column_guess import guessed_columns
from dpo_cli.data.columns import Columns
from dpo_cli.data.dataset import NO_COLUMN, Dataset, read
from dpo_cli.data.lengths import Lengths
from dpo_cli.errors import InvalidInput, Problem, UsageError
from dpo_cli.hardware.machine import probe
from dpo_cli.hardware.recommend import RATES, Recommendation, Request
from dpo_cli.models.source import ModelSource
from dpo_cli.strategies.strategies import STRATEGIES
from dpo_cli.ui.console import Console

MAX_VRAM_GB = 100_000
NO_GPU_FIX = "name the card to plan for, for example --vram 12"
ON_CPU_FIX = "; to train on a CPU, also name a small model, for example --model HuggingFaceTB/SmolLM2-135M-Instruct"


def gigabytes(text: str) -> float:
    """The value of --vram; the memory of a card, in GB."""
    try:
        return float(text)
    except ValueError as error:
        number = re.match(r"[\d.]*", text)
        raise typer.BadParameter(f"write the number of GB alone: --vram {number[0] if number and number[0] else 12}") from error


def require_vram(vram: float | None) -> None:
    """`UsageError` where it is not the memory of a card, in GB."""
    if vram is not None and not 0 < vram <= MAX_VRAM_GB:
        raise UsageError(f"{vram:g} GB is not the memory of a card", "name GB, for example 12")


def request_of(
    console: Console,
    vram: float | None,
    model: str | None,
    dataset: str | None,
    strategy: str,
    gpus: int = 1,
    nodes: int = 1,
) -> Request:
    """The request; `UsageError` for an unknown strategy, and without a card to plan for."""
    if strategy not in STRATEGIES:
        raise UsageError(f"unknown strategy {strategy}", f"name one of {', '.join(STRATEGIES)}")
    require_vram(vram)
    request = Request(vram or 0.0, model, dataset, strategy, gpus=gpus, nodes=nodes)
    if vram is None:
        machine = probe()
        if machine.card is None:
            raise UsageError("this machine has no GPU", NO_GPU_FIX + ON_CPU_FIX * (model is None))
        total_gb, free_gb, what = machine.card
        console.line(f"this machine: {what}")
        is_apple = machine.is_apple and not machine.gpus
        request = replace(request, vram_gb=total_gb, free_gb=free_gb, is_apple=is_apple, has_bf16=machine.has_bf16)
    if dataset is None:
        return request
    lengths, columns, prompts = _facts_of(dataset, ModelSource.of(model) if model else None, strategy)
    if lengths.most_tokens is None:
        console.line(f"{dataset} is not on this machine yet, so its lengths are not used")
    return replace(request, columns=columns, longest=lengths.most_tokens, prompts=prompts, share_over=lengths.share_over)


def _facts_of(dataset: str, model: ModelSource | None, strategy: str) -> tuple[Lengths, Columns | None, int]:
    """The lengths of the rows, the likely columns if no row can be read by the known names, and the number of prompts.

    Lengths in tokens with the tokenizer of `model` if given; all is empty for a hub dataset that is not fetched.
    """
    kind = STRATEGIES[strategy].rows

    def measured(columns: Columns | None) -> tuple[Dataset, Lengths]:
        lengths = Lengths(model.own.fast_tokenizer if model else None)
        return read(dataset, True, columns=columns, observers=[lengths], kind=kind), lengths

    (data, lengths), columns = measured(None), None
    if not data.pairs and any(problem.code == NO_COLUMN for problem in data.problems):
        columns = guessed_columns(data.sources[0].path)
        data, lengths = measured(columns)
    if any(problem.severity == "error" for problem in data.problems):
        wrong = read(dataset, columns=columns, kind=kind).problems  # what is skipped is an error here
        raise InvalidInput([_by_hand(problem) for problem in wrong if problem.severity == "error"])
    return lengths, columns, data.prompts


def _by_hand(problem: Problem) -> Problem:
    """A problem of columns that nothing is known of, with the command for a config to write them into."""
    if problem.code != NO_COLUMN or '"columns"' not in (problem.fix or ""):
        return problem
    way = "`dpo recommend --write my-config.json` without --dataset writes a config; add your dataset, and"
    return replace(problem, fix=f"{way} {problem.fix}")


def rate_line(recommendation: Recommendation, file: Path | None) -> str:
    """What to do about the learning rate, which is the documented one; empty if that suits an adapter too."""
    own = STRATEGIES[recommendation.values.strategy].adapter_rate
    if own is None:
        return ""
    value = json.dumps(own)
    here = f"replace its line in {file} by the commented one with {value}" if file else f'add "learning_rate": {value}'
    rate = json.dumps(recommendation.values.learning_rate)
    return f"learning_rate is {rate}, documented for all weights: an adapter hardly moves at it. To train an adapter, {here}"


def config_text(recommendation: Recommendation, file: str) -> str:
    """The config as a file of this name, with comments: why each value, and both learning rates."""
    return written(_lines(recommendation), file)


def _lines(recommendation: Recommendation) -> Iterator[Comment | Setting]:
    bill = f"the memory bill is {recommendation.memory.total_gb:.1f} GB."
    yield Comment(f"For a card with {recommendation.vram_gb:g} GB; {bill}")
    for key, value in recommendation.config.items():
        yield Comment(_why(key, value, recommendation))
        yield Setting(key, value)
    if "dataset" not in recommendation.config:
        yield Comment("your rows: JSONL, JSON, CSV or Parquet; make this a line of the config, and write the name of the file")
        yield Setting("dataset", "my-pairs.jsonl", is_active=False)
    strategy = STRATEGIES[recommendation.values.strategy]
    if strategy.adapter_rate is not None:
        yield Comment(f"documented, for all weights: to train an adapter, use the next line instead ({RATES})")
    else:
        yield Comment("the documented default")
    yield Setting("learning_rate", recommendation.values.learning_rate)
    if strategy.adapter_rate is not None:
        yield Setting("learning_rate", strategy.adapter_rate, is_active=False)


def _why(key: str, value: object, recommendation: Recommendation) -> str:
    """Why a key has its value."""
    named = {"strategy": "how to train", "model_name": "what is trained", "dataset": "what it is trained on"}
    named["num_processes"] = "one for each card"
    named["fsdp"] = "no card can hold the whole model"
    named["columns"] = "the likely meaning of its columns by their names; correct what is wrong"
    if key in named:
        return named[key]
    if key in recommendation.why:
        return recommendation.why[key]
    if recommendation.preset.get(key) == value:
        return f"documented preset, {recommendation.profile}"
    return options()[key].description
