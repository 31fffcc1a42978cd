"""`python watched.py REPORT dpo-arguments...`: a command, and in REPORT what it asked of the network, a line each.

An audit hook sees every use of Python's sockets, also one whose failure a library swallows.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

REPORT = Path(sys.argv[1])
# urllib3, which `datasets` imports, binds one to learn whether the machine knows IPv6: nothing is sent, nobody is asked.
PROBE = ("::1", 0)


def see(event: str, arguments: tuple[Any, ...]) -> None:
    if not event.startswith("socket.") or event in ("socket.__new__", "socket.gethostname"):
        return
    is_local = getattr(arguments[0], "family", None) == socket.AF_UNIX
    if is_local or (event == "socket.bind" and arguments[1] == PROBE):
        return
    with REPORT.open("a", encoding="utf-8") as report:
        report.write(f"{event} {arguments[1:]!r} {arguments[0]!r}\n")


if __name__ == "__main__":
    REPORT.touch()
    sys.addaudithook(see)
    sys.argv = ["dpo", *sys.argv[2:]]
    from dpo_cli.__main__ import main

    main()
