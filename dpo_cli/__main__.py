"""`dpo` as a process: the setup before other modules are loaded, and the end after the last line is printed."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys


class _Stream(io.TextIOWrapper):
    """Standard output or error. When its reader has closed it, the rest is dropped, and the exit code stays."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def main() -> None:
    """Run the command line. Ctrl-C while the modules load ends the process without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller: the output is dropped
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            stream = open(number, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        if isinstance(stream, io.TextIOWrapper):
            encoding, errors, newline = stream.encoding, stream.errors, None
            by_line, at_once = stream.line_buffering, stream.write_through
            stream = _Stream(stream.detach(), encoding, errors, newline, by_line, at_once)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    from dpo_cli.app import app

    try:
        app()  # inside, the session of a command handles Ctrl-C again
    finally:
        gc.freeze()  # the end of Python would search all objects of the libraries for garbage, several times


if __name__ == "__main__":
    main()
