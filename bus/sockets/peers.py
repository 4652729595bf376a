"""Sockets for messages to one peer, or to each of many: what cannot leave now waits in order, within a bound."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Sequence

import zmq

from bus.security import SecurityConfig
from bus.sockets.lanes import Lane, Sent
from bus.sockets.libzmq import Context
from bus.sockets.socket import OnBatch, Socket
from bus.wire import Buffer


class Dealer(Socket):
    """One peer, found by address. Sends queue (bounded) while it is away."""

    kind = zmq.DEALER

    def __init__(self, context: Context, lane: Lane, security: SecurityConfig, on_batch: OnBatch) -> None:
        super().__init__(context, lane, security, on_batch)
        self._queue: deque[Sequence[Buffer]] = deque()

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def room(self) -> int:
        """How many more messages are taken now, whatever libzmq has room for."""
        return self.lane.queue_limit - len(self._queue)

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
