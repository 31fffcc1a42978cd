"""The processes of one training. torch is imported only where there are several.

Each process runs the same program on the same config. They meet in four ways: `same` (the first process decides), `each`
(every process does a part), `summed` (the gradients) and `largest` (what a model that is divided runs next). A failure of one
process ends all there: the first process raises it, with the name of the process, and the others end with the same exit code
and no message of their own. Only within a run of a divided model a failure cannot be told: that process shows it itself.

They are started by `dpo train --processes N` (commands/launch.py), by torchrun, by `accelerate launch` or by srun. Libraries do
not see that: for them each process is alone, because the rows of a step are divided by dpo (training/trainer.py).
"""

from __future__ import annotations

import ipaddress
import os
import re
import signal
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from dpo_cli.errors import DpoError, OtherFailed, RunFailed, UsageError, interrupt_behind
from dpo_cli.storage.progress import working

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Guard = Callable[[], AbstractContextManager[None]]

AUTO = "auto"  # value of num_processes: one for each GPU
# Variable of commands/launch.py: the descriptor of the socket that the first process serves; empty for the others.
STORE = "DPO_STORE"
PORT = "29500"  # torch's own default
# Variables of torchrun, and of srun: rank, size, and the rank among the processes of one machine.
LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
# By these accelerate and transformers would divide batches again, or choose another precision.
SEEN_BY_LIBRARIES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE"),
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"),
)
ENGINES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")
UNEXPECTED_FIX = "train.log and --debug have the traceback"
REPORTED = "is_reported"  # mark of an error that the first process shows
SMALL = 1 << 24  # elements: larger tensors are exchanged alone, without a copy
LOST_FIX = "see its own message, if there is one; if it was killed, the memory may be too small; continue with --resume"
ALONE_FIX = "remove the variables RANK and WORLD_SIZE, or start with torchrun"


class Steps(Protocol):
    """The runs of a model that is divided over the processes (providers/sharding.py)."""

    is_open: bool  # a run has started, and not ended

    def failure(self, error: BaseException) -> BaseException:
        """The error to end with, for one that was raised within a run."""

    def finish(self) -> None:
        """Take part in the runs of the others until they have ended."""


class World:
    """A training in one process."""

    rank, size = 0, 1
    steps: Steps | None = None  # of a model that is divided over the processes
    local_size: int | None = None  # processes on this machine, if a launcher says so

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, which writes, prints and uploads."""
        return self.rank == 0

    def same(self, compute: Callable[[], T]) -> T:
        """What the first process computes, in every process. Only the first one calls `compute`."""
        return compute()

    def each(self, compute: Callable[[], T]) -> list[T]:
        """What every process computes, by rank, in every process."""
        return [compute()]

    def together(self, compute: Callable[[], T]) -> T:
        """What this process computes, once every process has computed its own."""
        kept: list[T] = []
        self.each(lambda: kept.append(compute()))
        return kept[0]

    def in_turn(self, compute: Callable[[], T]) -> T:
        """What this process computes; the others after the first one, which may write what they then read."""
        kept: list[T] = []
        self.same(lambda: kept.append(compute()))
        return kept[0] if self.is_main else compute()

    def summed(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes give."""
        return number

    @contextmanager
    def guarded(self, guard: Guard) -> Iterator[None]:
        """Within, the parts of this process run within `guard`: what it raises ends the part, and no exchange."""
        with guard():
            yield

    def leave(self) -> None:
        """The end of all trainings of this process."""


ALONE = World()


