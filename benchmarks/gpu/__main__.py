"""See the docstring of the package, benchmarks/gpu/__init__.py."""

from __future__ import annotations

import argparse
import errno
import math
import os
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BEGIN = time.monotonic()  # the imports are part of the minutes
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # a process that is forked from one with threads of OpenMP hangs in its first product
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler reports every start
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("", "benchmarks", "benchmarks/torture", "tests")]
sys.path.remove(str(HERE))  # as a package its modules do not hide those of benchmarks/

import torch  # noqa: E402
from baseline import Baseline, Column, Table, keep_or_compare  # noqa: E402
from machine import machine, versions  # noqa: E402

from gpu import runner  # noqa: E402
from gpu.runner import MEASURED, NOT_RUN, RIGHT, WRONG, Part  # noqa: E402

with runner.cuda_later():
    from fork_server import ready

    from gpu import bill, right, sampling, speed

    ready()

from dpo_cli.hardware.machine import probe  # noqa: E402

PARTS = (right.PART, bill.PART, speed.PART, sampling.PART)
MINUTES = 8.0
STOPPED = 130  # as a shell has it for SIGINT
NAMED = (Column("check"), Column("case"))
ABOUT = ("date", "machine", "versions", "gpus", "device")  # of the first line of the results
VERDICT, WHY = Column("verdict", "word"), Column("why", "reason")


def parsed() -> argparse.Namespace:
    names = ", ".join(part.name for part in PARTS)
    about = sys.modules["gpu"].__doc__
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: the rehearsal, on tiny shapes")
    parser.add_argument("--minutes", type=_minutes, default=MINUTES, help="after which everything has ended")
    parser.add_argument("--only", action="append", metavar="PART[/CHECK]", help=f"of {names}; may be repeated")
    parser.add_argument("--keep", action="store_true", help="also write the tables as baselines")
    parser.add_argument("--compare", action="store_true", help="exit 1 where a table is beyond its baseline's tolerance")
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)  # of one check, which this process is
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)  # the file of that check
    options = parser.parse_args()
    known = {part.name for part in PARTS} | {check.name for part in PARTS for check in part.checks}
    if unknown := set(options.only or []) - known:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    if (options.keep or options.compare) and any("/" in name for name in options.only or []):
        parser.error("a baseline is the table of a whole part")
    options.small = options.device == "cpu"
    if not options.small and not torch.cuda.is_available():
        parser.error("this torch cannot use CUDA; the rehearsal is --device cpu")
    return options


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise ValueError(text)
    return minutes


def chosen(only: list[str] | None) -> list[Part]:
    """The parts, each with the checks that are asked for."""
    if only is None:
        return list(PARTS)
    parts = [replace(part, checks=[check for check in part.checks if {part.name, check.name} & set(only)]) for part in PARTS]
    return [part for part in parts if part.checks]


def table_of(part: Part, lines: list[dict[str, Any]]) -> Table:
    """The table of a part, from its lines in the results."""
    table = Table([*NAMED, VERDICT, *part.columns, WHY])
    for line in lines:
        figures = [line["figures"].get(column.name) for column in part.columns]
        shown = [
            None if isinstance(figure, str) and column.unit != "text" else figure
            for figure, column in zip(figures, part.columns, strict=True)
        ]
        table.add(line["check"], line["case"], line["verdict"], *shown, line["why"] or None)
    for text, figures in part.after(lines):
        table.note(text, *figures)
    return table


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def print_line(line: dict[str, Any]) -> None:
    figures = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in line["figures"].items()
    )
    case = f" ({line['case']})" if line["case"] else ""
    print(f"{line['seconds']:7.1f} s  {line['verdict']:8}  {line['check']}{case}: {figures} {line['why']}".rstrip(), flush=True)


def run_parts(parts: list[Part], options: argparse.Namespace, results: Path) -> list[Baseline]:
    """Run the checks one after another; the table of each part is written next to the results after each check."""
    ends = runner.shares(parts, BEGIN + 60 * options.minutes)
    forks = True
    try:
        if options.device == "cuda":
            runner.require_fork()
    except runner.ForkFails:
        print("CUDA cannot be used after a fork here: each check imports everything again", flush=True)
        forks = False
    about = (date.today().isoformat(), machine(), versions())
    more = {"cuda": torch.version.cuda, **{name: _version(name) for name in ("triton", "liger-kernel")}}
    gpus = [{"name": gpu.name, "memory_gb": gpu.memory_gb} for gpu in probe().gpus]
    runner.append(results, dict(zip(ABOUT, (*about[:2], {**about[2], **more}, gpus, options.device), strict=True)))
    kept = []
    for number, part in enumerate(parts):
        end, lines, begin = ends(number), list[dict[str, Any]](), time.monotonic()
        at_once = 1 if options.small else part.at_once
        for check in runner.run_checks(part.checks, at_once, options.device, end, results, forks):
            for line in (found := runner.lines_of(results, check.name)):
                print_line(line)
            lines += found
            command = shlex.join(["python", "benchmarks/gpu", "--only", part.name, *(["--device", "cpu"] * options.small)])
            seconds = round(time.monotonic() - begin, 1)
            made = Baseline(part.baseline, command, *about[:1], seconds, *about[1:], table_of(part, lines))
            results.with_name(f"{part.baseline}.json").write_text(made.text(), encoding="utf-8")
        kept.append(made)
    print(f"{time.monotonic() - BEGIN:.0f} s in all; the results are in {results.parent}", flush=True)
    return kept


def _cannot_write(results: Path, error: OSError) -> int:
    print(f"{results.parent}: {error.strerror}; OUT=FOLDER names another folder for the results", file=sys.stderr)
    return 1


def main() -> int:
    options = parsed()
    parts = chosen(options.only)
    if options.results is not None:
        (part,) = parts
        (check,) = part.checks
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as place:
            end = time.monotonic() + options.seconds
            runner.carry_out(check, runner.Setting(check.name, options.device, end, Path(place), options.results))
        return 0
    results = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu") / "results.jsonl"
    try:
        runner.begin(results, [part.baseline for part in parts])
    except OSError as error:
        return _cannot_write(results, error)
    try:
        made = run_parts(parts, options, results)
    except KeyboardInterrupt:
        print(f"\nstopped; what is done is in {results}", file=sys.stderr)
        return STOPPED
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _cannot_write(results, error)
    verdicts = [line["verdict"] for line in runner.lines_of(results)]
    print("\n" + "\n\n".join(baseline.markdown() for baseline in made))
    print("\n" + ", ".join(f"{verdicts.count(name)} {name}" for name in (RIGHT, MEASURED, NOT_RUN, WRONG)))
    apart = [keep_or_compare(baseline, options) for baseline in made] if options.keep or options.compare else []
    return int(WRONG in verdicts or (RIGHT not in verdicts and MEASURED not in verdicts) or any(apart))


if __name__ == "__main__":
    sys.exit(main())
