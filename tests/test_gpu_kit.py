"""benchmarks/gpu without a GPU: its rehearsal, that each check fails for a fault that is made on purpose, and its kit.

Faults are patched into dpo (or into what it stands on) in this process; the check is then a plain function call. The file is
long because each fault is a small function, which is read next to the others.
"""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from conftest import ROOT
from test_imports import LIGHT, PACKAGE
from test_liger_kernels import needs_package
from test_liger_kernels import whole_interpreter as whole_interpreter
from transformers.models.llama import modeling_llama

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(1, str(ROOT / "benchmarks" / "torture"))
from gpu import bill, kit, right, runner, sampling, speed, trainings
from gpu.peer import PEERS
from gpu.runner import MEASURED, NOT_RUN, RIGHT, WRONG, Check, Setting

from dpo_cli.hardware import memory
from dpo_cli.providers import liger_kernels, sharding
from dpo_cli.scoring import forward, lm_head, lora_linear, oom, row_attention, shared_prompts
from dpo_cli.training.dpo_trainer import PairTrainer
from dpo_cli.training.trainer import CarefulTrainer

PARTS = (right.PART, bill.PART, speed.PART, sampling.PART)
CHECKS = {check.name: check for part in PARTS for check in part.checks}
# Lines that only a GPU can have, by check and case.
ONLY_ON_A_GPU = {("right/liger", "")}
NEED_TRL = {("right/trl", "")}  # a CPU needs .venv-trl, which `make speed` makes
NEED_PEERS = {(check.name, peer) for check in speed.PART.checks for peer in PEERS}  # .venv-flash-pref and .venv-unsloth


@pytest.mark.long
def test_the_rehearsal(tmp_path: Path) -> None:
    """Every check of every part runs on tiny shapes, and finds everything right; with time for a busy machine."""
    command = [sys.executable, "benchmarks/gpu", "--device", "cpu", "--minutes", "20"]
    environment = {**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = runner.lines_of(tmp_path / "results.jsonl")
    assert [line for line in lines if line["verdict"] == WRONG] == [], done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line["check"] for line in lines} == CHECKS.keys()
    not_run = {(line["check"], line["case"]) for line in lines if line["verdict"] == NOT_RUN}
    assert ONLY_ON_A_GPU <= not_run <= ONLY_ON_A_GPU | NEED_TRL | NEED_PEERS
    assert {line["verdict"] for line in lines if line["check"].startswith("right/")} == {RIGHT, NOT_RUN}
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", *(f"{part.baseline}.json" for part in PARTS)}
    assert str(Path.home()) not in (tmp_path / "results.jsonl").read_text(encoding="utf-8")


@pytest.fixture
def verdicts(tmp_path: Path) -> Callable[[str], set[str]]:
    """Runs a check in this process, and gives the verdicts of its lines."""

    def run(name: str) -> set[str]:
        results = tmp_path / "results.jsonl"
        setting = Setting(name, "cpu", time.monotonic() + 300, tmp_path, results)
        runner.carry_out(CHECKS[name], setting)
        return {line["verdict"] for line in runner.lines_of(results, name)}

    return run


def wrong_scaling(patch: pytest.MonkeyPatch) -> None:
    """The adapter's product of a fused layer is a hundredth too large."""
    product = lora_linear._product
    patch.setattr(lora_linear, "_product", lambda left, right, scaling: product(left, right, 1.01 * scaling))
    patch.setattr(lora_linear, "_agrees", lambda module: True)


def unfused(patch: pytest.MonkeyPatch) -> None:
    """No layer runs as one function."""
    patch.setattr(lora_linear, "_agrees", lambda module: False)


def wrong_head_gradient(patch: pytest.MonkeyPatch) -> None:
    """The gradient of the states misses the token itself: only the probabilities count."""
    patch.setattr(
        lm_head.Head,
        "unit_gradient",
        lambda self, probabilities, targets, logits, dtype: probabilities.neg_().to(dtype) @ self.weight.to(dtype),
    )


def last_chunk_lost(patch: pytest.MonkeyPatch) -> None:
    """The head leaves out the positions of its last chunk."""
    chunks = lm_head.Head.chunks
    patch.setattr(lm_head.Head, "chunks", lambda self, positions: list(chunks(self, positions))[:-1])


def dropped_mask(patch: pytest.MonkeyPatch) -> None:
    """The rejected response sees the chosen one: a pair is one causal sequence."""

    def cuts(self: shared_prompts.Layout) -> row_attention.Cuts:
        return row_attention.Cuts(tuple((p, c + r, 0) for p, c, r in self.pairs), self.input_ids.device)

    patch.setattr(shared_prompts.Layout, "cuts", property(cuts))


