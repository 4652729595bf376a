"""Sockets for streams: a publisher, a subscriber, and the hub between them that says who may subscribe to what."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import zmq

from bus.security import SecurityConfig
from bus.sockets.lanes import SUBSCRIPTIONS
from bus.sockets.libzmq import NOBLOCK, Context, receive
from bus.sockets.socket import DRAIN_LIMIT, Message, Socket
from bus.wire import Buffer


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
                frame = receive(self._socket, NOBLOCK, copy=False)
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
