"""Part `right`, whole trainings: quantised, in 16 bits, against plain TRL, killed and resumed, out of memory.

Figures of values are losses of the same step, in nats; those of gradients are relative differences of their norms, or of what
was trained.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import step_memory
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel, TrainerCallback
from typer.testing import CliRunner

from dpo_cli import api
from dpo_cli.data.encoded import Encoded
from dpo_cli.data.rows import Pair
from dpo_cli.errors import Problem
from dpo_cli.hardware.memory_inputs import Settings
from dpo_cli.plan import preflight
from dpo_cli.plan.feasibility import hardware_problems
from dpo_cli.scoring.oom import free_memory, is_out_of_memory
from dpo_cli.scoring.packing import row_tokens
from dpo_cli.storage.run_directory import ADAPTER, WEIGHTS, RunDirectory
from dpo_cli.training.trainer import CarefulTrainer, ProbeFirst
from gpu.runner import RIGHT, ROOT, WRONG, CannotRun, Check, Setting, most

TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"  # with a release of TRL that runs on a CPU
SETTINGS = Settings(batch=4, length=0, rank=8, bytes_per_value=4, checkpointing=False)
SAME = 1e-5  # two trainings of the same bits on a CPU; kernels of a GPU may sum in another order each time
LOSS, NORM = 2e-4, 5e-3  # the same on a GPU: nats, and a share of a norm
ROUNDED = 0.05  # of what 24 steps have trained, whose roundings AdamW enlarges
HALF_LOSS, SKIPPED_LOSS = 0.02, 0.05  # nats between trainings in 16 bits and in float32; with a step that fp16 has skipped
STEPS = 4
SKIPS = 2.0**20  # a scale with infinite gradients: the scaler skips steps before and after the first checkpoint, and then none


def small_llama(device: str, dtype: torch.dtype, bits: int | None = None) -> PreTrainedModel:
    """A Llama of four blocks with heads as wide as real ones; its weights are the same on every device, and fit bfloat16."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 512}
    ids = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**shape, **ids, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    model = step_memory.random_model(config, SETTINGS, "cpu")
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.data = torch.randn(weight.shape, generator=generator).mul_(0.06).bfloat16()
    model.to(device, dtype)
    if bits:
        step_memory.quantise(model, replace(SETTINGS, bits=bits))
        setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


def bench_of(setting: Setting) -> Any:
    """The folder of benchmarks/torture with its pairs, and a model as wide as kernels need it."""
    from bench import Bench

    made = Bench.make(setting.place / "bench")
    small_llama("cpu", torch.float32).save_pretrained(made.place / "model")
    return made


def trained(bench: Any, setting: Setting, name: str, **options: Any) -> list[dict[str, Any]]:
    """The lines of the steps of `dpo train` with these options."""
    common = {"device": setting.device, "max_steps": STEPS, "logging_steps": 1, "learning_rate": 1e-3}
    config = bench.config(name, {**common, **options})
    run = api.train(str(config), output_dir=str(setting.place / name))
    return [line for line in RunDirectory.open(run.run_dir).read_lines() if line["split"] == "train"]


def compared(
    setting: Setting, case: str, one: list[dict[str, Any]], other: list[dict[str, Any]], loss: float, norm: float
) -> None:
    """Write the line of two trainings: their losses, and the norms of their gradients."""
    pairs = list(zip(one, other, strict=True))
    values = most(abs(a["loss"] - b["loss"]) for a, b in pairs)
    # The scaler of fp16 finds its scale: the gradient of a step that it skips is infinite.
    both = [(a["grad_norm"], b["grad_norm"]) for a, b in pairs if not math.isinf(a["grad_norm"])]
    gradients = most(abs(a / b - 1) for a, b in both) if both else math.inf
    # Policy and reference are equal before the first step. A GPU may choose other kernels for a pass without a gradient.
    start, near = abs(one[0]["loss"] - math.log(2)), SAME if setting.is_small else HALF_LOSS
    figures = {"values": values, "gradients": gradients, "limit": max(loss, norm), "start": start}
    setting.agrees(case, figures, {"values": loss, "gradients": norm, "start": near})


