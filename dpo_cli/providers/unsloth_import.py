"""`import unsloth`, before the libraries that it patches: transformers, trl and peft. So nothing heavy is imported here."""

from __future__ import annotations

import importlib
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

from dpo_cli.errors import RunFailed
from dpo_cli.hardware.unsloth_support import INSTALL
from dpo_cli.storage.user_cache import KERNELS, cache_dir


def import_unsloth(device: str) -> None:
    """Import Unsloth for "cuda", or for "cpu" its fallback without kernels. Raises `RunFailed` with its reason.

    Sets what release 2026.10.9 reads from the environment during its import.
    """
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"  # else each load of a model is reported to the hub
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / KERNELS))  # else a folder in the current one
    with suppress(OSError):  # there are none yet
        os.utime(cache_dir() / KERNELS)  # the last use, for `dpo cache`
    if device == "cpu":
        os.environ["UNSLOTH_FORCE_CPU"] = "1"
    else:
        # Unsloth would rewrite TRL's DPOTrainer, and the rewritten one ignores peft_config: it would train every weight.
        # With this variable, meant for tests, it only changes models and kernels. tests/test_unsloth.py shows both.
        os.environ["UNSLOTH_ALLOW_CPU"] = "1"
    logging.getLogger().addHandler(logging.NullHandler())  # else it adds a handler that prints
    try:
        with prints_to_log():
            importlib.import_module("unsloth")
    except (ImportError, NotImplementedError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunFailed(f"unsloth cannot be imported: {reason}", f'{INSTALL}, or write "provider": "huggingface"') from error


@contextmanager
def prints_to_log() -> Iterator[None]:
    """Within, printed text goes to train.log: standard output may hold only one JSON document."""
    log = _Log()
    with redirect_stdout(log), redirect_stderr(log):
        yield


class _Log(io.TextIOBase):
    """A stream whose lines are log records. It stays open, because handlers of libraries keep it."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        for line in filter(str.strip, text.splitlines()):
            logging.getLogger("dpo").info("unsloth: %s", line)
        return len(text)
