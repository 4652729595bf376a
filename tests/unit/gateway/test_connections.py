"""A connection between its requests, with bytes and transport played by the test."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from kvcache.gateway.connections import guarded_protocol
from tests.harness.waiting import until

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
HEAD_OF_MORE = b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n"


class Wire(asyncio.Transport):
    """Remembers what was written, and whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def answered(request: bytes, idle_s: float) -> tuple[HttpToolsProtocol, Wire]:
    """A connection whose first request has its answer, and which may be idle for so long."""
    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None)
    config.load()
    config.timeout_keep_alive = idle_s  # type: ignore[assignment]  # it is only added to a time
    connection, wire = guarded_protocol(60.0, lambda status: None)(config, ServerState(), {}), Wire()
    connection.connection_made(wire)
    connection.data_received(request)
    await until(lambda: wire.written.endswith(b"ok"), "the request is answered")
    return connection, wire


@pytest.mark.parametrize(("request_", "more"), [(REQUEST, b"\r\n"), (HEAD_OF_MORE, b"of a body")])
async def test_bytes_that_begin_no_request_do_not_keep_an_idle_connection(request_: bytes, more: bytes) -> None:
    connection, wire = await answered(request_, 0.1)
    connection.data_received(more)
    await until(lambda: wire.is_closed, "the connection is closed", 10.0)
    connection.connection_lost(None)


async def test_a_request_that_begins_ends_the_idle_time() -> None:
    connection, _ = await answered(REQUEST, 60)
    clock = connection.timeout_keep_alive_task
    assert clock is not None
    connection.data_received(REQUEST[:5])
    assert clock.cancelled()
    connection.connection_lost(None)
