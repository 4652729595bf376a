"""Who is there: clients and workers by the link they speak on, workers also by id, and the ring of the live ones.

Plain state with one owner, the broker core. A link is a routing id that libzmq made up; it is never an
identity. `user_id` is who a peer counts as by its socket's security, `tenant` follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bus.messages import WorkerBeat, WorkerHello, WorkerState
from bus.stats import WorkerStats, WorkerView
from kvcache.ring import HashRing
from kvcache.routing.policies import Load

GARBAGE_PER_S = 100


@dataclass(slots=True)
class Call:
    """One dispatched request. `stream_id` is empty unless it generates."""

    id: int
    client: Client
    worker: Worker
    req_id: bytes
    deadline: float
    stream_id: bytes = b""


@dataclass(slots=True)
class Client:
    """A client's session. calls: by the request id the client chose, which only means something within it.
    ended: streams that ended a moment ago and may still be asked for lost tokens."""

    link: bytes
    session: bytes
    instance: bytes
    user_id: str
    heard_at: float
    bulk_link: bytes = b""
    calls: dict[bytes, Call] = field(default_factory=dict)
    ended: dict[bytes, Call] = field(default_factory=dict)
    streams: set[bytes] = field(default_factory=set)
    garbage: int = 0
    garbage_since: float = 0.0

    def counts_as_flood(self, now: float) -> bool:
        """Count one message that could not be read; True once there were 100 within a second."""
        if now - self.garbage_since > 1.0:
            self.garbage, self.garbage_since = 0, now
        self.garbage += 1
        return self.garbage >= GARBAGE_PER_S


@dataclass(slots=True)
class Worker:
    """A worker's session. `calls`: what it has of ours to answer."""

    link: bytes
    session: bytes
    user_id: str
    hello: WorkerHello
    heard_at: float
    lease_until: float
    state: WorkerState
    bulk_link: bytes = b""
    calls: dict[int, Call] = field(default_factory=dict)
    ended: dict[int, Call] = field(default_factory=dict)
    dispatched: int = 0
    beat: WorkerBeat | None = None
    stats: WorkerStats | None = None

    @property
    def id(self) -> str:
        return self.hello.worker_id


class Workers:
    """The live workers and the ring over those that take requests."""

    def __init__(self, suspect_s: float, max_inflight: int) -> None:
        self.by_link: dict[bytes, Worker] = {}
        self.by_id: dict[str, Worker] = {}
        self.ring = HashRing({})
        self._suspect_s = suspect_s
        self._max_inflight = max_inflight

    def add(self, worker: Worker) -> None:
        self.by_link[worker.link] = worker
        self.by_id[worker.id] = worker
        self.rebuild()

    def remove(self, worker: Worker) -> None:
        self.by_link.pop(worker.link, None)
        if self.by_id.get(worker.id) is worker:
            del self.by_id[worker.id]
        self.rebuild()

    def rebuild(self) -> None:
        """A new ring, if the set of workers that take requests, or a weight, has changed."""
        weights = {w.id: w.hello.weight for w in self.by_id.values() if w.state is WorkerState.READY}
        if weights != self.ring.weights:
            self.ring = HashRing(weights)

    def loads(self, now: float) -> dict[str, Load]:
        """What policies may know of each worker on the ring."""
        return {name: self._load(self.by_id[name], now) for name in self.ring.workers}

    def view(self, worker: Worker, now: float, *, full: bool) -> WorkerView:
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
            stats=worker.stats if full else None,
        )

    def is_full(self, worker: Worker) -> bool:
        return len(worker.calls) >= self._max_inflight

    def _load(self, worker: Worker, now: float) -> Load:
        available = not self._is_suspect(worker, now) and not self.is_full(worker)
        return Load(len(worker.calls), worker.hello.weight, worker.dispatched, available)

    def _is_suspect(self, worker: Worker, now: float) -> bool:
        return now - worker.heard_at > self._suspect_s
