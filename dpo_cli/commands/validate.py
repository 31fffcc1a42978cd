"""What `dpo validate` says of a config, on the screen and as its JSON document. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from dpo_cli.config.config import Loaded, load_stages
from dpo_cli.errors import Exit
from dpo_cli.hardware.machine import Machine
from dpo_cli.plan.preflight import inspect
from dpo_cli.ui.console import Console

ORDER = [Exit.DONE, Exit.UNFIT, Exit.INVALID]


def worst(codes: Iterable[Exit]) -> Exit:
    """Of the exit codes of several configs the one that is told."""
    return max(codes, key=ORDER.index)


ROWS = 256  # that are rendered
NOT_RENDERED = "rendered: none, since the model's tokenizer.json cannot be read here"


def validated_file(console: Console, path: str, overrides: list[str], *options: Any) -> tuple[dict[str, Any], Exit]:
    """What `validate --json` says of a file, and its exit code; of stages, all that is wrong and the largest memory."""
    found = [_validated(console, loaded.on_foundation(), *options) for loaded in load_stages(path, overrides)]
    documents = [document for document, _ in found]
    if len(found) == 1:
        return found[0]
    problems = {json.dumps(problem): problem for document in documents for problem in document["problems"]}
    bills = [document["memory"] for document in documents if document["memory"]]
    whole = {
        "ok": all(document["ok"] for document in documents),
        "problems": list(problems.values()),  # of what the stages share, once
        "config": {"stages": [document["config"] for document in documents]},
        "data": None,
        "memory": max(bills, key=lambda bill: bill["total_gb"], default=None),
        "stages": documents,
    }
    return whole, worst(code for _, code in found)


def _validated(
    console: Console, loaded: Loaded, machine: Machine, vram: float | None, with_data: bool, strict: bool, rows: int
) -> tuple[dict[str, Any], Exit]:
    """What `validate --json` says of one config, shown on the way, and its exit code."""
    found = inspect(loaded, machine, vram, with_data, rendered_rows=rows).stricter(lambda _: strict)
    plan, data = found.plan, found.data
    memory = plan.memory.to_json() if plan and plan.memory else None
    document = {
        "ok": not found.errors,
        "problems": [problem.to_json() for problem in found.problems],
        "config": plan.config.to_json() if plan else loaded.values,
        "data": data.to_json() if data else None,
        "memory": memory,
    }
    console.problems(found.problems)
    if data and data.train.pairs:
        console.line(f"data: {data.train.pairs} {data.train.noun} of {data.train.prompts} prompts in {data.train.rows} rows")
        console.columns(data.train.read_as)
        console.lengths(data.said)
        rendered = data.said["rendered"]
        console.line(f"rendered: {rendered} {data.train.noun}" if rendered else NOT_RENDERED)
    for note in plan.notes if plan else ():
        console.line(f"note: {note}")
    if memory:
        console.bill(memory)
    console.line(f"{loaded.label}: {f'not valid, errors: {len(found.errors)}' if found.errors else 'valid'}")
    return document, found.exit_code
