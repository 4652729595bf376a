"""A system of our own for a demo or a benchmark: real processes on free ports, ended with the block."""

from __future__ import annotations

import itertools
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from bus.endpoints import NUM_PORTS, endpoints
from kvcache.client import Client
from kvcache.threads import threads_per_worker

_PORTS = range(20_000, 32_700)
"""Below those that Linux gives to outgoing connections (ip_local_port_range, from 32,768): one of them could take a
port between our look and its use, or while its server is being restarted."""


def free_url() -> str:
    """An address whose six ports were all free a moment ago."""
    return f"tcp://127.0.0.1:{_free_block(NUM_PORTS)}"


def free_port() -> int:
    """A port of this machine that was free a moment ago."""
    return _free_block(1)


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
def cluster(
    num_workers: int, *worker_flags: str, model: str | None = "smollm2", timeout_s: float = 180.0
) -> Iterator[str]:
    """A broker and workers with `model` loaded (None: with no model, for the KV plane); yields the broker's address.

    Raises RuntimeError, with the last lines it wrote, when a worker ends or is not ready in time.
    """
    with broker_process() as url, ExitStack() as stack:
        logs = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvcache-"))
        workers = {}
        serve = ["--no-preload"] if model is None else ["--model", model]
        serve += ["--threads", str(threads_per_worker(num_workers))]
        for number in range(1, num_workers + 1):
            command = [sys.executable, "-m", "workers", "--broker", url, "--worker-id", f"worker-{number}"]
            log = stack.enter_context(Path(logs, f"worker-{number}.log").open("wb"))
            workers[Path(log.name)] = stack.enter_context(running([*command, *serve, *worker_flags], log))
        name = Path(model).name if model and Path(model).is_dir() else model
        _wait_until_serving(url, name, workers, timeout_s)
        yield url


def _wait_until_serving(
    url: str, model: str | None, workers: Mapping[Path, subprocess.Popen[bytes]], timeout_s: float
) -> None:
    until = time.monotonic() + timeout_s
    with Client(url, timeout=10.0) as client:
        while True:
            views = client.workers()
            if sum(model is None or (model, "ready") in view.models for view in views) == len(workers):
                return
            failed = [view.worker_id for view in views if (model, "failed") in view.models]
            ended = [log.stem for log, child in workers.items() if child.poll() is not None]
            if failed or ended or time.monotonic() > until:
                last = "\n".join(
                    line for log in workers for line in log.read_text("utf-8", "replace").splitlines()[-10:]
                )
                what = (
                    f"{', '.join(failed or ended)} failed" if failed or ended else f"not ready after {timeout_s:.0f} s"
                )
                raise RuntimeError(f"the workers did not start: {what}\n{last}")
            time.sleep(0.05)


@contextmanager
def running(command: Sequence[str], log: IO[bytes] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A child process, ended (politely, then not) when the block is left. It writes to `log`, if there is one."""
    child = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def name_on(client: Client, worker_id: str) -> str:
    """A new sequence id that this worker owns, by which a request is sent to it."""
    while True:
        name = f"on-{worker_id}-{secrets.token_hex(8)}"
        if client.route(name).worker_id == worker_id:
            return name


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


def _free_block(num_ports: int) -> int:
    """The first of so many neighbouring ports that are free."""
    start = _PORTS.start + secrets.randbelow(len(_PORTS))
    for base in itertools.chain(range(start, _PORTS.stop, num_ports), range(_PORTS.start, start, num_ports)):
        if all(_is_free(port) for port in range(base, base + num_ports)):
            return base
    raise RuntimeError(f"no {num_ports} consecutive ports are free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
