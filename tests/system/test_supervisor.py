"""The supervisor with real child processes: small Python programs that live and die as told."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcache.restarts import RestartPolicy
from kvcache.supervisor import Service, ServiceFailed, ServiceState, ServiceStatus, Supervisor

pytestmark = pytest.mark.system

SERVE = "import signal, sys; print('up', flush=True); signal.sigwait([signal.SIGTERM])"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def service(name: str, program: str, rank: int = 0) -> Service:
    program = f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n{program}"
    return Service(name=name, command=(sys.executable, "-c", textwrap.dedent(program)), rank=rank)


class Recorder:
    """Everything a supervisor reports, and a way to wait for it."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.changes: list[tuple[str, ServiceState]] = []
        self._news = asyncio.Event()

    def on_line(self, name: str, line: str) -> None:
        self.lines.append((name, line))
        self._news.set()

    def on_change(self, status: ServiceStatus) -> None:
        self.changes.append((status.service.name, status.state))
        self._news.set()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._news.clear()
                await self._news.wait()


def supervise(recorder: Recorder, *services: Service, grace_s: float = 5.0) -> Supervisor:
    policy = RestartPolicy(first_delay_s=0.01, max_failures=3)
    return Supervisor(services, on_line=recorder.on_line, on_change=recorder.on_change, policy=policy, grace_s=grace_s)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_stop_ends_higher_ranks_first() -> None:
    recorder, stop = Recorder(), asyncio.Event()
    supervisor = supervise(recorder, service("worker", SERVE, rank=1), service("broker", SERVE))
    async with asyncio.TaskGroup() as group:
        group.create_task(supervisor.run(stop))
        await recorder.wait_for(lambda: len(recorder.lines) == 2)
        stop.set()
    assert [name for name, state in recorder.changes if state is ServiceState.STOPPED] == ["worker", "broker"]
    assert {status.exit_code for status in supervisor.statuses.values()} == {0}


async def test_killed_child_is_started_again() -> None:
    recorder, stop = Recorder(), asyncio.Event()
    supervisor = supervise(recorder, service("worker", SERVE))
    async with asyncio.TaskGroup() as group:
        group.create_task(supervisor.run(stop))
        await recorder.wait_for(lambda: len(recorder.lines) == 1)
        supervisor.confirm()
        first = supervisor.statuses["worker"].pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await recorder.wait_for(lambda: len(recorder.lines) == 2)
        assert supervisor.statuses["worker"].pid not in (None, first)
        stop.set()


async def test_crash_loop_fails_with_the_last_lines_and_stops_the_others() -> None:
    recorder, stop = Recorder(), asyncio.Event()
    supervisor = supervise(recorder, service("broker", SERVE), service("worker", "print('no model'); exit(7)", rank=1))
    supervisor.confirm()
    with pytest.raises(ServiceFailed, match="with exit code 7, 3 times in a row; it said: no model") as failure:
        await supervisor.run(stop)
    assert list(failure.value.status.last_lines) == ["no model"] * 3
    assert supervisor.statuses["broker"].state is ServiceState.STOPPED


async def test_child_that_cannot_start_is_not_tried_again() -> None:
    recorder = Recorder()
    supervisor = supervise(recorder, service("broker", "exit(1)"))
    with pytest.raises(ServiceFailed, match=r"broker ended with exit code 1$"):
        await supervisor.run(asyncio.Event())
    assert recorder.changes.count(("broker", ServiceState.RUNNING)) == 1


async def test_child_that_ignores_sigterm_is_killed_after_the_grace() -> None:
    recorder, stop = Recorder(), asyncio.Event()
    supervisor = supervise(recorder, service("worker", STUBBORN), grace_s=0.2)
    async with asyncio.TaskGroup() as group:
        group.create_task(supervisor.run(stop))
        await recorder.wait_for(lambda: len(recorder.lines) == 1)
        stop.set()
    assert supervisor.statuses["worker"].exit_code == -signal.SIGKILL


async def test_line_without_end_does_not_block_the_child() -> None:
    recorder, stop = Recorder(), asyncio.Event()
    supervisor = supervise(recorder, service("worker", f"print('x' * 1_000_000)\n{SERVE}"))
    async with asyncio.TaskGroup() as group:
        group.create_task(supervisor.run(stop))
        await recorder.wait_for(lambda: ("worker", "up") in recorder.lines)
        stop.set()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
async def test_children_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    program = f"""
        import asyncio, sys
        from kvcache.supervisor import Service, Supervisor
        child = Service(name="child", command=(sys.executable, "-c", {SERVE!r}))
        def on_line(name, line): print(supervisor.statuses["child"].pid, flush=True)
        supervisor = Supervisor([child], on_line=on_line, on_change=lambda status: None)
        asyncio.run(supervisor.run(asyncio.Event()))
    """
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(program), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    async with asyncio.timeout(10):
        child = int(await parent.stdout.readline())
        parent.kill()
        await parent.wait()
        while is_alive(child):  # noqa: ASYNC110 - it is not our child: nobody tells us
            await asyncio.sleep(0.01)
