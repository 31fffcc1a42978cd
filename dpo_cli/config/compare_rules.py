"""Rules between the parts of the option `compare`, written like those of rules.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_cli.config.schema import Values, inner_defaults
from dpo_cli.errors import Problem

# What all methods of a comparison share, and what the comparison decides: base, data, held-out set, seed, place, budget.
SAME_FOR_ALL = (
    *("model_name", "revision", "dataset", "eval_dataset", "eval_split", "split_seed", "columns", "on_bad_rows"),
    *("seed", "output_dir", "num_train_epochs", "max_steps", "compare"),
)


def parts_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of `compare` with their defaults."""
    return {**inner_defaults("compare"), **values.get("compare", {})}


def name_of(method: str | Mapping[str, Any]) -> str:
    return method if isinstance(method, str) else str(method["name"])


def methods_have_own_names(values: Values, given: Values) -> Iterator[Problem]:
    """A name is a folder, also on disks that take upper and lower case as the same."""
    counts = Counter(name_of(method).lower() for method in parts_of(values)["methods"])
    for name in (name for name, count in counts.items() if count > 1):
        message = f'"compare": two methods have the name {name}'
        yield Problem("error", "method-name", message, "write an object with another name for each", "compare")


def methods_share_the_rest(values: Values, given: Values) -> Iterator[Problem]:
    for method in parts_of(values)["methods"]:
        if isinstance(method, str):
            continue
        parts = [method, *(stage for stage in method.get("stages") or () if isinstance(stage, dict))]
        for key in dict.fromkeys(key for part in parts for key in part if key in SAME_FOR_ALL):
            message = f'"compare": the method {method["name"]} has its own "{key}", which is the same for all methods'
            fix = f'write "{key}" next to "compare"' if key in ("model_name", "dataset", "eval_dataset") else f'remove "{key}"'
            yield Problem("error", "method-own-key", message, fix, "compare")


def seconds_have_a_number(values: Values, given: Values) -> Iterator[Problem]:
    parts = parts_of(values)
    if parts["budget"] == "seconds" and parts["budget_value"] is None:
        message = '"compare": a budget of seconds needs budget_value'
        yield Problem("error", "budget-missing", message, 'add "budget_value": 600 to "compare"', "compare")


def methods_have_no_rounds(values: Values, given: Values) -> Iterator[Problem]:
    """Each round would train for the whole budget."""
    methods = [method for method in parts_of(values)["methods"] if not isinstance(method, str)]
    parts = [
        values,
        *methods,
        *(stage for method in methods for stage in method.get("stages") or () if isinstance(stage, dict)),
    ]
    if "compare" in given and any(part.get("rounds") for part in parts):
        message, fix = '"compare": a method with "rounds" cannot be compared', 'remove "rounds"'
        yield Problem("error", "method-rounds", message, fix, "compare")


RULES = (methods_have_own_names, methods_share_the_rest, methods_have_no_rounds, seconds_have_a_number)
