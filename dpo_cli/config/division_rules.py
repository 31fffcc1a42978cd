"""Rules of weights that are divided over processes, or wait in the RAM. Written like those of rules.py."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_cli.config.schema import Values
from dpo_cli.errors import Problem


def is_shared(values: Values) -> bool:
    """Whether several processes train."""
    return bool(values.get("num_processes", 1) != 1)


def divides_weights(values: Values) -> bool:
    """Whether frozen weights are shards (providers/sharding.py): of several processes, or in the RAM, or both."""
    return values.get("cpu_offload") is True or (values.get("fsdp") is True and is_shared(values))


def weights_can_be_divided(values: Values, given: Values) -> Iterator[Problem]:
    wanted = next((name for name in ("cpu_offload", "fsdp") if values.get(name) is True), None)
    if wanted is None:
        return
    if reason := obstacle_to_division(values):
        name, why, other = reason
        message = f'"{wanted}": true takes frozen weights apart, and {why}'
        yield Problem("error", "not-divided", message, f'remove "{wanted}", or write "{name}": {other}', wanted)
    elif values.get("fsdp") is False and is_shared(values):
        message = '"cpu_offload": true divides the weights over the processes, so that the RAM has them once'
        yield Problem("error", "not-divided", message, 'remove "fsdp"', "fsdp")


def activations_of_whole_blocks(values: Values, given: Values) -> Iterator[Problem]:
    """TRL takes each tensor of a backward pass to the RAM but parameters, and does not know a block that is gathered."""
    may_divide = divides_weights(values) or (is_shared(values) and values.get("fsdp") is not False)
    if values.get("activation_offloading") and may_divide and values.get("gradient_checkpointing") is not True:
        message = '"activation_offloading" would also copy the weights of a block that is gathered from its shards'
        fix = 'write "gradient_checkpointing": true, which keeps only the inputs of a block'
        yield Problem("error", "offloaded-weights", message, fix, "activation_offloading")


def obstacle_to_division(values: Values) -> tuple[str, str, str] | None:
    """The option that keeps frozen weights from being divided (providers/sharding.py), the reason, and another value."""
    obstacles = {
        "lora_r": (values.get("lora_r") == 0, "without an adapter none is frozen", "16"),
        "provider": (values.get("provider") == "unsloth", "Unsloth's own kernels need them whole", '"huggingface"'),
        "use_8bit": (bool(values.get("use_8bit")), "bitsandbytes keeps scales with each 8-bit weight", "false"),
        "use_dora": (bool(values.get("use_dora")), "DoRA reads whole weights between the steps", "false"),
        "modules_to_save": (bool(values.get("modules_to_save")), "these modules are trained whole", "null"),
    }
    return next(((name, why, other) for name, (stops, why, other) in obstacles.items() if stops), None)


RULES = (weights_can_be_divided, activations_of_whole_blocks)
