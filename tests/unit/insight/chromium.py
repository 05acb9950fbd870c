"""A headless Chromium, spoken to by its DevTools protocol over two pipes: no driver is needed."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
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
    """One page of a headless browser; ``messages`` are all that it told, in order."""

    def __init__(self, program: str, profile: Path) -> None:
        self.messages: list[dict[str, Any]] = []
        self._number = 0
        self._data = b""
        self._pid, self._to, self._from = _spawn(
            [
                program,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
                "--no-first-run",
                "--disable-background-networking",
                f"--user-data-dir={profile}",
                "--remote-debugging-pipe",
            ],
            profile / "browser.log",
        )
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
        for _ in range(100):
            if os.waitpid(self._pid, os.WNOHANG)[0]:
                return
            time.sleep(0.05)
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

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


def _spawn(command: list[str], log: Path) -> tuple[int, int, int]:
    """Start the browser; its process, and the pipes to it and from it (3 and 4 over there)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    its_input, to_it = os.pipe()
    from_it, its_output = os.pipe()
    # Out of the way of 3 and 4, which are set one after the other.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (its_input, its_output)]
    pid = os.posix_spawn(
        command[0],
        command,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, high[0], 3),
            (os.POSIX_SPAWN_DUP2, high[1], 4),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )
    for descriptor in (its_input, its_output, *high):
        os.close(descriptor)
    return pid, to_it, from_it
