"""One training in several processes: the figures, lines and weights of one process, and a common end of all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from fork_server import dpo
from process_runs import (
    SIGNAL_IN_AN_EVALUATION,
    Config,
    apart,
    assert_same,
    document,
    in_two_with,
    resumed_as_alone,
    trained,
)

from dpo_cli.errors import Exit, UsageError
from dpo_cli.scoring.packing import shared_out
from dpo_cli.storage.run_directory import LINES, SUMMARY
from dpo_cli.storage.world import Place

STRATEGIES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "with an sft term": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "plain rows": {"prompt_sharing": False},
    "every weight": {"lora_r": 0, "learning_rate": 1e-3},
    "sft": {"strategy": "sft"},
    "reward": {"strategy": "reward"},
    "rlhf": {
        "strategy": "rlhf",
        "reward_functions": [{"rank": "regex", "pattern": "[a-e]"}],
        "num_generations": 2,
        "num_iterations": 2,
        "max_new_tokens": 2,
    },
}


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
def test_two_and_four_processes_train_as_one(config: Config, options: dict[str, Any]) -> None:
    one = trained(config("one", **options))
    for processes in (2, 4) if not options else (2,):
        several = trained(config(f"of-{processes}", **options), processes=processes)
        assert_same(one, several)
        if options.get("lora_r") != 0:
            assert apart(one, several) < 1e-4


@pytest.mark.long
def test_the_first_process_dequantises_a_model_for_all(config: Config, user_cache: Path) -> None:
    """transformers writes no weights in another process: a cache that one of those fills would be a model without weights."""
    gguf = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    cached = user_cache / "gguf"
    if cached.is_symlink():  # models of other tests
        cached.unlink()
    options = {"model_name": str(gguf), "max_steps": 1, "eval_split": 0, "save_steps": 1, "lora_r": 2, "max_seq_length": 64}
    trained(config("both", **options), processes=2)
    (folder,) = cached.iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


LONG = {"max_steps": 40, "eval_steps": 20, "logging_steps": 1, "save_steps": 1}


def started(config: Path, *words: str) -> subprocess.Popen[str]:
    """`dpo train --processes 2` as a user starts it."""
    command = [sys.executable, "-m", "dpo_cli", "train", str(config), "--processes", "2", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (run / LINES).is_file() and len((run / LINES).read_text(encoding="utf-8").splitlines()) >= step:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{run} did not reach step {step}")


def processes_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The training processes, the first one first."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"\nPPid:\t{launcher.pid}\n" in (place / "status").read_text(encoding="utf-8"):
                found.append(int(place.name))
    return sorted(found)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long, id="the first"), pytest.param(1, id="the second")])
def test_all_end_with_a_killed_process_and_resume_to_the_same_bits(config: Config, rank: int) -> None:
    alone, stopped = trained(config("alone", **LONG), processes=2), config("stopped", **LONG)
    launcher = started(stopped)
    wait_for_step(stopped.with_suffix(""), 12)
    children = processes_of(launcher)
    assert len(children) == 2
    os.kill(children[rank], signal.SIGKILL)
    said, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == Exit.FAILED
    assert f"process {rank + 1} of 2 was killed (SIGKILL)" in said
    assert ("another of the 2 processes has ended" in said) is (rank == 1)
    assert "Traceback" not in said
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    resumed_as_alone(stopped, alone)


@pytest.mark.long
def test_a_signal_to_the_launcher_saves_and_its_death_ends_all(config: Config) -> None:
    alone, stopped = trained(config("alone", **LONG), processes=2), config("stopped", **LONG)
    run = stopped.with_suffix("")
    launcher = started(stopped)
    wait_for_step(run, 5)
    launcher.send_signal(signal.SIGTERM)
    said, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == Exit.SIGTERM and "interrupted after step" in said
    steps = document(run, SUMMARY)["steps"]
    launcher = started(stopped, "--resume")
    wait_for_step(run, steps + 4)
    children = processes_of(launcher)
    launcher.kill()
    launcher.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    resumed_as_alone(stopped, alone)


@pytest.mark.long
def test_a_signal_in_an_evaluation_ends_all_at_one_place(config: Config) -> None:
    """The first process gets it in its part of the evaluation of step 3; nobody waits for another."""
    options = {"report_to": ["tensorboard"]}
    stopped = config("stopped", ddp_timeout=20, **options)
    codes, said = in_two_with(SIGNAL_IN_AN_EVALUATION, stopped)
    assert codes == [Exit.SIGINT, Exit.SIGINT], said
    assert "interrupted after step" in said[0] and "error" not in said[1]
    run = stopped.with_suffix("")
    assert len([*(run / "tensorboard").glob("*")]) == 1
    alone = trained(config("alone", **options), processes=2)
    resumed_as_alone(stopped, alone)


def test_a_run_resumes_in_another_number_of_processes(config: Config) -> None:
    alone, first = trained(config("alone")), config("changed")
    run = trained(first, processes=2)
    shutil.rmtree(run / "checkpoints" / "step-6")  # as if it was killed after step 4
    (run / SUMMARY).unlink()
    done = dpo("train", first, "--resume")
    assert done.returncode == 0, done.stderr
    assert "note: started in 2 processes, and resumed in 1: the last bits may differ" in done.stdout + done.stderr
    assert apart(alone, first.with_suffix("")) < 1e-4


def test_other_rows_on_another_machine_end_all(config: Config, tmp_path: Path) -> None:
    """Two starts with other folders stand for two machines whose copies of a file differ."""
    values = json.loads(config("apart").read_text(encoding="utf-8"))
    rows = Path(values["dataset"]).read_text(encoding="utf-8").splitlines(keepends=True)
    values |= {"dataset": "pairs.jsonl", "output_dir": str(tmp_path / "run")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        about = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    nodes = []
    for rank in (0, 1):
        folder = tmp_path / f"machine-{rank}"
        folder.mkdir()
        (folder / "pairs.jsonl").write_text("".join(rows[rank:]), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
        own = {**os.environ, **about, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        words = [sys.executable, "-m", "dpo_cli", "train", "config.json"]
        nodes.append(subprocess.Popen(words, cwd=folder, env=own, stdout=-1, stderr=subprocess.STDOUT, text=True))
    said = [node.communicate(timeout=90)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [Exit.FAILED, Exit.FAILED]
    assert "process 2 of 2 has read other rows than the first one" in said[0]
    assert not (tmp_path / "run").exists() and said[1] == ""


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces that stand for two machines, 10.77.0.1 and 10.77.0.2, connected by a cable."""
    names = [f"dpo-{os.getpid()}-{end}" for end in (1, 2)]
    ends = [f"dpo{end}p{os.getpid() % 100_000}" for end in (1, 2)]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
        subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip("this user may not make network namespaces")
    for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
        for words in (
            ["link", "set", end, "netns", name],
            ["-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end],
            ["-n", name, "link", "set", "lo", "up"],
            ["-n", name, "link", "set", end, "up"],
        ):
            subprocess.run(["ip", *words], check=True)
    yield names[0], names[1]
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.long
def test_a_machine_that_vanishes_ends_the_other_which_resumes(config: Config, machines: tuple[str, str]) -> None:
    path = config("apart", **LONG, ddp_timeout=8)
    about = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29612"}
    nodes = []
    for rank, name in enumerate(machines):
        words = ["ip", "netns", "exec", name, sys.executable, "-m", "dpo_cli", "train", str(path)]
        own = {**os.environ, **about, "RANK": str(rank)}
        nodes.append(subprocess.Popen(words, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    wait_for_step(path.with_suffix(""), 8)
    end = f"dpo2p{os.getpid() % 100_000}"
    subprocess.run(["ip", "-n", machines[1], "link", "set", end, "down"], check=True)
    said = [node.communicate(timeout=60)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [Exit.FAILED, Exit.FAILED]
    assert "another of the 2 processes has ended, or did not answer within 8 seconds" in said[0]
    assert "Traceback" not in said[0] + said[1]
    done = dpo("train", path, "--resume")
    assert done.returncode == 0 and "resuming from step-" in done.stdout + done.stderr


def test_the_place_of_a_process() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    srun = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "4(x2)"}
    assert Place.of({**torchrun, "LOCAL_WORLD_SIZE": "2"}) == Place(3, 4, 1, 2)
    assert Place.of(torchrun) == Place(3, 4, 1, 4)
    assert Place.of(srun) == Place(5, 8, 1, 4)
    assert Place.of({}) is None
    assert Place.of({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert Place.of({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # in the script of a job, outside srun
    with pytest.raises(UsageError, match="RANK=4 and WORLD_SIZE=4 do not say which of the processes this is"):
        Place.of({"RANK": "4", "WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("sizes", "processes", "shares"),
    [
        ([7, 1, 5, 3], 2, [[0, 1], [2, 3]]),  # 7; 5; 5 + 3; 7 + 1
        ([4, 4, 4], 2, [[0, 2], [1]]),
        ([9], 3, [[0], [], []]),
        ([], 2, [[], []]),
    ],
)
def test_pairs_are_shared_out_longest_first(sizes: Sequence[int], processes: int, shares: list[list[int]]) -> None:
    assert shared_out(sizes, processes) == shares


MEETINGS = """
import os, sys
from dpo_cli.errors import DpoError, DoesNotFit, Problem, RunFailed
from dpo_cli.storage.world import Place, Processes

world = Processes(Place.of(os.environ), 30)

def fails(rank, error):
    def compute():
        if world.rank == rank:
            raise error
        return world.rank
    return compute

def told(meet, compute):
    try:
        return repr(meet(compute))
    except BaseException as error:
        return f"{type(error).__name__} {getattr(error, 'exit_code', None)!r} {error}"

unfit = DoesNotFit([Problem("error", "too-large", "it is too large")])
for line in (
    told(world.each, fails(None, None)),
    told(world.same, fails(None, None)),
    told(world.each, fails(1, RunFailed("no disk", "buy one"))),
    told(world.each, fails(0, unfit)),
    told(world.each, fails(1, unfit)),
    told(world.same, fails(0, unfit)),
    told(world.each, fails(1, RuntimeError("CUDA out of memory"))),
    told(world.each, fails(1, ValueError("odd"))),
    told(world.each, fails(0, KeyboardInterrupt(130))),
):
    print(line)
import torch
many = [torch.full((3,), world.rank + 1.0), torch.full((2, 2), 10.0 * (world.rank + 1), dtype=torch.float64)]
world.summed(many)
print([tensor.flatten().tolist() for tensor in many], "RANK" in os.environ)
world.leave()
print("RANK" in os.environ)
"""


def test_what_one_process_raises_all_raise() -> None:
    """The first one as it is, with the name of the process; the others as an end without a message."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        about = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    nodes = []
    for rank in (0, 1):
        own = {**os.environ, **about, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        nodes.append(subprocess.Popen([sys.executable, "-c", MEETINGS], env=own, stdout=subprocess.PIPE, text=True))
    said = [node.communicate(timeout=60)[0].splitlines() for node in nodes]
    ended = "another process of this training failed"
    assert said[0] == [
        "[0, 1]",
        "0",
        "RunFailed <Exit.FAILED: 1> process 2 of 2: no disk",
        "DoesNotFit <Exit.UNFIT: 4> it is too large",
        "DoesNotFit <Exit.UNFIT: 4> process 2 of 2: it is too large",
        "DoesNotFit <Exit.UNFIT: 4> it is too large",
        "RuntimeError None process 2 of 2: CUDA out of memory",
        "RunFailed <Exit.FAILED: 1> process 2 of 2: ValueError: odd",
        "KeyboardInterrupt None 130",
        "[[3.0, 3.0, 3.0], [30.0, 30.0, 30.0, 30.0]] False",
        "True",
    ]
    assert said[1] == [
        *said[0][:2],
        f"OtherFailed <Exit.FAILED: 1> {ended}",
        *[f"OtherFailed <Exit.UNFIT: 4> {ended}"] * 3,
        said[0][6],
        f"OtherFailed <Exit.FAILED: 1> {ended}",
        *said[0][8:],
    ]
