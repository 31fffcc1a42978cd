"""`dpo` as a process: what must hold before any other module is loaded, and after the last line is printed."""

from __future__ import annotations

import io
import os
import signal
import sys


class _Stream(io.TextIOWrapper):
    """Standard output or error. When its reader has seen enough, what is left goes nowhere, and the exit code stays."""

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
    """Run the command line. Ctrl-C while the modules load ends the process as it would end any other, without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller: what is printed goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            stream = open(number, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        if isinstance(stream, io.TextIOWrapper):
            encoding, errors, newline = stream.encoding, stream.errors, None
            by_line, at_once = stream.line_buffering, stream.write_through
            stream = _Stream(stream.detach(), encoding, errors, newline, by_line, at_once)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    from dpo_cli.app import app

    app()  # in which a command's session takes Ctrl-C back


if __name__ == "__main__":
    main()
