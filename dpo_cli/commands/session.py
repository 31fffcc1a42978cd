"""The context of every command: errors become messages and exit codes, and heavy libraries are imported late."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import TextIO, cast

import typer

from dpo_cli.config.options import Config
from dpo_cli.errors import DpoError, Exit, UsageError, interrupt_behind
from dpo_cli.storage.atomic import way_out
from dpo_cli.storage.hub import ask_nobody
from dpo_cli.storage.progress import working
from dpo_cli.storage.redaction import Redacted
from dpo_cli.storage.world import Place
from dpo_cli.ui.console import Console

AGAIN = "run the same command again"  # it repeats what is lost, and continues what is kept
SHOWN = 80  # characters of a name that is too long


@contextmanager
def session(as_json: bool, debug: bool, is_shared: bool = False) -> Iterator[Console]:
    """The console of one command; whatever is raised becomes a message and an exit code.

    A command that is shared by several processes is shown by the first one.
    """
    with console_of(as_json, is_shared) as console, _reported(console, debug):
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # while modules and commands were loaded (__main__.py)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _require_folder()
        yield console


@contextmanager
def console_of(as_json: bool, is_shared: bool = False) -> Iterator[Console]:
    """A console that redacts secrets; with `as_json` what libraries print goes to standard error too (trackio prints)."""
    ask_nobody()
    with redirect_stdout(cast(TextIO, Redacted(sys.stdout))), redirect_stderr(cast(TextIO, Redacted(sys.stderr))):
        follower = Place.of_follower(os.environ) if is_shared else None
        console = Console(as_json) if follower is None else Console.of_follower(follower)
        other = sys.stderr if as_json else console.out.file if follower is not None else None
        with redirect_stdout(other) if other is not None else nullcontext(), console.progress:
            yield console


@contextmanager
def _reported(console: Console, debug: bool) -> Iterator[None]:
    try:
        yield
    except (typer.Exit, BrokenPipeError):
        raise
    except (KeyboardInterrupt, Exception) as error:
        if (interrupt := interrupt_behind(error)) is not None:
            raise _stopped(interrupt, console) from None
        assert isinstance(error, Exception)  # a DpoError, or a fault of dpo or of the machine: the exit code shows which
        if debug:
            traceback.print_exc()
        failure = error if isinstance(error, DpoError) else unexpected(error)
        console.error(failure)
        raise typer.Exit(int(failure.exit_code)) from error


def _stopped(interrupt: KeyboardInterrupt, console: Console) -> typer.Exit:
    """The exit after a signal, which the first process reports; its code is that of the signal that stopped a training."""
    stopped = DpoError("stopped before the end", getattr(interrupt, "__notes__", [AGAIN])[-1])
    stopped.exit_code = Exit(interrupt.args[0]) if interrupt.args else Exit.SIGINT
    console.break_line()  # after the ^C of the terminal
    if not console.is_of_follower:
        console.error(stopped)
    return typer.Exit(int(stopped.exit_code))


def _require_folder() -> None:
    """`UsageError` if the current folder was deleted: no path can be made absolute in it."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UsageError("the current folder was deleted", "change to a folder that exists") from error


def unexpected(error: Exception) -> DpoError:
    if "No space left on device" in str(error):  # an OSError, or a SafetensorError from the writer of the adapter
        what = "the disk is full; what was written before is kept"
        return DpoError(what, "free space where output_dir (or standard output) is, and start again")
    if isinstance(error, OSError) and (first := way_out(error, Path(error.filename or "."))) is not None:
        return DpoError(f"{error.filename or 'standard output'}: {error.strerror}", f"{first}, and start again")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UsageError(f"a name is too long for the file system: {str(error.filename)[:SHOWN]}...", "name a shorter path")
    return DpoError(f"{type(error).__name__}: {error}", "train.log and --debug have the traceback")


@contextmanager
def _without_collections() -> Iterator[None]:
    """Within, Python looks for no garbage: imports make a million objects, which each search goes through, and no garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def composer_for(configs: Sequence[Config] = ()) -> ModuleType:
    """The module that trains (these configs) and evaluates, imported late: it brings torch."""
    # OpenMP threads that wait by spinning stall each other when anything else runs on the same cores. A shorter spin costs
    # a single training nothing, and two at once much less: `make spin` prints both.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # oneDNN keeps a compiled product for each shape, 1,024 of them by default, and each row of a training has a new length: the
    # process grew with every step, far beyond its memory bill. These are enough for the layers of a row.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "128")
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi: bill and run mean the same card
    if any(config.full_determinism for config in configs):  # cuBLAS reads it when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Each row has another length: blocks of fixed sizes would leave gaps that nothing fits.
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if devices := {config.device for config in configs if config.provider == "unsloth"}:  # it changes what is imported next
        from dpo_cli.providers.unsloth_import import import_unsloth

        import_unsloth(max(devices))  # stages on cpu and cuda: with its kernels
    with working("starting torch"), _without_collections():
        from dpo_cli.storage.log import hush

        hush()
        from dpo_cli.commands import train
    return train
