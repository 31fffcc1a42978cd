"""How a run is made to fit: what may change by itself, and what the user can change, in the documentation's order. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from dpo_cli.hardware.memory import Bill, bill
from dpo_cli.hardware.memory_inputs import Settings
from dpo_cli.models.shape import ModelFacts, known_models

MARGIN = 0.1  # of the budget, left free where there is a choice: a bill is no measurement
LEAST_GB = 0.05  # a saving that is told
LARGE_RANK = 16  # the smallest documented one
LENGTHS = (4096, 2048, 1024, 512, 256)  # that a remedy goes down to


Change = tuple[str, Callable[[Settings], Settings]]  # what to write into a config, and the settings with it


def fit(facts: ModelFacts, wanted: Settings, budget_gb: float | None, checkpointing: bool | str) -> tuple[Settings, Bill]:
    """The way to run `wanted`, with its bill; where it does not fit, with what would make it fit."""
    settings, made = way(facts, wanted, budget_gb, checkpointing)
    return settings, made if made.fits is not False else replace(made, largest_change=advice(facts, settings, made))


def way(facts: ModelFacts, wanted: Settings, budget_gb: float | None, checkpointing: bool | str) -> tuple[Settings, Bill]:
    """The first way to run `wanted` that fits the budget, or the smallest with its bill when none does.

    Only what leaves the training unchanged is tried: `checkpointing` when it is "auto", then smaller micro-batches (the
    accumulation grows by the same factor, so pairs per optimizer step stay) unless the loss compares the pairs of one. A way
    with a margin goes before one without.
    """
    choices = (False, True) if checkpointing == "auto" else (bool(checkpointing),)
    batches = [size for size in range(wanted.batch, 0, -1) if wanted.batch % size == 0][: 1 if wanted.is_whole else None]
    ways = [replace(wanted, checkpointing=choice) for choice in choices]
    ways += [replace(wanted, batch=size, checkpointing=choices[-1]) for size in batches[1:]]
    bills = [bill(facts, settings, budget_gb) for settings in ways]
    if budget_gb is None:
        return ways[0], bills[0]
    for limit_gb in ((1 - MARGIN) * budget_gb, budget_gb):
        for settings, made in zip(ways, bills, strict=True):
            if made.total_gb <= limit_gb:
                return settings, made
    return ways[-1], bills[-1]


def advice(facts: ModelFacts, settings: Settings, made: Bill) -> str:
    """What makes it fit, in the documentation's order and no more than needed, each with what it saves on top of the others."""
    chosen: list[Change] = []
    for change in _changes(settings):
        chosen.append(change)
        if bill(facts, _changed(settings, chosen), made.budget_gb).fits:
            break
    else:
        return smaller_model(settings, made.budget_gb)
    for change in chosen[:-1]:
        without = [other for other in chosen if other is not change]
        if bill(facts, _changed(settings, without), made.budget_gb).fits:
            chosen = without
    return "; ".join(_told(facts, settings, chosen))


def savings(facts: ModelFacts, settings: Settings) -> list[str]:
    """All that the user can change, in the documentation's order, each with what it saves on top of those before it."""
    return _told(facts, settings, list(_changes(settings)))


def _told(facts: ModelFacts, settings: Settings, chosen: Sequence[Change]) -> list[str]:
    totals = [bill(facts, _changed(settings, chosen[:count]), None).total_gb for count in range(len(chosen) + 1)]
    steps = zip(chosen, totals, totals[1:], strict=False)
    return [f"{text} saves {before - after:.1f} GB" for (text, _), before, after in steps if before - after >= LEAST_GB]


def _changes(settings: Settings) -> Iterator[Change]:
    """dpo-strategy, "High Memory Usage", in its order, after what changes only the speed; a length replaces a longer one."""
    if not settings.checkpointing:
        yield '"gradient_checkpointing": true', lambda now: replace(now, checkpointing=True)
    if settings.bits != 4 and settings.rank:
        yield '"use_4bit": true' + (', "use_8bit": false' if settings.bits == 8 else ""), lambda now: replace(now, bits=4)
    if settings.batch > 1 and not settings.is_whole:
        fix = f'"per_device_train_batch_size": 1 with {settings.batch} times the "gradient_accumulation_steps"'
        yield fix, lambda now: replace(now, batch=1)
    for length in LENGTHS:
        if length < settings.length:
            yield f'"max_seq_length": {length}', partial(_shorter, length=length)
    if settings.rank > LARGE_RANK:  # beyond the documentation's remedies, which know no such rank
        yield f'"lora_r": {LARGE_RANK}', lambda now: replace(now, rank=LARGE_RANK)


def _shorter(settings: Settings, length: int) -> Settings:
    """Responses stay whole: a pair loses what its prompt loses."""
    pair = settings.pair_tokens
    return replace(settings, length=length, pair_tokens=pair and max(length, pair - settings.length + length))


def _changed(settings: Settings, changes: Sequence[Change]) -> Settings:
    for _, change in changes:
        settings = change(settings)
    return settings


def smaller_model(settings: Settings, budget_gb: float | None) -> str:
    """Which of the common models fits with these settings, or with the least; checkpointed and one pair at a time."""
    name = largest_model(settings, budget_gb) if budget_gb else None
    if name is not None:
        return f"use a smaller model: {name} is the largest known here that fits with these settings"
    changes = list(_changes(settings))
    name = largest_model(_changed(settings, changes), budget_gb) if budget_gb else None
    with_changes = f" with {', '.join(text for text, _ in changes)}" if changes else ""
    return f"use a smaller model: {name} fits{with_changes}" if name else "use a larger card: no model known here fits"


def largest_model(settings: Settings, budget_gb: float) -> str | None:
    """The largest of the common models that fits with these settings, checkpointed and, where possible, one pair at a time."""
    least = replace(settings, checkpointing=True, batch=settings.batch if settings.is_whole else 1)
    fitting = [name for name, facts in known_models().items() if bill(facts, least, budget_gb).fits]
    return max(fitting, key=lambda name: known_models()[name].parameters, default=None)
