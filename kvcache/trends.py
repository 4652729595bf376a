"""What the cluster does now, and did in the last minutes: rates and rows for people, from the broker's totals.

`Trends` is told every answer of the broker, about one a second, and every one that did not come. It owns the last
totals of each worker (they begin again at zero when one restarts), a short window that rates are taken over, and the
points of a chart. It keeps workers that are gone in sight for a while, since that is what somebody looks for. Core:
`now` is monotonic seconds, `at` Unix seconds for what is shown.
"""

from __future__ import annotations

from collections import deque

import msgspec

from bus.stats import ClusterStats, WorkerStats, WorkerView
from kvcache.model_words import describe_models
from kvcache.recent import Counter, Totals

RATE_S = 5.0
"""Workers report once a second, so a shorter window would show that rhythm and not theirs."""
PAUSE_S = 10.0
"""After a longer silence of ours nothing is known of the time between."""
NUM_POINTS = 300
GONE_S = 300.0
SETTLED_S = 5.0
"""A broker that has run for less may not have heard of all its workers again."""


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One worker. status: as the broker has it (ready, suspect, loading, draining), awaited by one that has just
    begun, lost, or left (lost after draining). Blocks of all its pools; rates and `hit_rate` are of late, the latter
    None if it prefilled nothing.
    """

    worker_id: str
    status: str
    share: float = 0.0
    running: int = 0
    waiting: int = 0
    inflight: int = 0
    num_blocks: int = 0
    held_blocks: int = 0
    cached_blocks: int = 0
    kv_used_bytes: int = 0
    kv_total_bytes: int = 0
    index: str = ""
    indexed_nodes: int = 0
    tokens_per_s: float = 0.0
    hit_rate: float | None = None
    queue_s: float = 0.0
    rss_bytes: int = 0
    loop_lag_ms: float = 0.0
    models: str = ""
    gone_at: float | None = None


class BrokerRow(msgspec.Struct, frozen=True, kw_only=True):
    """The broker, and totals since it began."""

    state: str
    policy: str
    uptime_s: float
    clients: int
    streams: int
    inflight: int
    requests: int
    workers_lost: int
    indexed_nodes: int
    queued_messages: int
    loop_lag_ms: float
    rss_bytes: int
    hit_rate: float | None
    reasons: dict[str, int]
    failed: dict[str, int]


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster at one time. Tokens of prompts that were cached and that were computed, and tokens generated, each
    per second; hit_rate: None if nothing was prefilled. is_known: whether the broker answered.
    """

    at: float
    is_known: bool = True
    hit_rate: float | None = None
    cached_per_s: float = 0.0
    computed_per_s: float = 0.0
    tokens_per_s: float = 0.0
    requests_per_s: float = 0.0
    running: int = 0
    waiting: int = 0


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to see. problem: why `broker` and `workers` are old or missing, empty if the broker answered.

    heard_at: when it last did, None if it never has.
    """

    point: Point
    problem: str = ""
    heard_at: float | None = None
    broker: BrokerRow | None = None
    workers: tuple[WorkerRow, ...] = ()


class Trends:
    """See the module. One owner, one thread."""

    def __init__(self) -> None:
        self._forget()
        self._history: deque[Point] = deque(maxlen=NUM_POINTS)
        self._last = Snapshot(point=Point(at=0.0, is_known=False))
        self._told_at = float("-inf")

    @property
    def history(self) -> tuple[Point, ...]:
        """The points so far, the oldest first."""
        return tuple(self._history)

    def fold(self, figures: ClusterStats, now: float, at: float) -> Snapshot:
        """The broker answered."""
        self._tick(now)
        added = self._broker.add(figures.broker.incarnation, Totals(requests=figures.broker.requests), now)
        for view in figures.workers:
            if view.stats is not None:
                counter = self._workers.setdefault(view.worker_id, Counter())
                added += counter.add(view.stats.incarnation, _totals(view.stats), now)
        self._cluster.grow(added, now)
        rows = tuple(self._row(view) for view in figures.workers)
        is_settled = figures.broker.uptime_s >= SETTLED_S
        return self._show(
            Snapshot(
                point=self._point(figures, at),
                heard_at=at,
                broker=_broker_row(figures),
                workers=tuple(sorted((*rows, *self._gone(rows, is_settled, at)), key=lambda row: row.worker_id)),
            )
        )

    def miss(self, problem: str, now: float, at: float) -> Snapshot:
        """The broker did not answer; what was known stays in sight."""
        self._tick(now)
        return self._show(msgspec.structs.replace(self._last, point=Point(at=at, is_known=False), problem=problem))

    def _tick(self, now: float) -> None:
        if now - self._told_at > PAUSE_S:
            self._forget()
        self._told_at = now

    def _forget(self) -> None:
        """Begin to count anew; workers that went while nobody looked are not news."""
        self._cluster, self._broker = Counter(), Counter()
        self._workers: dict[str, Counter] = {}
        self._last = Snapshot(point=Point(at=0.0, is_known=False))

    def _show(self, snapshot: Snapshot) -> Snapshot:
        self._history.append(snapshot.point)
        self._last = snapshot
        return snapshot

    def _gone(self, rows: tuple[WorkerRow, ...], is_settled: bool, at: float) -> list[WorkerRow]:
        """Those that were there a while ago and are not now."""
        present = {row.worker_id for row in rows}
        gone = []
        for row in self._last.workers:
            if row.worker_id in present or (row.gone_at is not None and at - row.gone_at > GONE_S):
                continue
            if row.gone_at is None:
                left = "left" if row.status == "draining" else "lost"
                row = WorkerRow(
                    worker_id=row.worker_id,
                    status=left if is_settled else "awaited",
                    models=row.models,
                    gone_at=at if is_settled else None,
                )
            gone.append(row)
        for worker_id in self._workers.keys() - present - {row.worker_id for row in gone}:
            del self._workers[worker_id]
        return gone

    def _row(self, view: WorkerView) -> WorkerRow:
        stats = view.stats
        counter = self._workers.get(view.worker_id, Counter())
        pools = [model.pool for model in stats.models] if stats else []
        added, seconds = counter.within(RATE_S)
        return WorkerRow(
            worker_id=view.worker_id,
            status=view.status,
            share=view.share,
            running=view.running,
            waiting=view.waiting,
            inflight=view.inflight,
            num_blocks=sum(pool.num_blocks for pool in pools),
            held_blocks=sum(pool.held_blocks for pool in pools),
            cached_blocks=sum(pool.cached_blocks for pool in pools),
            kv_used_bytes=view.kv_used_bytes,
            kv_total_bytes=view.kv_total_bytes,
            index=view.index,
            indexed_nodes=view.indexed_nodes,
            tokens_per_s=_rate(added.tokens, seconds),
            hit_rate=counter.hit_rate(),
            queue_s=round(view.queue_s, 3),
            rss_bytes=stats.rss_bytes if stats else 0,
            loop_lag_ms=stats.loop_lag_ms if stats else 0.0,
            models=describe_models(view),
        )

    def _point(self, figures: ClusterStats, at: float) -> Point:
        added, seconds = self._cluster.within(RATE_S)
        return Point(
            at=at,
            hit_rate=self._cluster.hit_rate(),
            cached_per_s=_rate(added.cached_tokens, seconds),
            computed_per_s=_rate(max(0, added.prompt_tokens - added.cached_tokens), seconds),
            tokens_per_s=_rate(added.tokens, seconds),
            requests_per_s=_rate(added.requests, seconds),
            running=sum(view.running for view in figures.workers),
            waiting=sum(view.waiting for view in figures.workers),
        )


def _broker_row(figures: ClusterStats) -> BrokerRow:
    broker = figures.broker
    return BrokerRow(
        state=broker.state,
        policy=broker.policy,
        uptime_s=broker.uptime_s,
        clients=broker.clients,
        streams=broker.streams,
        inflight=broker.inflight,
        requests=broker.requests,
        workers_lost=broker.workers_lost,
        indexed_nodes=broker.indexed_nodes,
        queued_messages=broker.queued_messages,
        loop_lag_ms=broker.loop_lag_ms,
        rss_bytes=broker.rss_bytes,
        hit_rate=Totals(prompt_tokens=broker.prompt_tokens, cached_tokens=broker.cached_tokens).hit_rate(),
        reasons=broker.reasons,
        failed=broker.failed,
    )


def _totals(stats: WorkerStats) -> Totals:
    engine = stats.engine
    return Totals(
        prompt_tokens=engine.prompt_tokens, cached_tokens=engine.cached_tokens, tokens=engine.completion_tokens
    )


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 2) if seconds > 0 else 0.0
