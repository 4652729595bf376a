"""What every kind of socket shares: drained on its descriptor, sends that never block, a queue for what must wait."""

from __future__ import annotations

import asyncio
import socket as stdlib_socket
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import zmq

from bus.errors import BadArgument, ConnectionLost
from bus.security import SecurityConfig
from bus.sockets.lanes import Lane
from bus.sockets.libzmq import (
    EVENTS,
    NOBLOCK,
    READABLE,
    SEND_MORE,
    Context,
    get_option,
    open_socket,
    part_of,
    receive,
    send,
    view_of,
)
from bus.wire import Buffer

DRAIN_LIMIT = 256
FLUSH_RETRY_S = 0.005

Message = list[Buffer]
OnBatch = Callable[[list[Message]], None]


class Socket:
    """The part every kind shares. Make a subclass; `start` inside a running loop, `close` in the same function.

    Raises ConnectionLost if the process may have no more sockets or descriptors.
    """

    kind: int

    def __init__(self, context: Context, lane: Lane, security: SecurityConfig, on_batch: OnBatch) -> None:
        self.lane = lane
        self.dropped = 0
        self._security = security
        self._on_batch = on_batch
        try:
            self._socket = open_socket(context, self.kind, lane)
        except zmq.ZMQError as error:
            raise ConnectionLost(f"cannot open a socket: {error.strerror or error}") from error
        self._context = context
        self._loop: asyncio.AbstractEventLoop | None = None
        self._recheck_due = False
        self._retry_due = False

    def bind(self, endpoint: str) -> None:
        """Raises Forbidden for an address the security mode does not allow, ConnectionLost if it is taken."""
        self._security.check_bind(endpoint)
        self._allow_ipv6(endpoint)
        if _is_served(endpoint):
            raise ConnectionLost(f"cannot bind {endpoint}: another process serves it")
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConnectionLost(f"cannot bind {endpoint}: {error.strerror or error}") from error

    def bind_free_port(self, host: str) -> str:
        """Bind a port of this host that is free; returns the endpoint. Raises as `bind` does."""
        self.bind(f"tcp://{host}:*")
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def connect(self, endpoint: str) -> None:
        """Returns at once; the connection is made, and made again, behind the scenes. Raises BadArgument."""
        self._allow_ipv6(endpoint)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise BadArgument(f"{endpoint} is no address to connect to: {error.strerror or error}") from error

    def _allow_ipv6(self, endpoint: str) -> None:
        """Only for a literal address: with the option set, a name that has both would only be tried as IPv6."""
        if endpoint.startswith("tcp://["):
            self._socket.setsockopt(zmq.IPV6, 1)

    def start(self) -> None:
        """Begin to drain; callbacks come from the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._drain)
        self._recheck()
        self._retry_later()

    def close(self, linger_ms: int = 0) -> None:
        """Stop draining and close, giving what was sent `linger_ms` to leave. Safe to call twice."""
        if self._socket.closed:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close(linger=linger_ms)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drain(self) -> None:
        if self._socket.closed:
            return
        batch = self._receive_batch()
        touched = self._context.touched = []
        try:
            if batch:
                self._on_batch(batch)
        finally:
            self._context.touched = None
        self._after_batch(len(batch) == DRAIN_LIMIT)
        for look_again in touched:
            look_again()

    def _after_batch(self, may_have_more: bool) -> None:
        if not self._socket.closed:  # the callback may have closed us
            self._flush()
            if may_have_more:
                self._recheck()

    def _receive_batch(self) -> list[Message]:
        batch: list[Message] = []
        socket, zero_copy = self._socket, self.lane.zero_copy
        try:
            while len(batch) < DRAIN_LIMIT:
                frame = receive(socket, NOBLOCK, copy=False)
                message: Message = [frame.bytes]
                while frame.more:
                    frame = receive(socket, NOBLOCK, copy=False)
                    message.append(view_of(frame) if zero_copy else frame.bytes)
                batch.append(message)
                if len(batch) == 1 and not self._is_readable():
                    break  # it came alone, as most do; to be told so by an exception takes three times as long
        except zmq.Again:
            pass
        return batch

    def _is_readable(self) -> bool:
        return bool(int(get_option(self._socket, EVENTS)) & READABLE)

    def _recheck_soon(self) -> None:
        """After a send: the descriptor's edge may be gone. One look at the end of the batch or of the loop's turn."""
        if self._recheck_due or self._loop is None:
            return
        self._recheck_due = True
        if self._context.touched is not None:
            self._context.touched.append(self._recheck)
        else:
            self._loop.call_soon(self._recheck)

    def _recheck(self) -> None:
        self._recheck_due = False
        if self._loop is None or self._socket.closed:
            return
        if self._is_readable():
            self._loop.call_soon(self._drain)

    @property
    def queued(self) -> int:
        """Messages that wait here for room in libzmq."""
        return 0

    def _flush(self) -> None:
        """Send what waits, if anything can wait in this kind of socket."""

    def _retry_later(self) -> None:
        """While something waits, look every few milliseconds whether it can leave: no event would say so."""
        if self._retry_due or self._loop is None or not self.queued:
            return
        self._retry_due = True
        self._loop.call_later(FLUSH_RETRY_S, self._retry)

    def _retry(self) -> None:
        self._retry_due = False
        if not self._socket.closed:
            self._flush()
            self._retry_later()

    def _try_send(self, frames: Sequence[Buffer]) -> bool:
        """Only the first part can be refused: libzmq sends a message whole or not at all."""
        try:
            if self.lane.zero_copy:
                for frame in frames[:-1]:
                    send(self._socket, part_of(frame), SEND_MORE, copy=False)
                send(self._socket, part_of(frames[-1]), NOBLOCK, copy=False)
            else:
                for frame in frames[:-1]:
                    send(self._socket, frame, SEND_MORE)
                send(self._socket, frames[-1], NOBLOCK)
        except zmq.Again:
            return False
        finally:
            self._recheck_soon()  # a send that fails has looked at the socket's commands too
        return True


def _is_served(endpoint: str) -> bool:
    """Whether an ipc path has a listener: libzmq would take the path from under it without a word."""
    scheme, _, path = endpoint.partition("://")
    if scheme != "ipc":
        return False
    with stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
