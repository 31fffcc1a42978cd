"""How a chat shows answers: as they are written, one alone or two next to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from dpo_cli.ui.console import Console, printable

WIDE = 100  # columns of a terminal that has room for two answers next to each other
Show = Callable[[str], object]


class ChatView:
    """Answers on the console; control characters of a model are replaced."""

    def __init__(self, console: Console) -> None:
        self._console, self._out = console, console.results

    @contextmanager
    def one(self) -> Iterator[Show]:
        """Within, pieces of an answer are printed as they come; in a pipe the whole answer is a line or more."""
        with self._console.progress.left_to_another():
            yield self._piece
            self._out.print()

    def _piece(self, text: str) -> None:
        self._out.print(Text(printable(text)), end="", soft_wrap=True)
        self._out.file.flush()

    @contextmanager
    def two(self, titles: Sequence[str]) -> Iterator[tuple[Show, Show]]:
        """Within, two answers with these titles grow: in columns on a wide terminal, else one above the other."""
        texts = ["", ""]

        def show(place: int) -> Show:
            def piece(text: str) -> None:
                texts[place] += printable(text)
                live.update(self._both(titles, texts))

            return piece

        live = Live(self._both(titles, texts), console=self._out, redirect_stdout=False, redirect_stderr=False)
        if not self._out.is_terminal:
            yield show(0), show(1)
            for title, text in zip(titles, texts, strict=True):
                self._out.print(Text(f"{title}: {text}"), soft_wrap=True)
            return
        with self._console.progress.left_to_another(), live:
            yield show(0), show(1)

    def _both(self, titles: Sequence[str], texts: Sequence[str]) -> RenderableType:
        width = self._out.width
        is_wide = width >= WIDE
        panels = [
            Panel(Text(text), title=title, title_align="left", border_style="dim", width=width // 2 - 1 if is_wide else None)
            for title, text in zip(titles, texts, strict=True)
        ]
        return Columns(panels) if is_wide else Group(*panels)
