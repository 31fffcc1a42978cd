"""Part `speed`: useful tokens a second of training steps, dpo and TRL's DPOTrainer in turns on the same pairs.

Useful tokens are those of a pair with its prompt once. Models have random weights, built on the device; pairs are
conversations of several turns. TRL has its own Triton head, and liger-kernel in turns of its own where that is installed. So do
flash-pref and Unsloth, which are processes of their own (peer.py), of `.venv-flash-pref` and `.venv-unsloth` where these are.
All compute the reference within the run. The floor is the time of the operations of the maths (benchmarks/floor.py) at the rate
of a large product in bf16 on this device, which is measured first. The rehearsal puts dpo's head on TRL's trainer: TRL's needs
a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import floor
import torch
from baseline import Column
from datasets import Dataset
from peers.trl_training import trainer_of
from step_memory import plan_of, trainer_for
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, PreTrainedModel, TrainerCallback

from dpo_cli.data.encoded import Encoded
from dpo_cli.hardware.memory_inputs import Settings
from dpo_cli.plan.plan import Plan
from dpo_cli.providers import liger_kernels
from dpo_cli.providers.out_of_memory import free_memory
from dpo_cli.scoring import forward
from gpu.bill import MODELS, SHAPE, facts_of, model_of
from gpu.peer import PEERS
from gpu.runner import LAST_LINES, ROOT, CannotRun, Check, Part, Setting

STEPS, PAIRS, RANK = 2, 8, 16  # of a round; pairs of a step
BATCHES = {"1B": 4, "8B": 1}  # pairs of a micro-batch: TRL keeps the states of all layers for both of their sequences
MOST_ROUNDS = 3
WORDS = 60  # of a turn and of an answer, with about five tokens each
TOP = 10  # kernels
NAME = 70  # characters of a kernel's name
FRESH = 0.05  # nats from ln 2: the loss of a first step, whose policy is its reference


class Clock(TrainerCallback):
    """Seconds of each step, when the device has done it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.begin = 0.0

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.begin = now()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.steps.append(now() - self.begin)


def now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.monotonic()


