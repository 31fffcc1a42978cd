"""The findings of `dpo validate` on a config, on the screen and as a result. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from dpo_cli.commands.recommendation import require_vram
from dpo_cli.config.config import ConfigLike, Loaded, load_stages
from dpo_cli.errors import Exit
from dpo_cli.hardware.machine import Machine
from dpo_cli.plan.cost import compared_with_pairs
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.examination import Data
from dpo_cli.plan.plan import Plan
from dpo_cli.plan.preflight import inspect
from dpo_cli.results.compared import compared
from dpo_cli.results.validation import Validation
from dpo_cli.strategies.dpo import DPO
from dpo_cli.ui.console import Console

ORDER = [Exit.DONE, Exit.UNFIT, Exit.INVALID]
CHARACTERS_A_TOKEN = 4  # of English
ROWS = 256  # rendered with the chat template


def worst(codes: Iterable[Exit]) -> Exit:
    """The exit code that is reported for several configs."""
    return max(codes, key=ORDER.index)


def validated_file(
    console: Console,
    path: ConfigLike,
    overrides: Sequence[str],
    machine: Machine,
    vram: float | None = None,
    with_data: bool = True,
    strict: bool = False,
    rows: int = ROWS,
) -> Validation:
    """The problems of a file, printed as they are found; for stages, all problems and the largest memory."""
    require_vram(vram)
    stages = [
        _validated(console, loaded.on_foundation(), machine, vram, with_data, strict, rows)
        for loaded in load_stages(path, overrides)
    ]
    if len(stages) == 1:
        return stages[0]
    return Validation(
        problems=list(dict.fromkeys(problem for stage in stages for problem in stage.problems)),  # shared problems once
        config={"stages": [stage.config for stage in stages]},
        data=None,
        memory=max((stage.memory for stage in stages if stage.memory), key=lambda bill: bill["total_gb"], default=None),
        exit_code=worst(stage.exit_code for stage in stages),
        stages=stages,
    )


def _compared_with_pairs(loaded: Loaded, plan: Plan, data: Data, machine: Machine, vram: float | None) -> str:
    """What a training that samples answers costs compared with dpo with the same values."""
    same = replace(loaded, config=plan.config.replaced({"strategy": DPO.name}))
    memory = resolve(same, machine, vram_gb=vram, longest=data.longest, model=plan.model).memory
    length = data.said["length"]
    tokens = length["tokens"]["median"] if length["tokens"] else length["characters"]["median"] / CHARACTERS_A_TOKEN
    words = f"compared with dpo, a step computes about {compared_with_pairs(plan.config, tokens):.1f} times as much"
    if plan.memory is None or memory is None:
        return words
    needed, of_dpo = compared(plan.memory.total_gb, memory.total_gb)
    return f"{words}, and needs {needed} GB instead of {of_dpo} GB"


def _validated(
    console: Console, loaded: Loaded, machine: Machine, vram: float | None, with_data: bool, strict: bool, rows: int
) -> Validation:
    """The problems of one config, printed as they are found."""
    inspection = inspect(loaded, machine, vram, with_data, rendered_rows=rows).stricter(lambda _: strict)
    plan, data = inspection.plan, inspection.data
    memory = plan.memory.to_json() if plan and plan.memory else None
    console.problems(inspection.problems)
    if data and data.train.pairs:
        console.line(f"data: {data.train.pairs} {data.train.noun} of {data.train.prompts} prompts in {data.train.rows} rows")
        if data.held_out_words:
            console.line(f"held out: {data.held_out_words}")
        console.columns(data.train.read_as)
        console.lengths(data.said)
        if rows:
            console.line(f"rendered: {data.rendered_words}")
    for note in plan.notes if plan else ():
        console.line(f"note: {note}")
    if memory:
        if plan and data and (words := data.billed_words(plan.config.max_seq_length)):
            console.line(words)
        if plan and plan.processes > 1:
            console.line(f"memory is billed for one of {plan.processes} processes, each with {plan.held_words}")
        console.bill(memory)
        if plan and plan.memory and plan.is_divided:
            when = "all the time" if plan.config.cpu_offload else "while it loads the model"
            console.line(f"each process needs about {plan.memory.host_gb:.1f} GB of RAM {when}")
    if plan and data and plan.strategy.generates:
        console.line(_compared_with_pairs(loaded, plan, data, machine, vram))
    console.line(f"{loaded.label}: {f'not valid, errors: {len(inspection.errors)}' if inspection.errors else 'valid'}")
    config = plan.config.to_json() if plan else loaded.values
    return Validation(inspection.problems, config, data.to_json() if data else None, memory, inspection.exit_code)
