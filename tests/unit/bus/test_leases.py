"""The worker's lease: it ends before the broker thinks so, and a pause ends it at once."""

from __future__ import annotations

from bus.leases import MAX_UNANSWERED, WorkerLease


def ticked(lease: WorkerLease, start: float, stop: float) -> None:
    """Tick each 250 ms from `start` to `stop`, as a healthy loop does."""
    now = start
    while now <= stop:
        lease.tick(now)
        now += 0.25


def test_a_new_lease_is_not_held() -> None:
    assert not WorkerLease(0.0).is_held(0.0)


def test_a_lease_counts_from_the_sending_of_the_beat_not_from_its_answer() -> None:
    lease = WorkerLease(0.0)
    lease.sent(1, 0.0)
    ticked(lease, 0.0, 0.4)
    assert lease.granted(1, 2000)
    ticked(lease, 0.5, 2.0)
    assert lease.is_held(1.99)
    assert not lease.is_held(2.0)


def test_an_answer_to_an_unknown_beat_grants_nothing() -> None:
    lease = WorkerLease(0.0)
    lease.sent(1, 0.0)
    assert not lease.granted(2, 2000)
    assert not lease.is_held(0.0)


def test_an_answer_counts_once() -> None:
    lease = WorkerLease(0.0)
    lease.sent(1, 0.0)
    assert lease.granted(1, 2000)
    assert not lease.granted(1, 60_000)
    ticked(lease, 0.0, 2.0)
    assert lease.is_held(1.99)
    assert not lease.is_held(2.0)


def test_a_late_answer_to_an_old_beat_does_not_shorten_the_lease() -> None:
    lease = WorkerLease(0.0)
    lease.sent(1, 0.0)
    lease.sent(2, 0.25)
    lease.tick(0.25)
    assert lease.granted(2, 2000)
    assert lease.granted(1, 2000)
    ticked(lease, 0.5, 2.25)
    assert lease.is_held(2.24)
    assert not lease.is_held(2.25)


def test_a_pause_longer_than_the_limit_voids_the_lease() -> None:
    lease = WorkerLease(0.0)
    lease.sent(1, 0.0)
    lease.granted(1, 2000)
    assert lease.tick(0.6) == 0.6
    assert not lease.is_held(0.6)


def test_a_paused_loop_holds_no_lease_even_before_its_next_tick() -> None:
    lease = WorkerLease(0.0)
    lease.sent(1, 0.0)
    lease.granted(1, 2000)
    assert lease.is_held(0.5)
    assert not lease.is_held(0.6)


def test_grants_for_beats_sent_before_a_pause_do_not_bring_the_lease_back() -> None:
    lease = WorkerLease(0.0)
    lease.sent(1, 0.0)
    lease.tick(0.6)
    assert not lease.granted(1, 2000)
    lease.sent(2, 0.6)
    assert lease.granted(2, 2000)
    assert lease.is_held(0.6)


def test_unanswered_beats_are_bounded() -> None:
    lease = WorkerLease(0.0)
    for beat in range(MAX_UNANSWERED + 1):
        lease.sent(beat, 0.0)
    assert not lease.granted(0, 2000)
    assert lease.granted(1, 2000)
