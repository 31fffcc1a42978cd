"""The files of configs/cluster: read by the launchers that are installed, and run with stand-ins for the others.

`make check-cluster` holds them against the schemas of SkyPilot and Kubeflow Trainer, shellcheck, and sbatch's manual.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT
from torch.distributed.run import get_args_parser

from dpo_cli.app import app

CLUSTER = ROOT / "configs" / "cluster"
ACCELERATE = sorted(CLUSTER.glob("accelerate-*.yaml"))
SLURM = sorted(CLUSTER.glob("slurm-*.sh"))
SKYPILOT = sorted(CLUSTER.glob("skypilot-*.yaml"))
KUBEFLOW = CLUSTER / "kubeflow.yaml"
RESUMES = {"train", "my-config.json", "--resume"}
# Of sbatch's manual; `make check-cluster` compares with the manual itself.
SBATCH = {
    "job-name",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "gpus-per-node",
    "cpus-per-task",
    "time",
    "requeue",
    "open-mode",
    "signal",
}


def name_of(file: Path) -> str:
    return file.stem


def parsed(words: list[str]) -> None:
    """Let Typer parse a command line of dpo, which has to continue a run that was stopped."""
    assert set(words) >= RESUMES
    group: Any = typer.main.get_command(app)
    train = group.commands[words[0]]
    if "--processes" in words and not any("--processes" in option.opts for option in train.params):
        pytest.skip("dpo train has no --processes in this version")
    train.make_context(words[0], words[1:])


def torchrun(words: list[str]) -> Any:
    """What torchrun reads from its words, of which the last ones are dpo's."""
    read = get_args_parser().parse_args(words)
    assert read.module and read.training_script == "dpo_cli"
    assert int(read.shutdown_timeout) == 120
    parsed(read.training_script_args)
    return read


def test_each_file_is_of_one_of_the_tools() -> None:
    assert {*ACCELERATE, *SLURM, *SKYPILOT, KUBEFLOW} == set(CLUSTER.iterdir())
    page = (ROOT / "docs" / "guides" / "cluster.md").read_text(encoding="utf-8")
    assert [file.name for file in CLUSTER.iterdir() if f"configs/cluster/{file.name}" not in page] == []


@pytest.mark.parametrize("file", ACCELERATE, ids=name_of)
def test_accelerate_reads_its_config_and_the_command_above_it(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig) and config.num_processes == 8 * config.num_machines
    commands = re.findall(r"^#   accelerate launch (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == config.num_machines
    for rank, command in enumerate(commands):
        words = [word.replace("configs/cluster", str(CLUSTER)) for word in shlex.split(command)]
        given, _, mixed_precision_is_configured = _validate_launch_command(launch_command_parser().parse_args(words))
        assert given.multi_gpu and given.module and given.training_script == "dpo_cli" and mixed_precision_is_configured
        assert (given.machine_rank, given.num_machines) == (rank, config.num_machines)
        parsed(given.training_script_args)


@pytest.mark.parametrize("file", SLURM, ids=name_of)
def test_slurm_scripts_are_sound(file: Path) -> None:
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
    head, _, body = file.read_text(encoding="utf-8").partition("\nset -u\n")
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=\S+)?$", head, re.MULTILINE)
    assert len(options) == head.count("\n#SBATCH") and "#SBATCH" not in body  # sbatch stops reading at the first command
    assert set(options) <= SBATCH and {"requeue", "signal", "open-mode"} <= set(options)
    (command,) = re.findall(r"\bdpo (train .+?)(?: &)?$", body, re.MULTILINE)
    values = {"$1": "my-config.json", "$SLURM_GPUS_ON_NODE": "8"}
    parsed([values.get(word, word) for word in shlex.split(command)])


STOPPED = """#!/bin/bash
trap 'sleep 0.2; echo saved; exit 143' TERM
echo "$$ started $*"
for _ in $(seq 100); do sleep 0.1; done
"""
SLURM_SETS = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "8"}
STAND_INS = {
    "dpo": STOPPED,
    "srun": '#!/bin/bash\nshift\necho "$MASTER_ADDR $MASTER_PORT"\nexec "$@"\n',
    "scontrol": '#!/bin/bash\n[ "$1" != show ] || { echo node1; echo node2; exit; }\necho "scontrol $*"\n',
}


def start(file: Path, place: Path) -> subprocess.Popen[str]:
    """A SLURM script with stand-ins for the commands that it calls."""
    for name, text in STAND_INS.items():
        (place / name).write_text(text, encoding="utf-8")
        (place / name).chmod(0o755)
    path = f"{place}:{os.environ['PATH']}"
    environment = {"PATH": path, **SLURM_SETS}
    command = [shutil.which("bash") or "bash", str(file), "my-config.json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)


@pytest.mark.parametrize("file", SLURM, ids=name_of)
def test_a_run_that_is_stopped_saves_and_is_queued_again(file: Path, tmp_path: Path) -> None:
    """SLURM signals the script of one node, and the tasks of several."""
    process = start(file, tmp_path)
    assert process.stdout
    lines = [process.stdout.readline()]
    while "started" not in lines[-1]:
        assert lines[-1], "the script ended"
        lines.append(process.stdout.readline())
    if "B:TERM" in file.read_text(encoding="utf-8"):
        time.sleep(0.2)  # until the script waits
        process.send_signal(signal.SIGTERM)
    else:
        os.kill(int(lines[-1].split()[0]), signal.SIGTERM)
        assert "node1 20007\n" in lines
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == 143
    assert rest == "saved\nscontrol requeue 7\n"


@pytest.mark.parametrize("file", SLURM, ids=name_of)
@pytest.mark.parametrize("code", [0, 3, 5])
def test_a_run_that_ends_is_not_queued_again(file: Path, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAND_INS, "dpo", f"#!/bin/bash\nexit {code}\n")
    process = start(file, tmp_path)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code and "requeue" not in output


@pytest.mark.parametrize("file", SKYPILOT, ids=name_of)
def test_skypilot_tasks_run_dpo(file: Path) -> None:
    task = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True, check=False).returncode == 0
    (folder,) = task["volumes"]
    assert f"output_dir={folder}/" in task["run"]  # a run that starts on another node finds it there
    values = {
        "SKYPILOT_NUM_NODES": 2,
        "SKYPILOT_NUM_GPUS_PER_NODE": 8,
        "SKYPILOT_NODE_RANK": 1,
        "SKYPILOT_NODE_IPS": "one\ntwo",
    }
    environment = {"PATH": os.environ["PATH"], **{name: str(value) for name, value in values.items()}}
    shown = 'show() { printf "%s\\n" "$@"; }\n' + re.sub(r"^(torchrun|dpo) ", r"show \1 ", task["run"])
    printed = subprocess.run(["bash", "-uc", shown], env=environment, capture_output=True, text=True, check=True)
    program, *words = printed.stdout.splitlines()
    if program == "dpo":
        parsed(words)
    else:
        read = torchrun(words)
        assert (read.nnodes, read.nproc_per_node, read.node_rank, read.master_addr) == ("2", "8", 1, "one")


def test_the_kubeflow_job_fits_its_runtime() -> None:
    runtime, job = yaml.safe_load_all(KUBEFLOW.read_text(encoding="utf-8"))
    assert job["spec"]["runtimeRef"] == {"apiGroup": "trainer.kubeflow.org", "kind": runtime["kind"], "name": "dpo"}
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert node["name"] == container["name"] == "node"  # Trainer looks for these names
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    program, *words = job["spec"]["trainer"]["command"]
    assert program == "torchrun" and torchrun(words)
    assert pod["terminationGracePeriodSeconds"] > 120
