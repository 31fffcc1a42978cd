"""Rules of rlhf: what scores its samples, and how many a step has. Written like those of rules.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_cli.config.ranking_rules import rank_problems
from dpo_cli.config.schema import Values, options
from dpo_cli.errors import Problem


def reward_functions(written: object) -> list[dict[str, Any]]:
    """The rules of `reward_functions` with all their parts: a name stands for an object with that rank."""
    parts: Mapping[str, Mapping[str, Any]] = options()["reward_functions"].rule["items"]["properties"]
    given = [{"rank": one} if isinstance(one, str) else one for one in written] if isinstance(written, list) else []
    return [{**{name: part.get("default") for name, part in parts.items()}, **one} for one in given]


def something_scores_the_samples(values: Values, given: Values) -> Iterator[Problem]:
    if "reward_functions" in values and not values["reward_functions"] and values.get("reward_model", "") is None:
        message = "nothing scores the samples: there is neither a reward_model nor a reward function"
        fix = 'train a reward model in a stage before it, or write a rule, for example "reward_functions": ["shorter"]'
        yield Problem("error", "reward-missing", message, fix, "reward_model")


def functions_have_their_parts(values: Values, given: Values) -> Iterator[Problem]:
    for function, one in zip(
        reward_functions(values.get("reward_functions")), values.get("reward_functions") or (), strict=True
    ):
        yield from rank_problems(function, one.keys() if isinstance(one, dict) else (), "reward_functions")


def a_step_has_whole_groups(values: Values, given: Values) -> Iterator[Problem]:
    sizes = [values.get(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")]
    if None in sizes:
        return
    batch, accumulation, group = map(int, filter(None, sizes))
    samples = batch * accumulation
    if samples % group:
        message = f"a step has {samples} samples ({batch} x {accumulation}), which is not a multiple of num_generations {group}"
        whole = next(size for size in range(accumulation, accumulation + group + 1) if batch * size % group == 0)
        fix = f'write "gradient_accumulation_steps": {whole}'
        yield Problem("error", "broken-group", message, fix, "num_generations")


def a_prompt_has_room_for_a_sample(values: Values, given: Values) -> Iterator[Problem]:
    longest, new = values.get("max_seq_length"), values.get("max_new_tokens")
    if "num_generations" in values and longest is not None and new is not None and new >= longest:
        message = f"max_new_tokens {new} leaves no room for a prompt in max_seq_length {longest}"
        fix = f'write "max_new_tokens": {max(1, longest // 4)}, or raise max_seq_length'
        yield Problem("error", "samples-too-long", message, fix, "max_new_tokens")


RULES = (
    something_scores_the_samples,
    functions_have_their_parts,
    a_step_has_whole_groups,
    a_prompt_has_room_for_a_sample,
)
