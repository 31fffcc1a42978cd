"""The card of a dataset: what its rows are, how many were removed and why, and what is still to be known about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date

from dpo_cli.data.rows import Rating, Row
from dpo_cli.errors import Problem
from dpo_cli.plan.examination import Data

_TEMPLATE = """\
---
task_categories: [text-generation]
tags: [{tags}]
---
# {name}

{count} {noun} of {prompts} different prompts, cleaned from {rows} rows of {sources} on {day} by dpo {version}.

| column | is |
|---|---|
{columns}

## Rows

| | |
|---|---|
{facts}

## Removed rows

{removed}

## Findings about these rows

{findings}
"""
TAGS = {"pairs": "preference, dpo", "ratings": "preference, kto", "demonstrations": "sft"}


def dataset_card(
    name: str,
    sources: Sequence[str],
    data: Data,
    problems: Sequence[Problem],
    removed: Mapping[str, int],
    rows: int,
    day: date,
    version: str,
) -> str:
    """The card of a written dataset; `removed` counts the reasons for which rows were removed, of `rows` before."""
    train = data.train
    columns = train.read_as.get("read")
    read = columns.items() if isinstance(columns, Mapping) else ()
    unread = train.read_as.get("unread")
    unread_rows = [f"| `{column}` | not read |" for column in unread] if isinstance(unread, list) else []
    return _TEMPLATE.format(
        name=name,
        tags=TAGS.get(train.noun, train.noun),
        count=f"{train.pairs:,}",
        noun=train.noun,
        prompts=f"{train.prompts:,}",
        rows=f"{rows:,}",
        sources=" and ".join(f"`{source}`" for source in sources),
        day=f"{day:%Y-%m-%d}",
        version=version,
        columns="\n".join([*(f"| `{column}` | {meaning} |" for column, meaning in read), *unread_rows]),
        facts="\n".join(f"| {words} | {value} |" for words, value in _facts(data)),
        removed="\n".join(f"- {count:,} rows: `{code}`" for code, count in removed.items()) or "None.",
        findings="\n".join(f"- {_finding(problem)}" for problem in problems if problem.key != "model_name") or "None.",
    )


def _facts(data: Data) -> list[tuple[str, str]]:
    """What the rows are like, in figures."""
    length = data.said["length"]["characters"]
    facts = [("characters of a row", f"median {length['median']:,}, maximum {length['most']:,}")]
    if data.said.get("longer_chosen") is not None:
        facts.append(("longer response chosen", f"{data.said['longer_chosen']:.0%} of the pairs"))
    rated = [row for row in data.train.load() if isinstance(row, Rating)]
    if rated:
        good = sum(row.is_good for row in rated)
        facts.append(("rated good, bad", f"{good:,}, {len(rated) - good:,}"))
    categories = _categories(data.train.load())
    return facts + ([("categories", categories)] if categories else [])


def _categories(rows: Sequence[Row]) -> str:
    """The categories with their rows, the largest first; empty if no row has one."""
    counts: dict[str, int] = {}
    for row in rows:
        if row.category:
            counts[row.category] = counts.get(row.category, 0) + 1
    largest = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count:,}" for name, count in largest[:10]) + (", ..." if len(largest) > 10 else "")


def _finding(problem: Problem) -> str:
    first, *_ = problem.message.splitlines()
    return f"{problem.severity} `{problem.code}`: {first}"
