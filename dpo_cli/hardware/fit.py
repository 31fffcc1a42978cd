"""How a run can fit the memory: automatic changes, and changes by the user, in the documentation's order. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from dpo_cli.hardware.memory import Bill, bill
from dpo_cli.hardware.memory_inputs import Settings
from dpo_cli.models.shape import ModelFacts, known_models

MARGIN = 0.1  # share of the budget to leave free if possible, because the memory is only estimated
LEAST_GB = 0.05  # the smallest saving that is reported
LARGE_RANK = 16  # the smallest documented one
LENGTHS = (4096, 2048, 1024, 512, 256)  # lengths that a remedy suggests


Change = tuple[str, Callable[[Settings], Settings]]  # the text for a config, and the change of the settings


def fit(facts: ModelFacts, wanted: Settings, budget_gb: float | None, checkpointing: bool | str) -> tuple[Settings, Bill]:
    """The settings to run `wanted`, with their memory; if they do not fit, with the changes that would help."""
    settings, memory = way(facts, wanted, budget_gb, checkpointing)
    if memory.fits is not False:
        return settings, memory
    return settings, replace(memory, largest_change=advice(facts, wanted, settings, memory, checkpointing))


def way(facts: ModelFacts, wanted: Settings, budget_gb: float | None, checkpointing: bool | str) -> tuple[Settings, Bill]:
    """The first settings for `wanted` that fit the budget, or the smallest if none do, with their memory.

    Only changes that do not affect the training are tried: rows that hold one micro-batch, `checkpointing` if it is "auto",
    then smaller micro-batches (with more accumulation, so that the pairs per optimizer step stay) unless the loss compares the
    pairs of one. Settings that leave a margin free come first.
    """
    choices = (False, True) if checkpointing == "auto" else (bool(checkpointing),)
    batches = [size for size in range(wanted.batch, 0, -1) if wanted.batch % size == 0][: 1 if wanted.is_whole else None]
    ways = [replace(wanted, checkpointing=choices[0])]
    wanted = wanted if wanted.is_whole else replace(wanted, row_tokens=0)
    ways += [replace(wanted, checkpointing=choice) for choice in choices]
    ways += [replace(wanted, batch=size, checkpointing=choices[-1]) for size in batches[1:]]
    bills = [bill(facts, settings, budget_gb) for settings in ways]
    if budget_gb is None:
        return ways[0], bills[0]
    for limit_gb in ((1 - MARGIN) * budget_gb, budget_gb):
        for settings, memory in zip(ways, bills, strict=True):
            if memory.total_gb <= limit_gb:
                return settings, memory
    return ways[-1], bills[-1]


def advice(facts: ModelFacts, wanted: Settings, settings: Settings, memory: Bill, checkpointing: bool | str) -> str:
    """The changes that make it fit, in the documentation's order, no more than needed, each with its additional saving.

    `settings` are those that `wanted` gets. A changed config gets others, faster ones where memory is left, so the savings are
    differences of the bills that a user sees.
    """
    chosen: list[Change] = []
    for change in _changes(settings):
        chosen.append(change)
        if bill(facts, _changed(settings, chosen), memory.budget_gb).fits:
            break
    else:
        return smaller_model(facts, settings, memory.budget_gb)
    for change in chosen[:-1]:
        without = [other for other in chosen if other is not change]
        if bill(facts, _changed(settings, without), memory.budget_gb).fits:
            chosen = without

    def total_gb(changes: Sequence[Change]) -> float:
        is_checkpointed = _changed(settings, changes).checkpointing and not settings.checkpointing  # by a change
        changed = _changed(wanted, changes)
        return way(facts, changed, memory.budget_gb, True if is_checkpointed else checkpointing)[1].total_gb

    return "; ".join(_in_words(chosen, [total_gb(chosen[:count]) for count in range(len(chosen) + 1)]))


def savings(facts: ModelFacts, settings: Settings) -> list[str]:
    """All changes that the user can make, in the documentation's order, each with its additional saving."""
    changes = list(_changes(settings))
    return _in_words(changes, [bill(facts, _changed(settings, changes[:i]), None).total_gb for i in range(len(changes) + 1)])


def _in_words(chosen: Sequence[Change], totals: Sequence[float]) -> list[str]:
    steps = zip(chosen, totals, totals[1:], strict=False)
    return [f"{text} saves {before - after:.1f} GB" for (text, _), before, after in steps if before - after >= LEAST_GB]


def _changes(settings: Settings) -> Iterator[Change]:
    """dpo-strategy, "High Memory Usage", in its order, after changes of speed only; a length replaces a longer one."""
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
    if settings.rank > LARGE_RANK:  # not in the documentation, which has no such rank
        yield f'"lora_r": {LARGE_RANK}', lambda now: replace(now, rank=LARGE_RANK)


def _shorter(settings: Settings, length: int) -> Settings:
    """The settings with shorter sequences: only prompts are cut, responses stay whole."""
    pair = settings.pair_tokens
    return replace(settings, length=length, pair_tokens=pair and max(length, pair - settings.length + length))


def _changed(settings: Settings, changes: Sequence[Change]) -> Settings:
    for _, change in changes:
        settings = change(settings)
    return settings


def smaller_model(facts: ModelFacts, settings: Settings, budget_gb: float | None) -> str:
    """A common model that fits with these settings, or with the smallest ones, checkpointed and one pair at a time.

    Also how the model of these facts fits with its weights in the RAM, if it does.
    """
    kept = _in_ram(facts, settings, budget_gb)
    return _smaller(settings, budget_gb) + (f"; or {kept}" if kept else "")


def _in_ram(facts: ModelFacts, settings: Settings, budget_gb: float | None) -> str | None:
    """How a model fits with the weights of its blocks in the RAM, if it does. The changes are as for `advice`."""
    if not (settings.can_divide and settings.on_gpu) or budget_gb is None:
        return None
    first: Change = ('"cpu_offload": true', lambda now: replace(now, in_ram=True))
    changes = [first, *_changes(settings)]
    for count in range(1, len(changes) + 1):
        needed = bill(facts, _changed(settings, changes[:count]), budget_gb)
        if needed.fits:
            words = ", ".join(text for text, _ in changes[:count])
            return f"keep the weights in the RAM, which is much slower: {words} needs {needed.total_gb:.1f} GB"
    return None


def _smaller(settings: Settings, budget_gb: float | None) -> str:
    """A common model that fits with these settings, or with the smallest ones."""
    name = largest_model(settings, budget_gb) if budget_gb else None
    if name is not None:
        return f"use a smaller model: {name} is the largest known model that fits with these settings"
    changes = list(_changes(settings))
    name = largest_model(_changed(settings, changes), budget_gb) if budget_gb else None
    with_changes = f" with {', '.join(text for text, _ in changes)}" if changes else ""
    return f"use a smaller model: {name} fits{with_changes}" if name else "use a larger card: no known model fits"


def largest_model(settings: Settings, budget_gb: float) -> str | None:
    """The largest of the common models that fits with these settings, checkpointed and, if possible, one pair at a time."""
    least = replace(settings, checkpointing=True, batch=settings.batch if settings.is_whole else 1)
    fitting = [name for name, facts in known_models().items() if bill(facts, least, budget_gb).fits]
    return max(fitting, key=lambda name: known_models()[name].parameters, default=None)
