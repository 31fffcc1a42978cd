"""What the user of a chat enters: on a terminal by prompt_toolkit, with history and several lines; in a pipe line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

from dpo_cli.errors import UsageError
from dpo_cli.storage.redaction import beneath

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

MARK = "> "


class Entry(Protocol):
    """A source of messages."""

    def text(self) -> str | None:
        """The next message; None at the end."""
        ...

    def key(self, question: str, keys: str) -> str | None:
        """One of these keys; None for no answer."""
        ...

    def quiet(self) -> AbstractContextManager[None]:
        """Within, typed keys do not appear: they would tear the lines of an answer."""
        ...


def is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def prompt_of(given: str | None, as_json: bool) -> str | None:
    """The one prompt of a chat, from --prompt or standard input; None for a conversation. `UsageError` for an empty one."""
    from_input = given == "-" or (given is None and as_json and not sys.stdin.isatty())
    text = _decoded(sys.stdin.buffer.read()) if from_input else given
    if text is None and as_json:
        raise UsageError("--json prints one answer, and there is no prompt", "--prompt TEXT, or text on standard input")
    if text is not None and not text.strip():
        raise UsageError("the prompt is empty", "--prompt TEXT, or text on standard input")
    return text


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError("standard input is not UTF-8 text", "convert it, for example with iconv") from error


class PipedEntry:
    """A message a line; blank lines are skipped."""

    def __init__(self) -> None:
        self._lines: Iterator[bytes] = iter(sys.stdin.buffer)

    def text(self) -> str | None:
        return next((text for line in self._lines if (text := _decoded(line).strip())), None)

    def key(self, question: str, keys: str) -> str | None:
        return None

    def quiet(self) -> AbstractContextManager[None]:
        return nullcontext()


class TypedEntry:
    """Enter sends, Alt+Enter starts a new line; the arrows recall earlier messages. Nothing typed is written to a file."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output

        self._output = create_output(beneath(sys.stdout))
        self._session: PromptSession[str] = PromptSession(
            output=self._output, multiline=True, key_bindings=_bindings(), prompt_continuation="  "
        )

    def text(self) -> str | None:
        try:
            return self._session.prompt(MARK)
        except EOFError:  # Ctrl-D, or Ctrl-C where nothing is typed
            return None

    def key(self, question: str, keys: str) -> str | None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings

        bindings = KeyBindings()
        for key in keys:
            bindings.add(key)(lambda event, key=key: event.app.exit(result=key))
        bindings.add("<any>")(lambda event: None)  # other keys do nothing
        bindings.add("enter")(lambda event: None)
        for key in ("c-c", "c-d"):
            bindings.add(key)(lambda event: event.app.exit(result=""))
        asked: PromptSession[str] = PromptSession(output=self._output, key_bindings=bindings)
        return asked.prompt(question) or None

    @contextmanager
    def quiet(self) -> Iterator[None]:
        if sys.platform == "win32":  # without termios; its console shows no ^C
            yield
            return
        import termios

        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
        mode = [*before]
        mode[3] &= ~termios.ECHO
        termios.tcsetattr(terminal, termios.TCSADRAIN, mode)
        try:
            yield
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _bindings() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def start_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def leave(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=EOFError)

    return bindings
