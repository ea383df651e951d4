"""A headless Chromium over its DevTools protocol, spoken through a pipe: no driver, no port, no package.

Unusual: messages travel over file descriptors 3 and 4, each ended by a zero byte (--remote-debugging-pipe).
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE_S = 60.0


def executable() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page at a time. ``said``: console messages, exceptions and violations of policy, as text."""

    def __init__(self, home: Path):
        there, mine = os.pipe(), os.pipe()  # it reads from the first and writes to the second
        # 3 and 4 may be our ends of the pipes, so a shell puts them in place after ours are closed
        script = f'exec 3<&{there[0]} 4>&{mine[1]} && exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", str(executable()), *FLAGS, f"--user-data-dir={home}", "about:blank"],
            pass_fds=(there[0], mine[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(there[0])
        os.close(mine[1])
        self.out, self.into = there[1], mine[0]
        self.number, self.buffer = 0, b""
        self.said: list[str] = []
        self.events: list[str | None] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        for end in (self.out, self.into):
            os.close(end)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            told = self.read()
            if told.get("id") == self.number:
                assert "error" not in told, f"{method}: {told['error']}"
                return told["result"]

    def read(self) -> dict:
        """The next message; what the page says is kept on the way."""
        until = time.monotonic() + PATIENCE_S
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.into], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"the browser says nothing for {PATIENCE_S:g} s"
            chunk = os.read(self.into, 2**20)
            assert chunk, "the browser ended"
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\0")
        told = json.loads(line)
        if told.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(json.dumps(told["params"])[:2000])
        self.events.append(told.get("method"))
        return told

    def open(self, path: Path, **told) -> None:
        """Load a file and wait until it has loaded. told: width, dark, scripts."""
        self.said, self.events = [], []
        width = told.get("width", 1180)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=1600, deviceScaleFactor=1, mobile=False)
        dark = {"name": "prefers-color-scheme", "value": "dark" if told.get("dark") else "light"}
        self.call("Emulation.setEmulatedMedia", features=[dark])
        self.call("Emulation.setScriptExecutionDisabled", value=not told.get("scripts", True))
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self.events:
            self.read()

    def value(self, expression: str):
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def key(self, name: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, text=text)

    def picture(self, path: Path, height: int = 1600) -> None:
        width = self.value("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
