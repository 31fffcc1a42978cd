"""The requirements of the provider "unsloth". No torch."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_cli.config.options import Config
from dpo_cli.errors import Problem
from dpo_cli.hardware.machine import Machine

INSTALL = "pip install 'dpo-cli[unsloth]'"
# Release 2026.10.9, LlamaModel_fast_forward: any mask is dropped in training, because its kernels are causal.
NO_SHARING = "Unsloth drops the mask that separates the responses of a pair"


def problems(config: Config, cpu_is_said: bool, machine: Machine, for_another: bool) -> Iterator[Problem]:
    """Problems that prevent Unsloth; `cpu_is_said`: the config itself sets "device": "cpu".

    A config `for_another` machine does not need packages on this one.
    """
    if config.provider != "unsloth":
        return
    on_cuda = config.device == "cuda" and (for_another or any(gpu.maker == "nvidia" for gpu in machine.gpus))
    if config.device == "cpu" and cpu_is_said:
        message = 'with "device": "cpu" Unsloth has no kernels: it is not faster than huggingface, which also shares prompts'
        yield Problem("warning", "unsloth-on-cpu", message, 'write "provider": "huggingface"', "provider")
    elif not on_cuda:
        message = "unsloth needs an NVIDIA GPU"
        fix = f'train on a machine with one ({INSTALL}), or write "provider": "huggingface"; "device": "cpu" is for tests'
        yield Problem("warning", "unsloth-without-cuda", message, fix, "provider", stops_training=True)
    if not for_another and not machine.has_unsloth:
        message, fix = "the package unsloth is not installed", f'{INSTALL}, or write "provider": "huggingface"'
        yield Problem("warning", "unsloth-not-installed", message, fix, "provider", stops_training=True)
