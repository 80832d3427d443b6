"""Chromium without a screen, asked over its DevTools protocol: what is on a page, and what the page does."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from tests.support.harness import running, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium")


class Page:
    """One page. What the browser says of it is kept in `events`."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.tell(f"{domain}.enable")

    def tell(self, method: str, **parameters: object) -> dict[str, Any]:
        """Have the browser do something; return what comes of it."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            heard: dict[str, Any] = json.loads(self._socket.recv(30))
            if heard.get("id") == number:
                assert "error" not in heard, heard
                result: dict[str, Any] = heard["result"]
                return result
            self.events.append(heard)

    def open(self, url: str) -> None:
        """Go there."""
        self.tell("Page.navigate", url=url)
        wait_until(lambda: self.ask("document.readyState") == "complete", 30, f"{url} is there")

    def ask(self, expression: str) -> Any:  # noqa: ANN401  # what JavaScript may have
        """The value of a JavaScript expression."""
        return self.tell("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def text(self) -> str:
        """What a person reads."""
        return str(self.ask("document.body.innerText"))

    def look(self, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Have a window of that size, for somebody who likes it dark or not."""
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Keep how all of it looks."""
        shot = self.tell("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def requested(self) -> set[str]:
        """The URLs that it has asked for, without those that are data themselves."""
        requests = [event["params"]["request"]["url"] for event in self._heard("Network.requestWillBeSent")]
        return {url for url in requests if not url.startswith("data:")}

    def complaints(self) -> list[object]:
        """What a console would show: errors, warnings, exceptions."""
        said = [event["params"] for event in self._heard("Log.entryAdded")]
        said += [event["params"] for event in self._heard("Runtime.exceptionThrown")]
        return said + [event["params"] for event in self._heard("Runtime.consoleAPICalled")]

    def _heard(self, method: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["method"] == method]


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """Start it, with a profile of its own in `folder`, and return its page."""
    profile = folder / "chromium"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
    with running(command, folder / "chromium.log"):
        announced = profile / "DevToolsActivePort"
        wait_until(lambda: announced.exists() and announced.read_text().count("\n"), 60, "Chromium")
        port = announced.read_text().split()[0]

        def pages() -> list[str]:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
                return [one["webSocketDebuggerUrl"] for one in json.load(answer) if one["type"] == "page"]

        with connect(wait_until(pages, 30, "its page")[0], max_size=None) as socket:
            yield Page(socket)
