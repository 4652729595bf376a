"""An engine in a process of its own, asked line by line; it stands still while another one is measured."""

from __future__ import annotations

import json
import os
import selectors
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, NoReturn

from kvcache.bench.peers.environments import PeerUnavailable
from kvcache.bench.peers.processes import Processes

ANSWER_S = 600.0
CLOSE_S = 10.0


class PeerProcess:
    """`ask` it; `close` it. Raises PeerUnavailable whenever it ends, is silent for ten minutes or reports an error."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self._processes = Processes(end_s=0.0)
        self._process = self._processes.start(command, variables, is_asked=True)

    def ask(self, **request: Any) -> dict[str, Any]:  # noqa: ANN401 (a line of JSON)
        """One request, one answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            self._ended()
        answer: dict[str, Any] = json.loads(self._read_line())
        if "error" in answer:
            raise PeerUnavailable(str(answer["error"]).strip().splitlines()[0])
        return answer

    def awake(self) -> AbstractContextManager[None]:
        """Let it run within; outside it is stopped, so that its idle threads take nothing from the others."""
        return self._processes.awake()

    def close(self) -> None:
        self._processes.close()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what it never read
                    pipe.close()

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
                    self._ended()
                line += piece
        return line

    def _ended(self) -> NoReturn:
        self._process.wait(CLOSE_S)
        self._processes.check()
        raise AssertionError("a process that has ended is found to have")
