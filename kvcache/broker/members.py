"""Who is there: clients and workers by the link they speak on, workers also by id, and the ring of the live ones.

Plain state, written by the broker's core only. A link is a routing id that libzmq made up; it is never an
identity. `user_id` is who a peer counts as by its socket's security; it is the tenant of what it asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bus.messages import WorkerBeat, WorkerHello, WorkerState
from bus.stats import WorkerStats, WorkerView
from bus.traces import Span
from kvcache.broker.answers import Answers
from kvcache.broker.directory import Name
from kvcache.ring import UNIT_WEIGHT, HashRing

GARBAGE_PER_S = 100


@dataclass(slots=True)
class Garbage:
    """Counts a session's messages that could not be read, second by second."""

    count: int = 0
    since: float = float("-inf")

    def add(self, now: float) -> int:
        """Count one more; how many there were in this second so far."""
        if now - self.since > 1.0:
            self.count, self.since = 0, now
        self.count += 1
        return self.count


@dataclass(slots=True, eq=False)
class Stream:
    """A topic that a client may subscribe to. `call` is the generation that it carries, None until there is one."""

    id: bytes
    client: Client
    expires_at: float
    call: Call | None = None


@dataclass(slots=True, eq=False)
class Call:
    """One dispatched request, or one worker's part of one. `stream` is None unless it generates.

    name: the sequence that it names, if any. version: what a change makes of that; 0 if it changes nothing.
    label: how logs call it, if they are to tell of it. span: what is recorded of it, if it is.
    on_bulk: whether it went to its worker on the bulk lane, where what is sent on the control lane may overtake it.
    """

    id: int
    client: Client
    worker: Worker
    req_id: bytes
    deadline: float
    stream: Stream | None = None
    name: Name | None = None
    version: int = 0
    gather: Gather | None = None
    prefill: Prefill | None = None
    label: str = ""
    span: Span | None = None
    on_bulk: bool = False

    @property
    def is_own(self) -> bool:
        """Whether the broker itself asked, and nobody waits for an answer."""
        return not self.client.link


@dataclass(slots=True)
class Prefill:
    """Of a generation, what was thought when it was dispatched. text_bytes: of a prompt that came as text alone."""

    hit_tokens: int
    text_bytes: int
    is_done: bool = False


@dataclass(slots=True, eq=False)
class Gather:
    """One request that several workers serve, each in a call of its own. parts: those without an answer yet.

    deletes: the sequence that is gone when it is done, and the version of that; None if it is not one to be gone.
    granted: chunks that each part can take of an upload, since its begin. passed_on: how many the client knows of.
    """

    client: Client
    req_id: bytes
    answers: Answers
    deletes: tuple[Name, int] | None = None
    parts: dict[int, Call] = field(default_factory=dict)
    granted: dict[int, int] = field(default_factory=dict)
    passed_on: int = 0


@dataclass(slots=True, eq=False)
class Client:
    """A client's session. calls: by the request id the client chose, which only means something within it.

    link: empty for the broker itself, which has no session. hello: the number of the one that began it.
    """

    link: bytes
    session: bytes
    instance: bytes
    user_id: str
    heard_at: float
    hello: int = 0
    bulk_link: bytes = b""
    calls: dict[bytes, Call | Gather] = field(default_factory=dict)
    streams: dict[bytes, Stream] = field(default_factory=dict)
    garbage: Garbage = field(default_factory=Garbage)


@dataclass(slots=True, eq=False)
class Worker:
    """A worker's session. calls: what it has of ours to answer. turn, decodes: see `kvcache.routing.views.Belief`.

    is_known: whether it has told of all named sequences that it holds. first_call: those before are of other sessions.
    """

    link: bytes
    session: bytes
    user_id: str
    hello: WorkerHello
    heard_at: float
    lease_until: float
    state: WorkerState
    joined_at: float
    is_known: bool
    first_call: int = 0
    bulk_link: bytes = b""
    calls: dict[int, Call] = field(default_factory=dict)
    dispatched: int = 0
    turn: float = 0.0
    decodes: int = 0
    beat: WorkerBeat | None = None
    stats: WorkerStats | None = None
    garbage: Garbage = field(default_factory=Garbage)

    @property
    def id(self) -> str:
        return self.hello.worker_id

    @property
    def has_waiting(self) -> bool:
        """Whether requests wait there, by its own word."""
        return self.beat is not None and self.beat.waiting > 0


