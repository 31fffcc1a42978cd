"""What a benchmark was measured on, and with which versions."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_cli.hardware.machine import probe

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
SHOWN = ("torch", "transformers", "trl", "peft")


def machine() -> dict[str, Any]:
    """Processor, memory and GPUs. GB are 2^30 bytes."""
    here = probe()
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    return {
        "processor": here.processor,
        "cores": here.cores,
        "memory_gb": here.memory_gb,
        "amx": here.bf16_flag == "amx_bf16",
        "avx512_bf16": "avx512_bf16" in flags,
        "gpus": [gpu.name for gpu in here.gpus],
    }


def versions() -> dict[str, str | None]:
    """Of Python, the packages that compute, and this program's commit; a plus follows a commit with changes since."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}, "dpo": _commit()}


def _commit() -> str | None:
    if shutil.which("git") is None:
        return None
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if commit.returncode:
        return None
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "dpo_cli"], cwd=ROOT, check=False).returncode
    return commit.stdout.strip() + ("+" if changed else "")


def machine_line(on: dict[str, Any], by: dict[str, str | None]) -> str:
    """One line of `machine()` and `versions()`, without what is not known."""
    gpus = "".join(f", {gpu}" for gpu in on["gpus"])
    packages = ", ".join(f"{name} {by[name]}" for name in SHOWN if by[name])
    commit = f", dpo {by['dpo']}" if by["dpo"] else ""
    return f"{on['cores']} cores of {on['processor']}{' with AMX' * on['amx']}, {on['memory_gb']} GB{gpus}; {packages}{commit}"
