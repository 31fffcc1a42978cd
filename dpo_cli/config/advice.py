"""The documentation's advice on single values, as hints: dpo-strategy, "Hyperparameter Tuning", "Common Issues", "Best
Practices". A hint never stops anything. Written like the rules of rules.py; `GUIDANCE` at the end lists them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dpo_cli.config import rules
from dpo_cli.config.rules import Rule
from dpo_cli.config.schema import Values, names_where, options, profile_defaults
from dpo_cli.errors import Problem
from dpo_cli.strategies.dpo import DPO
from dpo_cli.strategies.sft import SFT

LEARNING_RATE_RANGE = (1e-7, 1e-6)
# `adapter_rate` is what a LoRA adapter needs by measurement; `make learning-rates` prints the table of docs/benchmarks.md.
MEASURED = "gave the quickstart a margin of 1.65, where 5e-7 and 5e-6 gave 0.00"
ADAPTER_RATES = (1e-5, 1e-3)  # no hint between these
EPOCHS = (2, 4)
RANKS = (16, 32, 64)
LARGEST_DROPOUT = 0.1  # the documented 0.05 is called low
LARGEST_KL = 10
BETAS = {0.1: "a weak preference signal", 0.5: "balanced, recommended", 2.0: "a strong preference signal"}


def learning_rate(values: Values, given: Values) -> Iterator[Problem]:
    rate = values.get("learning_rate")
    low, high = LEARNING_RATE_RANGE
    if rate is None:
        return
    if values.get("lora_r") == 0:
        if rate > high:
            message = f"lora_r 0 trains every weight, and learning_rate {rate:g} is above the documented {low:g} to {high:g}"
            yield Problem("warning", "learning-rate-full", message, 'write "learning_rate": 5e-7', "learning_rate")
    elif rate < ADAPTER_RATES[0]:
        where = f"{'below' if rate < low else 'in' if rate <= high else 'above'} the documented range for DPO"
        where = where if "learning_rate" in given else "the documented default"
        message = f"learning_rate {rate:g}, {where}, is too low to move a LoRA adapter"
        fix = f'write "learning_rate": {DPO.adapter_rate:g}, which {MEASURED}: see docs/explanation/learning-rate-and-beta.md'
        yield Problem("hint", "learning-rate-small", message, fix, "learning_rate")
    elif rate > ADAPTER_RATES[1]:
        message = f"learning_rate {rate:g} is far above what an adapter needs"
        fix = f'write "learning_rate": {DPO.adapter_rate:g} or a value near it: see docs/explanation/learning-rate-and-beta.md'
        yield Problem("warning", "learning-rate-high", message, fix, "learning_rate")


def sft_learning_rate(values: Values, given: Values) -> Iterator[Problem]:
    rate, documented = values.get("learning_rate"), options()["learning_rate"].default("sft")
    if rate is not None and not 0.1 <= rate / documented <= 10:
        message = f"learning_rate {rate:g} is far from the documented {documented:g} for SFT"
        yield Problem("hint", "learning-rate-sft", message, f'write "learning_rate": {documented:g}', "learning_rate")


def beta(values: Values, given: Values) -> Iterator[Problem]:
    value = values.get("beta")
    if value is None or "beta" not in given or value == options()["beta"].default():
        return
    near = min(BETAS, key=lambda point: abs(value - point))
    points = ", ".join(f"{point:g} {meaning}" for point, meaning in BETAS.items())
    message = f"beta {value:g} is not a documented value; the nearest one, {near:g}, is {BETAS[near]}"
    fix = f"the documented values: {points}; a larger beta keeps the policy closer to the reference and scales the reward"
    yield Problem("hint", "beta", message, fix, "beta")


def epochs(values: Values, given: Values) -> Iterator[Problem]:
    value = values.get("num_train_epochs")
    low, high = EPOCHS
    if values.get("max_steps") is not None or value is None or "num_train_epochs" not in given or low <= value <= high:
        return
    message = f"num_train_epochs is {value:g}; the documentation recommends {low} to {high} for DPO"
    yield Problem(
        "hint", "epochs", message, "with fewer it may not learn the preference, with more it may overfit", "num_train_epochs"
    )


def lora_rank(values: Values, given: Values) -> Iterator[Problem]:
    rank = values.get("lora_r")
    if rank and "lora_r" in given and rank not in RANKS:
        message = f"lora_r is {rank}; the documentation recommends {', '.join(map(str, RANKS))}"
        yield Problem("hint", "lora-rank", message, "a smaller rank learns less, a larger one takes more memory", "lora_r")


def lora_alpha(values: Values, given: Values) -> Iterator[Problem]:
    alpha, rank = values.get("lora_alpha"), values.get("lora_r")
    if alpha is not None and rank and not values.get("use_rslora") and not rank <= alpha <= 4 * rank:
        message = f"lora_alpha {alpha:g} is far from 2 x lora_r = {2 * rank}"
        yield Problem(
            "hint", "lora-alpha", message, f'write "lora_alpha": {2 * rank}, the usual value for this rank', "lora_alpha"
        )


def lora_dropout(values: Values, given: Values) -> Iterator[Problem]:
    dropout = values.get("lora_dropout")
    if dropout is not None and dropout > LARGEST_DROPOUT:
        message = f"lora_dropout is {dropout:g}; the documentation recommends 0.05"
        yield Problem("hint", "lora-dropout", message, 'write "lora_dropout": 0.05, or remove the key', "lora_dropout")


def kl_limit(values: Values, given: Values) -> Iterator[Problem]:
    limit = values.get("max_kl")
    if limit is not None and limit > LARGEST_KL:
        message = f"max_kl is {limit:g}; the documentation calls a divergence below {LARGEST_KL} reasonable"
        yield Problem("hint", "max-kl", message, f'write "max_kl": {LARGEST_KL}', "max_kl")


def something_is_held_out(values: Values, given: Values) -> Iterator[Problem]:
    if values.get("eval_split") == 0 and "eval_dataset" in values and values["eval_dataset"] is None:
        message = "nothing is held out, so accuracy, margin and KL divergence cannot be measured"
        yield Problem("hint", "nothing-to-judge", message, 'write "eval_split": 0.1, or name an "eval_dataset"', "eval_split")


def within_the_profile(values: Values, given: Values) -> Iterator[Problem]:
    profile = values.get("compute_specs")
    documented_values = profile_defaults(str(profile))
    for name in documented_values.keys() & names_where(lambda option: option.memory == "more"):
        documented, value = documented_values[name], values.get(name)
        if name in given and value is not None and value > documented:
            message = f"{name} {value} is more than the {documented} documented for {profile}"
            fix = f'write "{name}": {documented}, or check the memory with `dpo validate --vram`'
            yield Problem("hint", "above-profile", message, fix, name)


GUIDANCE: Sequence[Rule] = (
    beta,
    lora_rank,
    lora_alpha,
    lora_dropout,
    kl_limit,
    something_is_held_out,
    within_the_profile,
)


OF_STRATEGY: Mapping[str, Sequence[Rule]] = {DPO.name: (learning_rate, epochs), SFT.name: (sft_learning_rate,)}


def check(values: Values, given: Values) -> list[Problem]:
    """Every hint."""
    return rules.check(values, given, (*OF_STRATEGY.get(str(values.get("strategy")), ()), *GUIDANCE))