class Workers:
    """The live workers and the ring over those that take requests."""

    def __init__(self, suspect_s: float, max_inflight: int) -> None:
        self.by_link: dict[bytes, Worker] = {}
        self.by_id: dict[str, Worker] = {}
        self._ring = HashRing({})
        self._on_ring: dict[str, tuple[bytes, int]] = {}  # sessions and weights of those who are on it
        self._may_be_stale = False
        self._suspect_s = suspect_s
        self._max_inflight = max_inflight
        self._turn = 0.0

    @property
    def ring(self) -> HashRing:
        """The ring. It is made anew when it is asked for and others take requests than before, another session of the
        same worker included: once for many workers that join together."""
        if self._may_be_stale:
            self._may_be_stale = False
            ready = {w.id: (w.session, w.hello.weight) for w in self.by_id.values() if w.state is WorkerState.READY}
            if ready != self._on_ring:
                self._on_ring = ready
                self._ring = HashRing({name: weight for name, (_, weight) in ready.items()}, before=self._ring)
        return self._ring

    @property
    def num_ready(self) -> int:
        """How many take requests."""
        return sum(worker.state is WorkerState.READY for worker in self.by_id.values())

    def add(self, worker: Worker) -> None:
        self.by_link[worker.link] = worker
        self.by_id[worker.id] = worker
        self.changed()

    def remove(self, worker: Worker) -> None:
        self.by_link.pop(worker.link, None)
        self.by_id.pop(worker.id, None)
        self.changed()

    def changed(self) -> None:
        """A worker is in another state than before, or others are there."""
        self._may_be_stale = True

    def count_dispatch(self, worker: Worker) -> None:
        """One more request went to `worker`. Its next turn lies 1/weight ahead, never in the past of the others."""
        worker.dispatched += 1
        self._turn = max(self._turn, worker.turn)
        worker.turn = self._turn + UNIT_WEIGHT / worker.hello.weight

    def view(self, worker: Worker, now: float, *, full: bool) -> WorkerView:
        """What is told of a worker; `full`: with the figures it reports itself."""
        beat = worker.beat
        return WorkerView(
            worker_id=worker.id,
            status="suspect" if self._is_suspect(worker, now) else worker.state.value,
            weight=worker.hello.weight,
            share=round(self.ring.share(worker.id), 4),
            inflight=len(worker.calls),
            dispatched=worker.dispatched,
            last_heard_s=round(now - worker.heard_at, 3),
            lease_s=round(worker.lease_until - now, 3),
            running=beat.running if beat else 0,
            waiting=beat.waiting if beat else 0,
            kv_used_bytes=beat.kv_used_bytes if beat else 0,
            kv_total_bytes=beat.kv_total_bytes if beat else 0,
            models=tuple((name, state.value) for name, state in beat.models) if beat else (),
            peer_url=worker.hello.peer_url,
            stats=worker.stats if full else None,
        )

    def can_serve(self, now: float) -> bool:
        """Whether any worker takes requests and was heard of lately."""
        return any(not self._is_suspect(self.by_id[name], now) for name in self.ring.workers)

    def available(self, worker_ids: Iterable[str], now: float) -> list[str]:
        """Those of them that were heard of lately and have room."""
        return [worker_id for worker_id in worker_ids if self.is_available(self.by_id[worker_id], now)]

    def least_busy(self, worker_ids: Sequence[str]) -> str:
        """The worker with the fewest calls; among equals the one whose turn it is."""
        return min(worker_ids, key=lambda name: (len(self.by_id[name].calls), self.by_id[name].turn))

    def is_full(self, worker: Worker) -> bool:
        return len(worker.calls) >= self._max_inflight

    def is_available(self, worker: Worker, now: float) -> bool:
        """Whether it was heard of lately and may have another request."""
        return not self._is_suspect(worker, now) and not self.is_full(worker)

    def _is_suspect(self, worker: Worker, now: float) -> bool:
        return now - worker.heard_at > self._suspect_s
