"""A gateway of our own, as a process, in front of a cluster of the harness."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvcache.local import free_port, running, wait_for_port
from tests.harness.cluster import ROOT


@contextmanager
def gateway(broker: str, log: Path, *flags: str) -> Iterator[str]:
    """A gateway for this broker, listening; yields its base URL, without a path."""
    port = free_port()
    command = [sys.executable, "-m", "kvcache.gateway", "--broker", broker, "--port", str(port), *flags]
    with log.open("ab") as lines, running(["env", f"PYTHONPATH={ROOT}", *command], lines) as process:
        try:
            wait_for_port(f"tcp://127.0.0.1:{port}")
        except RuntimeError:
            raise AssertionError(f"the gateway does not listen\n{log.read_text('utf-8', 'replace')}") from None
        yield f"http://127.0.0.1:{port}"
        assert isinstance(process, subprocess.Popen)
        assert process.poll() is None, f"the gateway ended\n{log.read_text('utf-8', 'replace')}"
