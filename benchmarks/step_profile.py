"""Where the time of a training step goes: torch's profiler over some steps of a workload of benchmarks/speed.py.

python benchmarks/step_profile.py [WORKLOAD ...]

Shares are of the wall time of the training loop. An operator counts its own time, without that of the operators it calls;
forward and backward never run at the same time. What is left is Python, and the profiler itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import baseline
import speed
from baseline import Column, Table
from torch.profiler import ProfilerActivity, profile

from dpo_cli import train
from dpo_cli.training.dpo_trainer import PairTrainer

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_", "aten::linear", "aten::mkldnn_linear", "aten::baddbmm")
KINDS = ("products", "head's products", "attention", "head's softmax", "elementwise", "optimizer", "data")
SHARE = "{:.0%}"
STEPS = 2  # the profiler takes long to read more
COLUMNS = (
    Column("workload"),
    Column("dtype"),
    Column("steps", "s", "{:.1f}"),
    *(Column(kind, "ratio", SHARE, (0.0, 0.1)) for kind in (*KINDS, "Python and the rest")),
)


def kind_of(event: Any, vocabulary: int) -> str:
    """The kind of an operator, by its name and the shapes of its inputs."""
    of_head = any(vocabulary in shape for shape in event.input_shapes if isinstance(shape, list))
    if event.key in PRODUCTS:
        return "head's products" if of_head else "products"
    if "attention" in event.key:
        return "attention"
    if event.key.startswith("Optimizer.") or "adam" in event.key:
        return "optimizer"
    if event.key.startswith("enumerate(DataLoader)"):
        return "data"
    if event.key.startswith("aten::"):
        return "head's softmax" if of_head else "elementwise"
    return ""  # a range that someone named, or an autograd node: Python


def measure(table: Table, options: argparse.Namespace) -> None:
    loop, measured = PairTrainer._inner_training_loop, dict[str, Any]()

    def profiled(self: PairTrainer, *args: Any, **kwargs: Any) -> Any:
        measured["vocabulary"] = self.model.get_output_embeddings().weight.shape[0]
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            start = time.monotonic()
            result = loop(self, *args, **kwargs)
            measured["seconds"] = time.monotonic() - start
        measured["events"] = profiler.key_averages(group_by_input_shape=True)
        return result

    PairTrainer._inner_training_loop = profiled  # type: ignore[method-assign]
    for name in options.workloads or ("multi-turn", "short answers", "long answers"):
        workload = speed.WORKLOADS[name]
        if (rows := workload.rows(workload.pairs)) is None:
            table.note(f"{name}: skipped, {speed.SHARED} is missing.")
            continue
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "pairs.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            with contextlib.redirect_stdout(sys.stderr):
                result = train(
                    {**speed.COMMON, **workload.config, "dataset": str(data), "output_dir": f"{folder}/run", "max_steps": STEPS}
                )
            plan = json.loads((Path(folder) / "run" / "plan.json").read_text(encoding="utf-8"))
        assert result is not None
        own: Counter[str] = Counter()
        for event in measured["events"]:
            own[kind_of(event, measured["vocabulary"])] += event.self_cpu_time_total / 1e6
        seconds = measured["seconds"]
        known = [own[kind] / seconds for kind in KINDS]
        dtype = "bfloat16" if plan["config"]["bf16"] else "float32"
        table.add(name, dtype, seconds, *known, max(0.0, 1 - sum(known)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(speed.WORKLOADS))
    sys.exit(baseline.main("step-profile", COLUMNS, measure, parser))
