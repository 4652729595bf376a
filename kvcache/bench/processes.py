"""Starting the real processes that a benchmark measures, on ports of their own, and ending them."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bus.endpoints import NUM_PORTS, endpoints


def free_url() -> str:
    """An address whose six ports were all free a moment ago."""
    for base in range(20_000 + time.time_ns() % 20_000, 60_000, NUM_PORTS):
        with_all = [base + index for index in range(NUM_PORTS)]
        if all(_is_free(port) for port in with_all):
            return f"tcp://127.0.0.1:{base}"
    raise RuntimeError("no six consecutive ports are free")


@contextmanager
def broker_process(*flags: str) -> Iterator[str]:
    """A broker of our own, ready for requests; yields its address."""
    url = free_url()
    with running(
        [sys.executable, "-m", "kvcache.broker", "--bind", url, "--settle-ms", "0", "--log-level", "error", *flags]
    ):
        wait_for_port(endpoints(url).tokens)
        yield url


@contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A child process, ended (politely, then not) when the block is left."""
    child = subprocess.Popen(command)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_for_port(endpoint: str, timeout_s: float = 30.0) -> None:
    """Raises RuntimeError unless somebody listens there in time."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        try:
            socket.create_connection((host, int(port)), 0.2).close()
            return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"nothing listens at {endpoint} after {timeout_s:.0f} s")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
