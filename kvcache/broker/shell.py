"""The broker's sockets and clock: moves frames between them and the core, and relays tokens untouched."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path

import psutil

from bus import sockets, wire
from bus.endpoints import endpoints
from bus.messages import SubAck
from bus.security import SecurityConfig
from bus.sockets import Message, Router, Sent, StreamHub, Subscriber
from kvcache.broker.core import BrokerCore
from kvcache.broker.journal import News
from kvcache.broker.recording import Recording
from kvcache.broker.sends import Port, Send
from kvcache.config import BrokerConfig
from kvcache.logs import about
from kvcache.tracing import Tracer

log = logging.getLogger(__name__)

TICK_S = 0.05
MEMORY_S = 1.0
LINGER_MS = 500
LAST_WORDS_S = 0.1
"""Between the last words and the close: a peer's DEALER drops what it has not read when its connection ends."""

Handler = Callable[[bytes, Message, float, str], list[Send]]


class Broker:
    """One broker on its six endpoints. `run` returns when `stop` is set and what was in flight has ended."""

    def __init__(self, config: BrokerConfig, tracer: Tracer | None = None) -> None:
        self._config = config
        self._tracer = tracer
        self._security = SecurityConfig(mode=config.security)
        self.core = BrokerCore(config, incarnation=time.time_ns(), now=time.monotonic(), is_tracing=tracer is not None)
        self.core.gauges.pid = os.getpid()
        self.core.gauges.version = version("kvcache")
        self._routers: dict[Port, Router] = {}
        self._recording: Recording | None = None
        self._memory_due = 0.0

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`; then drain. Raises Forbidden or ConnectionLost if an endpoint cannot be bound.

        Raises BadArgument if the file to record to cannot be opened.
        """
        at = endpoints(self._config.bind)
        with ExitStack() as stack:
            if self._config.record:
                self._recording = stack.enter_context(Recording(Path(self._config.record), time.monotonic()))
            context = stack.enter_context(sockets.Context())
            hub = stack.enter_context(
                StreamHub(context, self._security, allow=self.core.allows, on_allowed=self._acknowledge)
            )
            tokens = stack.enter_context(Subscriber(context, sockets.TOKENS, self._security, self._relay))
            self._hub = hub
            for port, lane, address, handler in (
                (Port.CLIENT, sockets.CONTROL, at.control, self.core.on_client),
                (Port.CLIENT_BULK, sockets.BULK, at.bulk, self.core.on_client_bulk),
                (Port.WORKER, sockets.CONTROL, at.worker_control, self.core.on_worker),
                (Port.WORKER_BULK, sockets.BULK, at.worker_bulk, self.core.on_worker_bulk),
            ):
                router = stack.enter_context(Router(context, lane, self._security, self._receiver(port, handler)))
                router.bind(address)
                self._routers[port] = router
            hub.bind(at.streams)
            tokens.bind(at.tokens)
            tokens.subscribe(b"")
            for socket in (*self._routers.values(), hub, tokens):
                socket.start()
            on_ready()
            await self._serve(stop)
            await asyncio.sleep(LAST_WORDS_S)
            for socket in (*self._routers.values(), hub):
                socket.close(LINGER_MS)

    async def _serve(self, stop: asyncio.Event) -> None:
        """Tick until told to stop and drained, or until draining has taken too long."""
        process = psutil.Process()
        due = time.monotonic() + TICK_S
        drain_until: float | None = None
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            now = time.monotonic()
            self._update_gauges(process, now, now - due)
            due = now + TICK_S
            self._perform(self.core.tick(now))
            self._trace()
            if self._recording is not None:
                self._recording.flush()
            for news in self.core.take_news():
                log.log(_level(news), "%s", news.text, extra=about(news.request_id))
            if stop.is_set() and drain_until is None:
                log.info("draining: %d requests in flight", self.core.inflight)
                self.core.drain()
                drain_until = now + self._config.drain_ms / 1000
            if drain_until is not None and (not self.core.inflight or now > drain_until):
                self._perform(self.core.farewell())
                return

    def _update_gauges(self, process: psutil.Process, now: float, lag_s: float) -> None:
        gauges = self.core.gauges
        gauges.loop_lag_s = max(0.9 * gauges.loop_lag_s, lag_s)
        if now >= self._memory_due:
            self._memory_due = now + MEMORY_S
            with suppress(OSError):  # to look takes a descriptor, of which peers may have left us none
                gauges.rss_bytes = process.memory_info().rss
        gauges.refused_subscriptions = self._hub.refused
        gauges.dropped_sends = sum(router.dropped for router in self._routers.values())
        gauges.queued_messages = sum(router.queued for router in self._routers.values())

    def _receiver(self, port: Port, handler: Handler) -> Callable[[list[Message]], None]:
        """The callback of one socket. A bug that one message brings out never stops the messages behind it."""
        user_id = self._security.user_id

        def receive(batch: list[Message]) -> None:
            now = time.monotonic()
            for link, *frames in batch:
                try:
                    if port is Port.CLIENT and self._recording is not None:
                        self._recording.asked(bytes(link), frames, now)
                    self._perform(handler(bytes(link), frames, now, user_id))
                except Exception:
                    log.exception("a message of a %s could not be handled", port.value)
                    if port is Port.CLIENT or port is Port.CLIENT_BULK:
                        self._perform(self.core.on_fault(port, bytes(link), frames))
            self._trace()

        return receive

    def _trace(self) -> None:
        """Export the spans that have just ended."""
        if self._tracer is not None and (spans := self.core.take_spans()):
            now = time.monotonic()
            for span in spans:
                self._tracer.record(span, now)

    def _perform(self, sends: list[Send]) -> None:
        for send in sends:
            if send.port is Port.CLIENT and self._recording is not None:
                self._recording.answered(send.link, send.frames)
            outcome = self._routers[send.port].send(send.link, send.frames)
            if outcome is Sent.FULL or outcome is Sent.GONE:
                self._perform(self.core.on_unsent(send, is_gone=outcome is Sent.GONE))

    def _relay(self, batch: list[Message]) -> None:
        """Tokens from workers to whoever subscribed; never parsed here. What has no topic before it goes nowhere."""
        send = self._hub.send
        for frames in batch:
            for topic, frame in zip(frames[::2], frames[1::2], strict=False):
                send((topic, frame))
            self.core.gauges.tokens_relayed += len(frames) // 2

    def _acknowledge(self, topic: bytes) -> None:
        self._hub.send([topic, wire.encode(SubAck())])


def _level(news: News) -> int:
    if news.request_id:
        return logging.DEBUG
    return logging.WARNING if news.is_bad else logging.INFO