@dataclass(frozen=True)
class Place:
    """Where a launcher has put this process."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # processes on this machine

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place | None:
        """The place that the environment names; None for a process that was started alone.

        `UsageError` for numbers that make no sense.
        """
        for names in LAUNCHERS:
            rank, size, local = (environment.get(name) for name in names)
            if rank is None or size is None:
                continue
            if not (rank.isdigit() and size.isdigit() and (local or "0").isdigit() and int(rank) < int(size)):
                message = f"{names[0]}={rank} and {names[1]}={size} do not say which of the processes this is"
                raise UsageError(message, ALONE_FIX)
            here = re.match(r"\d+", environment.get("LOCAL_WORLD_SIZE") or environment.get("SLURM_TASKS_PER_NODE") or size)
            if int(size) == 1:
                return None
            engine = next((name for name in ENGINES if environment.get(name, "").lower() in ("1", "true")), None)
            if engine is not None:
                message = f"{engine} is set, and dpo divides a model itself: see the option fsdp"
                raise UsageError(message, "start with torchrun, or with `accelerate launch --multi_gpu`")
            return cls(int(rank), int(size), int(local or rank), int(here[0]) if here else int(size))
        return None

    @classmethod
    def of_follower(cls, environment: Mapping[str, str]) -> Place | None:
        """The place of a process that is not the first one. Numbers that make no sense are reported later."""
        with suppress(UsageError):
            place = cls.of(environment)
            return place if place is not None and place.rank else None
        return None

    def take_card(self) -> None:
        """Show this process only its own card: then it is the first one for every library.

        Before torch is imported, because a library asks CUDA as soon as it is. A launcher that has shown it one card is right.
        """
        cards = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = cards.split(",") if cards else []
        if cards == "" or len(seen) == 1:
            return
        if seen and self.local_rank >= len(seen):
            message = f"CUDA_VISIBLE_DEVICES names {len(seen)} cards, and this is process {self.local_rank + 1} of its machine"
            raise UsageError(message, f"start at most {len(seen)} processes for each machine")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[self.local_rank].strip() if seen else str(self.local_rank)


@contextmanager
def hidden_from_libraries() -> Iterator[None]:
    """Within, libraries see a process that was started alone, also one that a launcher has started as the only one."""
    hidden = {name: os.environ.pop(name) for name in SEEN_BY_LIBRARIES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def require_alone(command: str) -> None:
    """`UsageError` where a launcher has started several of a command that starts its own processes."""
    if Place.of(os.environ) is not None:
        raise UsageError(f"{command} starts its own trainings, and was itself started as one of several processes", ALONE_FIX)


@dataclass(frozen=True)
class Outcome:
    """What a process computed, or why it could not."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""  # of the error, for the log of the first process

    @classmethod
    def of(cls, compute: Callable[[], object], guard: Guard) -> Outcome:
        """Compute it, within `guard`."""
        try:
            with guard():
                return cls(compute())
        except (Exception, KeyboardInterrupt) as error:  # it is raised in every process, after the exchange
            return cls(error=error, trace=traceback.format_exc())

    def sent(self) -> Outcome:
        """As it is sent to other processes: an error of a library, which may hold anything, is its text."""
        if self.error is None or isinstance(self.error, DpoError | KeyboardInterrupt):
            return self
        if (interrupt := interrupt_behind(self.error)) is not None:
            return Outcome(error=interrupt)
        kind = RuntimeError if isinstance(self.error, RuntimeError) else Exception
        return Outcome(
            error=kind(str(self.error) if kind is RuntimeError else f"{type(self.error).__name__}: {self.error}"),
            trace=self.trace,
        )


