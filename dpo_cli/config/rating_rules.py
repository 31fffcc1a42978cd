"""Rules of the strategies that train on rated answers; written like those of rules.py."""

from __future__ import annotations

import json
from collections.abc import Iterator

from dpo_cli.config.schema import Values, options
from dpo_cli.errors import Problem
from dpo_cli.strategies.strategies import STRATEGIES


def values_of_strategy(values: Values, given: Values) -> Iterator[Problem]:
    """Values that belong to one strategy only (x-values-for in the schema)."""
    strategy = str(values.get("strategy"))
    for name in given.keys() & values.keys():
        of = options()[name].values_for
        items = values[name] if isinstance(values[name], list) else [values[name]]
        wrong = {item: [one for one, own in of.items() if item in own] for item in items if isinstance(item, str)}
        for item, owners in wrong.items() if of else ():
            if owners and strategy not in owners:
                message = f'"{name}": {json.dumps(item)} belongs to strategy {owners[0]}, and the strategy is {strategy}'
                yield Problem(
                    "error", "value-of-strategy", message, f'write "strategy": "{owners[0]}", or another {name}', name
                )
            elif not owners and strategy in of:
                message = f'"{name}": {json.dumps(item)} does not belong to strategy {strategy}'
                fix = f'write "{name}": {" or ".join(map(json.dumps, of[strategy]))}'
                yield Problem("error", "value-of-strategy", message, fix, name)
        if strategy in of and isinstance(values[name], list):
            message, fix = (
                f"strategy {strategy} has one {name}, and not a list",
                f'write "{name}": {json.dumps(of[strategy][0])}',
            )
            yield Problem("error", "value-of-strategy", message, fix, name)


def step_has_other_answers(values: Values, given: Values) -> Iterator[Problem]:
    """The reference point of KTO is measured on answers to other prompts of the same step."""
    strategy = STRATEGIES.get(str(values.get("strategy")))
    batch, accumulation = values.get("per_device_train_batch_size"), values.get("gradient_accumulation_steps")
    if strategy is not None and strategy.mismatches and batch == accumulation == 1 and values.get("loss_type") == "kto":
        message = "a step has one row, so that the loss has no answers to other prompts to measure its reference point on"
        fix = 'write "gradient_accumulation_steps": 8, or "loss_type": "apo_zero_unpaired", which needs none'
        yield Problem("error", "step-of-one", message, fix, "gradient_accumulation_steps")


def weights_are_no_signal(values: Values, given: Values) -> Iterator[Problem]:
    """The two weights stand against an imbalance of the data, so that one of them is enough."""
    both = [name for name in ("desirable_weight", "undesirable_weight") if values.get(name, 1) != 1]
    if len(both) == 2:
        message = "desirable_weight and undesirable_weight are both set: only their ratio balances good and bad answers"
        fix = "keep one of them: their size scales the loss, as learning_rate scales its steps"
        yield Problem("hint", "both-weights", message, fix, "desirable_weight")


RULES = (values_of_strategy, step_has_other_answers, weights_are_no_signal)
