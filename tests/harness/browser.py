"""Headless Chromium, spoken to over a pipe in the DevTools protocol: no driver, no port, no package.

One browser per `with`, with a profile of its own. `Page` collects what a user would only see in the console: errors,
warnings of the content security policy, failed requests, uncaught exceptions.
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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
LIVENESS_S = 60.0
POLL_S = 0.1
LEAST_DESCRIPTOR = 10  # above those that the browser expects its pipe at

_FLAGS = (
    "--headless",
    "--no-sandbox",  # ours are the only pages, and root may not use it
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)


def find_browser() -> str | None:
    """The path of a browser, KVCACHE_BROWSER's if that is set; None if there is none."""
    named = os.environ.get("KVCACHE_BROWSER")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class Pipe:
    """JSON messages ended by a zero byte, both ways."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads = reads
        self._writes = writes
        self._buffer = b""
        self._last_id = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None, **params: object) -> dict[str, Any]:
        """The result of a command; events that come meanwhile are kept. Raises AssertionError."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        os.write(self._writes, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        end = time.monotonic() + LIVENESS_S
        while True:
            answer = self._next(end)
            if answer.get("id") == self._last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reads], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the browser said nothing for {LIVENESS_S:.0f} s"
            data = os.read(self._reads, 1 << 20)
            assert data, "the browser ended"
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message


class Page:
    """One tab. complaints: what its console and its network had to complain about, in words."""

    def __init__(self, pipe: Pipe, session: str) -> None:
        self._pipe = pipe
        self._session = session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def shape(self, width: int, height: int, scheme: str = "light") -> None:
        """Be so many CSS pixels large, for a reader who prefers this colour scheme."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, which may be a promise. Raises AssertionError if it throws."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Until the expression is true. Raises AssertionError, with the page's text, if it does not become so."""
        end = time.monotonic() + LIVENESS_S
        while not self.evaluate(expression):
            if time.monotonic() >= end:
                text = self.evaluate("document.body?.innerText")
                raise AssertionError(f"not within {LIVENESS_S:.0f} s: {expression}\n{self.complaints}\n{text}")
            time.sleep(POLL_S)

    def screenshot(self, path: Path, *, is_whole: bool = True) -> None:
        """Of the whole page, or of what is in sight."""
        path.parent.mkdir(parents=True, exist_ok=True)
        shot = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=is_whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    @property
    def complaints(self) -> list[str]:
        self.evaluate("0")  # what was said before this is in the pipe now
        return [text for event in self._pipe.events if (text := _complaint(event))]

    def _call(self, method: str, **params: object) -> dict[str, Any]:
        return self._pipe.call(method, self._session, **params)


@contextmanager
def browser_page(path: str, profile: Path) -> Iterator[Page]:
    """A browser with one empty page, ended with the block."""
    with ExitStack() as stack:
        (theirs_in, ours_out), (ours_in, theirs_out) = _pipe(stack), _pipe(stack)
        redirected = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash"]
        process = subprocess.Popen(
            [*redirected, path, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(_end, process)
        _close((theirs_in, theirs_out))
        pipe = Pipe(ours_in, ours_out)
        target = pipe.call("Target.createTarget", None, url="about:blank")["targetId"]
        session = pipe.call("Target.attachToTarget", None, targetId=target, flatten=True)["sessionId"]
        yield Page(pipe, session)
        pipe.call("Browser.close", None)


def _pipe(stack: ExitStack) -> tuple[int, int]:
    low = os.pipe()
    high = (
        fcntl.fcntl(low[0], fcntl.F_DUPFD_CLOEXEC, LEAST_DESCRIPTOR),
        fcntl.fcntl(low[1], fcntl.F_DUPFD_CLOEXEC, LEAST_DESCRIPTOR),
    )
    _close(low)
    stack.callback(_close, high)
    return high


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with suppress(OSError):  # ours to close twice: the browser's ends, once it has them
            os.close(descriptor)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _complaint(event: dict[str, Any]) -> str:
    params = event.get("params", {})
    match event.get("method"):
        case "Runtime.exceptionThrown":
            return f"exception: {params['exceptionDetails']}"
        case "Runtime.consoleAPICalled" if params["type"] in {"error", "warning", "assert"}:
            return f"console: {params['args']}"
        case "Log.entryAdded" if params["entry"]["level"] in {"error", "warning"}:
            entry = params["entry"]
            return f"log: {entry['text']} {entry.get('url', '')}"
        case "Network.responseReceived" if params["response"]["status"] >= 400:
            return f"{params['response']['status']}: {params['response']['url']}"
        case _:
            return ""
