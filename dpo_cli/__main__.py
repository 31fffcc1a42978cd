"""`dpo` as a process: what must hold before any other module is loaded, and after the last line is printed."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line. Ctrl-C while the modules load ends the process as it would end any other, without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if stream is None:  # closed by the caller: what is printed goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, "stdout" if number == 1 else "stderr", open(number, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    from dpo_cli.app import app

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app()
    except BrokenPipeError:  # the reader has seen enough: what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
