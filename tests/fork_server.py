"""`dpo` as a process of its own that costs no imports: each command is forked from a server that has loaded everything.

The server runs no command itself: autograd does not work in a child of a process that has gone backward.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from dpo_cli.__main__ import main
from dpo_cli.commands.session import composer_for
from dpo_cli.config.config import load
from dpo_cli.report.render import _environment
from dpo_cli.storage.hub import ask_nobody

ROOT = Path(__file__).parent.parent
LATE = ("peft.tuners.lora.bnb", "pydantic")
STREAMS = (("input", os.O_RDONLY), ("output", os.O_WRONLY | os.O_CREAT), ("errors", os.O_WRONLY | os.O_CREAT))


def dpo(
    *words: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None, input: str = "", processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` gives of a `dpo` with these words. Variables that are read while a library is imported are the
    server's: a test of one of those starts a process. With `processes` it is as torchrun starts so many."""
    server = _server()
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "input").write_text(input, encoding="utf-8")
        asked = {"words": [*map(str, words)], "cwd": str(cwd), "env": dict(os.environ if env is None else env), "place": place}
        asked["processes"] = processes
        print(json.dumps(asked), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        said, errors = ((Path(place) / name).read_text(encoding="utf-8") for name in ("output", "errors"))
    return subprocess.CompletedProcess(["dpo", *asked["words"]], code, said, errors)


@functools.cache
def _server() -> subprocess.Popen[str]:
    """It ends with this process."""
    words = [sys.executable, "-P", __file__]
    server = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server


def ready() -> None:
    """Load all that a training loads, also late, before children are forked."""
    ask_nobody()
    composer_for()
    for name in LATE:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:  # dpo itself does not need pydantic
            importlib.import_module(name)
    load(str(ROOT / "configs" / "quickstart.json"))
    _environment().get_template("report.html.j2")
    gc.collect()
    gc.freeze()  # a child then copies no page only to see that nothing on it is garbage


def reseed() -> None:
    """Random numbers as in a process of its own: a child has the state of its parent."""
    for seed in (random.seed, np.random.seed, torch.seed):
        seed()


def _serve() -> bool:
    """Answer each line with the exit code of a child; True in the child, which has become what was asked for."""
    for line in sys.stdin:
        if not (pid := os.fork()):
            _become(**json.loads(line))
            return True
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return False


def _become(words: list[str], cwd: str, env: dict[str, str], place: str, processes: int) -> None:
    for number, (name, flags) in enumerate(STREAMS):
        os.dup2(os.open(Path(place) / name, flags), number)
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, errors="backslashreplace")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["dpo", *words]
    reseed()
    if processes > 1:
        _multiply(processes)


def _multiply(processes: int) -> None:
    """Become so many, each with the variables of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        about = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ.update(about)
    rank = next((rank for rank in range(1, processes) if not os.fork()), 0)
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)


def _exit_code() -> int:
    """Of the command, as the interpreter makes one of what leaves it."""
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> None:
    """As the interpreter ends, but for taking apart what it shares with the server: each page of it would be copied."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    ready()
    if _serve():
        _end(_exit_code())
