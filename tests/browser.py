"""A page in a real browser (Debian's chromium), used as a reader would use it.

Chromium is driven through its own protocol (DevTools) over a pair of pipes: nothing but chromium
has to be installed. Keys are real ones, so that focus, clicks by keyboard, the clipboard and
downloads work as they do for a person.
"""

from __future__ import annotations

import base64
import fcntl
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

import pytest

WIDE, PHONE = (1280, 900), (390, 844)
PATIENCE_S = 60.0
KEYS = {"Tab": 9, "Enter": 13, "Space": 32}


def find_browser() -> str:
    """The browser's path; skips the test where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed: install chromium to run the page in a browser")
    return found


class Browser:
    """A running browser; see ``browser``.

    Attributes:
        downloads: folder in which saved files arrive.
    """

    def __init__(self, commands: int, answers: int, downloads: Path) -> None:
        self._commands, self._answers = commands, answers
        self._rest, self._number = b"", 0
        self._events: list[dict[str, Any]] = []
        self.downloads = downloads

    def ask(self, method: str, tab: str | None = None, **values: Any) -> dict[str, Any]:
        """Call a method of the protocol; returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": values}
        message |= {} if tab is None else {"sessionId": tab}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == self._number:
                assert "error" not in said, (method, said["error"])
                return said["result"]
            self._events.append(said)

    def events(self, tab: str) -> list[dict[str, Any]]:
        """What has happened in a tab so far."""
        return [e for e in self._events if e.get("sessionId") == tab]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], PATIENCE_S)
            assert ready, f"the browser has said nothing for {PATIENCE_S:g} s"
            self._rest += (added := os.read(self._answers, 1 << 20))
            assert added, "the browser has ended"
        said, self._rest = self._rest.split(b"\0", 1)
        return json.loads(said)


@contextmanager
def browser(scratch: Path) -> Iterator[Browser]:
    """A browser that starts and ends with the block; skips the test where there is none."""
    downloads = scratch / "downloads"
    downloads.mkdir()
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    command = [
        find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={scratch / 'profile'}", "--remote-debugging-pipe", "about:blank",
    ]  # fmt: skip

    def place_pipes() -> None:
        """At 3 and 4, where the browser expects them (by way of numbers that neither has)."""
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        for place, end in zip((3, 4), high, strict=True):
            os.dup2(end, place)

    process = subprocess.Popen(
        command, preexec_fn=place_pipes, close_fds=False, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    running = Browser(ours_out, ours_in, downloads)
    try:
        behaviour = {"behavior": "allow", "downloadPath": str(downloads)}
        running.ask("Browser.setDownloadBehavior", **behaviour)
        granted = ["clipboardReadWrite", "clipboardSanitizedWrite"]
        running.ask("Browser.grantPermissions", permissions=granted)
        yield running
    finally:
        process.terminate()
        process.wait(timeout=30)
        os.close(ours_in)
        os.close(ours_out)


class Tab:
    """One page, loaded from disk.

    Args:
        size: of the window, in CSS pixels.
        dark: what the reader prefers.
    """

    def __init__(
        self, running: Browser, page: Path, size: tuple[int, int] = WIDE, dark: bool = False
    ) -> None:
        self._browser = running
        target = running.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = running.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._tab: str = attached["sessionId"]
        for part in ("Page", "Runtime", "Log"):
            self._ask(f"{part}.enable")
        self._ask("Emulation.setFocusEmulationEnabled", enabled=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1],
            deviceScaleFactor=1, mobile=size == PHONE,
        )  # fmt: skip
        self._ask("Page.navigate", url=page.as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def _ask(self, method: str, **values: Any) -> dict[str, Any]:
        return self._browser.ask(method, self._tab, **values)

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression (a promise's, when it is one)."""
        found = self._ask(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until it holds."""
        end = time.monotonic() + PATIENCE_S
        while not self.value(expression):
            assert time.monotonic() < end, f"never came: {expression}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """A key of the keyboard, down and up."""
        code = KEYS[key]
        text = {"Enter": "\r", "Space": " "}.get(key, "")
        name = " " if key == "Space" else key
        event = {"key": name, "code": key, "windowsVirtualKeyCode": code}
        self._ask("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self._ask("Input.dispatchKeyEvent", type="keyUp", **event)

    @property
    def console(self) -> list[str]:
        """Messages and errors, none of which a page should have."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(e) for e in self._browser.events(self._tab) if e["method"] in kinds]

    def picture(self, path: Path) -> None:
        """The whole page as a PNG, for people to look at."""
        taken = self._ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def close(self) -> None:
        """Forget the page."""
        self._ask("Page.close")