def positions_run_on(patch: pytest.MonkeyPatch) -> None:
    """Positions of the rejected response continue after the chosen one, instead of after the prompt."""
    lay_out = shared_prompts.lay_out

    def counted(*args: Any) -> shared_prompts.Layout:
        layout = lay_out(*args)
        positions = torch.arange(layout.input_ids.shape[1])[None]
        return shared_prompts.Layout(layout.input_ids, positions, layout.pairs, layout.place)

    patch.setattr(shared_prompts, "lay_out", counted)


def no_window(patch: pytest.MonkeyPatch) -> None:
    """One call of attention gets no window."""
    together = row_attention._together
    patch.setattr(row_attention, "_together", lambda scale, cuts, window, *states: together(scale, cuts, None, *states))


def prompts_of_another_pair(patch: pytest.MonkeyPatch) -> None:
    """The keys of the second response are those of the chosen one, not of the prompt."""

    def repeated(states: torch.Tensor, pairs: Any) -> torch.Tensor:
        pieces = iter(torch.split(states, [size for pair in pairs for size in pair]))
        ordered = []
        for prompt, chosen, rejected in zip(pieces, pieces, pieces, strict=True):
            ordered += [prompt, chosen, *([torch.flip(prompt, [0]), rejected] if len(rejected) else [])]
        return torch.cat(ordered)

    patch.setattr(row_attention, "_with_prompts", repeated)


def repacked(patch: pytest.MonkeyPatch) -> None:
    """An evaluation changes the 4-bit weights, as bitsandbytes' own packing for CPUs did."""
    evaluate = CarefulTrainer.evaluate

    def damaging(self: Any, *args: Any, **kwargs: Any) -> Any:
        figures = evaluate(self, *args, **kwargs)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if weight.requires_grad and "lora_B" in name:
                    weight.mul_(0.5)
        return figures

    patch.setattr(CarefulTrainer, "evaluate", damaging)


def loss_of_half_the_pairs(patch: pytest.MonkeyPatch) -> None:
    """Every pair counts half."""
    step = PairTrainer.compute_loss
    patch.setattr(PairTrainer, "compute_loss", lambda *args, **kwargs: step(*args, **kwargs) / 2)


def other_beta(patch: pytest.MonkeyPatch) -> None:
    """The gradient is that of a larger loss, while the figures stay those of the right one."""
    step = PairTrainer.training_step

    def doubled(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        for weight in self.model.parameters():
            if weight.grad is not None and weight.ndim == 2 and weight.shape[0] < weight.shape[1]:
                weight.grad.neg_()
        return loss

    patch.setattr(PairTrainer, "training_step", doubled)


def sixteen_bits_lose_the_loss(patch: pytest.MonkeyPatch) -> None:
    """A training in bf16 has a loss of its own."""
    step = PairTrainer.compute_loss
    patch.setattr(PairTrainer, "compute_loss", lambda self, *a, **k: step(self, *a, **k) * (1.1 if self.args.bf16 else 1.0))


def gradients_of_a_failed_try_stay(patch: pytest.MonkeyPatch) -> None:
    """What a try has added before memory was out is counted twice."""

    def run_in_parts(step: Any, parts: Any, parameters: Any, divided: Any) -> torch.Tensor:
        return torch.stack([loss for _, loss in oom.in_halves(parts, step, divided)]).sum()

    patch.setattr(oom, "run_in_parts", run_in_parts)


def rows_stay_as_large(patch: pytest.MonkeyPatch) -> None:
    """A row that is out of memory is tried again as it is."""
    patch.setattr(CarefulTrainer, "_smaller", lambda self, row: [row])


def no_probe(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CarefulTrainer, "probe_longest", lambda self: None)


def probe_of_the_shortest(patch: pytest.MonkeyPatch) -> None:
    """The probe takes the first pairs of the file."""
    probe = CarefulTrainer.probe_longest

    def first(self: Any) -> None:
        real = self.train_dataset
        self.train_dataset = real.select(range(2))
        probe(self)
        self.train_dataset = real

    patch.setattr(CarefulTrainer, "probe_longest", first)


def random_state_is_lost(patch: pytest.MonkeyPatch) -> None:
    """A resumed run draws other numbers."""
    patch.setattr(CarefulTrainer, "_load_rng_state", lambda self, checkpoint: None)


def moments_are_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CarefulTrainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: None)


def merge_that_is_wrong(patch: pytest.MonkeyPatch) -> None:
    """The merged model is the base plus noise."""
    from dpo_cli.commands import export

    merged = export.merged

    def noisy(*args: Any) -> Any:
        model = merged(*args)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        return model

    patch.setattr(export, "merged", noisy)


