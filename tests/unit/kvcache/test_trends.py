"""Rates, rows and losses, from answers of a broker that the test makes up."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from bus.stats import BrokerStats, ClusterStats, EngineStats, ModelStats, PoolStats, WorkerStats, WorkerView
from kvcache.trends import GONE_S, NUM_POINTS, PAUSE_S, Snapshot, Trends

START_AT = 1_000_000.0


def worker(
    worker_id: str = "w", prompt: int = 0, cached: int = 0, tokens: int = 0, incarnation: int = 1, status: str = "ready"
) -> WorkerView:
    pool = PoolStats(num_blocks=100, held_blocks=10, cached_blocks=30, free_blocks=60)
    stats = WorkerStats(
        worker_id=worker_id,
        incarnation=incarnation,
        state="ready",
        models=(ModelStats(name="tiny", state="ready", pool=pool),),
        engine=EngineStats(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=tokens),
    )
    return WorkerView(
        worker_id=worker_id, status=status, weight=100, share=0.5, inflight=1, dispatched=3, last_heard_s=0.1,
        lease_s=2.0, running=2, waiting=1, index="exact", models=(("tiny", "ready"),), stats=stats,
    )  # fmt: skip


@dataclass
class Asking:
    """Trends that are told something once a second."""

    trends: Trends = field(default_factory=Trends)
    now: float = 100.0

    def hear(self, *workers: WorkerView, requests: int = 0, uptime_s: float = 99.0, broker: int = 1) -> Snapshot:
        stats = BrokerStats(
            incarnation=broker, state="serving", policy="prefix", requests=requests, uptime_s=uptime_s,
            prompt_tokens=100, cached_tokens=25,
        )  # fmt: skip
        self.now += 1.0
        at = START_AT + self.now
        return self.trends.fold(ClusterStats(healthy=True, broker=stats, workers=workers), self.now, at)

    def miss(self) -> Snapshot:
        self.now += 1.0
        return self.trends.miss("away", self.now, START_AT + self.now)


@pytest.fixture
def asking() -> Asking:
    return Asking()


def statuses(snapshot: Snapshot) -> dict[str, str]:
    return {row.worker_id: row.status for row in snapshot.workers}


def test_rates_are_what_was_added_of_late_and_not_totals(asking: Asking) -> None:
    snapshot = asking.hear(worker(prompt=1000, cached=0, tokens=500), requests=40)
    for second in range(1, 20):
        snapshot = asking.hear(
            worker(prompt=1000 + 100 * second, cached=80 * second, tokens=500 + 10 * second), requests=40 + 2 * second
        )
    point = snapshot.point
    assert (point.cached_per_s, point.computed_per_s) == (80.0, 20.0)
    assert (point.tokens_per_s, point.requests_per_s, point.hit_rate) == (10.0, 2.0, 0.8)
    (row,) = snapshot.workers
    assert (row.tokens_per_s, row.hit_rate, row.held_blocks, row.cached_blocks) == (10.0, 0.8, 10, 30)
    assert (point.running, point.waiting) == (2, 1)


def test_what_stopped_long_ago_is_in_no_rate(asking: Asking) -> None:
    asking.hear(worker())
    snapshot = asking.hear(worker(prompt=100, cached=50, tokens=10))
    assert snapshot.point.hit_rate == 0.5
    for _ in range(40):
        snapshot = asking.hear(worker(prompt=100, cached=50, tokens=10))
    assert (snapshot.point.tokens_per_s, snapshot.point.hit_rate) == (0.0, None)


def test_a_worker_that_restarts_counts_from_zero_and_nothing_is_negative(asking: Asking) -> None:
    asking.hear(worker(tokens=1000))
    asking.hear(worker(tokens=1000))
    snapshot = asking.hear(worker(tokens=20, incarnation=2))
    assert snapshot.point.tokens_per_s == 10.0  # 20 in two seconds
    assert asking.hear(worker(tokens=5, incarnation=2)).point.tokens_per_s >= 0.0


def test_a_worker_that_comes_brings_no_jump(asking: Asking) -> None:
    asking.hear(worker("a", tokens=10))
    snapshot = asking.hear(worker("a", tokens=10), worker("b", tokens=10**6))
    assert snapshot.point.tokens_per_s == 0.0


def test_a_lost_worker_stays_in_sight_and_is_forgotten_later(asking: Asking) -> None:
    asking.hear(worker("a"), worker("b"))
    snapshot = asking.hear(worker("a"))
    assert statuses(snapshot) == {"a": "ready", "b": "lost"}
    lost = snapshot.workers[1]
    assert (lost.gone_at, lost.share, lost.running) == (START_AT + asking.now, 0.0, 0)
    for _ in range(int(GONE_S)):
        snapshot = asking.hear(worker("a"))
    assert statuses(snapshot) == {"a": "ready", "b": "lost"}
    assert statuses(asking.hear(worker("a"))) == {"a": "ready"}


def test_a_lost_worker_that_is_back_is_one_worker(asking: Asking) -> None:
    asking.hear(worker("a"))
    asking.hear()
    assert statuses(asking.hear(worker("a"))) == {"a": "ready"}


def test_a_worker_that_drained_has_left(asking: Asking) -> None:
    asking.hear(worker("a", status="draining"))
    assert statuses(asking.hear()) == {"a": "left"}


def test_a_broker_that_has_just_begun_waits_for_its_workers_before_they_count_as_lost(asking: Asking) -> None:
    asking.hear(worker("a"))
    assert statuses(asking.hear(uptime_s=1.0, broker=2)) == {"a": "awaited"}
    assert statuses(asking.hear(uptime_s=6.0, broker=2)) == {"a": "lost"}


def test_without_an_answer_what_was_known_stays_and_the_point_says_so(asking: Asking) -> None:
    heard = asking.hear(worker("a"))
    missed = asking.miss()
    assert (missed.workers, missed.broker, missed.heard_at) == (heard.workers, heard.broker, heard.heard_at)
    assert (missed.problem, missed.point.is_known) == ("away", False)
    assert asking.hear(worker("a")).problem == ""


def test_after_a_pause_of_ours_nothing_is_made_up_of_the_time_between(asking: Asking) -> None:
    asking.hear(worker("a", tokens=10), worker("b"))
    asking.now += PAUSE_S
    snapshot = asking.hear(worker("a", tokens=10**6))
    assert snapshot.point.tokens_per_s == 0.0
    assert statuses(snapshot) == {"a": "ready"}


def test_the_history_is_bounded_and_in_order(asking: Asking) -> None:
    for _ in range(NUM_POINTS + 5):
        asking.hear(worker())
    times = [point.at for point in asking.trends.history]
    assert len(times) == NUM_POINTS
    assert times == sorted(times)


def test_the_brokers_own_hit_rate_is_of_all_its_time(asking: Asking) -> None:
    broker = asking.hear().broker
    assert broker is not None
    assert broker.hit_rate == 0.25
