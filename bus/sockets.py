"""ZeroMQ, all of it: the one file that imports zmq.

A `Socket` is a plain zmq socket drained on its file descriptor by the running event loop, one reader
and one writer in one thread. It hands each drained batch to a callback at once, as an asyncio protocol
does; awaiting message by message costs four times as much (docs/PROTOCOL.md). What the callback may
rely on, and why the code is as it is:

- nothing is ever cancelled inside a receive, so no message is lost to a timeout;
- sends never block: what libzmq will not take now waits in a queue of ours, bounded per peer, in order;
  when that is full the send reports `Sent.FULL` and the message is not sent: the caller decides;
- a ROUTER is always MANDATORY: a peer that is gone is reported (`Sent.GONE`), never a silent hole;
- the descriptor is edge-triggered and a send can swallow the edge, so events are looked at again after
  every batch and after every send.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import socket as stdlib_socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import zmq

from bus.errors import BadArgument, ConnectionLost
from bus.limits import CHUNK_BYTES
from bus.security import SecurityConfig
from bus.wire import MAX_FRAME_BYTES, Buffer

DRAIN_LIMIT = 256
FLUSH_RETRY_S = 0.005
CONTROL_MESSAGE_BYTES = CHUNK_BYTES + 64 * 1024
ZERO_COPY_BYTES = 64 * 1024

# pyzmq's convenient methods take four times as long as what they wrap (0.6 us against 2.8 us to send three
# small frames, 1.5 against 2.7 to receive them), and the broker does little else.
_send = zmq.backend.Socket.send
_receive = zmq.backend.Socket.recv
_get = zmq.backend.Socket.get
_SEND_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_NOBLOCK = int(zmq.NOBLOCK)
_EVENTS = int(zmq.EVENTS)
_READABLE = int(zmq.POLLIN)

Message = list[Buffer]
OnBatch = Callable[[list[Message]], None]


class Sent(enum.Enum):
    """What became of a send. QUEUED goes out in order unless the peer leaves; FULL and GONE were not sent at all."""

    DONE = enum.auto()
    QUEUED = enum.auto()
    FULL = enum.auto()
    GONE = enum.auto()


@dataclass(frozen=True, slots=True)
class Lane:
    """Socket options of one kind of traffic; queue_limit is ours, in messages per peer, beyond libzmq's HWM.

    silence_ms: how long a connection may say nothing at all before libzmq ends it. A message counts when it is whole.
    0: for ever, where peers may not know ZeroMQ's heartbeats.
    """

    send_hwm: int
    receive_hwm: int
    max_message_bytes: int
    queue_limit: int
    silence_ms: int
    zero_copy: bool = False


CONTROL = Lane(
    send_hwm=256, receive_hwm=256, max_message_bytes=CONTROL_MESSAGE_BYTES, queue_limit=1024, silence_ms=1500
)
# A chunk has so long to arrive, so the slowest link that carries bulk data does some 70 kB/s.
BULK = Lane(
    send_hwm=4,
    receive_hwm=4,
    max_message_bytes=CHUNK_BYTES + 4096,
    queue_limit=64,
    silence_ms=15_000,
    zero_copy=True,
)
TOKENS = Lane(send_hwm=4000, receive_hwm=4000, max_message_bytes=16 * 1024, queue_limit=0, silence_ms=3000)
SUBSCRIPTIONS = Lane(send_hwm=4000, receive_hwm=1000, max_message_bytes=64, queue_limit=0, silence_ms=3000)
# Readers are not ours. A replay is queued whole, twice what is kept of events, and shares its bytes with the others.
KV_EVENTS = Lane(send_hwm=10_000, receive_hwm=64, max_message_bytes=64, queue_limit=20_000, silence_ms=0)


class Context:
    """libzmq's I/O threads; closes every socket that was made from it.

    touched: while one of its sockets hands out a batch, those that were sent on meanwhile; else None.
    """

    def __init__(self, *, io_threads: int = 1, max_sockets: int = 4096) -> None:
        self.touched: list[Socket] | None = None
        self._zmq = zmq.Context(io_threads)
        self._zmq.set(zmq.MAX_SOCKETS, max_sockets)

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


class Socket:
    """The part every kind shares. Make a subclass; `start` inside a running loop, `close` in the same function."""

    kind: int

    def __init__(self, context: Context, lane: Lane, security: SecurityConfig, on_batch: OnBatch) -> None:
        self.lane = lane
        self.dropped = 0
        self._security = security
        self._on_batch = on_batch
        self._socket = _open(context, self.kind, lane)
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
        for socket in touched:
            socket._recheck()

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
                frame = _receive(socket, _NOBLOCK, copy=False)
                message: Message = [frame.bytes]
                while frame.more:
                    frame = _receive(socket, _NOBLOCK, copy=False)
                    message.append(_view(frame) if zero_copy else frame.bytes)
                batch.append(message)
                if len(batch) == 1 and not self._is_readable():
                    break  # it came alone, as most do; to be told so by an exception takes three times as long
        except zmq.Again:
            pass
        return batch

    def _is_readable(self) -> bool:
        return bool(int(_get(self._socket, _EVENTS)) & _READABLE)

    def _recheck_soon(self) -> None:
        """After a send: the descriptor's edge may be gone. One look at the end of the batch or of the loop's turn."""
        if self._recheck_due or self._loop is None:
            return
        self._recheck_due = True
        if self._context.touched is not None:
            self._context.touched.append(self)
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
                self._socket.send_multipart([_part(frame) for frame in frames], zmq.NOBLOCK, copy=False)
            else:
                for frame in frames[:-1]:
                    _send(self._socket, frame, _SEND_MORE)
                _send(self._socket, frames[-1], _NOBLOCK)
        except zmq.Again:
            return False
        finally:
            self._recheck_soon()  # a send that fails has looked at the socket's commands too
        return True


class Dealer(Socket):
    """One peer, found by address. Sends queue (bounded) while it is away."""

    kind = zmq.DEALER

    def __init__(self, context: Context, lane: Lane, security: SecurityConfig, on_batch: OnBatch) -> None:
        super().__init__(context, lane, security, on_batch)
        self._queue: deque[Sequence[Buffer]] = deque()

    @property
    def queued(self) -> int:
        return len(self._queue)

    def send(self, frames: Sequence[Buffer]) -> Sent:
        """Send or queue one message."""
        if not self._queue and self._try_send(frames):
            return Sent.DONE
        if len(self._queue) >= self.lane.queue_limit:
            self.dropped += 1
            return Sent.FULL
        self._queue.append(frames)
        self._retry_later()
        return Sent.QUEUED

    def forget_queue(self) -> None:
        """Drop what waits: the peer it was meant for is known to be gone."""
        self._queue.clear()

    def _flush(self) -> None:
        while self._queue and self._try_send(self._queue[0]):
            self._queue.popleft()


class Router(Socket):
    """Many peers, by the routing ids that libzmq gave them; received messages begin with that id."""

    kind = zmq.ROUTER

    def __init__(self, context: Context, lane: Lane, security: SecurityConfig, on_batch: OnBatch) -> None:
        super().__init__(context, lane, security, on_batch)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._queues: dict[bytes, deque[Sequence[Buffer]]] = {}

    @property
    def queued(self) -> int:
        return sum(map(len, self._queues.values()))

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> Sent:
        """Send or queue one message for `peer`."""
        queue = self._queues.get(peer)
        if queue is None:
            outcome = self._offer(peer, frames)
            if outcome is not Sent.QUEUED:
                return outcome
            self._queues[peer] = deque([frames])
            self._retry_later()
            return Sent.QUEUED
        if len(queue) >= self.lane.queue_limit:
            self.dropped += 1
            return Sent.FULL
        queue.append(frames)
        return Sent.QUEUED

    def _offer(self, peer: bytes, frames: Sequence[Buffer]) -> Sent:
        try:
            return Sent.DONE if self._try_send([peer, *frames]) else Sent.QUEUED
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                return Sent.GONE
            raise

    def _flush(self) -> None:
        for peer in list(self._queues):
            queue = self._queues[peer]
            while queue:
                outcome = self._offer(peer, queue[0])
                if outcome is Sent.QUEUED:
                    break
                if outcome is Sent.GONE:
                    queue.clear()
                    break
                queue.popleft()
            if not queue:
                del self._queues[peer]


class Publisher(Socket):
    """A worker's tokens, or its block events.

    What a full or absent subscriber misses is dropped; sequence numbers reveal it.
    """

    kind = zmq.PUB

    def send(self, frames: Sequence[Buffer]) -> None:
        self._try_send(frames)


class Subscriber(Socket):
    """Receives the topics it subscribed to, as `[topic, frame 0]`."""

    kind = zmq.SUB

    def subscribe(self, topic: bytes) -> None:
        self._socket.setsockopt(zmq.SUBSCRIBE, topic)

    def unsubscribe(self, topic: bytes) -> None:
        self._socket.setsockopt(zmq.UNSUBSCRIBE, topic)


class StreamHub(Socket):
    """An XPUB in manual mode: a subscription counts only if `allow(topic)` says so, then `on_allowed` is told.

    In manual mode `SUBSCRIBE` applies to the peer whose request was read last, so each request is decided
    before the next one is read. An unsubscription must be repeated to libzmq, or data would go on flowing.

    libzmq 4.3.5 loses count of which peer asked what once some peer sends a message that is no request, as an XSUB
    may: an approval then goes to whoever asked next. So from such a message on, until all that has arrived is read
    and the count is right again, every request is refused. Who asked in good faith asks again.
    """

    kind = zmq.XPUB

    def __init__(
        self,
        context: Context,
        security: SecurityConfig,
        *,
        allow: Callable[[bytes], bool],
        on_allowed: Callable[[bytes], None],
    ) -> None:
        super().__init__(context, SUBSCRIPTIONS, security, lambda batch: None)
        self._socket.setsockopt(zmq.XPUB_MANUAL, 1)
        self._allow = allow
        self._on_allowed = on_allowed
        self._is_miscounted = False
        self.refused = 0

    def send(self, frames: Sequence[Buffer]) -> None:
        self._try_send(frames)

    def _receive_batch(self) -> list[Message]:
        for _ in range(DRAIN_LIMIT):
            try:
                frame = _receive(self._socket, _NOBLOCK, copy=False)
            except zmq.Again:
                self._is_miscounted = False
                break
            request = frame.bytes
            if frame.more or request[:1] not in {b"\x00", b"\x01"}:
                self._is_miscounted = True
            elif request[:1] == b"\x01":
                self._decide(request[1:])
            else:
                self._socket.setsockopt(zmq.UNSUBSCRIBE, request[1:])
        else:
            self._recheck_soon()
        return []

    def _decide(self, topic: bytes) -> None:
        if not self._is_miscounted and self._allow(topic):
            self._socket.setsockopt(zmq.SUBSCRIBE, topic)
            self._on_allowed(topic)
        else:
            self.refused += 1


def _view(frame: zmq.Frame) -> Buffer:
    """Small frames as bytes (they are parsed), large ones as a read-only view of what libzmq received."""
    if len(frame) <= MAX_FRAME_BYTES:
        return frame.bytes
    return frame.buffer.toreadonly()


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


def _part(frame: Buffer) -> Buffer | zmq.Frame:
    """What libzmq received and nobody changed goes out as it is, counted by reference; the rest by its address."""
    if isinstance(frame, memoryview) and isinstance(frame.obj, zmq.Frame) and frame.nbytes == len(frame.obj):
        return frame.obj
    return frame


def _open(context: Context, kind: int, lane: Lane) -> zmq.Socket[bytes]:
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
