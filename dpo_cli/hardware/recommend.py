"""A config for a card: the documented settings of its profile, improved or reduced to what fits. No torch.

It starts with the documented preset (its values are in config/schema.json). If that fits with a margin, it is improved step by
step, and each step that fits is kept; else settings are reduced in the order of the documentation's remedies. The pairs per
optimizer step stay as documented.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TypedDict

from dpo_cli.config.options import Config
from dpo_cli.config.schema import defaults, names_where, profile_defaults
from dpo_cli.data.columns import Columns
from dpo_cli.errors import DoesNotFit, InvalidInput, Problem, invalid
from dpo_cli.hardware.fit import MARGIN, smaller_model, way
from dpo_cli.hardware.memory import Bill
from dpo_cli.hardware.memory_inputs import Longest, Settings
from dpo_cli.hardware.reward_model import with_reward_model
from dpo_cli.models.checks import problems
from dpo_cli.models.shape import ModelFacts, known_models
from dpo_cli.models.source import ModelSource
from dpo_cli.results.compared import compared
from dpo_cli.results.intervals import FEW_PROMPTS
from dpo_cli.storage.jsonio import read_json

RATES = "docs/explanation/learning-rate-and-beta.md"
EVAL_SPLIT = 0.1  # dpo-strategy, "Advanced DPO Configuration": the share of held-out prompts
MOST_HELD_OUT = 0.3  # of few prompts: the others are needed for the training
CARDS = (4, 6, 8, 10, 12, 16, 24, 32, 48, 80)  # common sizes of cards in GB
QLORA_BELOW_GB = 12  # dpo-strategy, "Minimum Requirements"; below, weights stay in 4 bits


@dataclass(frozen=True)
class Step:
    """One change of one key, and its reason."""

    why: str
    key: str
    value: int  # may be true or false


BATCH, LENGTH = "per_device_train_batch_size", "max_seq_length"
# Faster settings do not change the result; 16-bit weights are exact; longer sequences cut less of long prompts.
IMPROVEMENTS: Sequence[Step] = (
    Step("weights in 16 bits, without the error of quantisation", "use_4bit", False),
    Step("longer sequences", LENGTH, 2048),
    Step("longer sequences", LENGTH, 4096),
    Step("larger micro-batches, which are faster", BATCH, 2),
    Step("larger micro-batches, which are faster", BATCH, 4),
    Step("larger micro-batches, which are faster", BATCH, 8),
    Step("no recomputation in the backward pass, which is faster", "gradient_checkpointing", False),
)
# The documentation's remedies ("High Memory Usage") after those without a cost here (4 bits in every preset; smaller
# micro-batches), and a smaller adapter if that of the preset is large.
CONCESSIONS: Sequence[Step] = (
    Step("shorter sequences: longer pairs are cut or skipped", LENGTH, 1024),
    Step("a smaller adapter", "lora_r", 16),
    Step("shorter sequences: longer pairs are cut or skipped", LENGTH, 512),
    Step("shorter sequences: longer pairs are cut or skipped", LENGTH, 256),
)


@dataclass(frozen=True)
class Recommendation:
    """`config` fits the budget with a margin; `preset` is the documented one that it started from."""

    profile: str
    vram_gb: float
    config: dict[str, object]  # the config to write
    values: Config
    memory: Bill
    preset: dict[str, object]
    reasons: list[str]
    why: dict[str, str]  # of the keys that differ from the preset

    def to_json(self) -> dict[str, object]:
        return {
            "profile": self.profile,
            "vram_gb": self.vram_gb,
            "config": self.config,
            "memory": self.memory.to_json(),
            "reasons": self.reasons,
        }


@dataclass(frozen=True)
class Request:
    """The request: a card, its free memory `free_gb` if that is less, and what is known about the data."""

    vram_gb: float
    model: str | None = None
    dataset: str | None = None
    strategy: str = "dpo"
    free_gb: float | None = None
    longest: int | None = None  # estimated tokens of the longest sequence of the dataset
    prompts: int | None = None  # different ones in the dataset
    share_over: Callable[[int], float] = lambda length: 0.0  # the share of its pairs that are longer
    is_apple: bool = False  # without bitsandbytes, and in float32
    has_bf16: bool = True  # for cards other than Apple's
    columns: Columns | None = None  # the likely ones, if those of the dataset have other names than the known ones
    gpus: int = 1  # such cards in one machine
    nodes: int = 1  # such machines

    @property
    def cards(self) -> int:
        return self.gpus * self.nodes

    @property
    def budget_gb(self) -> float:
        return min(self.free_gb or self.vram_gb, self.vram_gb)


class Profile(TypedDict):
    """A class of cards, and the models that are suggested for it."""

    from_gb: float
    advice: str
    models: list[str]


def profiles() -> dict[str, Profile]:
    loaded: dict[str, Profile] = read_json(files("dpo_cli.hardware").joinpath("profiles.json"))
    return loaded


def recommend(request: Request) -> Recommendation:
    """The best config for `request`, with its model or the profile's largest that fits; `DoesNotFit` suggests another."""
    best = _best(request)
    for card in (card for card in CARDS if card > request.vram_gb):
        gains = _gains(best, replace(request, vram_gb=float(card), free_gb=None))
        if gains:
            best.reasons.append(f"a card of {card} GB would allow {', '.join(gains)}")
            break
    return best


