"""The client's sockets and clock: carries messages between one broker and the core, and performs what it decides.

It has no tasks: sockets call back from the running loop, and a timer ticks. Large transfers wait here for room on
the bulk lane, so that its bounded queue is never overrun and a request that has ended sends no more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import msgspec

from bus import messages as m
from bus import sockets, wire
from bus.endpoints import Endpoints
from bus.errors import KVCacheError, ProtocolError
from bus.messages import AttachBulk, Chunk, StreamBeat, StreamTokens, SubAck
from bus.security import SecurityConfig
from bus.sockets import Dealer, Message, Sent, Subscriber
from bus.topics import stream_of, topic_of
from kvcache.client.calls import Action, Call, Emit, Fail, Settle, ToBulk, ToControl, Unwatch, Watch
from kvcache.client.core import ClientCore, corrupt

log = logging.getLogger(__name__)

TICK_S = 0.05
BULK_QUEUE = 16
BULK_RETRY_S = 0.002
LINGER_MS = 100

Deliver = Callable[[Emit | Settle | Fail], None]


class Connection:
    """Made inside a running loop, and closed there. `deliver` is told what calls have to say."""

    def __init__(self, core: ClientCore, at: Endpoints, security: SecurityConfig, deliver: Deliver) -> None:
        self._core = core
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._bulk_out: deque[ToBulk] = deque()
        self._pump_due: asyncio.TimerHandle | None = None
        self._is_attaching = False
        with ExitStack() as stack:
            context = stack.enter_context(sockets.Context())
            self._control = stack.enter_context(Dealer(context, sockets.CONTROL, security, self._on_frames))
            self._bulk = stack.enter_context(Dealer(context, sockets.BULK, security, self._on_frames))
            self._streams = stack.enter_context(Subscriber(context, sockets.TOKENS, security, self._on_published))
            for socket, address in ((self._control, at.control), (self._bulk, at.bulk), (self._streams, at.streams)):
                socket.connect(address)
                socket.start()
            self._resources = stack.pop_all()
        self._timer = self._loop.call_soon(self._tick)

    def submit(self, call: Call) -> None:
        """Begin a call; its end is delivered, perhaps before this returns."""
        self._perform(self._core.submit(call, time.monotonic()))

    def abandon(self, key: bytes) -> None:
        """Nobody waits for this call any more."""
        self._perform(self._core.abandon(key))

    def consume(self, key: bytes, upto: int) -> None:
        """The reader of a generation has used its tokens below `upto`."""
        self._perform(self._core.consume(key, upto, time.monotonic()))

    def close(self) -> None:
        """Say goodbye and close the sockets. What was under way ends without a word; its waiters are the caller's."""
        self._timer.cancel()
        if self._pump_due is not None:
            self._pump_due.cancel()
        self._perform(self._core.close())
        self._control.close(LINGER_MS)
        self._resources.close()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_S, self._tick)
        was_joined = self._core.is_joined
        try:
            actions = self._core.tick(time.monotonic())
            if was_joined and not self._core.is_joined:
                self._control.forget_queue()  # it was meant for a broker that is gone, or does not listen
            self._perform(actions)
        except Exception:
            log.exception("the client's timer met a fault")

    def _on_frames(self, batch: list[Message]) -> None:
        for frames in batch:
            try:
                self._perform(self._read(frames))
            except Exception:
                log.exception("a message could not be handled")

    def _read(self, frames: Message) -> Sequence[Action]:
        now = time.monotonic()
        try:
            message, payload = wire.decode(frames, verify_payload=False)
        except ProtocolError as error:
            return self._core.on_broken(wire.request_id_of(frames[0]) if frames else wire.NO_REQUEST, error, now)
        if payload:
            try:
                wire.check_payload(message.payload, payload)
            except ProtocolError as error:
                return self._core.on_broken(wire.request_id_of(frames[0]), corrupt(error), now)
        return self._core.on_message(message, payload, now)

    def _on_published(self, batch: list[Message]) -> None:
        now = time.monotonic()
        for frames in batch:
            stream_id = stream_of(bytes(frames[0]))
            try:
                message = wire.decode(frames[1:]).message
            except KVCacheError as error:
                log.warning("a message on a stream could not be read, and will be asked for again: %s", error)
                continue
            if stream_id is not None and isinstance(message, SubAck | StreamTokens | StreamBeat):
                try:
                    self._perform(self._core.on_stream(stream_id, message, now))
                except Exception:
                    log.exception("a message on a stream could not be handled")

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case ToControl():
                    self._send(action)
                case ToBulk():
                    self._bulk_out.append(action)
                case Watch():
                    self._streams.subscribe(topic_of(action.stream_id))
                case Unwatch():
                    self._streams.unsubscribe(topic_of(action.stream_id))
                case Emit() | Settle() | Fail():
                    self._deliver(action)
        if self._bulk_out and self._pump_due is None:
            self._pump()

    def _send(self, action: ToControl) -> None:
        frame = self._encoded(action.message)
        if frame is not None and self._control.send([frame, *action.payload]) is Sent.FULL:
            self._perform(self._core.on_unsent(_request_of(action.message), time.monotonic()))

    def _encoded(self, message: m.Message) -> bytes | None:
        """Frame 0; None if there can be none, of which whoever asked has been told."""
        try:
            return wire.encode(message)
        except ProtocolError as error:  # names and stop strings that are too long together
            self._perform(self._core.on_broken(_request_of(message), error, time.monotonic()))
            return None

    def _pump(self) -> None:
        """Send what waits for the bulk lane, as far as there is room; come back soon if some is left."""
        self._pump_due = None
        while self._bulk_out and self._bulk.queued < BULK_QUEUE:
            message, payload = self._bulk_out[0].message, self._bulk_out.popleft().payload
            if isinstance(message, AttachBulk):
                self._bulk.send([wire.encode(message)])
                self._is_attaching = True
                continue
            if not self._core.is_pending(message.req_id):
                continue
            if isinstance(message, Chunk):
                message = msgspec.structs.replace(message, payload=wire.describe(payload))
            frame = self._encoded(message)
            if frame is not None:
                self._bulk.send([frame, *payload])
        if self._is_attaching and not self._bulk.queued:
            self._is_attaching = False
            self._perform(self._core.on_attached(time.monotonic()))
        if self._bulk_out or self._is_attaching:
            self._pump_later()

    def _pump_later(self) -> None:
        if self._pump_due is None:
            self._pump_due = self._loop.call_later(BULK_RETRY_S, self._pump)


def _request_of(message: m.Message) -> bytes:
    return getattr(message, "req_id", wire.NO_REQUEST)
