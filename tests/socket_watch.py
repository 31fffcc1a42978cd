"""`python watched.py REPORT COMMANDS`: commands (a JSON list of lists), and in REPORT what they asked of the network.

An audit hook sees every use of Python's sockets, also one whose failure a library swallows.
"""

from __future__ import annotations

import json
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
    from dpo_cli.app import app

    for arguments in json.loads(sys.argv[2]):
        if code := app(arguments, standalone_mode=False) or 0:
            sys.exit(f"{arguments}: exit code {code}")
        if asked := REPORT.read_text(encoding="utf-8"):
            sys.exit(f"{arguments}: {asked}")