def _gains(best: Recommendation, request: Request) -> list[str]:
    """The improvements of the best config for another card."""
    try:
        other = _best(request).values
    except DoesNotFit:  # because of that card's profile, not its memory
        return []
    mine = best.values
    costs, saves = names_where(lambda option: option.memory == "more"), names_where(lambda option: option.memory == "less")
    larger = [key for key in costs if getattr(other, key) > getattr(mine, key)]
    if request.longest is not None and request.longest <= mine.max_seq_length:
        larger = [key for key in larger if key != LENGTH]
    without = [key for key in saves if getattr(mine, key) and not getattr(other, key)]
    model = ["model_name"] if other.model_name != mine.model_name else []
    return [f"{key} {_as_json(getattr(other, key))}" for key in (*model, *without, *larger)]


def _best(request: Request) -> Recommendation:
    name, profile = [(name, entry) for name, entry in profiles().items() if entry["from_gb"] <= request.vram_gb][-1]
    preset: dict[str, object] = {"strategy": request.strategy, **profile_defaults(name)}
    written = {**preset, "gradient_checkpointing": True}
    if request.is_apple:
        written["use_4bit"] = False
    smaller = [
        model for entry in reversed(profiles().values()) if entry["from_gb"] < profile["from_gb"] for model in entry["models"]
    ]
    models = [request.model] if request.model else list(dict.fromkeys([*profile["models"], *smaller]))
    shapes = {candidate: _facts(candidate) for candidate in models}
    reasons = [f"{request.vram_gb:g} GB is the profile {name}: {profile['advice']}"]
    for model, facts in shapes.items():
        start = _start(written, model, request)
        documented = _bill(facts, start, request)[1]
        settled = _settled(facts, start, request)
        if request.cards > 1 and not _fits(facts, start, request):  # before anything of the training is cut
            settled = _settled(facts, _divided(start, request), request) or settled
        if settled is None:
            needed, budget = compared(documented.total_gb, request.budget_gb)
            reasons.append(f"{model} does not fit: it needs {needed} of {budget} GB")
            continue
        values, changes = settled
        steps = [text for _, text in changes]
        settings, memory = _bill(facts, values, request)
        needed, budget = compared(documented.total_gb, request.budget_gb)
        margin = f"{MARGIN:.0%} of the card stay free (validate also accepts a full card)"
        reasons.append(f"the documented preset needs {needed} of {budget} GB with {model}; {margin}")
        config: dict[str, object] = {"strategy": request.strategy, "model_name": model}
        config |= {"dataset": request.dataset} if request.dataset else {}
        config |= {"columns": request.columns} if request.columns else {}
        config |= {key: getattr(values, key) for key in written}
        config |= {"num_processes": request.cards} if request.cards > 1 else {}
        config |= {"fsdp": True} if values.fsdp is True else {}
        config["eval_split"] = held_out = eval_split(request.prompts)
        if held_out != EVAL_SPLIT:
            assert request.prompts is not None
            expected = round(held_out * request.prompts)
            text = f"{held_out:g}: about {expected} of {request.prompts} prompts are held out; an interval needs {FEW_PROMPTS}"
            if expected < FEW_PROMPTS:
                text += ', so add prompts, or name an "eval_dataset"'
            changes.append(("eval_split", text))
            steps.append(f"eval_split is {text}")
        if settings.batch < values.per_device_train_batch_size:
            steps.append(f"to fit, the training uses micro-batches of {settings.batch}; the pairs per step stay the same")
        reasons += _reasons_of_cards(request, values, memory)
        if request.longest is not None:
            billed, limit = min(request.longest, values.max_seq_length), values.max_seq_length
            reasons.append(
                f"memory is billed for rows of {billed} tokens; the longest of the dataset has about {request.longest} at most"
            )
            if share := request.share_over(limit):
                reasons.append(f"about {share:.0%} of the pairs are longer than {limit}, and are cut or skipped")
        if request.columns is not None:
            reasons.append(f"columns by their names: {', '.join(f'{name} is {key}' for key, name in request.columns.items())}")
        reasons += [*steps, f"learning_rate keeps its documented default; for adapters see {RATES}"]
        return Recommendation(name, request.vram_gb, config, values, memory, preset, reasons, dict(changes))
    model = models[-1]
    raise DoesNotFit([_misfit(model, shapes[model], _start(written, model, request), request)])


