"""The hub: requests have a deadline, and libraries make none on their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import TypeVar, cast

from dpo_cli.errors import RunFailed

DEADLINE_SECONDS = 6.0  # a name server that never answers has no timeout
CACHE_FIX = "set HF_HOME to a folder that you may write, with room for a model; then run the same command again"
SETTINGS = "https://huggingface.co/settings/tokens"

Reply = TypeVar("Reply")
_silent = Event()  # the hub missed a deadline: it is not waited for again


class Unreachable(Exception):
    """The hub did not answer."""


def ask_nobody() -> None:
    """Disable requests that libraries make on their own. They read these settings during import, so they must be set before.

    TRL and huggingface_hub send telemetry; transformers asks a bot to convert weights that are not safetensors; if `kernels` is
    installed, bitsandbytes fetches code from the hub and runs it.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    sys.modules["kernels"] = None  # type: ignore[assignment] # as if it were not installed


def answer(ask: Callable[[], Reply]) -> Reply:
    """What `ask` returns or raises; `Unreachable` if the hub does not answer by the deadline."""
    from concurrent.futures import Future, wait

    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    if _silent.is_set():
        raise Unreachable
    reply: Future[Reply] = Future()

    def run() -> None:
        try:
            reply.set_result(ask())
        except Exception as error:  # raised again by the caller
            reply.set_exception(error)

    Thread(target=run, daemon=True).start()  # a name lookup cannot be stopped: the process does not wait for it
    if not wait([reply], DEADLINE_SECONDS).done:
        _silent.set()
        raise Unreachable
    error = reply.exception()
    if isinstance(error, RepositoryNotFoundError):  # a gated repository is one too
        raise error
    if isinstance(error, httpx.TransportError | HfHubHTTPError | OfflineModeIsEnabled):
        raise Unreachable from error
    if error is not None:
        raise cache_fault(error) or error
    return reply.result()


def unreachable(kind: str, name: str) -> RunFailed:
    """The error for a model or a dataset that is not cached and cannot be downloaded now."""
    command = f"hf download {'--repo-type dataset ' if kind == 'dataset' else ''}{name}"
    fix = f"run `{command}` where there is a network; once it is in the cache, HF_HUB_OFFLINE=1 needs no network; "
    fix += "or name a local file" if kind == "dataset" else "or name a local model directory or GGUF file"
    return RunFailed(f"the hub cannot be reached, and the {kind} {name} is not in the local cache", fix)


def gated(kind: str, name: str) -> RunFailed:
    """The error for a gated repository."""
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    fix = f"1. request access on {page}, and wait until it is granted; 2. create a token with read access on {SETTINGS}; "
    fix += "3. `hf auth login`, or set HF_TOKEN to the token"
    return RunFailed(f"the {kind} {name} is gated: its owner decides who may download it", fix)


def cache_fault(error: BaseException) -> RunFailed | None:
    """The error for a hub cache that cannot be read or written, if that is the cause of `error`; else None."""
    from huggingface_hub import constants

    cause: BaseException | None = error
    while cause is not None:
        named = str(cause.filename or "") if isinstance(cause, OSError) and cause.errno else ""
        for place in filter(None, (constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH)):
            if named and (Path(named).is_relative_to(place) or Path(place).is_relative_to(named)):
                set_here = [name for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME") if os.environ.get(name)]
                where = set_here[0] if set_here else "the home folder, as HF_HOME is not set"
                reason = cast(OSError, cause).strerror
                return RunFailed(f"cannot use the cache of the hub, {place} (in {where}): {named}: {reason}", CACHE_FIX)
        cause = cause.__cause__ or cause.__context__
    return None
