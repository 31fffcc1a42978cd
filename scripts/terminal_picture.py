"""Pictures of a real run, as SVGs without web fonts: what `make demo` leaves on a terminal, and the live view on the way.

The commands run on a pseudo-terminal of their own; pyte plays what they write, Rich draws the screen that results.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
COLUMNS, LINES = 96, 400  # more lines than a run writes, so that nothing scrolls away
SVG = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="a run of dpo">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, monospace; font-size: {char_height}px;
  line-height: {line_height}px; white-space: pre; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
<rect width="{width}" height="{height}" rx="8" fill="#0c0f14"/>
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def played(words: list[str], until: str | None = None) -> list[Text]:
    """The lines of the screen after a command has run on a terminal of `COLUMNS`, or when it first matches `until`."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    process = subprocess.Popen(words, cwd=ROOT, stdin=child, stdout=child, stderr=child, env={**os.environ, "TERM": "xterm"})
    os.close(child)
    while True:
        try:
            data = os.read(parent, 65536)
        except OSError:  # Linux ends a pseudo-terminal's output this way
            break
        if not data:
            break
        stream.feed(data)
        if until and re.search(until, "\n".join(screen.display), re.MULTILINE | re.DOTALL):
            process.kill()
            os.close(parent)
            process.wait()
            return [line(screen, row) for row in range(screen.cursor.y + 1)]
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return [line(screen, row) for row in range(screen.cursor.y)]


def line(screen: pyte.Screen, row: int) -> Text:
    text = Text()
    for column in range(COLUMNS):
        cell = screen.buffer[row][column]
        colour = "" if cell.fg == "default" else f"#{cell.fg}" if len(cell.fg) == 6 else cell.fg.replace("brown", "yellow")
        text.append(cell.data, style=f"{'bold ' if cell.bold else ''}{colour}".strip())
    text.rstrip()
    return text


def main() -> None:
    dpo = str(Path(sys.executable).parent / "dpo")
    live(dpo)
    with tempfile.TemporaryDirectory() as place:
        run = f"{place}/quickstart"
        train = played([dpo, "train", "configs/quickstart.json", f"output_dir={run}"])
        judged = played([dpo, "eval", run])
    draw("demo.svg", {"$ dpo train configs/quickstart.json": train, "$ dpo eval runs/quickstart": judged}, run)


def live(dpo: str) -> None:
    """The view a little after the middle of the run, with two evaluations behind it; what is above it is left out."""
    words = ["train", "configs/quickstart.json", "eval_steps=7"]
    with tempfile.TemporaryDirectory() as place:
        lines = played([dpo, *words, f"output_dir={place}/quickstart"], until=r"^16/\d+ .*^memory ")
    top = next(i for i, text in enumerate(lines) if text.plain.startswith("16/"))
    draw("live.svg", {f"$ dpo {' '.join(words)}": [Text("..."), *lines[top:]]})


def draw(name: str, screens: dict[str, list[Text]], run: str | None = None) -> None:
    """Write docs/`name`: commands, each with what is on the screen. The temporary folder `run` is not shown."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115, PTH123
    for title, lines in screens.items():
        console.print(Text(title, style="bold green"))
        for text in lines:
            if run is not None and run in text.plain:  # a cell of a table keeps its width
                shown = text.plain.replace(f"{run}/", "runs/quickstart/").replace(run, "runs/quickstart".ljust(len(run)))
                text = Text(shown, spans=text.spans)
            console.print(text)
    (ROOT / "docs" / name).write_text(console.export_svg(code_format=SVG, title="dpo"), encoding="utf-8")


if __name__ == "__main__":
    main()