def _reasons_of_cards(request: Request, values: Config, memory: Bill) -> Iterator[str]:
    """What several cards do, need, and may lack."""
    if request.cards == 1:
        return
    holds = "a part of each block of it" if values.fsdp is True else "the whole model"
    yield f"{request.cards} cards share the pairs of each step; each holds {holds}: the bill is for one"
    if values.fsdp is True:
        ram_gb = request.gpus * memory.host_gb
        yield f"each machine needs about {ram_gb:.0f} GB of RAM to load it in {request.gpus} processes"
    if (idle := request.cards - _pairs(values)) > 0:
        more = math.ceil(request.cards / values.per_device_train_batch_size)
        words = f"a step has {_pairs(values)} pairs, so {idle} cards have nothing to do"
        yield f'{words}: for larger and fewer steps, "gradient_accumulation_steps": {more}'
    if request.nodes > 1:
        yield f"start it on each of the {request.nodes} machines with torchrun or srun: docs/guides/cluster.md"


def eval_split(prompts: int | None) -> float:
    """The share to hold out: a tenth, or what very probably gives `FEW_PROMPTS` prompts if that is more, but at most 0.3.

    Each prompt is drawn by itself, so the aim is two standard deviations above the number that is needed.
    """
    if not prompts:
        return EVAL_SPLIT
    aim = FEW_PROMPTS + 2 * math.sqrt(FEW_PROMPTS)
    return min(MOST_HELD_OUT, max(EVAL_SPLIT, math.ceil(100 * aim / prompts) / 100))


def _start(written: Mapping[str, object], model: str, request: Request) -> Config:
    """The config to try first, with the values that its device decides."""
    half = {"bf16": False, "fp16": False} if request.is_apple else {"bf16": request.has_bf16, "fp16": not request.has_bf16}
    device = "mps" if request.is_apple else "cuda"
    own = {"dataset": request.dataset or "", "model_name": model, "device": device, **half}
    return Config(**{**defaults(request.strategy), **written, **own})


def _divided(values: Config, request: Request) -> Config:
    """The values with the weights divided over all cards; as they are for one card."""
    return replace(values, fsdp=True, num_processes=request.cards) if request.cards > 1 else values


