"""What this machine has, asked without torch."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
SMALLEST_CARD_BYTES = 2 * GIB  # what the BIOS gives an integrated GPU is less
APPLE_SHARE = 2 / 3  # of unified memory, that Metal lets a process hold (recommendedMaxWorkingSetSize, of smaller machines)


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gb: float  # in total
    free_gb: float
    compute_capability: float  # of an NVIDIA one; 0 for others
    maker: str = "nvidia"

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bfloat16: NVIDIA's from Ampere on; ROCm has it for all of AMD's that it supports."""
        return self.maker == "amd" or self.compute_capability >= 8.0


@dataclass(frozen=True)
class Machine:
    """Processor, memory and GPUs. GB are 2^30 bytes."""

    processor: str
    cores: int
    memory_gb: float
    has_amx: bool  # bfloat16 matrix units of the processor
    gpus: tuple[Gpu, ...]
    is_apple: bool
    has_unsloth: bool = False  # the package

    @property
    def device(self) -> str:
        """What "auto" means here."""
        return "cuda" if self.gpus else "mps" if self.is_apple else "cpu"

    @property
    def card(self) -> tuple[float, float, str] | None:
        """(GB in all, GB free, what it is) of the memory that a training here would use; None where there is no GPU."""
        if self.gpus:
            gpu = self.gpus[0]
            driver = " through ROCm" if gpu.maker == "amd" else ""
            return float(round(gpu.memory_gb)), gpu.free_gb, f"{gpu.name}{driver}, {gpu.free_gb:.1f} GB free"
        if self.is_apple:
            share = round(APPLE_SHARE * self.memory_gb, 1)
            return share, share, f"unified memory, of which Metal lets a process hold about {share:g} GB"
        return None

    def memory_of(self, device: str) -> tuple[float | None, float | None]:
        """(GB in all, GB free) of what a training on "cuda", "mps" or "cpu" uses here; None where there is no such device."""
        if device == "cuda":
            return (self.gpus[0].memory_gb, self.gpus[0].free_gb) if self.gpus else (None, None)
        if device == "mps" and self.card is not None:
            return self.card[0], self.card[1]
        return self.memory_gb, self.memory_gb

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def probe() -> Machine:
    """Look at this machine."""
    cpuinfo = _read("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return Machine(
        processor=names[0] if names else platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        has_amx="amx_bf16" in cpuinfo,
        gpus=nvidia_gpus() or amd_gpus(),
        is_apple=platform.system() == "Darwin" and platform.machine() == "arm64",
        has_unsloth=importlib.util.find_spec("unsloth") is not None,
    )


def nvidia_gpus() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists; none when there is no such program or it fails."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = "--query-gpu=name,memory.total,memory.free,compute_cap"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:  # a driver that hangs offers no GPU
        return ()
    # A GPU that shares the processor's memory prints [N/A] for its own: it has no bill, and is left out.
    rows = (re.fullmatch(r"(.*), ([\d.]+), ([\d.]+), ([\d.]+)", line.strip()) for line in done.stdout.splitlines())
    found = (row.groups() for row in rows if row and done.returncode == 0)
    gpus = [Gpu(name, float(total) / 1024, float(free) / 1024, float(cc)) for name, total, free, cc in found]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")  # numbers as nvidia-smi counts with CUDA_DEVICE_ORDER=PCI_BUS_ID
    if chosen is None or not re.fullmatch(r"\d+(,\d+)*", chosen):
        return tuple(gpus)
    return tuple(gpus[int(number)] for number in chosen.split(",") if int(number) < len(gpus))


def amd_gpus(root: Path = Path("/")) -> tuple[Gpu, ...]:
    """AMD's GPUs where ROCm's driver is loaded (/dev/kfd), from the kernel's files below `root`; no integrated ones."""
    if not (root / "dev/kfd").exists():
        return ()
    found = []
    for device in sorted((root / "sys/class/drm").glob("card[0-9]*/device")):
        total = _read(str(device / "mem_info_vram_total")).strip()
        if _read(str(device / "vendor")).strip() == "0x1002" and total.isdigit() and int(total) >= SMALLEST_CARD_BYTES:
            used = _read(str(device / "mem_info_vram_used")).strip()
            name = _read(str(device / "product_name")).strip() or "AMD GPU"
            free = int(total) - int(used or 0)
            found.append(Gpu(name, int(total) / GIB, free / GIB, 0.0, "amd"))
    return tuple(found)


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).exists() else ""
