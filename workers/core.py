"""The worker's decisions: what sockets and engine report goes in, what to send and to compute comes out.

Each `on_...` method takes one event and `now` (monotonic seconds) and returns the actions that follow, in
order. There is no socket, thread or clock here. This file joins the parts and owns the worker's state:

    LOADING   models named at start are loading; requests wait for them
    READY     serving
    DRAINING  nothing new; what runs has 10 s, then fails as retryable. `is_drained` says when to leave

What a request means stands in `generations` and `kv_plane`, what a broker may ask of us in `links`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from bus import wire
from bus.errors import (
    Cancelled,
    Conflict,
    Corrupt,
    DeadlineExceeded,
    Draining,
    InternalError,
    KVCacheError,
    MalformedMessage,
    Overloaded,
    WorkerLost,
)
from bus.messages import (
    Ack,
    Append,
    Assign,
    BrokerBeat,
    Cancel,
    Chunk,
    Credit,
    Delete,
    Dispatched,
    Failed,
    Forward,
    Generate,
    Goodbye,
    ModelState,
    Pin,
    Put,
    Release,
    Resume,
    Unpin,
    Welcome,
    WorkerHello,
    WorkerState,
    WorkerStatus,
)
from bus.stats import WorkerStats, pack
from bus.wire import Buffer, Frames
from workers.calls import Action, Call, CallId, Calls, Channel, Send
from workers.engine_api import Answered, EngineFigures, Event, Forgotten, Retained
from workers.generations import Generations
from workers.keys import SequenceKey
from workers.kv_plane import KVPlane
from workers.links import Link, Load
from workers.replies import Replies
from workers.store import KVStore

log = logging.getLogger(__name__)

DRAIN_S = 10.0
STATUS_S = 1.0
RETRY_AFTER_MS = 200

_SETTLED = (ModelState.READY, ModelState.FAILED)
_CHANGES = (Put, Append, Delete, Pin, Unpin)


class WorkerCore:
    """One worker's state.

    hello: what this worker says of itself to each of `num_links` brokers. store: the KV plane's memory.
    preloading: models that must be loaded, or have failed to, before the worker is READY.
    """

    def __init__(
        self, hello: WorkerHello, store: KVStore, *, num_links: int, preloading: Sequence[str], now: float
    ) -> None:
        self.calls = Calls()
        self.malformed = 0
        self._worker_id = hello.worker_id
        self._incarnation = hello.incarnation
        self._pid = hello.pid
        self._links = [Link(number, hello, now) for number in range(num_links)]
        self._generations = Generations(hello.worker_id, self.calls, self._may_act)
        self._replies = Replies()
        self._kv = KVPlane(hello.worker_id, self.calls, store, self._replies, self._generations.is_writing)
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

    # --- events ---

    def on_control(self, number: int, frames: Frames, now: float) -> list[Action]:
        """A message on a broker's control lane. Whatever it is, what follows is at worst a `Failed`."""
        link = self._links[number]
        link.heard(now)
        try:
            message = wire.decode_header(frames[0]) if frames else None
        except KVCacheError as error:
            return self._unreadable(number, error)
        match message:
            case Assign():
                return self._assigned(number, message, frames[1:], now)
            case Forward():
                return self._forwarded(number, message, frames[1:], now)
            case BrokerBeat():
                link.granted(message)
                return []
            case Release():
                return self._released(CallId(number, message.call))
            case Welcome():
                return self._welcomed(link, message, now)
            case Goodbye():
                log.info("broker %d leaves: %s", number, message.reason)
                link.left(now)
                return self._lose_session(number, now)
            case Failed():
                log.error("broker %d refuses this worker: %s", number, message.message)
                return []
            case _:
                return self._unreadable(number, MalformedMessage("not a message for a worker's control lane"))

    def on_bulk(self, number: int, frames: Frames, now: float) -> list[Action]:
        """A message on a broker's bulk lane: a chunk of a call."""
        self._links[number].heard(now)
        try:
            envelope = wire.decode_header(frames[0]) if frames else None
        except KVCacheError as error:
            return self._unreadable(number, error)
        if not isinstance(envelope, Forward):
            return self._unreadable(number, MalformedMessage("not a message for a worker's bulk lane"))
        return self._forwarded(number, envelope, frames[1:], now)

    def on_engine(self, event: Event, now: float) -> list[Action]:
        """Something the engine has to say."""
        match event:
            case Answered() | Retained() | Forgotten():
                return self._kv.on_event(event)
            case _:
                return self._generations.on_event(event, now)

    def on_unsent(self, send: Send, now: float) -> list[Action]:
        """A message could not even be queued. A call ends, typed; a broker that takes nothing counts as gone."""
        call = None if send.call is None else self.calls.find(send.call)
        if send.channel is Channel.CONTROL:
            self._links[send.link].left(now)
            return self._lose_session(send.link, now)
        if call is None:
            return []
        error = Overloaded("the worker has too much bulk data on its way", retry_after_ms=RETRY_AFTER_MS)
        return self._end(call, error)

    def tick(self, figures: EngineFigures, now: float, *, rss_bytes: int, lag_s: float) -> list[Action]:
        """Time has passed (call it each 50 ms): liveness, deadlines, pins, orphans, figures."""
        self._figures = figures
        actions: list[Action] = []
        was, self._state = self._state, self._next_state()
        for link in self._links:
            if link.is_dead(now):
                log.warning("broker %d has fallen silent", link.number)
                link.left(now)
                actions += self._lose_session(link.number, now)
            actions += link.tick(self._state, lambda: self._load(now), now)
            if was is not self._state:
                actions += link.beat(self._state, self._load(now), now)
        actions += self._overdue(now)
        actions += self._generations.tick(now)
        if self._state is WorkerState.DRAINING and now >= self._drain_until:
            actions += self._fail_all(WorkerLost("the worker was told to drain and its time is up"))
        if now >= self._status_due:
            self._status_due = now + STATUS_S
            payload = pack(self.stats(now, rss_bytes=rss_bytes, lag_s=lag_s))
            status = WorkerStatus(payload=wire.describe([payload]))
            actions += [action for link in self._links for action in link.say(status, payload)]
        return actions

    # --- leaving ---

    def drain(self, now: float) -> list[Action]:
        """Take nothing new; tell everybody at once."""
        if self._state is WorkerState.DRAINING:
            return []
        self._state = WorkerState.DRAINING
        self._drain_until = now + DRAIN_S
        return [action for link in self._links for action in link.beat(self._state, self._load(now), now)]

    @property
    def is_drained(self) -> bool:
        return self._state is WorkerState.DRAINING and not len(self.calls)

    def farewell(self) -> list[Action]:
        return [action for link in self._links for action in link.farewell("drained")]

    # --- figures ---

    def stats(self, now: float, *, rss_bytes: int, lag_s: float) -> WorkerStats:
        counts = self._generations.counts
        return WorkerStats(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            state=self._state.value,
            pid=self._pid,
            uptime_s=round(now - self._started_at, 3),
            rss_bytes=rss_bytes,
            loop_lag_ms=round(lag_s * 1000, 3),
            malformed=self.malformed,
            models=self._figures.models,
            engine=msgspec.structs.replace(
                self._figures.engine, gaps_replayed=counts.gaps_replayed, pulled_streams=counts.pulled_streams
            ),
            store=self._kv.stats(now),
        )

    def _load(self, now: float) -> Load:
        store, figures = self._kv.stats(now), self._figures
        return Load(
            running=figures.engine.running,
            waiting=figures.engine.waiting,
            progress=figures.progress,
            kv_used_bytes=figures.kv_used_bytes + store.used_bytes,
            kv_total_bytes=figures.kv_total_bytes + store.capacity_bytes,
            models=tuple((model.name, ModelState(model.state)) for model in figures.models),
        )

    def _next_state(self) -> WorkerState:
        settled = {model.name for model in self._figures.models if model.state in _SETTLED}
        self._preloading -= settled
        if self._state is WorkerState.LOADING and not self._preloading:
            return WorkerState.READY
        return self._state

    # --- sessions ---

    def _welcomed(self, link: Link, welcome: Welcome, now: float) -> list[Action]:
        if not link.welcomed(welcome, now):
            return []
        log.info("broker %d welcomes this worker", link.number)
        lost = self._lose_session(link.number, now)
        return [*lost, *link.attach(), *link.beat(self._state, self._load(now), now)]

    def _lose_session(self, number: int, now: float) -> list[Action]:
        """The broker knows nothing of its calls any more: streams wait for their clients, all else stops."""
        actions: list[Action] = []
        for call in self.calls.of_link(number):
            if isinstance(call.message, Generate):
                actions += self._generations.orphan(call, now)
            else:
                actions += self._kv.stop(call)
            self.calls.forget(call)
        return actions

    def _may_act(self, number: int, now: float) -> bool:
        return self._links[number].lease.is_held(now)

    # --- requests ---

    def _assigned(self, number: int, assign: Assign, frames: Frames, now: float) -> list[Action]:
        try:
            message, payload = _decode(frames)
            if not isinstance(message, Dispatched):
                raise MalformedMessage(f"{type(message).__name__} is not a request for a worker")
        except KVCacheError as error:
            return self._refused(number, assign, frames, error)
        call = self.calls.open(number, assign, message, now)
        try:
            return self._begin(call, payload, now)
        except KVCacheError as error:
            return self._end(call, error)
        except Exception:  # noqa: BLE001  # the outermost edge of one request: logged, and answered
            return self._fault(call)

    def _begin(self, call: Call, payload: Sequence[Buffer], now: float) -> list[Action]:
        """Raises what is wrong with the request, or with us for it."""
        message = call.message
        if self._state is WorkerState.DRAINING:
            raise Draining("this worker is draining and takes nothing new", retry_after_ms=RETRY_AFTER_MS)
        if call.deadline <= now:
            raise DeadlineExceeded("the deadline had passed when the request reached the worker")
        if isinstance(message, _CHANGES) and not self._may_act(call.id.link, now):
            raise WorkerLost("this worker holds no lease and may not acknowledge writes")
        if isinstance(message, (*_CHANGES, Generate)):
            reply = self._replies.claim(call.request, message, now)
            if reply is not None:
                return self.calls.finish(call, reply)
        if isinstance(message, Generate):
            if message.seq_id and self._kv.is_stored(SequenceKey(call.request.tenant, message.seq_id)):
                raise Conflict(
                    f"sequence {message.seq_id!r} was stored by a client; delete it or generate under another seq_id"
                )
            return self._generations.start(call, message, payload, now)
        return self._kv.start(call, payload, now)

    def _forwarded(self, number: int, forward: Forward, frames: Frames, now: float) -> list[Action]:
        call = self.calls.find(CallId(number, forward.call))
        if call is None:  # it ended meanwhile
            return []
        try:
            message, payload = _decode(frames)
            match message:
                case Cancel():
                    return self._end(call, Cancelled("cancelled by the client"))
                case Ack() | Resume():
                    return self._generations.follow_up(call, message, now)
                case Credit() | Chunk():
                    return self._continue_transfer(call, message, payload, now)
                case _:
                    raise MalformedMessage(f"{type(message).__name__} does not belong within a request")
        except KVCacheError as error:
            return self._end(call, error)
        except Exception:  # noqa: BLE001  # as above
            return self._fault(call)

    def _continue_transfer(
        self, call: Call, message: Credit | Chunk, payload: Sequence[Buffer], now: float
    ) -> list[Action]:
        if isinstance(message, Chunk) and not self._may_act(call.id.link, now):
            raise WorkerLost("this worker's lease ran out during the transfer")
        return self._kv.follow_up(call, message, payload)

    def _released(self, call_id: CallId) -> list[Action]:
        call = self.calls.find(call_id)
        if call is None:
            return []
        actions = self._stop(call)
        self.calls.forget(call)
        return actions

    def _overdue(self, now: float) -> list[Action]:
        error = DeadlineExceeded("the deadline passed before the worker was done")
        return [action for call in self.calls.overdue(now) for action in self._end(call, error)]

    def _fail_all(self, error: KVCacheError) -> list[Action]:
        return [action for call in self.calls.everything() for action in self._end(call, error)]

    def _end(self, call: Call, error: KVCacheError) -> list[Action]:
        return [*self._stop(call), *self.calls.fail(call, error)]

    def _stop(self, call: Call) -> list[Action]:
        return self._generations.stop(call) if isinstance(call.message, Generate) else self._kv.stop(call)

    # --- what cannot be served ---

    def _fault(self, call: Call) -> list[Action]:
        """Our own bug in one request harms that request alone."""
        log.exception("request %s failed", call.request.req_id.hex())
        return self._end(call, InternalError("a fault of the worker; its log has the traceback"))

    def _refused(self, number: int, assign: Assign, frames: Frames, error: KVCacheError) -> list[Action]:
        """A request that cannot be read still gets its one answer."""
        self.malformed += 1
        req_id = wire.request_id_of(frames[0]) if frames else wire.NO_REQUEST
        return self.calls.refuse(CallId(number, assign.call), req_id, error)

    def _unreadable(self, number: int, error: KVCacheError) -> list[Action]:
        self.malformed += 1
        log.warning("broker %d sent what cannot be read: %s", number, error)
        return []


def _decode(frames: Frames) -> wire.Decoded:
    """A message with its payload checked. Raises MalformedMessage, or Corrupt if bytes changed on the way."""
    decoded = wire.decode(frames, verify_payload=False)
    try:
        wire.check_payload(getattr(decoded.message, "payload", ()), decoded.payload)
    except MalformedMessage as error:
        raise Corrupt(error.message) from error
    return decoded
