"""The worker's decisions: what sockets and engine report goes in, what to send and to compute comes out.

Each `on_...` method takes one event and `now` (monotonic seconds) and returns the actions that follow, in
order. There is no socket, thread or clock here. This file joins the parts and owns the worker's state:

    LOADING   models named at start are loading; requests wait for them
    READY     serving
    DRAINING  nothing new; what runs has 10 s, then fails as retryable, and so long each broker may have others copy the
              named sequences and wanted prompts that are here. `is_drained` says when to leave

What becomes of a request stands in `requests`, what a broker may ask of us in `links`, what other workers may in
`peers`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from bus import wire
from bus.errors import KVCacheError, MalformedMessage, WorkerLost
from bus.messages import (
    MAX_BEAT_MODELS,
    AskNodes,
    Assign,
    BrokerBeat,
    CopySequence,
    DropSequences,
    Failed,
    Forward,
    Goodbye,
    Grant,
    HandedOver,
    ModelState,
    Relay,
    Release,
    ReleaseSequence,
    Welcome,
    WorkerHello,
    WorkerSequences,
    WorkerState,
    WorkerStatus,
)
from bus.stats import Holdings, ModelStats, WorkerStats, pack, unpack
from bus.wire import Frames
from workers.calls import Action, Announce, CallId, Channel, Send, ToCaller, ToPeer
from workers.copy_api import BlocksRead, CopyBroke, Filled, Lent, Wanted
from workers.engine_api import BlocksMoved, EngineFigures, Event, NodesMoved
from workers.holdings import HeldSequences
from workers.links import Link, Load
from workers.node_log import NodeLog
from workers.peers import Peers
from workers.requests import Requests
from workers.sequence_giver import Giver
from workers.sequence_taker import Taker
from workers.store import KVStore

log = logging.getLogger(__name__)

DRAIN_S = 10.0
STATUS_S = 1.0
PAGES_PER_TICK = 8


class WorkerCore:
    """One worker's state.

    hello: what this worker says of itself to each of `num_links` brokers. store: the KV plane's memory.
    preloading: models that must be loaded, or have failed to, before the worker is READY.
    bulk_room(link): how many messages more that broker's bulk lane takes now.
    """

    def __init__(
        self,
        hello: WorkerHello,
        store: KVStore,
        *,
        num_links: int,
        preloading: Sequence[str],
        bulk_room: Callable[[int], int],
        now: float,
    ) -> None:
        self._hello = hello
        self._links = [Link(number, hello, now) for number in range(num_links)]
        self._held = HeldSequences(num_links)
        self._requests = Requests(hello.worker_id, store, self._held, self._may_act, bulk_room)
        self._nodes = NodeLog()
        requests = self._requests
        taker = Taker(hello.worker_id, store, self._held, requests.is_written, requests.outdate, requests.adopt)
        self._peers = Peers(hello.worker_id, Giver(store, self._held, requests.receipts), taker)
        self._waits_for: set[int] = set()  # while draining: brokers that may still have others copy from here
        self._malformed = 0
        self._state = WorkerState.LOADING if preloading else WorkerState.READY
        self._preloading = set(preloading)
        self._figures = EngineFigures()
        self._started_at = now
        self._status_due = now
        self._drain_until = float("inf")

    @property
    def state(self) -> WorkerState:
        return self._state

    @property
    def has_joined(self) -> bool:
        """Whether any broker has welcomed this worker."""
        return any(link.welcome is not None for link in self._links)

    @property
    def inflight(self) -> int:
        """Requests without a final answer."""
        return len(self._requests)

    # --- events ---

    def on_control(self, number: int, frames: Frames, now: float) -> list[Action]:
        """A message on a broker's control lane, whatever its bytes."""
        link = self._links[number]
        link.heard(now)
        try:
            message = wire.decode_header(frames[0]) if frames else None
        except KVCacheError as error:
            return self._unreadable(number, error)
        match message:
            case Assign():
                return self._requests.assigned(number, self._peers.route(number, message, now), frames[1:], now)
            case Forward():
                return self._requests.forwarded(number, message, frames[1:], now)
            case BrokerBeat():
                link.granted(message)
                return []
            case AskNodes():
                self._nodes.asked(number, message.after)
                return self._tell_nodes(now)
            case Release():
                return self._requests.released(CallId(number, message.call))
            case Grant():
                return self._peers.granted(message, now)
            case CopySequence():
                return self._peers.ordered(number, message, now, is_closed=self._requests.is_closed)
            case HandedOver():
                return self._handed_over(number, message)
            case DropSequences():
                return self._drop_sequences(number, frames)
            case ReleaseSequence():
                return self._requests.release_sequence(message)
            case Welcome():
                return self._welcomed(link, message, now)
            case Goodbye():
                log.info("broker %d leaves: %s", number, message.reason)
                self._waits_for.discard(number)
                lost = self._lose(link, now)
                link.said_goodbye(now)
                return lost
            case Failed():
                if link.is_news(message.message):
                    log.error("broker %d refuses this worker: %s", number, message.message)
                return []
            case _:
                return self._unreadable(number, MalformedMessage("not a message for a worker's control lane"))

    def on_bulk(self, number: int, frames: Frames, now: float) -> list[Action]:
        """A message on a broker's bulk lane: a change to a sequence, a chunk of one, or what another worker says."""
        self._links[number].heard(now)
        try:
            envelope = wire.decode_header(frames[0]) if frames else None
        except KVCacheError as error:
            return self._unreadable(number, error)
        match envelope:
            case Assign() | Forward() if self._links[number].is_void(envelope.call):
                return []
            case Assign():
                return self._requests.assigned(number, envelope, frames[1:], now)
            case Forward():
                return self._requests.forwarded(number, envelope, frames[1:], now)
            case Relay():
                return self._peers.on_relay(number, envelope, frames[1:], now)
            case _:
                return self._unreadable(number, MalformedMessage("not a message for a worker's bulk lane"))

    def on_engine(self, event: Event, now: float) -> list[Action]:
        """Something the engine has to say."""
        match event:
            case Lent() | BlocksRead() | Wanted() | Filled() | CopyBroke():
                return self._peers.on_engine(event, now)
            case NodesMoved():
                self._nodes.note(event.changes)
                return self._tell_nodes(now)
            case BlocksMoved():
                return [Announce(event.changes)]
            case _:
                return self._requests.on_engine(event, now)

    def on_peer_request(self, peer: bytes, frames: Frames, now: float) -> list[Action]:
        """A message at this worker's own endpoint, from whoever can reach it."""
        return self._peers.on_request(peer, frames, now)

    def on_peer_answer(self, url: str, frames: Frames, now: float) -> list[Action]:
        """A message of the worker at `url`, which this one copies from."""
        return self._peers.on_answer(url, frames, now)

    def on_peer_unsent(self, action: ToPeer | ToCaller, now: float) -> list[Action]:
        """A message to another worker could not be sent: what was to be copied will not be."""
        if isinstance(action, ToPeer):
            return self._peers.lose_peer(action.url, now)
        return self._peers.lose_caller(action.peer)

    def on_unsent(self, send: Send, now: float) -> list[Action]:
        """A message could not even be queued. A request ends, typed; a broker that takes nothing counts as gone."""
        if send.channel is Channel.CONTROL:
            return self._lose(self._links[send.link], now)
        return [] if send.call is None else self._requests.unsent(send.call, send.frames)

    def tick(self, figures: EngineFigures, now: float, *, rss_bytes: int, lag_s: float) -> list[Action]:
        """Time has passed (call it each 50 ms): liveness, deadlines, state, figures."""
        self._figures = figures
        actions = self._tell_nodes(now)
        was, self._state = self._state, self._next_state()
        for link in self._links:
            if link.is_dead(now):
                log.warning("broker %d has fallen silent", link.number)
                actions += self._lose(link, now)
            actions += link.tick(self._state, partial(self._load, link, now), now)
            if was is not self._state:
                actions += link.beat(self._state, self._load(link, now), now)
        actions += self._requests.tick(now)
        actions += self._peers.tick(now)
        actions += self._tell_sequences()
        if now >= self._drain_until:
            if self._waits_for and len(self._held):
                log.warning("this worker leaves before all of its named sequences were copied")
            self._waits_for.clear()
            actions += self._requests.fail_all(WorkerLost("the worker was told to drain and its time is up"))
        if now >= self._status_due:
            self._status_due = now + STATUS_S
            actions += self._status(self.stats(now, rss_bytes=rss_bytes, lag_s=lag_s))
        return actions

    # --- leaving ---

    def drain(self, now: float) -> list[Action]:
        """Take nothing new; tell everybody at once."""
        if self._state is WorkerState.DRAINING:
            return []
        self._state = WorkerState.DRAINING
        self._drain_until = now + DRAIN_S
        self._requests.close()
        if len(self._held):
            self._waits_for = {link.number for link in self._links if link.may_be_back(DRAIN_S, now)}
        elif len(self._nodes):
            self._waits_for = {link.number for link in self._links if link.welcome is not None}
        return [action for link in self._links for action in link.beat(self._state, self._load(link, now), now)]

    @property
    def is_drained(self) -> bool:
        return self._state is WorkerState.DRAINING and not self.inflight and not self._waits_for

    def farewell(self) -> list[Action]:
        """The last words."""
        return [action for link in self._links for action in link.say(Goodbye(reason="drained"))]

    # --- figures ---

    def stats(self, now: float, *, rss_bytes: int, lag_s: float) -> WorkerStats:
        """Everything this worker reports of itself."""
        counts = self._requests.stream_counts
        return WorkerStats(
            worker_id=self._hello.worker_id,
            incarnation=self._hello.incarnation,
            state=self._state.value,
            pid=self._hello.pid,
            uptime_s=round(now - self._started_at, 3),
            rss_bytes=rss_bytes,
            loop_lag_ms=round(lag_s * 1000, 3),
            malformed=self._malformed + self._requests.malformed + self._peers.malformed,
            models=self._figures.models,
            engine=msgspec.structs.replace(
                self._figures.engine, gaps_replayed=counts.gaps_replayed, pulled_streams=counts.pulled_streams
            ),
            store=self._requests.store_stats(now),
            peers=self._peers.stats(),
        )

    def _status(self, stats: WorkerStats) -> list[Action]:
        payload = pack(stats)
        status = WorkerStatus(payload=wire.describe([payload]))
        return [action for link in self._links for action in link.say(status, payload)]

    def _tell_nodes(self, now: float) -> list[Action]:
        """What brokers are to hear of the nodes that this worker holds, as far as it is time."""
        return [
            action
            for link in self._links
            for report, nodes in self._nodes.reports(link.number, now)
            for action in link.say(report, nodes, point="worker.nodes")
        ]

    def _load(self, link: Link, now: float) -> Load:
        store, figures = self._requests.store_stats(now), self._figures
        return Load(
            running=figures.engine.running,
            waiting=figures.engine.waiting,
            progress=figures.progress,
            kv_used_bytes=figures.kv_used_bytes + store.used_bytes,
            kv_total_bytes=figures.kv_total_bytes + store.capacity_bytes,
            sequences=len(self._held),
            models=_models_to_tell(figures.models),
            backlog_tokens=figures.engine.backlog_tokens,
            changes=self._nodes.sent(link.number),
        )

    def _next_state(self) -> WorkerState:
        self._preloading -= {model.name for model in self._figures.models if _is_settled(model)}
        if self._state is WorkerState.LOADING and not self._preloading:
            return WorkerState.READY
        return self._state

    # --- named sequences ---

    def _tell_sequences(self) -> list[Action]:
        """Tell each broker more of what we hold; a great many take some ticks, so that nothing else waits."""
        actions: list[Action] = []
        for link in self._links:
            for _ in range(PAGES_PER_TICK):
                page = self._held.next_page(link.number)
                if page is None:
                    break
                holdings, is_complete = page
                payload = pack(holdings)
                message = WorkerSequences(is_complete=is_complete, payload=wire.describe([payload]))
                actions += link.say(message, payload)
        return actions

    def _drop_sequences(self, number: int, frames: Frames) -> list[Action]:
        try:
            holdings = unpack(wire.decode(frames).payload[0], Holdings)
        except KVCacheError as error:
            return self._unreadable(number, error)
        return self._requests.drop_sequences(holdings)

    def _handed_over(self, number: int, message: HandedOver) -> list[Action]:
        self._waits_for.discard(number)
        if message.num_left:
            log.warning("%d named sequences are lost with this worker: no other could take them", message.num_left)
        return []

    # --- sessions ---

    def _welcomed(self, link: Link, welcome: Welcome, now: float) -> list[Action]:
        was_away = link.welcome is None
        if link.welcomed(welcome, now):
            lost = [*self._peers.replace_session(link.number), *self._requests.replace_session(link.number, now)]
        elif was_away:
            lost = [*self._peers.regain_session(link.number), *self._requests.regain_session(link.number)]
        else:
            return []
        log.info("broker %d welcomes this worker", link.number)
        self._nodes.joined(link.number)
        self._held.joined(link.number)
        if self._state is WorkerState.DRAINING and len(self._held):
            self._waits_for.add(link.number)  # it orders copies when it has heard what is here, and says when to go
        told = [*link.attach(), *link.beat(self._state, self._load(link, now), now)]
        return [*lost, *told, *self._tell_nodes(now)]

    def _lose(self, link: Link, now: float) -> list[Action]:
        link.left(now)
        self._nodes.left(link.number)
        self._held.left(link.number)
        if not len(self._held):  # for named sequences it is waited for: it may be back in time
            self._waits_for.discard(link.number)
        return [*self._peers.lose_session(link.number), *self._requests.lose_session(link.number, now)]

    def _may_act(self, number: int, now: float) -> bool:
        return self._links[number].lease.is_held(now)

    def _unreadable(self, number: int, error: KVCacheError) -> list[Action]:
        self._malformed += 1
        log.warning("broker %d sent what cannot be read: %s", number, error)
        return []


def _is_settled(model: ModelStats) -> bool:
    """It is loaded, or will not be without being asked for: it has failed, or there is a reason why it is absent."""
    return model.state in (ModelState.READY, ModelState.FAILED) or (
        model.state == ModelState.ABSENT and model.reason != ""
    )


def _models_to_tell(models: Sequence[ModelStats]) -> tuple[tuple[str, ModelState], ...]:
    """As many as a beat may hold; those that anybody has asked for first."""
    in_order = sorted(models, key=lambda model: model.state == ModelState.ABSENT)
    return tuple((model.name, ModelState(model.state)) for model in in_order[:MAX_BEAT_MODELS])
