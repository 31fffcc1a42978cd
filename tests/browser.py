"""A headless Chromium with one page in it, driven over the DevTools protocol on a pipe: no driver to install, no open port."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
)


class Page:
    """The page; `console` has what it logged or threw, `requests` the addresses that it asked for."""

    def __init__(self, commands: int, events: int) -> None:
        self.commands, self.events, self.number = commands, os.fdopen(events, "rb"), 0
        self.console: list[str] = []
        self.requests: list[str] = []
        self.loaded = 0
        self.session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """What the browser answers; the events that come before are noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self.events.read(1)) != b"\0":
            assert byte, "the browser is gone"
            text += byte
        event: dict[str, Any] = json.loads(text)
        method, parameters = event.get("method"), event.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.console.append(json.dumps(parameters))
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        self.loaded += method == "Page.loadEventFired"
        return event

    def _until_loaded(self, method: str, **parameters: Any) -> None:
        before = self.loaded
        self.call(method, **parameters)
        while self.loaded == before:
            self._next()

    def open(self, url: str) -> None:
        self._until_loaded("Page.navigate", url=url)

    def reload(self) -> None:
        self._until_loaded("Page.reload")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        made = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in made, made["exceptionDetails"]
        return made["result"].get("value")

    def press(self, *keys: str) -> None:
        """Keys as the page sees them from a keyboard."""
        for key in keys:
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def click(self, selector: str, count: int = 1) -> None:
        """A click of the mouse, or the `count`th of a row, on the middle of an element, which has to be in sight."""
        box = self.js(
            f"(() => {{ const element = document.querySelector({json.dumps(selector)});"
            " element.scrollIntoView({ block: 'nearest' }); const box = element.getBoundingClientRect();"
            " const at = [box.x + box.width / 2, box.y + box.height / 2];"
            " return [...at, element.contains(document.elementFromPoint(...at))]; })()"
        )
        assert box[2], f"{selector} is not in sight"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=count)

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """The size of the window in CSS pixels, that of a phone where it is small, and the colours that the system asks for."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self) -> bytes:
        """What is seen of the page, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser with a profile of its own in `folder`, where downloads land too."""
    assert CHROMIUM
    to_browser, commands = os.pipe()
    events, from_browser = os.pipe()
    # The browser reads descriptor 3 and writes 4; the shell moves ours there, by way of numbers that are neither.
    moved = 'exec 8<&"$1" 9>&"$2"; exec 3<&8 4>&9; shift 2; exec "$@"'
    profile = f"--user-data-dir={folder / 'profile'}"
    command = ["bash", "-c", moved, "-", str(to_browser), str(from_browser), CHROMIUM, *FLAGS, profile]
    process = subprocess.Popen(
        [*command, "--remote-debugging-pipe"],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        page = Page(commands, events)
        page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        yield page
    finally:
        process.terminate()
        process.wait()
        os.close(commands)
        os.close(events)
