"""A headless Chromium, controlled through its DevTools protocol over two pipes."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT_S = 60.0


def find_browser() -> str | None:
    """The browser's program: that of ULTRATHINK_BROWSER, or the first of the usual names."""
    named = os.environ.get("ULTRATHINK_BROWSER")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a headless browser; ``messages`` has all that it reported, in order."""

    def __init__(self, program: str, profile: Path) -> None:
        self.messages: list[dict[str, Any]] = []
        self._number = 0
        self._data = b""
        its_input, self._to = os.pipe()
        self._from, its_output = os.pipe()
        flags = "headless=new no-sandbox disable-gpu disable-dev-shm-usage hide-scrollbars"
        flags += " no-first-run disable-background-networking remote-debugging-pipe"
        profile.mkdir(parents=True, exist_ok=True)
        with (profile / "browser.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    # It reads commands from 3 and answers to 4.
                    *("bash", "-c", f'exec "$@" 3<&{its_input} 4>&{its_output}', "bash", program),
                    *(f"--{flag}" for flag in (*flags.split(), f"user-data-dir={profile}")),
                ],
                stdout=log,
                stderr=log,
                pass_fds=(its_input, its_output),
            )
        for descriptor in (its_input, its_output):
            os.close(descriptor)
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (self._to, self._from):
            os.close(descriptor)  # it ends when nobody speaks to it any more
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def call(self, method: str, **params: Any) -> Any:
        """The answer to one command."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        found = self._wait(lambda one: one.get("id") == number, method)
        assert "error" not in found, f"{method}: {found['error']}"
        return found["result"]

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file on a screen of a size, light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        begin = len(self.messages)
        self.call("Page.navigate", url=page.resolve().as_uri())
        self._wait(lambda one: one.get("method") == "Page.loadEventFired", "load", begin)

    def evaluate(self, expression: str) -> Any:
        """What a JavaScript expression comes to, as plain data."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def point(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    @property
    def requests(self) -> list[str]:
        """The addresses that the page asked for, data within it left out."""
        return [
            one["params"]["request"]["url"]
            for one in self.messages
            if one.get("method") == "Network.requestWillBeSent"
            and not one["params"]["request"]["url"].startswith("data:")
        ]

    @property
    def complaints(self) -> list[str]:
        """What was logged on the console, errors of scripts and of the page's policy included."""
        return [
            json.dumps(one["params"])
            for one in self.messages
            if one.get("method")
            in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        ]

    def _wait(
        self, is_it: Callable[[dict[str, Any]], bool], what: str, begin: int | None = None
    ) -> dict[str, Any]:
        place = len(self.messages) if begin is None else begin
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            for one in self.messages[place:]:
                if is_it(one):
                    return one
            place = len(self.messages)
            left = deadline - time.monotonic()
            ready = select.select([self._from], [], [], max(0.0, left))[0]
            assert ready, f"the browser did not answer within {TIMEOUT_S:.0f} s: {what}"
            data = os.read(self._from, 2**20)
            assert data, f"the browser ended: {what}"
            *whole, self._data = (self._data + data).split(b"\0")
            self.messages += [json.loads(part) for part in whole]