@contextmanager
def fp16(setting: Setting, scale: float = 2.0**16) -> Iterator[None]:
    """Within, the gradient scaler of fp16 starts with this scale; a CPU has fp16 too, with torch's scaler for CPUs."""

    def create(trainer: Any) -> None:
        super(CarefulTrainer, trainer).create_accelerator_and_postprocess()  # type: ignore[misc]
        if trainer.args.fp16:
            trainer.accelerator.native_amp = True  # accelerate has neither on a CPU
            trainer.accelerator.scaler = torch.amp.GradScaler(setting.device, init_scale=scale)

    def allowed(*given: Any) -> Iterator[Problem]:
        return (problem for problem in hardware_problems(*given) if problem.code != "fp16-device")

    with (
        patch.object(CarefulTrainer, "create_accelerator_and_postprocess", create, create=True),
        patch.object(preflight, "hardware_problems", allowed),
    ):
        yield


def quantised(setting: Setting) -> None:
    """With quantised weights: a training with an evaluation after each step against one without, step by step."""
    bench = bench_of(setting)
    loss, norm = (SAME, SAME) if setting.is_small else (LOSS, NORM)
    for key in ("use_4bit", "use_8bit"):
        options = {key: True, "bf16": True, "eval_split": 0.25}
        often = trained(bench, setting, f"{key}-often", **options, eval_steps=1)
        once = trained(bench, setting, f"{key}-once", **options, eval_steps=1000)
        compared(setting, f"{key}: trained after an evaluation", often, once, loss, norm)


def half(setting: Setting) -> None:
    """Trainings in 16 bits against float32: bf16, fp16 with its scaler, and fp16 with 4-bit weights against bf16 with them."""
    bench = bench_of(setting)
    single = trained(bench, setting, "float32")
    compared(setting, "bf16 against float32", trained(bench, setting, "bf16", bf16=True), single, HALF_LOSS, 0.1)
    with fp16(setting):
        compared(setting, "fp16 against float32", trained(bench, setting, "fp16", fp16=True), single, SKIPPED_LOSS, 0.1)
        both = [trained(bench, setting, f"4-bit-{key}", use_4bit=True, **{key: True}) for key in ("fp16", "bf16")]
    compared(setting, "fp16 against bf16, 4-bit weights", *both, SKIPPED_LOSS, 0.1)


def in_ram(setting: Setting) -> None:
    """Weights, and activations, that wait in the RAM, against those on the device, step by step."""
    bench = bench_of(setting)
    loss, norm = (SAME, SAME) if setting.is_small else (LOSS, NORM)
    common = {"bf16": True, "gradient_checkpointing": True, "eval_split": 0.25}
    for name, more in (("weights", {}), ("4-bit weights", {"use_4bit": True})):
        there = trained(bench, setting, f"{name}-on-the-device", **common, **more)
        here = trained(bench, setting, f"{name}-in-ram", **common, **more, cpu_offload=True)
        compared(setting, name, here, there, loss, norm)
        if not more:
            kept = trained(bench, setting, "activations", **common, activation_offloading=True)
            compared(setting, "activations", kept, there, loss, norm)


def optimizers(setting: Setting) -> None:
    """The optimizers of bitsandbytes, whose states are in 8 bits or in paged memory (on a GPU), against torch's."""
    bench = bench_of(setting)
    common = {"bf16": True, "lora_r": 32}  # tensors of fewer than 4,096 weights keep states in float32
    plain = trained(bench, setting, "torch", **common)
    for optim in ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"):
        compared(setting, optim, trained(bench, setting, optim, **common, optim=optim), plain, HALF_LOSS, 0.1)


