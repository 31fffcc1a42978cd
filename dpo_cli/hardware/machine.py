"""The hardware of this machine, without torch."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import dpo_cli

GIB = 2**30
SMALLEST_CARD_BYTES = 2 * GIB  # integrated GPUs have less
OLDEST_MACOS = 14  # the oldest with torch's Metal backend, and bfloat16 in it
BF16_FLAGS = ("amx_bf16", "avx512_bf16", "svebf16", "bf16")  # of /proc/cpuinfo: bfloat16 products, on x86 and on Arm
# Products are only a part of a step, and bfloat16 costs exactness: below this it gains too little. The margin also covers the
# error of a measurement of a few milliseconds.
WORTH_BF16 = 1.2  # times as fast as float32
APPLE_SHARE = 2 / 3  # share of unified memory that Metal lets a process hold (recommendedMaxWorkingSetSize on smaller machines)


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gb: float  # in total
    free_gb: float
    compute_capability: float  # of an NVIDIA GPU; 0 for others
    maker: str = "nvidia"
    uuid: str = ""

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bfloat16: NVIDIA GPUs from Ampere on, and all AMD GPUs that ROCm supports."""
        return self.maker == "amd" or self.compute_capability >= 8.0


@dataclass(frozen=True)
class Machine:
    """Processor, memory and GPUs. GB are 2^30 bytes."""

    processor: str
    cores: int
    memory_gb: float
    gpus: tuple[Gpu, ...]
    is_apple: bool  # Apple silicon with a GPU that torch can use
    has_unsloth: bool = False  # the package
    bf16_flag: str = ""  # the processor's flag that promises bfloat16 products
    processes: int | None = None  # of a training that are on this machine; None: all of them
    bf16_speed: float | None = None  # of such products, relative to float32, as a training measured it (providers/precision.py)

    @property
    def device(self) -> Literal["cuda", "mps", "cpu"]:
        """The device that "auto" stands for."""
        return "cuda" if self.gpus else "mps" if self.is_apple else "cpu"

    @property
    def has_bf16(self) -> bool:
        """Whether all of its GPUs compute in bfloat16."""
        return all(gpu.has_bf16 for gpu in self.gpus)

    @property
    def cpu_has_bf16(self) -> bool:
        """Whether its processor gains by bfloat16: as measured, or else as its flags promise."""
        return self.bf16_speed >= WORTH_BF16 if self.bf16_speed is not None else bool(self.bf16_flag)

    @property
    def cpu_words(self) -> str:
        """The precision of a run on the processor that names none, and the reason."""
        dtype = "bfloat16" if self.cpu_has_bf16 else "float32"
        if self.bf16_speed is not None:
            return f"{dtype}: products in bfloat16 are {self.bf16_speed:.1f} times as fast as in float32 here"
        promise = f"has {self.bf16_flag}" if self.bf16_flag else "names no bfloat16 products"
        return f"{dtype} is assumed, since the processor {promise}: `dpo train` measures which is faster"

    @property
    def card(self) -> tuple[float, float, str] | None:
        """(total GB, free GB, description) of the GPU memory that a training would use; None without a GPU."""
        if self.gpus:
            gpu = self.gpus[0]
            driver = " through ROCm" if gpu.maker == "amd" else ""
            return float(round(gpu.memory_gb)), gpu.free_gb, f"{gpu.name}{driver}, {gpu.free_gb:.1f} GB free"
        if self.is_apple:
            share = round(APPLE_SHARE * self.memory_gb, 1)
            return share, share, f"unified memory, of which Metal lets a process hold about {share:g} GB"
        return None

    def memory_of(self, device: str, processes: int = 1) -> tuple[float | None, float | None]:
        """(total GB, free GB) of the memory of one of the `processes` of a training on "cuda", "mps" or "cpu".

        Each has a GPU of its own, and a share of the machine's memory. None without such a device.
        """
        if device == "cuda":
            return (self.gpus[0].memory_gb, self.gpus[0].free_gb) if self.gpus else (None, None)
        here = self.processes or processes
        if device == "mps" and self.card is not None:
            return self.card[0] / here, self.card[1] / here
        return self.memory_gb / here, self.memory_gb / here

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "has_amx": self.bf16_flag == "amx_bf16"}


def probe() -> Machine:
    """The hardware of this machine."""
    cpuinfo = _read("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return Machine(
        processor=names[0] if names else platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=round(_memory_bytes() / GIB, 1),
        gpus=nvidia_gpus() or amd_gpus(),
        is_apple=_has_metal(),
        has_unsloth=importlib.util.find_spec("unsloth") is not None,
        bf16_flag=bf16_flag(cpuinfo) or apple_bf16_flag(),
    )


