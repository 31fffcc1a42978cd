"""A gate before every system call of a child that changes something below a folder: it passes, fails, or is the child's last.

The child hands its write-like system calls to its parent (seccomp's user notifications, Linux 5.5 and later). A library put
before libc would not see them all: safetensors makes and renames its files with system calls of its own.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forks import Child

# Numbers on x86_64, and the arguments that say what is written to: a descriptor, or a folder's descriptor (or None) and a path.
DESCRIPTOR: dict[int, int] = {1: 0, 18: 0, 20: 0, 40: 0, 296: 0, 326: 2, 328: 0, 74: 0, 75: 0, 77: 0, 285: 0}
PATH: dict[int, tuple[int | None, int]] = {
    2: (None, 0), 76: (None, 0), 82: (None, 1), 83: (None, 0), 84: (None, 0), 85: (None, 0), 87: (None, 0),
    257: (0, 1), 258: (0, 1), 263: (0, 1), 264: (2, 3), 316: (2, 3),
}  # fmt: skip
NAMES = {
    1: "write", 18: "pwrite", 20: "writev", 40: "sendfile", 296: "pwritev", 326: "copy_file_range", 328: "pwritev2",
    74: "fsync", 75: "fdatasync", 77: "ftruncate", 285: "fallocate", 2: "open", 76: "truncate", 82: "rename", 83: "mkdir",
    84: "rmdir", 85: "creat", 87: "unlink", 257: "open", 258: "mkdir", 263: "unlink", 264: "rename", 316: "rename",
}  # fmt: skip
TAKES_ROOM = {
    "write",
    "pwrite",
    "writev",
    "sendfile",
    "pwritev",
    "copy_file_range",
    "pwritev2",
    "fallocate",
    "mkdir",
    "open",
    "creat",
}
FREES = {"unlink", "rmdir"}
FLAGS = {2: 1, 257: 2}  # the argument with the flags of an open
NOTIFICATION, ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
RECEIVE, SEND = 0xC0502100, 0xC0182101  # ioctl's names of both
PASS = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
CWD = 0xFFFFFF9C  # AT_FDCWD, as 32 bits


@dataclass(frozen=True)
class Call:
    """A write-like system call that is about to happen."""

    name: str
    path: Path
    is_new: bool  # whether it makes the file


Decide = Callable[[Call], int | None]


def is_possible() -> bool:
    return sys.platform == "linux" and os.uname().machine == "x86_64" and _can_install()


def _can_install() -> bool:
    """Tried in a process of its own: a filter stays for good."""
    pid = os.fork()
    if not pid:
        os._exit(_listener() < 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _listener() -> int:
    """From now on this process's write-like calls wait for the one who holds this descriptor; -1 where that cannot be had."""
    numbers = [*DESCRIPTOR, *PATH]
    # struct sock_filter: load the number; jump to the last line on any of the numbers below; let all others pass.
    code = [struct.pack("=HBBI", 0x20, 0, 0, 0)]
    code += [struct.pack("=HBBI", 0x15, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    code += [struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000), struct.pack("=HBBI", 0x06, 0, 0, 0x7FC00000)]
    lines = ctypes.create_string_buffer(b"".join(code))
    program = ctypes.create_string_buffer(struct.pack("=H6xQ", len(code), ctypes.addressof(lines)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which an unprivileged filter needs
    return int(libc.syscall(317, 1, 8, program))  # seccomp(SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER)


def watched(begin: Callable[[Callable[[], object]], Child], below: Path, decide: Decide) -> tuple[Child, int]:
    """The child that `begin` starts, which calls what `begin` is given before its work, and its exit code.

    `decide` is asked before each call of it that changes something below a folder: None lets it happen, a number of errno
    makes it fail, and 0 ends the child there.
    """
    ours, theirs = socket.socketpair()

    def arm() -> None:
        ours.close()
        socket.send_fds(theirs, [b"0"], [_listener()])
        theirs.close()

    child = begin(arm)
    theirs.close()
    with ours:
        listener = socket.recv_fds(ours, 1, 1)[1][0]
    try:
        while _answered(listener, child, below, decide):
            pass
    finally:
        os.close(listener)
    return child, child.end()


def _answered(listener: int, child: Child, below: Path, decide: Decide) -> bool:
    """Answer one call; False when there will be no more."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    ((_, events),) = poll.poll()
    if not events & select.POLLIN:
        return False
    received = bytearray(NOTIFICATION.size)
    try:
        fcntl.ioctl(listener, RECEIVE, received)
    except FileNotFoundError:  # it was killed while it waited
        return True
    key, pid, _, number, _, _, *arguments = NOTIFICATION.unpack(received)
    call = _call(pid, number, arguments)
    decision = decide(call) if call is not None and call.path.is_relative_to(below) else None
    if decision == 0:
        child.send(signal.SIGKILL)
        return False
    failed, flag = (-decision, 0) if decision else (0, PASS)
    fcntl.ioctl(listener, SEND, bytearray(ANSWER.pack(key, 0, failed, flag)))
    return True


def _call(pid: int, number: int, arguments: list[int]) -> Call | None:
    """What a call is about to change; None where that is nothing: what is only read, made again, or not there to be removed."""
    name = NAMES[number]
    if number in DESCRIPTOR:
        return Call(name, Path(f"/proc/{pid}/fd/{arguments[DESCRIPTOR[number]] & 0xFFFFFFFF}").readlink(), False)
    if number in FLAGS and not arguments[FLAGS[number]] & (os.O_CREAT | os.O_TRUNC):
        return None
    folder, place = PATH[number]
    text = _string(pid, arguments[place])
    start = "cwd" if folder is None or arguments[folder] & 0xFFFFFFFF == CWD else f"fd/{arguments[folder]}"
    path = Path(text) if text.startswith("/") else Path(f"/proc/{pid}/{start}").readlink() / text
    exists = os.path.lexists(path)
    if exists if name == "mkdir" else name in FREES and not exists:
        return None
    return Call(name, path, not exists)


def _string(pid: int, address: int) -> str:
    """The text that ends with a zero byte at an address of another process."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123 - unbuffered: a page beyond may not exist
        found = b""
        while b"\0" not in found:
            memory.seek(address + len(found))
            found += memory.read(256 - (address + len(found)) % 256)
    return os.fsdecode(found.split(b"\0")[0])


def counted(call: Call, number: int) -> bool:
    """Whether a call is one that may fail with this errno: removing asks for no room."""
    return not (number == errno.ENOSPC and call.name in FREES)


def takes_room(call: Call) -> bool:
    return call.name in TAKES_ROOM and (call.name != "open" or call.is_new)
