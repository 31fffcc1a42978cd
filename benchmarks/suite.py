"""`make baselines`: keeps the baseline of each benchmark, one after another, for an idle machine. `--list` says what there is.

python benchmarks/suite.py [NAME ...]              those, or all but those that need more than this machine has
python benchmarks/suite.py --compare [NAME ...]    compares with what is kept
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from baseline import BASELINES, Baseline

ROOT = Path(__file__).parent.parent
CONVERTER = ROOT / "models" / "llama.cpp" / "convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Benchmark:
    """A script below benchmarks/, with its words, and about how long it takes; `needs` is what not every machine has."""

    script: str
    minutes: float  # on two cores without AMX
    needs: str = ""


BENCHMARKS = {
    "validate-speed": Benchmark("validate_speed.py", 1),
    "cases": Benchmark("cases.py", 2),
    "data-speed": Benchmark("data_speed.py", 2),
    "dataset-scale": Benchmark("dataset_scale.py", 8),
    "spin": Benchmark("spin.py", 2),
    "memory": Benchmark("step_memory.py", 3),
    "prompt-sharing": Benchmark("prompt_sharing.py", 6),
    "exact": Benchmark("exact.py", 10),
    "concise": Benchmark("concise.py", 10),
    "two-stage": Benchmark("two_stage.py", 12),
    "compare": Benchmark("compare.py", 35),
    "torture-trl": Benchmark("torture/plain_trl.py", 12),
    "torture": Benchmark("torture", 14),
    "learning-rates": Benchmark("learning_rates.py", 25),
    "variants": Benchmark("variants.py", 25),
    "export": Benchmark("export.py", 8, "`make check-gguf`, which fetches the converter"),
    "compiled-parts": Benchmark("compiled_parts.py", 1),
    "collectives": Benchmark("collectives.py", 1),
    "divided-weights": Benchmark("divided_weights.py", 1),
    "scaling": Benchmark("scaling.py", 1),
    "processes": Benchmark("processes.py", 6),
    "step-profile": Benchmark("step_profile.py", 5),
    "speed-curve": Benchmark("speed_curve.py", 5),
    "speed": Benchmark("speed.py", 30, "`make speed`, which installs TRL"),
    "unsloth": Benchmark("check_unsloth.py", 5, "`make check-unsloth`, which installs Unsloth"),
    "gpu-right": Benchmark("gpu --only right", 3, "an NVIDIA GPU"),
    "gpu-memory": Benchmark("gpu --only bill", 3, "an NVIDIA GPU"),
    "gpu-speed": Benchmark("gpu --only speed", 3, "an NVIDIA GPU"),
    "gpu-sampling": Benchmark("gpu --only sampling", 1, "an NVIDIA GPU"),
}


def listed() -> None:
    for name, benchmark in BENCHMARKS.items():
        file = BASELINES / f"{name}.json"
        kept = Baseline.read(file) if file.exists() else None
        when = f"kept {kept.date} on {kept.machine['processor']}" if kept else "not kept yet"
        minutes = kept.seconds / 60 if kept and kept.seconds else benchmark.minutes
        print(f"{name:15} {minutes:4.0f} minutes, {when}" + f"; needs {benchmark.needs}" * bool(benchmark.needs))


def run(name: str, word: str) -> bool:
    """Whether a benchmark ended well. Its table goes to the terminal as it is made."""
    started = time.monotonic()
    print(f"--- {name} {word}", flush=True)
    environment = {**os.environ, "DPO_GGUF_CONVERTER": str(CONVERTER)} if CONVERTER.exists() else os.environ
    command = [sys.executable, *f"benchmarks/{BENCHMARKS[name].script}".split(), word]
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    print(f"--- {name}: exit {code} after {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    return code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.names) - BENCHMARKS.keys():
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if options.list:
        listed()
        return 0
    names = options.names or [name for name, benchmark in BENCHMARKS.items() if not benchmark.needs]
    failed = [name for name in names if not run(name, "--compare" if options.compare else "--keep")]
    print(f"failed: {', '.join(failed)}" if failed else "now `make reference` writes the tables of the pages")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
