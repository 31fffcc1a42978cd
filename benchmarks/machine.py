"""The line under every table: what it was measured on, and with which versions."""

from __future__ import annotations

from importlib.metadata import version

from dpo_cli.hardware.machine import probe


def machine_line() -> str:
    machine = probe()
    gpus = "".join(f", {gpu.name}" for gpu in machine.gpus)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    amx = " with AMX" if machine.has_amx else ""
    return f"{machine.cores} cores of {machine.processor}{amx}, {machine.memory_gb} GB{gpus}; {versions}"