class Bench:
    """A model for each trainer, and the pairs of their steps."""

    def __init__(self, setting: Setting, name: str, bits: int | None) -> None:
        from builders import conversation_pairs, tiny_tokenizer

        from dpo_cli.data.rows import to_pair
        from dpo_cli.data.tokens import encode

        self.setting, self.tokenizer = setting, tiny_tokenizer()
        words = 2 if setting.is_small else WORDS
        self.rows = conversation_pairs(STEPS * PAIRS, turn_words=words, answer_words=words)
        self.pairs: Sequence[Encoded] = encode([to_pair(row, i + 1) for i, row in enumerate(self.rows)], self.tokenizer)
        self.facts = facts_of(setting, MODELS[name])
        length = max(pair.length for pair in self.pairs)
        batch = BATCHES[name]
        self.settings = Settings(batch=batch, length=length, rank=RANK, bytes_per_value=2, checkpointing=False, bits=bits)
        plan = plan_of(self.settings, length, True, setting.device, setting.place)
        self.plan = replace(plan, config=plan.config.replaced({"gradient_accumulation_steps": PAIRS // batch}))
        self.own = model_of(self.facts, self.settings, setting.device)
        if setting.device == "cuda" and liger_kernels.is_installed():  # as the provider does
            liger_kernels.use_kernels(self.own)

    def planned(self, steps: int) -> Plan:
        epochs = -(-steps // STEPS)
        return replace(self.plan, config=self.plan.config.replaced({"max_steps": steps, "num_train_epochs": epochs}))

    def dpo(self, steps: int) -> Any:
        return trainer_for(self.own, self.settings, self.planned(steps), self.pairs)

    def trl(self, model: PreTrainedModel, liger: bool, steps: int) -> Any:
        config = self.planned(steps).to_json()["config"]
        options = {"output_dir": str(self.setting.place / "trl"), "use_liger_kernel": liger}
        trainer = trainer_of(model, self.tokenizer, Dataset.from_list(self.rows), config, self.setting.device, **options)
        if self.setting.is_small:
            forward.attach(trainer.model.get_base_model(), forward.plain_states, outputs=("log_probs",))
        return trainer

    @property
    def tokens(self) -> int:
        """Useful tokens of the pairs."""
        return sum(pair.shared_length for pair in self.pairs)

    def floor_seconds(self, with_reference: bool, rate: float) -> float:
        sizes = floor.Model.of(vars(self.facts), RANK)
        pairs = [floor.Pair(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in self.pairs]
        return floor.operations(sizes, pairs, 1, with_reference) / rate


def steps_of(build: Callable[[int], Any], steps: int) -> list[float]:
    """Seconds of each of these steps; the model is as before when they are done."""
    trainer, clock = build(steps), Clock()
    trainer.add_callback(clock)
    try:
        trainer.train()
    finally:
        trainer.model.unload()
        del trainer
        free_memory()
    return clock.steps


class Peer:
    """A trainer of peer.py, in its process. It waits for a line between its turns, and holds no more than its model."""

    def __init__(self, bench: Bench, name: str, job: Path) -> None:
        own = ROOT / f".venv-{name.lower()}" / "bin" / "python"
        python = own if own.exists() else Path(sys.executable)
        environment = {key: value for key, value in os.environ.items() if python != own or key != "PYTHONPATH"}
        self._log = bench.setting.place / f"{name}.log"
        command = [str(python), str(Path(__file__).with_name("peer.py")), name, str(job)]
        with self._log.open("w") as log:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            self.process = subprocess.Popen(command, env=environment, cwd=bench.setting.place, **pipes)
        self.setting, self.name, self.versions = bench.setting, name, ""

    def is_ready(self) -> bool:
        """Whether it is imported, has built its model, and has run each step once. Else a line says why, and it has ended."""
        try:
            self.versions = self._answer()["versions"]
            self._ask()
            loss = self._answer()["loss"]
            if not abs(loss - math.log(2)) < FRESH:
                raise CannotRun(f"its first loss is {loss:.3f}, and not ln 2: it trains something else")
        except CannotRun as error:
            self.leave(str(error))
            return False
        return True

    def steps(self) -> list[float]:
        """Seconds of each of its steps; `CannotRun` if it fails."""
        self._ask()
        seconds: list[float] = self._answer()["seconds"]
        return seconds

    def leave(self, why: str) -> None:
        self.setting.not_run(self.name, why)
        self.stop()

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _ask(self) -> None:
        assert self.process.stdin is not None
        try:
            print(file=self.process.stdin, flush=True)
        except BrokenPipeError as error:
            raise CannotRun(self._end()) from error

    def _answer(self) -> dict[str, Any]:
        """What it says next, in half of the time that is left: the others need the rest."""
        output = self.process.stdout
        assert output is not None
        seconds = self.setting.seconds_left / 2
        if not select.select([output], [], [], max(0, seconds))[0]:
            raise CannotRun(f"no answer in {seconds:.0f} s")
        line = output.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._end()}
        if "error" in answer:
            raise CannotRun(answer["error"])
        return answer

    def _end(self) -> str:
        last = " | ".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
        return f"ended with {self.process.wait()}: {last}"


def peers_of(bench: Bench, bits: int | None) -> list[Peer]:
    """A process for each peer, which imports its package while models are built here."""
    setting, tokenizer = bench.setting, bench.tokenizer
    # Beyond its positions Unsloth would stretch the angles, and train another model.
    shape = {name: getattr(bench.facts, name) for name in SHAPE} | {"max_position_embeddings": 2 * bench.settings.length}
    place = setting.place / "peers"
    tokenizer.save_pretrained(place)
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype=torch.bfloat16).save_pretrained(place)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bench.rows), encoding="utf-8")
    job = {
        "model": str(place),
        "rows": str(place / "rows.jsonl"),
        "output_dir": str(place / "run"),
        "device": setting.device,
        "bits": bits,
        "shape": shape,
        "config": bench.planned(STEPS).to_json()["config"],
        "tokens": {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")},
        "chat_template": tokenizer.chat_template,
    }
    (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
    return [Peer(bench, name, place / "job.json") for name in PEERS]


def rates(setting: Setting, name: str, bits: int | None) -> None:
    """Tokens a second of a model in a precision, then the kernels of a step."""
    logging.disable(logging.WARNING)
    try:
        _rates(setting, name, bits)
    except torch.OutOfMemoryError as error:
        raise CannotRun(str(error).splitlines()[0]) from error


def _rates(setting: Setting, name: str, bits: int | None) -> None:
    rate = floor.rate(torch.bfloat16, setting.device)
    bench = Bench(setting, name, bits)
    peers = peers_of(bench, bits)
    try:
        others = {"TRL": False} | ({"TRL with liger": True} if _has_liger(setting) else {})
        models = {other: model_of(bench.facts, bench.settings, setting.device) for other in others}
        builds = {"dpo": bench.dpo, **{other: partial(bench.trl, models[other], liger) for other, liger in others.items()}}
        for build in builds.values():  # kernels are compiled and chosen, and memory is taken
            steps_of(build, 1)
        peers = [peer for peer in peers if peer.is_ready()]
        _rounds(setting, bench, builds, peers, rate)
    finally:
        for peer in peers:
            peer.stop()
    setting.measured("kernels of a step, percent of their time", {"kernels": kernels(setting, bench)})


def _rounds(setting: Setting, bench: Bench, builds: dict[str, Callable[[int], Any]], peers: list[Peer], rate: float) -> None:
    """Measure all in turns, and write the best of each after each round. A peer that fails takes no further part."""
    seconds: dict[str, list[float]] = {who: [] for who in (*builds, "dpo, cached")}
    versions = {"TRL": _trl(setting), **{peer.name: peer.versions for peer in peers}}
    for _ in range(1 if setting.is_small else MOST_ROUNDS):
        began = time.monotonic()
        for who, build in builds.items():
            try:
                measured = steps_of(build, 2 * STEPS if who == "dpo" else STEPS)
            except torch.OutOfMemoryError:
                if not peers:
                    raise
                while peers:
                    peers.pop().leave("the GPU has no memory for it next to the others")
                measured = steps_of(build, 2 * STEPS if who == "dpo" else STEPS)
            seconds[who].append(sum(measured[:STEPS]))
            if who == "dpo":
                seconds["dpo, cached"].append(sum(measured[STEPS:]))
        for peer in list(peers):
            try:
                measured = peer.steps()
            except CannotRun as error:
                peers.remove(peer)
                peer.leave(str(error))
            else:
                seconds.setdefault(peer.name, []).append(sum(measured))
        report(setting, bench, seconds, rate, [versions[who] for who in seconds if who in versions])
        if setting.seconds_left < 1.5 * (time.monotonic() - began):
            break


def _has_liger(setting: Setting) -> bool:
    return setting.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def _trl(setting: Setting) -> str:
    head = "with dpo's head, as its own needs a GPU" if setting.is_small else "with its own head"
    return f"TRL {version('trl')} {head}"


def report(setting: Setting, bench: Bench, seconds: dict[str, list[float]], rate: float, versions: Sequence[str]) -> None:
    """Write what is measured so far: of each the best round, and the ratios of it."""
    best = {who: min(rounds) for who, rounds in seconds.items() if rounds}
    figures: dict[str, Any] = {who: bench.tokens / value for who, value in best.items()}
    figures |= {"faster": best["TRL"] / best["dpo"], "of the floor": bench.floor_seconds(True, rate) / best["dpo"]}
    figures |= {"cached, of the floor": bench.floor_seconds(False, rate) / best["dpo, cached"], "rate": rate / 1e12}
    rounds = len(seconds["dpo"])
    pairs = f"{len(bench.pairs)} pairs of {bench.tokens / len(bench.pairs):.0f} tokens"
    setting.measured(f"round {rounds}: {pairs}", figures, "; ".join(versions))


def kernels(setting: Setting, bench: Bench) -> dict[str, int]:
    """The kernels that a step of dpo takes most time in (on a CPU the operators), in percent of the time of all."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        steps_of(bench.dpo, 1)
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        own = event.self_device_time_total if is_kernel else event.self_cpu_time_total
        if is_kernel == (setting.device == "cuda"):
            times[event.key[:NAME]] += own
    total = sum(times.values())
    return {name: round(100 * time / total) for name, time in times.most_common(TOP)}


RATE: dict[str, Any] = {"unit": "tokens/s", "shown": "{:,.0f}"}
PART = Part(
    "speed",
    "gpu-speed",
    0.3,
    (
        Check("speed/8B", partial(rates, name="8B", bits=None), 70),
        Check("speed/8B-4bit", partial(rates, name="8B", bits=4), 70),
        Check("speed/1B", partial(rates, name="1B", bits=None), 30),
        Check("speed/1B-4bit", partial(rates, name="1B", bits=4), 30),
    ),
    (
        Column("TRL", **RATE),
        Column("TRL with liger", **RATE),
        Column("flash-pref", **RATE),
        Column("Unsloth", **RATE),
        Column("dpo", tolerance=(0.25, 0), **RATE),
        Column("dpo, cached", tolerance=(0.25, 0), **RATE),
        Column("faster", "ratio", "{:.2f}x", (0.25, 0)),
        Column("of the floor", "ratio", "{:.2f}", (0.25, 0)),
        Column("cached, of the floor", "ratio", "{:.2f}", (0.25, 0)),
        Column("rate", "TFLOP/s", "{:,.1f}"),
        Column("kernels", "percent"),
    ),
)
