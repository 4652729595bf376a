"""An engine in a process of its own, asked line by line; it stands still while another one is measured."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from kvcache.bench.peers.environments import PeerUnavailable
from kvcache.orphans import die_with_us

ANSWER_S = 600.0
CLOSE_S = 10.0


class PeerProcess:
    """`ask` it; `close` it. Raises PeerUnavailable whenever it ends, is silent for ten minutes or reports an error."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **variables},
            start_new_session=True,  # so that what it starts stops and ends with it
            preexec_fn=die_with_us(signal.SIGKILL),
        )

    def ask(self, **request: Any) -> dict[str, Any]:  # noqa: ANN401 (a line of JSON)
        """One request, one answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        answer: dict[str, Any] = json.loads(self._read_line())
        if "error" in answer:
            raise PeerUnavailable(str(answer["error"]).strip().splitlines()[0])
        return answer

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run within; outside it is stopped, so that its idle threads take nothing from the others."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait(CLOSE_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what it never read
                    pipe.close()
        self._log.close()

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        deadline, line = time.monotonic() + ANSWER_S, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise PeerUnavailable(f"it did not answer within {ANSWER_S:.0f} s")
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise self._ended()
                line += piece
        return line

    def _ended(self) -> PeerUnavailable:
        self._process.wait(CLOSE_S)
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
        return PeerUnavailable(f"its process ended with status {self._process.returncode}: {' '.join(last)}")

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return