class Processes(World):
    """One of several processes, connected with the others."""

    def __init__(self, place: Place, seconds: float) -> None:
        """Wait for the other processes; none may keep the others waiting for longer than `seconds`.

        Raises `RunFailed` if they do not come.
        """
        self.rank, self.size, self.local_size, self.seconds = place.rank, place.size, place.local_size, seconds
        self._guard: Guard = nullcontext
        stops = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, signal.SIG_DFL) for number in stops}  # torch waits without Python
        where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        with working(f"waiting for the {place.size} processes at {where}"):
            self._connect(place)
        for number in stops:  # the first process decides when to stop
            signal.signal(number, before[number] if self.is_main else signal.SIG_IGN)
        self._hidden = ExitStack()
        self._hidden.enter_context(hidden_from_libraries())

    def _connect(self, place: Place) -> None:
        import torch
        from torch import distributed

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        limit, environment = timedelta(seconds=self.seconds), os.environ
        environment.setdefault("MASTER_PORT", PORT)
        if "MASTER_ADDR" not in environment:
            message = "MASTER_ADDR is not set: the processes do not know the machine of the first one"
            of_slurm = 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            raise UsageError(message, of_slurm if "SLURM_JOB_NODELIST" in environment else ALONE_FIX)
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            interface = _interface_to(environment["MASTER_ADDR"], is_far=place.local_size < self.size)
            if variable not in environment and interface is not None:
                environment[variable] = interface
        environment.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a lost process is an error where it is waited for
        store: Any = None
        if (descriptor := environment.pop(STORE, None)) is not None:
            host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
            served: dict[str, Any] = {"master_listen_fd": int(descriptor)} if descriptor else {}
            with self._connected():
                store = distributed.TCPStore(host, port, self.size, self.is_main, limit, **served)  # type: ignore[attr-defined]
        elif "RANK" not in environment:  # srun
            environment["RANK"], environment["WORLD_SIZE"] = str(self.rank), str(self.size)
        with self._connected():
            if store is not None:
                distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=limit)
            else:
                distributed.init_process_group(backend, timeout=limit)

    def same(self, compute: Callable[[], T]) -> T:
        from torch import distributed

        own = Outcome.of(compute, self._guard) if self.is_main else Outcome()
        sent: list[Any] = [own.sent()]
        with self._connected():
            distributed.broadcast_object_list(sent, src=0)
        return self._values([own if self.is_main else sent[0]])[0]  # type: ignore[no-any-return]

    def each(self, compute: Callable[[], T]) -> list[T]:
        from torch import distributed

        own = Outcome.of(compute, self._guard)
        if self.steps is not None:
            # The others wait in a run of the model, where no message reaches them. And a user who stops does not wait for them.
            if own.error is not None and (self.steps.is_open or isinstance(own.error, KeyboardInterrupt)):
                raise self._lost(own.error) if _is_of_connection(own.error) else self.steps.failure(own.error)
            self._finish(self.steps)
        outcomes: list[Any] = [None] * self.size
        with self._connected():
            distributed.all_gather_object(outcomes, own.sent())
        outcomes[self.rank] = own
        return self._values(outcomes)

    def _finish(self, steps: Steps) -> None:
        """Take part in the runs of the others; an exchange within one fails as any other one."""
        try:
            steps.finish()
        except RuntimeError as error:
            failure = self._lost(error) if _is_of_connection(error) else steps.failure(error)
            raise failure from (None if failure is error else error)

    def summed(self, tensors: Sequence[Tensor]) -> None:
        import torch
        from torch import distributed

        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() >= SMALL and tensor.is_contiguous():
                with self._connected():
                    distributed.all_reduce(tensor)
            else:
                kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for same_kind in kinds.values():  # one exchange for many small tensors
            flat = torch.cat([tensor.reshape(-1) for tensor in same_kind])
            with self._connected():
                distributed.all_reduce(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in same_kind])
            for tensor, part in zip(same_kind, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def largest(self, number: int) -> int:
        import torch
        from torch import distributed

        shared = torch.tensor(number)
        with self._connected():
            distributed.all_reduce(shared, distributed.ReduceOp.MAX)
        return int(shared)

    @contextmanager
    def guarded(self, guard: Guard) -> Iterator[None]:
        before, self._guard = self._guard, guard
        try:
            yield
        finally:
            self._guard = before

    def leave(self) -> None:
        from torch import distributed

        with suppress(RuntimeError):  # another process may be gone: the training has ended, and nothing is lost
            distributed.barrier()
        distributed.destroy_process_group()
        self._hidden.close()

    def _values(self, outcomes: Sequence[Outcome]) -> list[Any]:
        """The values of all; the first error if there is one, as this process raises it.

        An interrupt and an error of torch are raised in every process: an evaluation may go on without what is out of memory.
        """
        failed = next((rank for rank, outcome in enumerate(outcomes) if outcome.error is not None), None)
        if failed is None:
            return [outcome.value for outcome in outcomes]
        error, trace = outcomes[failed].error, outcomes[failed].trace
        assert error is not None
        if isinstance(error, KeyboardInterrupt) or failed == self.rank == 0:
            raise error
        where = f"process {failed + 1} of {self.size}"
        if isinstance(error, RuntimeError):
            named: Exception = RuntimeError(f"{where}: {error}")
        elif self.is_main:
            named = error.of(where) if isinstance(error, DpoError) else RunFailed(f"{where}: {error}", UNEXPECTED_FIX)
        else:
            named = OtherFailed.like(error)
        if trace:
            named.add_note(trace)
        vars(named)[REPORTED] = not self.is_main
        raise named

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Within, a failure of the connection says what it means: another process has ended, or does not answer."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: BaseException) -> DpoError:
        """What a failure of the connection means: the first process says it."""
        if not self.is_main:
            return OtherFailed()
        why = re.sub(r"^\[[^\]]*\] ?", "", str(error)).partition("\n")[0].partition(". ")[0]  # without the place in C++
        message = f"another of the {self.size} processes has ended, or did not answer within {self.seconds:g} seconds ({why})"
        return RunFailed(message, LOST_FIX)


def _is_of_connection(error: BaseException) -> bool:
    """Whether an exchange within a run of the model has failed: torch's exchanges raise a plain error with gloo."""
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL", "ProcessGroup"))


def _interface_to(host: str, is_far: bool) -> str | None:
    """The network interface by which this machine reaches the first process; None where it is not known.

    gloo takes that of the machine's own name, which is often the loopback. So is the name of the first machine, on itself: with
    other machines (`is_far`) that one is of no use.
    """
    import psutil  # a requirement of accelerate

    try:
        kind, _, _, _, address = socket.getaddrinfo(host, int(PORT), type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
        if is_far and ipaddress.ip_address(own).is_loopback:
            return None
    except OSError:  # the name is not known here, or there is no route: the connection itself says so
        return None
    addresses = psutil.net_if_addrs().items()
    return next((name for name, known in addresses if own in (address.address.partition("%")[0] for address in known)), None)
