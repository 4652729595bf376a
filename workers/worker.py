"""The worker's sockets and clock: moves frames and events between the brokers, the engine and the core.

Three connections to each broker: control and bulk (so that a tensor never delays a heartbeat) and one to
publish tokens through; those between workers are in `peer_sockets`. Everything here runs on the loop; the
model runs in the engine's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import TypeAlias, assert_never

import msgspec
import psutil

from bus import sockets
from bus.endpoints import endpoints
from bus.errors import InternalError
from bus.messages import WorkerHello, WorkerState
from bus.security import SecurityConfig
from bus.sockets import Context, Dealer, Message, Publisher, Sent
from bus.wire import Buffer
from kvcache.tracing import Tracer
from workers.calls import Action, Announce, Channel, Forget, HangUp, Publish, Record, Send, Tell, ToCaller, ToPeer
from workers.core import WorkerCore
from workers.engine import EngineThread
from workers.engine_api import Event, Load
from workers.failpoints import Failpoint
from workers.kv_event_sockets import KvEventsConfig, KvEventSockets
from workers.loading import Models
from workers.memory import HostMemory
from workers.model_budget import ModelBudget
from workers.peer_sockets import PeerSockets
from workers.relays import through_broker
from workers.store import KVStore
from workers.tasks import MAX_NUM_SEQS, CacheConfig

log = logging.getLogger(__name__)

TICK_S = 0.05
MEMORY_S = 1.0
LINGER_MS = 500

Published: TypeAlias = dict[int, list[Buffer]]
"""Topics and frames in turn, by broker."""


class Worker:
    """One worker process. `run` returns when `stop` is set and what was in progress has ended.

    brokers: their addresses. budget: of the models' memory. preload: names to load before the worker is ready.
    kv_events: where block events are told. failpoint: for fault tests. tracer: where spans go, None for nowhere.
    """

    def __init__(
        self,
        hello: WorkerHello,
        brokers: Sequence[str],
        models: Models,
        budget: ModelBudget,
        *,
        kv_plane_bytes: int,
        max_tokens_per_step: int,
        max_num_seqs: int = MAX_NUM_SEQS,
        shares_prefixes: bool = True,
        cache: CacheConfig = CacheConfig(),
        kv_events: KvEventsConfig | None = None,
        preload: Sequence[str] = (),
        failpoint: str = "",
        tracer: Tracer | None = None,
    ) -> None:
        self._brokers = [endpoints(url) for url in brokers]
        self._models = models
        self._budget = budget
        self._max_tokens_per_step = max_tokens_per_step
        self._max_num_seqs = max_num_seqs
        self._shares_prefixes = shares_prefixes
        self._cache = cache
        self._kv_events_config = kv_events
        self._kv_events: KvEventSockets | None = None
        self._preload = tuple(preload)
        self._security = SecurityConfig()
        self._failpoint = Failpoint(failpoint) if failpoint else None
        self._tracer = tracer
        self._hello = hello
        self._store = KVStore(HostMemory(kv_plane_bytes))
        self._core: WorkerCore
        self._peers: PeerSockets
        self._lanes: dict[tuple[int, Channel], Dealer] = {}
        self._publishers: list[Publisher] = []
        self._engine: EngineThread

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`, then drain, say goodbye and close. Raises InternalError if the engine has failed."""
        with ExitStack() as stack:
            context = stack.enter_context(sockets.Context())
            self._peers = PeerSockets(context, self._security, stack, self._on_peer_request, self._on_peer_answer)
            if self._kv_events_config is not None:
                self._kv_events = KvEventSockets(context, self._security, stack, self._kv_events_config)
            self._core = WorkerCore(
                msgspec.structs.replace(self._hello, peer_url=self._peers.url),
                self._store,
                num_links=len(self._brokers),
                preloading=self._preload,
                bulk_room=lambda link: self._lanes[link, Channel.BULK].room,
                now=time.monotonic(),
            )
            self._engine = stack.enter_context(
                EngineThread(
                    self._models,
                    self._budget,
                    self._on_engine,
                    on_load=partial(self._reach, "worker.load"),
                    max_tokens_per_step=self._max_tokens_per_step,
                    max_num_seqs=self._max_num_seqs,
                    shares_prefixes=self._shares_prefixes,
                    cache=replace(self._cache, tells_blocks=self._kv_events is not None),
                )
            )
            for name in self._preload:
                self._engine.send(Load(name))
            for number in range(len(self._brokers)):
                self._connect(context, stack, number)
            try:
                await self._serve(stop, on_ready)
            finally:
                self._perform(self._core.farewell())
                for lane in self._lanes.values():
                    lane.close(LINGER_MS)

    def _connect(self, context: Context, stack: ExitStack, number: int) -> None:
        at = endpoints(self._brokers[number].url)
        for channel, lane, address in (
            (Channel.CONTROL, sockets.CONTROL, at.worker_control),
            (Channel.BULK, sockets.BULK, at.worker_bulk),
        ):
            dealer = stack.enter_context(Dealer(context, lane, self._security, self._receiver(number, channel)))
            dealer.connect(address)
            dealer.start()
            self._lanes[number, channel] = dealer
        publisher = stack.enter_context(Publisher(context, sockets.TOKENS, self._security, lambda batch: None))
        publisher.connect(at.tokens)
        self._publishers.append(publisher)

    async def _serve(self, stop: asyncio.Event, on_ready: Callable[[], None]) -> None:
        """Tick until told to stop and drained."""
        process = psutil.Process()
        is_ready = False
        due = memory_due = time.monotonic()
        rss_bytes = 0
        while not self._core.is_drained:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            now = time.monotonic()
            lag_s, due = now - due, now + TICK_S
            if not self._engine.is_alive:
                raise InternalError("the engine has failed; this process can serve nothing more")
            if stop.is_set():
                self._perform(self._core.drain(now))
            if now >= memory_due:
                memory_due = now + MEMORY_S
                with suppress(OSError):  # to look takes a descriptor, of which peers may have left us none
                    rss_bytes = process.memory_info().rss
            self._perform(self._core.tick(self._engine.figures(), now, rss_bytes=rss_bytes, lag_s=lag_s))
            if not is_ready and self._core.has_joined and self._core.state is WorkerState.READY:
                is_ready = True
                on_ready()

    # --- callbacks of sockets and engine: nothing they are given may stop what comes behind it ---

    def _receiver(self, number: int, channel: Channel) -> Callable[[list[Message]], None]:
        handle = self._core.on_control if channel is Channel.CONTROL else self._core.on_bulk

        def receive(batch: list[Message]) -> None:
            now = time.monotonic()
            for frames in batch:
                try:
                    self._perform(handle(number, frames, now))
                except Exception:
                    log.exception("a message of broker %d could not be handled", number)

        return receive

    def _on_peer_request(self, peer: bytes, frames: Message) -> None:
        try:
            self._perform(self._core.on_peer_request(peer, frames, time.monotonic()))
        except Exception:
            log.exception("a message of another worker could not be handled")

    def _on_peer_answer(self, url: str, frames: Message) -> None:
        try:
            self._perform(self._core.on_peer_answer(url, frames, time.monotonic()))
        except Exception:
            log.exception("a message of the worker at %s could not be handled", url)

    def _on_engine(self, events: Sequence[Event]) -> None:
        now = time.monotonic()
        published: Published = {}
        for event in events:
            try:
                self._carry_out(self._core.on_engine(event, now), published)
            except Exception:
                log.exception("%s of the engine could not be handled", type(event).__name__)
        self._publish(published)

    # --- actions ---

    def _perform(self, actions: Sequence[Action]) -> None:
        published: Published = {}
        self._carry_out(actions, published)
        self._publish(published)

    def _carry_out(self, actions: Sequence[Action], published: Published) -> None:
        """All but publishing, which is noted."""
        for action in actions:
            match action:
                case Send():
                    self._send(action)
                case Publish():
                    self._reach("worker.publish")
                    published.setdefault(action.link, []).extend((action.topic, action.frame))
                case Tell():
                    self._engine.send(action.command)
                case Record():
                    if self._tracer is not None:
                        self._tracer.record(action.span, time.monotonic())
                case Forget():
                    self._lanes[action.link, Channel.CONTROL].forget_queue()
                case ToPeer() | ToCaller():
                    relay = through_broker(action)
                    self._send_to_peer(action) if relay is None else self._send(relay)
                case HangUp():
                    self._peers.hang_up(action.url)
                case Announce():
                    if self._kv_events is not None:
                        self._kv_events.publish(action.changes)
                case _:
                    assert_never(action)

    def _publish(self, published: Published) -> None:
        """This goes out last, all for one broker in one message: each message wakes threads on its way."""
        for link, frames in published.items():
            self._publishers[link].send(frames)

    def _send(self, send: Send) -> None:
        if send.call is not None:
            self._reach("worker.reply")
        if send.point and self._reach(send.point):
            return
        outcome = self._lanes[send.link, send.channel].send(send.frames)
        if outcome is Sent.FULL:
            self._perform(self._core.on_unsent(send, time.monotonic()))

    def _send_to_peer(self, action: ToPeer | ToCaller) -> None:
        frames = action.frames
        if isinstance(action, ToPeer):
            is_sent = self._peers.send(action.url, frames)
        else:
            if len(frames) > 1 and self._reach("peer.chunk"):
                frames = [*frames[:-1], bytes(len(frames[-1]))]
            is_sent = self._peers.answer(action.peer, frames)
        if not is_sent:
            self._perform(self._core.on_peer_unsent(action, time.monotonic()))

    def _reach(self, point: str) -> bool:
        """Whether a test wants what is sent here corrupted or dropped."""
        return self._failpoint is not None and self._failpoint.reach(point)