def bf16_flag(cpuinfo: str) -> str:
    """The flag of a /proc/cpuinfo that promises bfloat16 products; empty if there is none."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = {flag for line in lines for flag in line.split()}
    return next((flag for flag in BF16_FLAGS if flag in flags), "")


def apple_bf16_flag() -> str:
    """The same of an Apple processor, which has no /proc/cpuinfo: M2 and later."""
    if platform.system() != "Darwin" or shutil.which("sysctl") is None:
        return ""
    asked = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    return "FEAT_BF16" if done.stdout.strip() == "1" else ""


def _has_metal() -> bool:
    """Whether torch trains on this machine's GPU through Metal: Apple's own processors, from macOS 14 on."""
    version = platform.mac_ver()[0].partition(".")[0]
    return platform.system() == "Darwin" and platform.machine() == "arm64" and int(version or 0) >= OLDEST_MACOS


def _memory_bytes() -> int:
    """The machine's memory in bytes."""
    if total := re.match(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo")):  # Linux
        return int(total[1]) * 1024
    if hasattr(os, "sysconf"):  # macOS
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import psutil  # Windows; a requirement of accelerate

    return int(psutil.virtual_memory().total)


def nvidia_gpus() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists; empty if it is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return ()
    listed = _nvidia_smi("--query-gpu=name,memory.total,memory.free,compute_cap,uuid", "--format=csv,noheader,nounits")
    # A GPU that shares the processor's memory prints [N/A] for its own memory: it is skipped.
    rows = (re.fullmatch(r"(.*), ([\d.]+), ([\d.]+), ([\d.]+)(?:, (\S*))?", line.strip()) for line in listed.splitlines())
    found = (row.groups(default="") for row in rows if row)
    gpus = [Gpu(name, float(total) / 1024, float(free) / 1024, float(cc), uuid=uuid) for name, total, free, cc, uuid in found]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and chosen.strip().startswith("MIG-"):
        gpus = _mig_instances(gpus, _nvidia_smi("-L"))
    return visible(gpus, chosen)


def _nvidia_smi(*words: str) -> str:
    """The output of nvidia-smi; empty if it fails."""
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:  # the driver hangs: no usable GPU
        return ""
    return done.stdout if done.returncode == 0 else ""


def _mig_instances(gpus: Sequence[Gpu], listed: str) -> list[Gpu]:
    """The MIG instances that `nvidia-smi -L` lists; their memory is in the name of their profile: "MIG 1g.10gb"."""
    by_uuid, whole, parts = {gpu.uuid: gpu for gpu in gpus}, None, []
    for line in listed.splitlines():
        uuid = re.search(r"\(UUID: (\S+)\)", line)
        profile = re.match(r"\s+MIG (\S*?(\d+)gb\S*)", line)
        if uuid and profile and whole is not None:
            size = float(profile[2])
            name = f"{whole.name} MIG {profile[1]}"
            parts.append(replace(whole, name=name, memory_gb=size, free_gb=min(size, whole.free_gb), uuid=uuid[1]))
        elif uuid:
            whole = by_uuid.get(uuid[1])
    return parts


def visible(gpus: Sequence[Gpu], chosen: str | None) -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES selects, as CUDA and torch read it; all if it is not set.

    Numbers are those of nvidia-smi (`composer_for` in session.py ensures it), and names are a UUID or its beginning. The list
    ends before the first entry that does not name a GPU, and is empty if a GPU is named twice.
    """
    if chosen is None:
        return tuple(gpus)
    selected: list[Gpu] = []
    for entry in (part.strip() for part in chosen.split(",")):
        if number := re.match(r"\+?(\d+)", entry):
            named = list(gpus[int(number[1]) : int(number[1]) + 1])
        else:
            named = [gpu for gpu in gpus if entry.startswith(("GPU-", "MIG-")) and gpu.uuid.startswith(entry)]
        if len(named) != 1:
            break
        if named[0] in selected:
            return ()
        selected += named
    return tuple(selected)


def amd_gpus(root: Path = Path("/")) -> tuple[Gpu, ...]:
    """AMD GPUs if ROCm's driver is loaded (/dev/kfd), from the kernel's files in `root`; without integrated ones."""
    if not (root / "dev/kfd").exists():
        return ()
    found = []
    for device in sorted((root / "sys/class/drm").glob("card[0-9]*/device")):
        total = _read(str(device / "mem_info_vram_total")).strip()
        if _read(str(device / "vendor")).strip() == "0x1002" and total.isdigit() and int(total) >= SMALLEST_CARD_BYTES:
            used = _read(str(device / "mem_info_vram_used")).strip()
            name = _read(str(device / "product_name")).strip() or "AMD GPU"
            free = int(total) - int(used or 0)
            found.append(Gpu(name, int(total) / GIB, free / GIB, 0.0, "amd", uuid=device.parent.name))
    return visible(found, os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES")))


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).exists() else ""


PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")


OF_PROVIDER = {"unsloth": ("unsloth", "unsloth_zoo")}
OPTIONAL = ("liger-kernel",)  # packages that are used where they are installed


def installed_versions(provider: str = "") -> dict[str, str]:
    """The versions that decide the figures of a run, with the packages of its provider. No package is imported."""
    from importlib.metadata import PackageNotFoundError, version  # late: `validate` needs none, and has to be quick

    versions = {"dpo": dpo_cli.__version__, "python": platform.python_version()}
    versions |= {package: version(package) for package in PACKAGES}
    for package in (*OF_PROVIDER.get(provider, ()), *OPTIONAL):  # a run may be evaluated where its provider is not installed
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
