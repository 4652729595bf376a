"""libzmq, through pyzmq: the context, a socket with all options set, and the calls that are made for every message."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import zmq

from bus.sockets.lanes import Lane
from bus.wire import MAX_FRAME_BYTES, Buffer

ZERO_COPY_BYTES = 160 * 1024
MAX_SOCKETS = 4096

# pyzmq's convenient methods take four times as long as what they wrap (0.6 us against 2.8 us to send three
# small frames, 1.5 against 2.7 to receive them), and the broker does little else.
send = zmq.backend.Socket.send
receive = zmq.backend.Socket.recv
get_option = zmq.backend.Socket.get
SEND_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
NOBLOCK = int(zmq.NOBLOCK)
EVENTS = int(zmq.EVENTS)
READABLE = int(zmq.POLLIN)


class Context:
    """libzmq's I/O thread; closes every socket that was made from it.

    touched: while one of its sockets hands out a batch, how to look again at those that were sent on
    meanwhile; else None.
    """

    def __init__(self) -> None:
        self.touched: list[Callable[[], None]] | None = None
        self._zmq = zmq.Context()
        self._zmq.set(zmq.MAX_SOCKETS, MAX_SOCKETS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._zmq.destroy(linger=0)

    def raw(self, kind: int) -> zmq.Socket[bytes]:
        return self._zmq.socket(kind)


def open_socket(context: Context, kind: int, lane: Lane) -> zmq.Socket[bytes]:
    socket = context.raw(kind)
    socket.setsockopt(zmq.SNDHWM, lane.send_hwm)
    socket.setsockopt(zmq.RCVHWM, lane.receive_hwm)
    socket.setsockopt(zmq.MAXMSGSIZE, lane.max_message_bytes)
    socket.setsockopt(zmq.LINGER, 0)
    if kind == zmq.DEALER:
        socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.HEARTBEAT_IVL, lane.silence_ms // 3)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, lane.silence_ms)
    socket.setsockopt(zmq.HEARTBEAT_TTL, lane.silence_ms * 4 // 3)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 1000)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.BACKLOG, 1024)
    if lane.zero_copy:
        socket.setsockopt(zmq.SNDBUF, 4 << 20)
        socket.setsockopt(zmq.RCVBUF, 4 << 20)
        socket.copy_threshold = ZERO_COPY_BYTES
    return socket


def view_of(frame: zmq.Frame) -> Buffer:
    """Small frames as bytes (they are parsed), large ones as a read-only view of what libzmq received."""
    if len(frame) <= MAX_FRAME_BYTES:
        return frame.bytes
    return frame.buffer.toreadonly()


def part_of(frame: Buffer) -> Buffer | zmq.Frame:
    """What libzmq received and nobody changed goes out as it is, counted by reference; the rest by its address."""
    if isinstance(frame, memoryview) and isinstance(frame.obj, zmq.Frame) and frame.nbytes == len(frame.obj):
        return frame.obj
    return frame