def against_trl(setting: Setting) -> None:
    """Losses of each step against TRL's own DPOTrainer, in a process of its own, from the same first adapter, in float32."""
    from builders import conversation_pairs, tiny_tokenizer
    from peft import get_peft_model_state_dict
    from test_dpo import make_plan, make_trainer

    from dpo_cli.data.rows import to_pair
    from dpo_cli.data.tokens import encode
    from dpo_cli.training.callbacks.metrics_log import Record

    python = Path(sys.executable) if setting.device == "cuda" else TRL_PYTHON
    if not python.exists():
        raise CannotRun("TRL 1.15 needs Triton, so a GPU; and there is no .venv-trl, which `make speed` makes for the CPU")
    bench, tokenizer = bench_of(setting), tiny_tokenizer()
    rows = conversation_pairs(8, turn_words=6, answer_words=6)
    (bench.place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs = encode([to_pair(row, i + 1) for i, row in enumerate(rows)], tokenizer)
    options = {"device": setting.device, "max_steps": STEPS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    options |= {"learning_rate": 1e-3, "num_train_epochs": STEPS}
    trainer, _ = make_trainer(setting.place, tokenizer, pairs=pairs, **options)
    save_file(
        {name: part.contiguous().cpu() for name, part in get_peft_model_state_dict(trainer.model).items()},
        bench.place / "adapter.safetensors",
    )
    from conftest import tiny_model

    tiny_model("llama", torch.float32).save_pretrained(bench.place / "model")
    lines: list[dict[str, float]] = []
    trainer.add_callback(Record(trainer.totals, [lambda line: lines.append(line.figures)]))
    trainer.train()
    config = make_plan(setting.place, **options).to_json()["config"]
    adapter = {"lora_r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    job = {
        "model": str(bench.place / "model"),
        "rows": str(bench.place / "rows.jsonl"),
        "output_dir": str(setting.place / "trl"),
    }
    job |= {"config": {**config, **adapter}, "precompute": False, "device": setting.device}
    job |= {"adapter": str(bench.place / "adapter.safetensors")}
    file = setting.place / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    command = [str(python), str(ROOT / "benchmarks" / "peers" / "trl_training.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=_clean(setting))
    if done.returncode:
        raise RuntimeError(f"TRL ended with {done.returncode}: {done.stderr[-2000:]}")
    theirs = json.loads(done.stdout)
    values = most(abs(line["loss"] - loss) for line, loss in zip(lines, theirs["losses"], strict=True))
    moved = abs(lines[-1]["loss"] - lines[0]["loss"])
    figures = {"values": values, "limit": LOSS, "moved": moved}
    why = "" if moved > 100 * LOSS else "the losses hardly moved, so the comparison shows nothing"
    setting.agrees(f"TRL {theirs['trl']}", figures, {"values": LOSS if not why else -1.0}, why)


def _clean(setting: Setting) -> dict[str, str]:
    """The environment of another virtual environment: our packages are not on its path."""
    own = {name: value for name, value in os.environ.items() if setting.device == "cuda" or name != "PYTHONPATH"}
    return {**own, "HF_DATASETS_CACHE": str(setting.place / "datasets")}


def resume(setting: Setting) -> None:
    """SIGKILL after the first checkpoint, then --resume: what is left equals that of a run that was let alone.

    fp16 has the state of its gradient scaler in the checkpoint too: a scaler that starts again skips steps again.
    """
    if torch.cuda.is_initialized():
        raise CannotRun("it forks runs, and CUDA has started in this process")
    bench = bench_of(setting)
    common = {"device": setting.device, "lora_dropout": 0.3, "save_steps": 2, "max_steps": 24, "learning_rate": 1e-3}
    in_fp16 = {"fp16": True, "full_determinism": True, "max_steps": 6 if setting.is_small else 24}  # a CPU is slow in fp16
    cases = {
        "bf16, full_determinism": {"bf16": True, "full_determinism": True},
        "bf16": {"bf16": True},
        "fp16 and its scaler, full_determinism": in_fp16,
    }
    for number, (case, values) in enumerate(cases.items()):
        config = bench.config(f"resumed-{number}", {**common, **values, "per_device_train_batch_size": 2})
        with fp16(setting, SKIPS) if "fp16" in case else nullcontext():
            _resumed(setting, case, config, setting.is_small or "full_determinism" in values)


def _resumed(setting: Setting, case: str, config: Path, is_exact: bool) -> None:
    """Write the line of a run that was killed, resumed, and compared with one that was let alone."""
    from bench import Left, train

    runs = [setting.place / f"{word}-{case.replace(' ', '-')}" for word in ("alone", "killed")]
    alone = train(config, runs[0])
    if alone.end():
        raise RuntimeError(f"a run that was let alone failed: {alone.said()[-2000:]}")
    child = train(config, runs[1])
    while child.wait(0.002) is None and not RunDirectory(runs[1]).checkpoints.all() and setting.seconds_left > 0:
        pass
    if child.code is not None:
        raise RuntimeError(f"no checkpoint was seen before the run ended: {child.said()[-2000:]}")
    child.kill()
    resumed = train(config, runs[1], "--resume")
    if resumed.end():
        raise RuntimeError(f"--resume failed: {resumed.said()[-2000:]}")
    # B starts at zero: it is what was trained, where A is mostly what was drawn.
    files = [sorted(load_file(run / ADAPTER / WEIGHTS).items()) for run in runs]
    gradients = _apart(*(torch.cat([part.flatten() for name, part in file if "lora_B" in name]) for file in files))
    left = [Left.by(run) for run in runs]
    steps = [[line["loss"] for line in one.lines if line["split"] == "train"] for one in left]
    figures = {"values": most(abs(a - b) for a, b in zip(*steps, strict=True)), "gradients": gradients}
    if is_exact:
        figures |= {"limit": 0.0, "other": float(left[0] != left[1])}
        setting.agrees(case, figures, {"gradients": 0.0, "other": 0.0})
    else:
        setting.agrees(case, {**figures, "limit": ROUNDED}, {"gradients": ROUNDED}, "to rounding")


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def out_of_memory(setting: Setting) -> None:
    """A row that does not fit is divided, and the step has the same gradient: with half the memory of a run without a limit."""
    free, _, tokens, needs = _one_step(setting, None)
    for share in (0.8, 0.65, 0.5, 0.4):
        parted, notices, fewer, _ = _one_step(setting, int(share * needs), raises=[True])
        if notices:
            figures = {"gradients": _apart(parted, free), "limit": 1e-4, "share": share, "row": tokens, "smaller row": fewer}
            setting.agrees(f"{share:.0%} of the memory", figures, {"gradients": 1e-4, "smaller row": tokens - 1}, notices[0])
            return
    setting.says("", WRONG, {}, "no limit was too small for a row: the limit does not act")


def _one_step(setting: Setting, limit: int | None, raises: Sequence[bool] = ()) -> tuple[Tensor, list[str], int, int]:
    """The gradients of a step, the notices, tokens of the smallest row, and the bytes that it took; with a limit of these."""
    free_memory()
    settings = replace(SETTINGS, batch=8)
    trainer = _trainer(setting, settings, [(96, 32)] * 16 if setting.is_small else [(640, 160)] * 16)
    notices: list[str] = []
    trainer._tell = notices.append
    rows, step, whole_step = [], trainer.run_row, trainer.training_step
    trained_weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    gradients: list[Tensor] = []
    faults = iter(raises if setting.is_small else ())

    def run_row(model: Any, row: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(row_tokens(row, 2, trainer.is_shared))
        loss = step(model, row, *args, **kwargs)
        if limit is not None and next(faults, False):  # the CPU has no limit: as in the tests, memory is out after the gradient
            raise torch.OutOfMemoryError("no memory is left, as this check pretends")
        return loss

    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = whole_step(*args, **kwargs)
        gradients.append(torch.cat([weight.grad.cpu().flatten() for weight in trained_weights]))
        return loss

    trainer.run_row, trainer.training_step = run_row, training_step
    with memory_limit(setting, limit) as peak:
        trainer.train()
    return gradients[0], notices, min(rows), peak()


@contextmanager
def memory_limit(setting: Setting, limit: int | None) -> Any:
    """Within, torch may take so many bytes more than it has now. Gives a function: the bytes that were taken at their most."""
    if setting.is_small:
        yield lambda: 0
        return
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else min(1.0, (before + limit) / total))
    try:
        yield lambda: torch.cuda.max_memory_reserved() - before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _trainer(setting: Setting, settings: Settings, sizes: Sequence[tuple[int, int]]) -> Any:
    """The trainer of `dpo train` on random pairs of these tokens of prompt and response, on a small model, always the same."""
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 500, (count,), generator=generator).tolist()

    rows = [Encoded(Pair("", "", "", 1), ids(prompt), (ids(response), ids(response - 1))) for prompt, response in sizes]
    place = setting.place / f"plan-{time.monotonic_ns()}"
    place.mkdir()
    plan = step_memory.plan_of(settings, max(map(sum, sizes)), True, setting.device, place)
    torch.manual_seed(1)
    return step_memory.trainer_for(small_llama(setting.device, torch.float32), settings, plan, rows)


class Steps(TrainerCallback):
    """Counts the steps that have started."""

    count = 0

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.count += 1


def probe(setting: Setting) -> None:
    """A pair that does not fit alone fails before the first step: the probe runs it first, and it is the longest."""
    sizes = [(24, 8)] * 7 + [(400, 100) if setting.is_small else (3000, 1000)] + [(24, 8)] * 8
    needs = _probed(setting, sizes, None)[2]
    tokens, steps, _ = _probed(setting, sizes, needs // 3)
    longest = sum(sizes[7]) + sizes[7][1] - 1
    verdict = RIGHT if (tokens, steps) == (longest, 0) else WRONG
    why = "" if verdict == RIGHT else f"{tokens} tokens were run first of {longest}, and {steps} steps"
    setting.says("", verdict, {"row": tokens, "steps": steps}, why)


def _probed(setting: Setting, sizes: Sequence[tuple[int, int]], limit: int | None) -> tuple[int, int, int]:
    """Tokens of the last row that was tried, steps that have started, and the bytes that were taken."""
    trainer = _trainer(setting, replace(SETTINGS, batch=1), sizes)
    trainer.add_callback(ProbeFirst(trainer))
    steps, tried, run = Steps(), [], trainer.run_row
    trainer.add_callback(steps)
    trainer._tell = lambda _: None

    def run_row(model: Any, row: Any, *args: Any, **kwargs: Any) -> Any:
        tried.append(row_tokens(row, 2, trainer.is_shared))
        if setting.is_small and limit is not None and tried[-1] > sum(sizes[0]) * 4:
            raise torch.OutOfMemoryError("no memory is left, as this check pretends")
        return run(model, row, *args, **kwargs)

    trainer.run_row = run_row
    with memory_limit(setting, limit) as peak:
        try:
            trainer.train()
        except RuntimeError as error:
            if limit is None or not is_out_of_memory(error):
                raise
    return tried[-1] if limit is not None else 0, steps.count, peak()


def afterwards(setting: Setting) -> None:
    """What follows a training: `dpo eval` gives the figures that it ended with, and `dpo export` accepts the merge."""
    from dpo_cli.app import app

    bench = bench_of(setting)
    trained(bench, setting, "judged", bf16=True, eval_split=0.4, kl_prompts=2)
    run = setting.place / "judged"
    stored = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["eval"]
    again = api.evaluate(run).sides.policy
    values = most(abs(again[name].value - stored[name]["value"]) for name in ("loss", "margin", "kl_token"))
    setting.agrees("eval", {"values": values, "limit": HALF_LOSS / 10}, {"values": HALF_LOSS / 10})
    done = CliRunner().invoke(app, ["export", str(run), "--out", str(setting.place / "merged")])
    verdict = RIGHT if done.exit_code == 0 else WRONG
    setting.says("export", verdict, {}, "" if verdict == RIGHT else f"{done.exception!r} {done.output[-500:]}")


CHECKS = (
    Check("right/trl", against_trl, 60),
    Check("right/quantised", quantised, 60),
    Check("right/half", half, 60),
    Check("right/oom", out_of_memory, 40),
    Check("right/probe", probe, 30),
    Check("right/resume", resume, 90),
    Check("right/in-ram", in_ram, 40),
    Check("right/optimizers", optimizers, 40),
    Check("right/afterwards", afterwards, 30),
)
