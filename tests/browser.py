"""A headless Chromium and pages in it, driven over the DevTools protocol on a pipe: no driver to install, no open port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
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


WAIT = 30.0  # seconds until a browser that says nothing has failed


class Browser:
    """A running browser: what is written to it, and what it writes."""

    def __init__(self, commands: int, events: int) -> None:
        self.commands, self.events, self.number = commands, events, 0
        self.unread = b""

    def page(self, downloads: Path) -> Page:
        """A page that shares no storage with another; what it saves lands in `downloads`."""
        return Page(self, downloads)

    def send(self, message: dict[str, Any]) -> int:
        self.number += 1
        os.write(self.commands, json.dumps({"id": self.number, **message}).encode() + b"\0")
        return self.number

    def next(self) -> dict[str, Any]:
        """The next answer or event."""
        deadline = time.monotonic() + WAIT
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.events], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser said nothing for {WAIT:.0f} s"
            part = os.read(self.events, 1 << 20)
            assert part, "the browser is gone"
            self.unread += part
        text, _, self.unread = self.unread.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message


class Page:
    """A page; `console` has what it logged or threw, `requests` the addresses that it asked for."""

    def __init__(self, browser: Browser, downloads: Path) -> None:
        self.browser = browser
        self.console: list[str] = []
        self.requests: list[str] = []
        self.loaded = 0
        self.session: dict[str, str] = {}
        own = {"browserContextId": self.call("Target.createBrowserContext")["browserContextId"]}
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads), **own)
        target = self.call("Target.createTarget", url="about:blank", **own)["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """What the browser answers; the events that come before are noted."""
        number = self.browser.send({"method": method, "params": parameters, **self.session})
        while (answer := self._next()).get("id") != number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        event = self.browser.next()
        if event.get("sessionId") != self.session.get("sessionId"):  # of a page before
            return event
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
        """Load the page again, as a person would: a moment later. The browser hands localStorage to another process first."""
        time.sleep(1.5)
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
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in `folder`."""
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
        yield Browser(commands, events)
    finally:
        process.terminate()
        process.wait(WAIT)
        os.close(commands)
        os.close(events)
