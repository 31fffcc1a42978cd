"""What is asked of the network: nothing with a local model; and where there is none, the remedy, soon."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import pytest
from conftest import ROOT
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError

from dpo_cli.data.hub_datasets import fetch
from dpo_cli.errors import RunFailed
from dpo_cli.models.hub_models import require

HAS_NAMESPACES = shutil.which("unshare") and subprocess.run(["unshare", "-rn", "true"], check=False).returncode == 0
LONGEST = 60  # seconds until a command that hangs has failed
FROM_ENVIRONMENT = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "CI", "PYTEST_CURRENT_TEST", "TRANSFORMERS_OFFLINE")


def environment(home: Path, **more: str) -> dict[str, str]:
    """As a user has it: nothing that switches the network off, and a cache without a model."""
    kept = {name: value for name, value in os.environ.items() if name not in FROM_ENVIRONMENT}
    return kept | {"HOME": str(home), "HF_HOME": str(home / "hf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def dpo(folder: Path, *arguments: str, before: tuple[str, ...] = (), **more: str) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-m", "dpo_cli", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(folder, **more), capture_output=True, text=True, timeout=LONGEST, check=False
    )


@pytest.fixture
def place(tmp_path: Path, tiny_model_dir: Path, pairs_file: Callable[..., Path]) -> Path:
    """A folder with a model by a relative name, pairs, prompts and the config of a short training."""
    (tmp_path / "tiny").symlink_to(tiny_model_dir)
    values: Mapping[str, object] = {
        **{"model_name": "tiny", "dataset": str(pairs_file()), "eval_split": 0.3, "device": "cpu", "output_dir": "run"},
        **{"bf16": False, "fp16": False, "max_steps": 2, "lora_r": 4, "learning_rate": 1e-2, "kl_prompts": 2},
        **{"max_new_tokens": 4, "augment": {"rank": "shorter", "max_new_tokens": 4, "responses": 2}},
    }
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    # A second run on top of the first, merged: PEFT is told the name of a folder that has no config.json.
    second = {**values, "model_name": "run", "reference": "base", "output_dir": "second"}
    (tmp_path / "second.json").write_text(json.dumps(second), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("hello\nthe cat\n", encoding="utf-8")
    return tmp_path


COMMANDS = (
    ("validate", "config.json"),
    ("train", "config.json"),
    ("train", "second.json"),
    ("eval", "run"),
    ("eval", "config.json", "--adapter", "run/adapter"),
    ("report", "run"),
    ("export", "run", "--out", "whole"),
    ("augment", "prompts.txt", "config.json", "--out", "made.jsonl"),
)


def test_with_a_local_model_nobody_is_asked(place: Path) -> None:
    """Nobody is asked, whatever a library does with the failure; and where it can be had, without a network, none is needed."""
    seen = place / "seen.txt"
    watched = [sys.executable, str(ROOT / "tests" / "socket_watch.py"), str(seen), json.dumps(COMMANDS)]
    done = subprocess.run(
        [*(("unshare", "-rn") if HAS_NAMESPACES else ()), *watched],
        **{"cwd": place, "env": environment(place), "capture_output": True, "text": True, "timeout": LONGEST * 5},
        check=False,
    )
    assert (done.returncode, done.stderr if done.returncode else "") == (0, "")
    assert seen.read_text(encoding="utf-8") == ""
    assert json.loads((place / "run" / "metrics.json").read_text(encoding="utf-8"))["status"] == "completed"
    assert (place / "whole" / "config.json").is_file() and (place / "made.jsonl").is_file()


@pytest.mark.skipif(not HAS_NAMESPACES, reason="this machine lets nobody make a namespace without a network")
@pytest.mark.parametrize(
    ("override", "command"),
    [("model_name=owner/model", "`hf download owner/model`"), ("dataset=owner/p", "`hf download --repo-type dataset owner/p`")],
)
def test_a_hub_id_without_a_network_is_told_with_the_command(place: Path, override: str, command: str) -> None:
    done = dpo(place, "train", "config.json", override, before=("unshare", "-rn"))
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr and command in done.stderr and "HF_HUB_OFFLINE=1" in done.stderr
    assert not (place / "run").exists()


@pytest.mark.long
def test_a_hub_that_never_answers_is_not_waited_for(place: Path) -> None:
    """It takes the connection and says nothing; the command ends all the same, long before any library's own retries."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = dpo(place, "train", "config.json", "model_name=owner/model", HF_ENDPOINT=address)
    assert done.returncode == 1 and "the hub cannot be reached" in done.stderr


@pytest.mark.long
def test_a_name_server_that_never_answers_is_not_waited_for(place: Path) -> None:
    """Nothing can stop a look-up of a name; the process leaves it behind."""
    hanging = "import socket, time; socket.getaddrinfo = lambda *_, **__: time.sleep(600)\n"
    (place / "sitecustomize.py").write_text(hanging, encoding="utf-8")
    done = dpo(place, "train", "config.json", "model_name=owner/model", PYTHONPATH=f"{place}:{ROOT}")
    assert done.returncode == 1 and "the hub cannot be reached" in done.stderr


@pytest.mark.parametrize(
    ("call", "ask", "page"), [("model_info", require, "owner/gated"), ("dataset_info", fetch, "datasets/owner/gated")]
)
def test_what_is_gated_is_told_with_all_steps_in_order(
    call: str, ask: Callable[[str], None], page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise GatedRepoError("403", response=httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co")))

    monkeypatch.setattr(HfApi, call, refused)
    with pytest.raises(RunFailed, match="is gated") as caught:
        ask("owner/gated")
    fix = str(caught.value.fix)
    steps = [fix.find(step) for step in (f"https://huggingface.co/{page},", "settings/tokens", "hf auth login", "HF_TOKEN")]
    assert -1 not in steps and steps == sorted(steps)
