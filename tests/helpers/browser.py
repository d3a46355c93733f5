"""Drive a headless Chromium over its debugging pipe: open pages, evaluate scripts, take screenshots."""

import base64
import fcntl
import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from helpers.tools import find

# Only the page: no first-run pages, no calls to the servers of its maker.
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-pipe",
]  # fmt: skip


class Browser:
    """One page of a browser of its own. Commands are those of the Chrome DevTools protocol."""

    def __init__(self, profile: Path) -> None:
        program = find("chromium")
        assert program
        (its_input, self.commands), (replies, its_output) = os.pipe(), os.pipe()
        # Chromium expects them as 3 and 4, which may be in use here: so they are moved first.
        ends = [fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in (its_input, its_output)]

        def put_pipes() -> None:
            for place, number in enumerate(ends, start=3):
                os.dup2(number, place)

        self.process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=put_pipes, close_fds=False,
        )  # fmt: skip
        for number in (its_input, its_output, *ends):
            os.close(number)
        self.replies = os.fdopen(replies, "rb", buffering=0)
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        self.rest = b""
        self.session = ""
        page = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            more = self.replies.read(1 << 20)
            assert more, "the browser is gone"
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, page: Path | str, *, width_px: int, dark: bool = False) -> None:
        """Show `page`, a file or a URL, and wait until it is loaded."""
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width_px,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, script: str) -> Any:
        result = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def complaints(self) -> list[str]:
        """Return console errors, exceptions and everything that a policy blocked, since `open`."""
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"])[:500] for event in self.events if event.get("method") in bad]

    def screenshot(self, path: Path, height_px: int | None = None) -> None:
        """Save the whole page, or its first `height_px`, as a PNG."""
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height_px or size["height"], "scale": 1}
        shot = self("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        self.replies.close()
