"""`kvcache up` with its real broker and a real worker: it serves, mends itself, and ends in order."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvcache.local import free_port, free_url

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


class Up:
    """A running `kvcache up` and the lines it wrote so far."""

    def __init__(self, process: Process, url: str) -> None:
        self.process = process
        self.url = url
        self.lines: list[str] = []

    async def read_until(self, condition: Callable[[str], bool]) -> str:
        """The next line of which `condition` holds."""
        assert self.process.stdout is not None
        async with asyncio.timeout(100):
            async for raw in self.process.stdout:
                self.lines.append(raw.decode().rstrip())
                if condition(self.lines[-1]):
                    return self.lines[-1]
        raise AssertionError("\n".join(["`kvcache up` ended:", *self.lines]))

    async def workers(self) -> list[dict[str, Any]]:
        code, out, err = await run("workers", "--json", "--url", self.url)
        assert code == 0, err
        return list(json.loads(out))


async def run(*arguments: str) -> tuple[int | None, str, str]:
    """One `kvcache` command: exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvcache.cli", *arguments, stdout=PIPE, stderr=PIPE
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def running_up(model: Path) -> AsyncIterator[Up]:
    url = free_url()
    arguments = ["-m", "kvcache.cli", "up", "--url", url, "--workers", "1", "--model", str(model)]
    arguments += ["--kv-cache-memory-bytes", "64MiB"]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=PIPE, stderr=STDOUT)
    up = Up(process, url)
    try:
        yield up
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_up_serves_restarts_a_killed_worker_and_stops_in_order(tiny_model: Path) -> None:
    async with running_up(tiny_model) as up:
        await up.read_until(lambda line: "1 workers serve at" in line)
        (worker,) = await up.workers()
        assert (worker["worker_id"], worker["status"]) == ("worker-1", "ready")

        started = next(line for line in up.lines if line.startswith("[worker-1] started, pid "))
        os.kill(int(started.rpartition(" ")[2]), signal.SIGKILL)
        await up.read_until(lambda line: "[worker-1] waiting to restart, exit code -9" in line)
        await up.read_until(lambda line: "worker worker-1 ready" in line)

        up.process.send_signal(signal.SIGTERM)
        await up.read_until(lambda line: line == "stopped")
        assert await up.process.wait() == 0
        ends = [line for line in up.lines if "] stopped, exit code" in line]
        assert ends == ["[worker-1] stopped, exit code 0", "[broker] stopped, exit code 0"]


async def test_serve_runs_all_of_it_and_the_gateway_stops_first(tiny_model: Path) -> None:
    port = free_port()
    arguments = ["-m", "kvcache.cli", "serve", str(tiny_model), "--url", free_url(), "--port", str(port)]
    arguments += ["--kv-cache-memory-bytes", "64MiB"]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=PIPE, stderr=STDOUT)
    serve = Up(process, "")
    try:
        await serve.read_until(lambda line: f"ready: http://127.0.0.1:{port}/v1" in line)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30.0) as web:
            answer = await web.post("/v1/completions", json={"model": tiny_model.name, "prompt": "hello"})
        assert answer.json()["usage"]["completion_tokens"] > 0
        process.send_signal(signal.SIGTERM)
        await serve.read_until(lambda line: line == "stopped")
        assert await process.wait() == 0
        ends = [line for line in serve.lines if "] stopped, exit code" in line]
        assert ends == [f"[{name}] stopped, exit code 0" for name in ("gateway", "worker-1", "broker")]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