def _settled(facts: ModelFacts, values: Config, request: Request) -> tuple[Config, list[tuple[str, str]]] | None:
    """(values that fit, each changed key with its change and reason); None if nothing fits."""
    changes: list[tuple[str, str]] = []

    def taken(kind: str, step: Step, values: Config) -> Config:
        text = f"{kind}: {step.key} {_as_json(step.value)} instead of {_as_json(getattr(values, step.key))} ({step.why})"
        changes.append((step.key, text))
        return _changed(values, step)

    context = facts.max_position_embeddings
    if context is not None and context < values.max_seq_length:
        values = taken("reduced", Step("the maximum of the model", LENGTH, context), values)
    for step in CONCESSIONS:
        if _fits(facts, values, request):
            break
        if step.value < getattr(values, step.key):
            values = taken("reduced", step, values)
    if not _fits(facts, values, request):
        return None
    for step in IMPROVEMENTS:
        if step.key == LENGTH and context is not None and step.value > context:
            continue
        if _improves(values, step, request) and _runs_as_written(facts, _changed(values, step), request):
            values = taken("improved", step, values)
    return values, changes


def _improves(values: Config, step: Step, request: Request) -> bool:
    if step.key == "use_4bit":
        return values.use_4bit and request.vram_gb >= QLORA_BELOW_GB
    if step.key == LENGTH:
        now = values.max_seq_length
        return step.value > now and (request.longest is None or now < request.longest)
    if step.key == BATCH:
        return step.value > values.per_device_train_batch_size and _pairs(values) % step.value == 0
    return bool(getattr(values, step.key))


def _pairs(values: Config) -> int:
    """Pairs per optimizer step."""
    return values.per_device_train_batch_size * values.gradient_accumulation_steps


def _changed(values: Config, step: Step) -> Config:
    """The values with the step, with the same pairs per optimizer step."""
    changed = values.replaced({step.key: step.value})
    return replace(changed, gradient_accumulation_steps=_pairs(values) // changed.per_device_train_batch_size)


def _fits(facts: ModelFacts, values: Config, request: Request) -> bool:
    return _bill(facts, values, request)[1].total_gb <= _limit_gb(request)


def _runs_as_written(facts: ModelFacts, values: Config, request: Request) -> bool:
    settings, memory = _bill(facts, values, request)
    return memory.total_gb <= _limit_gb(request) and settings.batch == values.per_device_train_batch_size


def _limit_gb(request: Request) -> float:
    return (1 - MARGIN) * request.budget_gb


def _bill(facts: ModelFacts, values: Config, request: Request) -> tuple[Settings, Bill]:
    """The settings of a run with these values, and their memory, as in `validate` and `train`."""
    settings = with_reward_model(Settings.of(values, facts, Longest(request.longest)), values, facts)
    return way(facts, settings, request.budget_gb, values.gradient_checkpointing)


def _facts(model: str) -> ModelFacts:
    source = ModelSource.of(model)
    wrong = [
        problem
        for problem in problems(source, to_align=False)
        if problem.severity == "error" or problem.code == "model-name-near"
    ]
    if wrong:
        raise InvalidInput([replace(problem, severity="error") for problem in wrong])
    facts = source.facts
    if facts is None:
        message = f"the shape of {model} is unknown"
        fix = "name a local model directory, a GGUF file, or one of: " + ", ".join(known_models())
        raise invalid("model-unknown", message, fix, "model_name")
    return facts


def _misfit(model: str, facts: ModelFacts, least: Config, request: Request) -> Problem:
    least = _divided(least, request)
    for step in CONCESSIONS:
        least = _changed(least, replace(step, value=min(step.value, getattr(least, step.key))))
    needed, budget = compared(_bill(facts, least, request)[1].total_gb, request.budget_gb)
    each = f" of each of {request.cards} cards" if request.cards > 1 else ""
    message = f"{model} needs at least {needed} GB{each} and a margin, but there are {budget} GB"
    settings = with_reward_model(Settings.of(least, facts, Longest(request.longest)), least, facts)
    fix = smaller_model(facts, settings, _limit_gb(request))
    return Problem("error", "does-not-fit", message, fix)


def _as_json(value: object) -> str:
    return json.dumps(value)
