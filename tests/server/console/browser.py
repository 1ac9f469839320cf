"""A headless Chromium, driven through its DevTools protocol over a pipe: JSON, ended by NUL."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WAIT_S = 30
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars "
    "--no-first-run --disable-background-networking --remote-debugging-pipe"
)
LAUNCH = """
import fcntl, os, sys
for wanted, end in enumerate([fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]):
    os.dup2(end, 3 + wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads commands from descriptor 3 and writes answers to 4."""


class Browser:
    """One tab. `problems` are what its console had to say: errors, warnings, broken requests."""

    def __init__(self, commands: int, answers: int) -> None:
        self.problems: list[str] = []
        self._commands = commands
        self._messages: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._count = 0
        self._session: str | None = None
        Thread(target=self._read, args=(answers,), daemon=True).start()

    def attach(self) -> None:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._messages.get(timeout=WAIT_S)
            if reply.get("id") == self._count:
                assert "error" not in reply, (method, reply["error"])
                return reply["result"]
            self._note(reply)

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """What an expression of the page comes to; promises are awaited."""
        reply = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true."""
        end = time.monotonic() + WAIT_S
        while not self.value(f"!!({expression})"):
            assert time.monotonic() < end, (expression, self.text(), self.problems)
            time.sleep(0.05)

    def text(self) -> str:
        return str(self.value("document.body?.innerText"))

    def see(self, words: str) -> None:
        self.wait(f"document.body?.innerText.includes({json.dumps(words)})")

    def fill(self, selector: str, text: str) -> None:
        self.value(f"document.querySelector({json.dumps(selector)}).select()")
        self.send("Input.insertText", text=text)

    def press(self, key: str, *, ctrl: bool = False) -> None:
        code = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36}
        code |= {"ArrowLeft": 37, "ArrowRight": 39}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        fields: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": code.get(key, 0)}
        fields["modifiers"] = 2 if ctrl else 0
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **fields)
        self.send("Input.dispatchKeyEvent", type="keyUp", **fields)

    def screen(
        self, *, width: int = 1280, height: int = 900, dark: bool = False, still: bool = False
    ) -> None:
        """`still`: with as little motion as may be."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        motion = {"name": "prefers-reduced-motion", "value": "reduce" if still else ""}
        self.send("Emulation.setEmulatedMedia", features=[scheme, motion])
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def picture(self, path: Path) -> None:
        """Of the whole page, as PNG."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def _note(self, event: dict[str, Any]) -> None:
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(str(event["params"]["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.problems.append(str(event["params"]["args"]))
            case "Log.entryAdded":
                self.problems.append(str(event["params"]["entry"]))

    def _read(self, answers: int) -> None:
        rest = b""
        while part := os.read(answers, 65536):
            *whole, rest = (rest + part).split(b"\0")
            for message in whole:
                self._messages.put(json.loads(message))

    def rest(self) -> None:
        """Takes in what has been reported without an answer."""
        self.value("0")
        try:
            while True:
                self._note(self._messages.get_nowait())
        except Empty:
            pass


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    assert CHROMIUM is not None
    command_end, commands = os.pipe()
    answers, answer_end = os.pipe()
    ends = (command_end, answer_end)
    begin = [sys.executable, "-ISc", LAUNCH, *map(str, ends), CHROMIUM, *FLAGS.split()]
    chromium = subprocess.Popen(
        [*begin, f"--user-data-dir={profile}"],
        pass_fds=ends,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_end)
    os.close(answer_end)
    browser = Browser(commands, answers)
    try:
        browser.attach()
        yield browser
    finally:
        os.close(commands)  # it then leaves
        try:
            chromium.wait(20)
        finally:
            chromium.kill()
            chromium.wait()
            os.close(answers)
