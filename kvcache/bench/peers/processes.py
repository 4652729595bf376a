"""Processes that are measured: started together, stopped while others are, ended together whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO

import psutil

from kvcache.bench.peers.environments import PeerUnavailable
from kvcache.orphans import die_with_us

END_S = 15.0


class Processes:
    """Each in a session of its own, so that what it starts stops and ends with it. `close` ends them.

    end_s: how long they have, all together, to end by themselves.
    """

    def __init__(self, end_s: float = END_S) -> None:
        self._end_s = end_s
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self, command: Sequence[str], variables: Mapping[str, str], *, is_asked: bool = False
    ) -> subprocess.Popen[bytes]:
        """is_asked: its stdin and stdout are pipes. Raises PeerUnavailable if there is no such program."""
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if is_asked else subprocess.DEVNULL,
                stdout=subprocess.PIPE if is_asked else self._log,
                stderr=self._log,
                env={**os.environ, **variables},
                start_new_session=True,
                preexec_fn=die_with_us(signal.SIGKILL),
            )
        except OSError as error:
            raise PeerUnavailable(f"{command[0]} cannot be started: {error.strerror}") from error
        self._started.append(process)
        return process

    def check(self) -> None:
        """Raises PeerUnavailable, with the last line that was written, if one has ended."""
        for process in self._started:
            if process.poll() is not None:
                raise PeerUnavailable(f"its process ended with status {process.returncode}: {self._last_line()}")

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let them run within; outside they are stopped, so that what they do when idle is at nobody's cost."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def memory_bytes(self) -> int:
        """What all of them hold now; what some of them share is counted once (proportional set size)."""
        total = 0
        for process in self._started:
            with suppress(psutil.NoSuchProcess):
                top = psutil.Process(process.pid)
                total += sum(each.memory_full_info().pss for each in (top, *top.children(recursive=True)))
        return total

    def close(self) -> None:
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        until = time.monotonic() + self._end_s
        for process in self._started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        self._signal(signal.SIGKILL)  # also what a process left behind
        for process in self._started:
            process.wait()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def _last_line(self) -> str:
        if self._log.closed:
            return "it was ended"
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
        self._log.seek(0, os.SEEK_END)
        return next((line for line in reversed(lines) if line), "it wrote nothing")
