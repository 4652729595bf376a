"""Keeps child processes running: start, restart with back-off, drain in order, leave nobody behind.

Owns the children and their pipes. When to restart is `kvcache.restarts`; what the children are is the
caller's. Services stop in the reverse order of their list, those of one `rank` together: workers drain
while the broker still routes their last answers. Children get a process group of their own, so that a
Ctrl-C in the terminal reaches only us and the order holds, and on Linux die with us even if we are
killed (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import asyncio
import enum
import os
import signal
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from kvcache.orphans import die_with_us
from kvcache.restarts import RestartCounter, RestartPolicy

MAX_LINE_BYTES = 64 * 1024
NUM_LAST_LINES = 20


class ServiceState(enum.StrEnum):
    """starting -> running -> (waiting -> running)* -> stopped | gave up."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting to restart"
    STOPPED = "stopped"
    GAVE_UP = "gave up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A child to keep running. Lower ranks start first and stop last. `env` is added to our own environment."""

    name: str
    command: Sequence[str]
    rank: int = 0
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class ServiceStatus:
    """What is known of one child now; the supervisor writes it, anyone may read it."""

    service: Service
    state: ServiceState = ServiceState.STARTING
    pid: int | None = None
    restarts: int = 0
    exit_code: int | None = None
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=NUM_LAST_LINES))


class ServiceFailed(Exception):
    """A child ended, and starting it again makes no sense."""

    def __init__(self, status: ServiceStatus) -> None:
        self.status = status
        code = status.exit_code
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        often = f", {status.restarts + 1} times in a row" if status.restarts else ""
        said = f"; it said: {status.last_lines[-1]}" if status.last_lines else ""
        super().__init__(f"{status.service.name} ended {how}{often}{said}")


class Supervisor:
    """Run `services` until `stop` is set or one of them is in a crash loop.

    Until `confirm` is called a service that ends is not started again but fails the run: what cannot
    even start is a mistake in the configuration, and its message should be the last thing on the screen.

    on_line: called with a service's name and each line that it writes.
    on_change: called when a service's state changed. Both run in the event loop and must not block.
    grace_s: how long a service may take to end after SIGTERM, before SIGKILL.
    """

    def __init__(
        self,
        services: Sequence[Service],
        *,
        on_line: Callable[[str, str], None],
        on_change: Callable[[ServiceStatus], None],
        policy: RestartPolicy | None = None,
        grace_s: float = 15.0,
    ) -> None:
        self.statuses = {service.name: ServiceStatus(service) for service in services}
        self._on_line = on_line
        self._on_change = on_change
        self._policy = policy or RestartPolicy()
        self._grace_s = grace_s
        self._is_confirmed = False

    def confirm(self) -> None:
        """It all works: from now on a service that ends is started again."""
        self._is_confirmed = True

    async def run(self, stop: asyncio.Event) -> None:
        """Return when `stop` was set and every child has ended. Raises ServiceFailed, then too with no child left."""
        halts = {name: asyncio.Event() for name in self.statuses}
        failed: list[ServiceStatus] = []

        async def keep(status: ServiceStatus) -> None:
            await self._keep_running(status, halts[status.service.name])
            if status.state is ServiceState.GAVE_UP:
                failed.append(status)
                stop.set()

        async with asyncio.TaskGroup() as group:
            by_start = sorted(self.statuses.values(), key=lambda status: status.service.rank)
            keepers = {status.service.name: group.create_task(keep(status)) for status in by_start}
            await stop.wait()
            for rank in sorted({status.service.rank for status in by_start}, reverse=True):
                names = [status.service.name for status in by_start if status.service.rank == rank]
                for name in names:
                    halts[name].set()
                await asyncio.wait([keepers[name] for name in names])
        if failed:
            raise ServiceFailed(failed[0])

    async def _keep_running(self, status: ServiceStatus, halt: asyncio.Event) -> None:
        counter = RestartCounter(self._policy)
        while not halt.is_set():
            counter.started(time.monotonic())
            await self._run_once(status, halt)
            if halt.is_set():
                break
            delay_s = counter.ended(time.monotonic()) if self._is_confirmed else None
            if delay_s is None:
                self._change(status, ServiceState.GAVE_UP)
                return
            status.restarts = counter.failures
            self._change(status, ServiceState.WAITING)
            await _set_within(halt, delay_s)
        self._change(status, ServiceState.STOPPED)

    async def _run_once(self, status: ServiceStatus, halt: asyncio.Event) -> None:
        """One life of a child: spawn, hand on its lines, end it when `halt` is set."""
        process = await asyncio.create_subprocess_exec(
            *status.service.command,
            env={**os.environ, **status.service.env},
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            process_group=0,
            preexec_fn=die_with_us(signal.SIGTERM),
            limit=MAX_LINE_BYTES,
        )
        status.pid, status.exit_code = process.pid, None
        self._change(status, ServiceState.RUNNING)
        try:
            async with asyncio.TaskGroup() as group:
                lines = group.create_task(self._hand_on_lines(status, process))
                ending = group.create_task(self._end_on(halt, process))
                await process.wait()
                ending.cancel()
                await _done_within(lines, 1.0)
        finally:
            await _end(process, 0.0)
            status.pid, status.exit_code = None, process.returncode

    async def _hand_on_lines(self, status: ServiceStatus, process: Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:
                continue  # longer than MAX_LINE_BYTES: that much is dropped, the child is not blocked
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            status.last_lines.append(text)
            self._on_line(status.service.name, text)

    async def _end_on(self, halt: asyncio.Event, process: Process) -> None:
        await halt.wait()
        await _end(process, self._grace_s)

    def _change(self, status: ServiceStatus, state: ServiceState) -> None:
        status.state = state
        self._on_change(status)


async def _end(process: Process, grace_s: float) -> None:
    """SIGTERM, then SIGKILL after the grace; at once without one. Returns when the process is gone."""
    with suppress(ProcessLookupError):
        if process.returncode is None and grace_s > 0:
            process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), grace_s)
        if process.returncode is None:
            process.kill()
    await process.wait()


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


async def _done_within(task: asyncio.Task[None], seconds: float) -> None:
    """A grandchild may hold the pipe open after the child has gone; do not wait for it."""
    _, pending = await asyncio.wait([task], timeout=seconds)
    for late in pending:
        late.cancel()