def bill_without_activations(patch: pytest.MonkeyPatch) -> None:
    """The bill forgets half of what a step holds."""
    step = memory.step_bytes
    patch.setattr(memory, "step_bytes", lambda *args: tuple(size / 2 for size in step(*args)))


def other_answers(patch: pytest.MonkeyPatch) -> None:
    """The cache loses the first token."""
    from dpo_cli.evaluation import decoding

    update = decoding.RoomyLayer.update

    def forgetful(self: Any, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = update(self, key, value, *args, **kwargs)
        keys[:, :, 0] = 0
        return keys, values

    patch.setattr(decoding.RoomyLayer, "update", forgetful)


def other_optimizer(patch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' optimizers move the weights by a tenth less."""
    from bitsandbytes.optim.optimizer import Optimizer8bit

    step = Optimizer8bit.step

    def slower(self: Any, *args: Any, **kwargs: Any) -> Any:
        for group in self.param_groups:
            group["lr"] *= 0.9
        try:
            return step(self, *args, **kwargs)
        finally:
            for group in self.param_groups:
                group["lr"] /= 0.9

    patch.setattr(Optimizer8bit, "step", slower)


def no_number_from_the_head(patch: pytest.MonkeyPatch) -> None:
    """As from a kernel that reads what nothing has written."""
    scored = lm_head.score_tokens

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        scores = scored(*args, **kwargs)
        return replace(scores, log_probs=scores.log_probs * math.nan)

    for module in (lm_head, right, forward):
        patch.setattr(module, "score_tokens", spoilt)


def no_number_from_layers(patch: pytest.MonkeyPatch) -> None:
    adapted = lora_linear._adapted
    patch.setattr(lora_linear, "_adapted", lambda *given: adapted(*given) * math.nan)


def no_number_from_attention(patch: pytest.MonkeyPatch) -> None:
    together = row_attention._together
    patch.setattr(row_attention, "_together", lambda *given: together(*given) * math.nan)


def four_bits_come_back_larger(patch: pytest.MonkeyPatch) -> None:
    """A fused layer of 4 bits multiplies with a weight that is a fiftieth too large."""
    add = lora_linear._add_product

    def larger(total: torch.Tensor, left: torch.Tensor, weight: torch.Tensor, base: Any, transposed: bool) -> None:
        add(total, left if type(base) is torch.nn.Linear else 1.02 * left, weight, base, transposed)

    patch.setattr(lora_linear, "_add_product", larger)
    patch.setattr(lora_linear, "_agrees", lambda module: True)


def four_bits_run_apart(patch: pytest.MonkeyPatch) -> None:
    """No layer of 4 bits runs as one function: the comparison of both ways has refused them."""
    agrees = lora_linear._agrees
    patch.setattr(lora_linear, "_agrees", lambda module: type(module.base_layer) is torch.nn.Linear and agrees(module))


def another_kernel_without_adapter(patch: pytest.MonkeyPatch) -> None:
    """A layer of 4 bits whose adapter is off sums in float32 what is else rounded once: as another kernel, by an order."""
    from bitsandbytes.functional import dequantize_4bit

    def alone(x: torch.Tensor, base: Any) -> torch.Tensor:
        whole = dequantize_4bit(base.weight, base.weight.quant_state)
        half = x.shape[1] // 2
        return x[:, :half] @ whole[:, :half].T + x[:, half:] @ whole[:, half:].T

    patch.setattr(lora_linear, "_alone", alone)


def gradients_stay_scaled(patch: pytest.MonkeyPatch) -> None:
    """The gradients of fp16 are clipped before the scale is taken out of them."""
    patch.setattr(accelerate.Accelerator, "unscale_gradients", lambda self, optimizer=None: None)


def fp16_loses_the_loss(patch: pytest.MonkeyPatch) -> None:
    """A training in fp16 has a loss of its own."""
    step = PairTrainer.compute_loss
    patch.setattr(PairTrainer, "compute_loss", lambda self, *a, **k: step(self, *a, **k) * (1.1 if self.args.fp16 else 1.0))


def scaler_is_lost(patch: pytest.MonkeyPatch) -> None:
    """The gradient scaler of a resumed run starts again."""
    patch.setattr(CarefulTrainer, "_load_scaler", lambda self, checkpoint: None)


def scaler_is_not_kept(patch: pytest.MonkeyPatch) -> None:
    """A checkpoint has the scale of before the first step."""
    from dpo_cli.training import trainer

    def first(self: Any, place: str) -> None:
        trainer.save_state(Path(place) / trainer.SCALER, torch.amp.GradScaler("cpu").state_dict())

    patch.setattr(CarefulTrainer, "_save_scaler", first)


def evaluation_of_the_base(patch: pytest.MonkeyPatch) -> None:
    """A run that is opened again has a fresh adapter."""
    from dpo_cli.commands import eval as evaluation

    load = evaluation.load_policy

    def fresh(*args: Any) -> Any:
        policy, plan = load(*args)
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.data.zero_()
        return policy, plan

    patch.setattr(evaluation, "load_policy", fresh)


def a_card_that_is_too_small(patch: pytest.MonkeyPatch) -> None:
    """The first row of the recommended config is out of memory, as where the bill has forgotten something."""
    step, faults = CarefulTrainer.run_row, iter([True])

    def run_row(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        if next(faults, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    patch.setattr(CarefulTrainer, "run_row", run_row)


def a_shard_is_lost(patch: pytest.MonkeyPatch) -> None:
    """A weight of the first block does not come back from the RAM."""
    place = sharding.place_adapters

    def lost(model: Any, device: torch.device) -> None:
        place(model, device)
        next(weight for weight in model.parameters() if isinstance(weight, sharding.DTensor)).to_local().zero_()

    patch.setattr("dpo_cli.training.trainer.place_adapters", lost)


FAULTS: tuple[tuple[str, Callable[[pytest.MonkeyPatch], None]], ...] = (
    ("right/head", wrong_head_gradient),
    ("right/head", last_chunk_lost),
    ("right/head", no_number_from_the_head),
    ("right/shared", no_number_from_the_head),
    ("right/attention", no_number_from_attention),
    ("right/layers", no_number_from_layers),
    ("right/shared", dropped_mask),
    ("right/shared", positions_run_on),
    ("right/attention", no_window),
    ("right/attention", prompts_of_another_pair),
    ("right/layers", wrong_scaling),
    ("right/layers", unfused),
    ("right/trl", loss_of_half_the_pairs),
    ("right/trl", other_beta),
    ("right/quantised", repacked),
    ("right/half", sixteen_bits_lose_the_loss),
    ("right/oom", gradients_of_a_failed_try_stay),
    ("right/oom", rows_stay_as_large),
    ("right/probe", no_probe),
    ("right/probe", probe_of_the_shortest),
    ("right/layers", four_bits_come_back_larger),
    ("right/layers", four_bits_run_apart),
    ("right/layers", another_kernel_without_adapter),
    ("right/half", fp16_loses_the_loss),
    ("right/half", gradients_stay_scaled),
    ("right/in-ram", a_shard_is_lost),
    ("right/optimizers", other_optimizer),
    ("right/afterwards", merge_that_is_wrong),
    ("right/afterwards", evaluation_of_the_base),
    ("bill/1B", bill_without_activations),
    ("bill/card-8", a_card_that_is_too_small),
    ("sampling/8B", other_answers),
)


@pytest.mark.long
@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=lambda one: one if isinstance(one, str) else one.__name__)
def test_a_fault_is_found(
    name: str, fault: Callable[..., None], verdicts: Callable[[str], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "right/trl" and not trainings.TRL_PYTHON.exists():
        pytest.skip("`make speed` makes .venv-trl")
    fault(monkeypatch)
    assert WRONG in verdicts(name)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["random_state_is_lost", "moments_are_lost", "scaler_is_lost", "scaler_is_not_kept"])
def test_a_fault_of_a_resumed_run_is_found(fault: str, tmp_path: Path) -> None:
    """In a process of its own, as the check forks: autograd does not work in a child of a process that has gone backward."""
    code = f"""
import pytest, time
from pathlib import Path
import test_gpu_kit as kit
from fork_server import ready
if __name__ == "__main__":
    ready()
    kit.{fault}(pytest.MonkeyPatch())
    place = Path({str(tmp_path)!r})
    setting = kit.Setting("right/resume", "cpu", time.monotonic() + 300, place, place / "results")
    kit.runner.carry_out(kit.CHECKS[setting.check], setting)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert WRONG in {line["verdict"] for line in runner.lines_of(tmp_path / "results")}


@pytest.fixture
def interpreted(whole_interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """liger-kernel's kernels in Triton's interpreter, which is slow; the rope of all later models is again as before."""
    monkeypatch.setattr(liger_kernels, "TOKENS_OF_HEADS", 512)
    monkeypatch.setattr(modeling_llama, liger_kernels.ROPE, getattr(modeling_llama, liger_kernels.ROPE))


def no_kernel_is_used(patch: pytest.MonkeyPatch) -> None:
    """The comparison of both ways has refused all of them."""
    patch.setattr(liger_kernels, "_agrees", lambda *_: False)


def norms_are_larger(patch: pytest.MonkeyPatch) -> None:
    """The kernel of a norm divides by a hundredth less, and the comparison has not seen it."""
    import liger_kernel.ops.rms_norm as rms_norm
    import triton.language as tl

    patch.setattr(rms_norm, "rsqrt", lambda x: 1.01 / tl.sqrt(x))
    patch.setattr(liger_kernels, "_agrees", lambda *_: True)


def rope_turns_back(patch: pytest.MonkeyPatch) -> None:
    """The kernel of the rotation gets the other sign of the sine."""
    rotated = liger_kernels._by_device
    patch.setattr(
        liger_kernels,
        "_by_device",
        lambda device, fast, plain: rotated(device, lambda q, k, cos, sin, *a, **kw: fast(q, k, cos, -sin, *a, **kw), plain),
    )


@needs_package
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("fault", [None, no_kernel_is_used, norms_are_larger, rope_turns_back])
def test_a_fault_of_liger_kernel_is_found(
    fault: Callable[[pytest.MonkeyPatch], None] | None,
    verdicts: Callable[[str], set[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault is not None:
        fault(monkeypatch)
    assert verdicts("right/liger") == {RIGHT if fault is None else WRONG}


@pytest.fixture
def bench(tmp_path: Path) -> speed.Bench:
    """Of the rehearsal."""
    return speed.Bench(Setting("speed/1B", "cpu", time.monotonic() + 60, tmp_path, tmp_path / "results.jsonl"), "1B", None)


def reasons(bench: speed.Bench) -> list[str]:
    """Why peers were not run."""
    lines = runner.lines_of(bench.setting.results)
    return [line["why"] for line in lines if line["case"] == "Unsloth" and line["verdict"] == NOT_RUN]


def peer_that(answers: str, bench: speed.Bench, patch: pytest.MonkeyPatch) -> speed.Peer:
    """A peer whose program does this instead, after which it waits."""
    place = bench.setting.place
    program = f"import json, sys, time\ndef say(**words): print(json.dumps(words), flush=True)\n{answers}\ntime.sleep(60)\n"
    (place / "peer.py").write_text(program, encoding="utf-8")
    patch.setattr(speed, "__file__", str(place / "speed.py"))
    return speed.Peer(bench, "Unsloth", place / "job.json")


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ("say(error='ImportError: no such package')", "ImportError: no such package"),
        ("sys.exit('no GPU is here')", "ended with 1: no GPU is here"),
        ("say(versions=''); input(); sys.exit('out of memory')", "ended with 1: out of memory"),
        ("say(versions=''); sys.stdin.close(); sys.exit('at once')", "ended with 1: at once"),
        ("say(versions=''); input(); say(seconds=[1, 1], loss=0.5)", "its first loss is 0.500"),
        ("say(versions=''); input(); say(seconds=[1, 1], loss=float('nan'))", "its first loss is nan"),
        ("pass", "no answer in"),
    ],
)
def test_a_peer_that_fails_is_a_line(answers: str, why: str, bench: speed.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.setting.deadline = time.monotonic() + (2 if why.startswith("no answer") else 60)
    peer = peer_that(answers, bench, monkeypatch)
    assert not peer.is_ready() and peer.process.poll() is not None
    (reason,) = reasons(bench)
    assert reason.startswith(why)


def test_a_peer_that_fails_between_its_turns_costs_only_itself(bench: speed.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peer_that(
        "say(versions='Unsloth 1'); input(); say(seconds=[1, 1], loss=0.6931); input(); sys.exit('gone')", bench, monkeypatch
    )
    assert peer.is_ready()
    speed._rounds(bench.setting, bench, {"dpo": bench.dpo, "TRL": bench.dpo}, [peer], 1e12)
    assert reasons(bench) == ["ended with 1: gone"]
    (line,) = [line for line in runner.lines_of(bench.setting.results) if line["verdict"] == MEASURED]
    assert line["figures"]["faster"] > 0 and "Unsloth" not in line["figures"]


def test_a_peer_whose_package_is_missing_says_so(bench: speed.Bench) -> None:
    if importlib.util.find_spec("unsloth") or (ROOT / ".venv-unsloth").exists():
        pytest.skip("it is there")
    (peer,) = [peer for peer in speed.peers_of(bench, None) if peer.name == "Unsloth" or peer.stop()]
    assert not peer.is_ready()
    assert reasons(bench) == ["ModuleNotFoundError: No module named 'unsloth'"]


def test_rates_by_hand(tmp_path: Path) -> None:
    """1,000 tokens in 2 s at best are 500 a second; TRL takes 5 s; the floors are 0.5 s and 0.25 s."""
    results = tmp_path / "results.jsonl"
    pairs = types.SimpleNamespace(
        tokens=1000, pairs=[1, 2], floor_seconds=lambda with_reference, rate: 5e11 / rate / 2 ** (not with_reference)
    )
    seconds = {"dpo": [2.5, 2.0], "TRL": [5.0, 5.5], "dpo, cached": [1.5, 1.0], "Unsloth": [4.0], "flash-pref": []}
    speed.report(Setting("speed/1B", "cpu", 0.0, tmp_path, results), pairs, seconds, 1e12, ["TRL 1", "Unsloth 2"])  # type: ignore[arg-type]
    (line,) = runner.lines_of(results)
    assert line["case"] == "round 2: 2 pairs of 500 tokens" and line["why"] == "TRL 1; Unsloth 2"
    assert line["figures"] == {
        "dpo": 500, "TRL": 200, "dpo, cached": 1000, "Unsloth": 250, "faster": 2.5, "of the floor": 0.25,
        "cached, of the floor": 0.25, "rate": 1,
    }  # fmt: skip


def ended(check: Callable[[Setting], None], place: Path, seconds: float = 30) -> list[tuple[str, str]]:
    """The verdicts and reasons of a check in a process of its own."""
    results = place / "results.jsonl"
    results.touch()
    (_,) = runner.run_checks([Check("made/up", check, seconds)], 1, "cpu", time.monotonic() + seconds, results, forks=True)
    return [(line["verdict"], line["why"]) for line in runner.lines_of(results)]


def test_a_line_is_written_at_once_and_a_late_check_is_stopped(tmp_path: Path) -> None:
    def slow(setting: Setting) -> None:
        setting.agrees("first", {"values": 0.5}, {"values": 1.0})
        time.sleep(60)

    assert ended(slow, tmp_path, 4) == [(RIGHT, ""), (NOT_RUN, "stopped after 4 s")]


def test_what_a_check_started_ends_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"

    def starts(setting: Setting) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        pid.write_text(str(child.pid), encoding="utf-8")
        setting.measured("", {})

    assert ended(starts, tmp_path) == [(MEASURED, "")]
    status, end = Path(f"/proc/{pid.read_text(encoding='utf-8')}/stat"), time.monotonic() + 10
    while status.exists() and " Z " not in status.read_text(encoding="utf-8"):  # it has its signal, and ends when it has a core
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_stop_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    results = tmp_path / "results.jsonl"
    runner.begin(results, [])
    Path(tempfile.gettempdir()).mkdir()

    def writes(setting: Setting) -> None:
        for number in range(100_000):
            (setting.place / f"{number}").mkdir()
            setting.place.joinpath("started").touch()

    checks = [Check("first/up", lambda setting: setting.measured("", {}), 20), Check("made/up", writes, 20)]
    ended = runner.run_checks(checks, 2, "cpu", time.monotonic() + 20, results, forks=True)
    assert next(ended).name == "first/up"
    while not list(tmp_path.glob("scratch/*/started")):
        time.sleep(0.01)
    ended.close()  # as a Ctrl-C does
    assert not list(tmp_path.glob("scratch/*")) and [line["check"] for line in runner.lines_of(results)] == ["first/up"]


def test_earlier_results_are_kept(tmp_path: Path) -> None:
    results, table = tmp_path / "new" / "results.jsonl", tmp_path / "new" / "gpu-right.json"
    runner.begin(results, ["gpu-right"])
    assert results.read_text(encoding="utf-8") == "" and not table.exists()
    results.write_text("mine", encoding="utf-8")
    table.write_text("too", encoding="utf-8")
    os.utime(results, (0, 1_700_000_000))
    runner.begin(results, ["gpu-right"])
    kept = {file.read_text(encoding="utf-8"): file.name[:17] for file in results.parent.iterdir() if "-20" in file.name}
    assert kept == {"mine": "results-2023-11-1", "too": "gpu-right-2023-11"} and not table.exists()


@pytest.mark.long
def test_a_stop_and_a_folder_that_cannot_be_written_are_reported(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu", "--device", "cpu", "--only", "right/head", "--only", "right/resume"]
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "file").touch()
    unwritable = subprocess.run(
        command, cwd=ROOT, env={**environment, "OUT": str(tmp_path / "file")}, capture_output=True, text=True
    )
    assert unwritable.returncode == 1 and "OUT=FOLDER" in unwritable.stderr and "Traceback" not in unwritable.stderr
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and "right/head" in run.stdout.readline()
        run.send_signal(signal.SIGINT)
        _, said = run.communicate()
    assert run.returncode == 130 and "stopped; what is done is in" in said and "Traceback" not in said
    assert {line["check"] for line in runner.lines_of(tmp_path / "out/results.jsonl")} == {"right/head"}
    for wrong in ("0", "-1", "nan", "inf"):
        done = subprocess.run([*command, "--minutes", wrong], cwd=ROOT, env=environment, capture_output=True)
        assert done.returncode == 2


def test_a_crash_costs_one_check(tmp_path: Path) -> None:
    def crashes(setting: Setting) -> None:
        setting.agrees("before", {"values": 0.0}, {"values": 1.0})
        os.kill(os.getpid(), signal.SIGKILL)

    (first, second) = ended(crashes, tmp_path)
    assert first == (RIGHT, "") and second[0] == WRONG and "ended with -9" in second[1]


def test_an_error_is_a_fault_and_says_what_happened(tmp_path: Path) -> None:
    def fails(setting: Setting) -> None:
        raise ValueError(f"of {ROOT}")

    ((verdict, why),) = ended(fails, tmp_path)
    assert verdict == WRONG and "ValueError: of ." in why and str(ROOT) not in why


def test_a_check_without_a_line_is_a_fault(tmp_path: Path) -> None:
    ((verdict, _),) = ended(lambda setting: None, tmp_path)
    assert verdict == WRONG


def test_no_time_is_said(tmp_path: Path) -> None:
    assert ended(lambda setting: None, tmp_path, 1) == [(NOT_RUN, "no time was left")]


@pytest.mark.parametrize("value", [2.0, float("nan"), float("inf")])
def test_a_figure_beyond_its_limit_is_wrong(value: float, tmp_path: Path) -> None:
    def beyond(setting: Setting) -> None:
        setting.agrees("", {"values": value}, {"values": 1.0})

    assert [verdict for verdict, _ in ended(beyond, tmp_path)] == [WRONG]
    json.loads((tmp_path / "results.jsonl").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_time_that_a_part_leaves_is_that_of_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of 3, 1 and 1 of 100 s: the first ends at 60; done at 20, the second has half of the other 80."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    parts = [runner.Part("", "", share, (), ()) for share in (3, 1, 1)]
    end = runner.shares(parts, end=100)
    assert end(0) == pytest.approx(60)
    clock[0] = 20
    assert end(1) == pytest.approx(60)
    clock[0] = 30
    assert end(2) == pytest.approx(100)


def test_context_and_slack_by_hand() -> None:
    """Points on the line 0.5 + 1.1 x, one a little above and one below."""
    assert bill.line_through([(1.0, 1.6), (2.0, 2.7), (4.0, 4.9)]) == pytest.approx((0.5, 1.1))
    assert bill.line_through([(1.0, 1.7), (1.0, 1.5), (3.0, 3.7), (3.0, 3.9)]) == pytest.approx((0.5, 1.1))
    assert bill.line_through([(1.0, 1.6), (1.0, 1.6)]) is None
    figures = [{"error": 0.1, "measured": x, "reserved": y - 0.5, "context": 0.5} for x, y in ((1.0, 1.6), (2.0, 2.7))]
    notes = bill.fitted([{"figures": one} for one in [*figures, {"error": 0.2}, {}]])
    assert [[value for _, value in values] for _, values in notes] == [
        pytest.approx([3, 0.4 / 3, 0.2]),
        pytest.approx([2, 0.5, 0.1]),
    ]


def gpu_functions() -> Iterator[str]:
    """The functions of the rooms with torch that do something else on an NVIDIA GPU: they name it, or a gradient scaler."""
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        if place.split("/")[0] in LIGHT:
            continue
        waiting: list[tuple[str, ast.AST]] = [("", ast.parse(path.read_text(encoding="utf-8")))]
        while waiting:
            name, node = waiting.pop()
            for child in ast.iter_child_nodes(node):
                is_named = isinstance(child, ast.FunctionDef | ast.ClassDef)
                own = f"{name}.{child.name}".strip(".") if is_named else name
                if _is_of_a_gpu(child):
                    yield f"{place}:{own}"
                waiting.append((own, child))


def _is_of_a_gpu(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return node.value == "cuda"
    # The module, torch.accelerator, and not Trainer's own accelerator.
    is_module = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
    return isinstance(node, ast.Attribute) and (
        node.attr in ("is_cuda", "scaler") or (is_module and node.attr in ("cuda", "accelerator"))
    )


def test_every_branch_of_a_gpu_is_on_the_list() -> None:
    text = (ROOT / "benchmarks" / "gpu" / "README.md").read_text(encoding="utf-8")
    assert {*re.findall(r"^\| `([\w/]+\.py:[\w.]+)` \|", text, re.M)} == {*gpu_functions()}
    named = re.findall(r"`((?:right|bill|speed|sampling)/[\w-]+)`", text)
    assert {*named} <= CHECKS.keys() and named


def test_no_kernel_of_ours_is_written_in_triton() -> None:
    assert not [path for path in PACKAGE.rglob("*.py") if "import triton" in path.read_text(encoding="utf-8")]


def wheel_of(place: Path, name: str, files: dict[str, str]) -> Path:
    """A wheel with these files, and a RECORD of them."""
    wheel, record = place / f"{name}-1.0-py3-none-any.whl", io.StringIO()
    files = {**files, f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"}
    files[f"{name}-1.0.dist-info/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    lines = csv.writer(record, lineterminator="\n")
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, text in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
            lines.writerow([file, f"sha256={digest}", len(text)])
            archive.writestr(file, text)
        lines.writerow([f"{name}-1.0.dist-info/RECORD", "", ""])
        archive.writestr(f"{name}-1.0.dist-info/RECORD", record.getvalue())
    return wheel


LIBRARIES = ("cpu", "cuda118", "cuda130", "cuda132", "rocm64", "xpu2025")


def test_one_library_is_kept_and_the_wheel_is_valid(tmp_path: Path) -> None:
    files = {f"bitsandbytes/libbitsandbytes_{name}.so": name for name in LIBRARIES} | {"bitsandbytes/note.txt": ""}
    wheel = wheel_of(tmp_path, "bitsandbytes", files)
    kit._without(wheel, kit.OTHER_LIBRARY)
    with zipfile.ZipFile(wheel) as archive:
        names = {*archive.namelist()}
        record = archive.read("bitsandbytes-1.0.dist-info/RECORD").decode()
    assert {name for name in names if name.endswith(".so")} == {
        "bitsandbytes/libbitsandbytes_cpu.so",
        "bitsandbytes/libbitsandbytes_cuda130.so",
    }
    assert {line.split(",")[0] for line in record.splitlines()} == names
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    assert subprocess.run(command, check=False).returncode == 0


def test_a_wheel_whose_files_were_changed_is_refused(tmp_path: Path) -> None:
    wheel = wheel_of(tmp_path, "bitsandbytes", {"bitsandbytes/a.txt": "one"})
    changed = tmp_path / "changed.whl"
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, "other" if name.endswith("a.txt") else old.read(name))
    with pytest.raises(SystemExit, match=r"a\.txt is not what RECORD says"):
        kit._without(changed, kit.OTHER_LIBRARY)


def test_what_is_there_is_printed_and_not_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kit" / "any").mkdir(parents=True)
    wheel_of(tmp_path / "kit" / "any", "torch", {"torch/note.txt": ""})
    wheel_of(tmp_path / "kit" / "any", "nowhere_else", {"nowhere_else/note.txt": ""})
    kit.install(tmp_path / "kit", tmp_path / "site")
    assert {path.name for path in (tmp_path / "site").iterdir()} == {"nowhere_else", "nowhere_else-1.0.dist-info"}
    assert f"torch {torch.__version__} is there (the kit has 1.0)" in capfd.readouterr().err


def test_requirements_of_another_python_and_of_extras(tmp_path: Path) -> None:
    needs = ['old; python_version < "3.12"', "plain>=2", 'more; extra == "all"', 'windows; sys_platform == "win32"']
    with zipfile.ZipFile(tmp_path / "needs.whl", "w") as archive:
        archive.writestr("one-1.0.dist-info/METADATA", "Name: one\n" + "".join(f"Requires-Dist: {need}\n" for need in needs))
    names = {
        python: [one.name for one in kit._requirements(tmp_path / "needs.whl", python, ["all"])] for python in ("3.11", "3.12")
    }
    assert names == {"3.11": ["old", "plain", "more"], "3.12": ["plain", "more"]}


def test_parts_have_all_of_the_time() -> None:
    assert sum(part.share for part in PARTS) == pytest.approx(1)
    assert len(CHECKS) == sum(len(part.checks) for part in PARTS)


def test_checks_run_at_the_same_time(tmp_path: Path) -> None:
    """Each of two waits for the other's file."""

    def meets(setting: Setting, own: str, other: str) -> None:
        (tmp_path / own).touch()
        while not (tmp_path / other).exists():
            time.sleep(0.01)
        setting.measured("", {})

    results = tmp_path / "results.jsonl"
    results.touch()
    checks = [Check(own, partial(meets, own=own, other=other), 20) for own, other in (("one", "two"), ("two", "one"))]
    assert len([*runner.run_checks(checks, 2, "cpu", time.monotonic() + 20, results, forks=True)]) == 2
    assert [line["verdict"] for line in runner.lines_of(results)] == [MEASURED, MEASURED]


@pytest.mark.long
def test_a_check_that_cannot_be_forked_is_a_process_that_imports(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.touch()
    (_,) = runner.run_checks([CHECKS["right/head"]], 1, "cpu", time.monotonic() + 60, results, forks=False)
    assert {line["verdict"] for line in runner.lines_of(results)} == {RIGHT}
