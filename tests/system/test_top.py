"""`kvcache top` on a terminal, as a person uses it."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.cluster import ROOT, Cluster

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

LIVENESS_S = 60.0


def press_q(process: subprocess.Popen[bytes], terminal: int) -> None:
    os.write(terminal, b"q")


def interrupt(process: subprocess.Popen[bytes], terminal: int) -> None:
    process.send_signal(signal.SIGINT)


@pytest.mark.parametrize("leave", [press_q, interrupt])
def test_top_shows_the_workers_and_leaves_the_terminal_as_it_was(
    cluster: Cluster, leave: Callable[[subprocess.Popen[bytes], int], None]
) -> None:
    ours, theirs = pty.openpty()
    try:
        before = termios.tcgetattr(theirs)
        process = subprocess.Popen(
            [sys.executable, "-m", "kvcache.cli", "top", "--url", cluster.url],
            cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "200", "LINES": "40", "PYTHONPATH": str(Path(ROOT))},
        )  # fmt: skip
        try:
            shown = read_until(ours, b"worker-2", b"")
            leave(process, ours)
            shown = read_until(ours, b"\x1b[?1049l", shown)  # the screen as it was before
            assert process.wait(LIVENESS_S) == 0
        finally:
            process.kill()
            process.wait()
        assert b"worker-1" in shown
        assert termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)


def read_until(terminal: int, wanted: bytes, text: bytes) -> bytes:
    """All that is shown until this is. Raises AssertionError."""
    end = time.monotonic() + LIVENESS_S
    while wanted not in text:
        ready, _, _ = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"not shown: {wanted!r}; shown: {text!r}"
        text += os.read(terminal, 65_536)
    return text
