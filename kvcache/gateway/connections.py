"""uvicorn's connection, with what it has no limits for: how long a request's head may take, and how long it may be.

Without them, one caller could hold connections for ever by sending a header byte now and then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvcache.gateway.problems import Problem

MAX_HEAD_BYTES = 64 * 1024
_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


def guarded_protocol(head_timeout_s: float, on_refusal: Callable[[int], None]) -> type[HttpToolsProtocol]:
    """A protocol that gives each request's head so many seconds, from its first byte or the connection's begin.

    on_refusal: is told the status of each answer that is given here, to what never became a request.
    """

    class GuardedProtocol(HttpToolsProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as its parent
            super().connection_made(transport)
            self._num_head_bytes = 0
            self._timer: asyncio.TimerHandle | None = None
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_there()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._timer is not None:
                self._num_head_bytes += len(data)
            idle, self.timeout_keep_alive_task = self.timeout_keep_alive_task, None
            # A body may come with its head, so only what the parser still calls a head counts.
            super().data_received(data)
            if idle is not None:
                self._stop_unless_idle(idle)
            if self._timer is not None and self._num_head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, f"the request's head is larger than {MAX_HEAD_BYTES} bytes")

        def _stop_unless_idle(self, clock: asyncio.TimerHandle) -> None:
            """uvicorn stops the clock of an idle connection at any byte, though a late body's begin no request."""
            if self._timer is None and self.cycle.response_complete:
                self.timeout_keep_alive_task = clock
            else:
                clock.cancel()

        def on_message_begin(self) -> None:
            self._expect_head()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head_is_there()
            super().on_headers_complete()

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, msg)

        def _expect_head(self) -> None:
            if self._timer is None:
                self._num_head_bytes = 0
                message = f"the request's head did not arrive within {head_timeout_s:g} s"
                self._timer = self.loop.call_later(head_timeout_s, self._refuse, 408, message)

        def _head_is_there(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _refuse(self, status: int, message: str) -> None:
            self._head_is_there()
            if self.transport.is_closing():
                return
            problem = Problem(status, message, closes=True)
            body = problem.body()
            headers: dict[str, Any] = problem.headers() | {"content-length": len(body)}
            lines = [f"HTTP/1.1 {status} {_REASONS[status]}", *(f"{name}: {value}" for name, value in headers.items())]
            on_refusal(status)
            self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            self.transport.close()

    return GuardedProtocol
