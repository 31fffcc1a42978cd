"""Rules between options, and the documentation's guidance as hints. Each rule is one function that yields problems.

A rule receives the values (defaults filled in, only those that passed the schema on their own) and the keys the user gave.
It reads with `.get`, because a value that failed the schema is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dpo_cli.errors import Problem

Values = Mapping[str, Any]
Rule = Callable[[Values, frozenset[str]], Iterator[Problem]]

# dpo-strategy documentation, "Learning Rate": the recommended value and range.
LEARNING_RATE_RANGE = (1e-7, 1e-6)
# What a LoRA adapter needs by measurement; the table is in the README, `make learning-rates` prints it.
ADAPTER_LEARNING_RATE = 2e-4


def one_precision(values: Values, given: frozenset[str]) -> Iterator[Problem]:
    if values.get("bf16") and values.get("fp16"):
        yield Problem("error", "two-precisions", "bf16 and fp16 are both true", "keep one: bf16 where there is it", "fp16")


def one_warmup(values: Values, given: frozenset[str]) -> Iterator[Problem]:
    if values.get("warmup_steps") is not None and values.get("warmup_ratio"):
        message = "warmup_steps and warmup_ratio both say how long to warm up"
        yield Problem("error", "two-warmups", message, "remove one of them", "warmup_ratio")


def learning_rate_range(values: Values, given: frozenset[str]) -> Iterator[Problem]:
    rate = values.get("learning_rate")
    low, high = LEARNING_RATE_RANGE
    if rate is None:
        return
    if rate <= high:
        where = "in" if rate >= low else "below"
        message = f"learning_rate {rate:g} is {where} the documented range for DPO, at which a LoRA adapter hardly moves"
        fix = f"a LoRA adapter learns at {ADAPTER_LEARNING_RATE:g} and around it: see the table in the README"
        yield Problem("hint", "learning-rate-small", message, fix, "learning_rate")
    else:
        message = f"learning_rate {rate:g} is above the documented {low:g} to {high:g}; an adapter needs more than that"
        yield Problem("hint", "learning-rate-adapter", message, "if the loss oscillates, lower it", "learning_rate")


def epochs_range(values: Values, given: frozenset[str]) -> Iterator[Problem]:
    epochs = values.get("num_train_epochs")
    if epochs is not None and "num_train_epochs" in given and values.get("max_steps") is None and not 2 <= epochs <= 4:
        message = f"num_train_epochs is {epochs:g}; the documentation advises 2 to 4 for DPO"
        yield Problem("hint", "epochs", message, "fewer may not learn the preference, more may overfit", "num_train_epochs")


def alpha_twice_rank(values: Values, given: frozenset[str]) -> Iterator[Problem]:
    alpha, rank = values.get("lora_alpha"), values.get("lora_r")
    if alpha is not None and rank is not None and not rank <= alpha <= 4 * rank:
        message = f"lora_alpha {alpha} is far from 2 x lora_r = {2 * rank}"
        yield Problem("hint", "lora-alpha", message, f"lora_alpha is usually {2 * rank} at this rank", "lora_alpha")


def no_head_adapter(values: Values, given: frozenset[str]) -> Iterator[Problem]:
    modules = values.get("target_modules")
    if (isinstance(modules, list) and "lm_head" in modules) or modules == "lm_head":
        message = "an adapter on lm_head would never be trained: the log-probs use its weight directly"
        yield Problem("error", "lm-head-adapter", message, "remove lm_head from target_modules", "target_modules")


def warmup_acts(values: Values, given: frozenset[str]) -> Iterator[Problem]:
    if values.get("lr_scheduler_type") == "constant" and (values.get("warmup_ratio") or values.get("warmup_steps")):
        message = "lr_scheduler_type constant has no warm-up"
        yield Problem("warning", "warmup-ignored", message, 'use "constant_with_warmup"', "lr_scheduler_type")


def evaluation_has_data(values: Values, given: frozenset[str]) -> Iterator[Problem]:
    if values.get("eval_steps") is not None and values.get("eval_split") == 0:
        message = "eval_steps has no effect: nothing is held out"
        yield Problem("warning", "eval-steps-ignored", message, 'set "eval_split", for example to 0.1', "eval_steps")


RULES: tuple[Rule, ...] = (
    one_precision,
    one_warmup,
    learning_rate_range,
    epochs_range,
    alpha_twice_rank,
    no_head_adapter,
    warmup_acts,
    evaluation_has_data,
)


def check(values: Values, given: frozenset[str]) -> list[Problem]:
    """Every problem that every rule finds."""
    return [problem for rule in RULES for problem in rule(values, given)]
