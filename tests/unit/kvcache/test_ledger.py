"""The ledger of work: counted at dispatch, gone at the first token, and what is heard from elsewhere on top."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.routing.ledger import MOST_BUSY, WINDOW_S, WorkLedger
from kvcache.routing.views import Belief


def queue_s(ledger: WorkLedger, worker: str, now: float) -> float:
    belief = Belief(0, 100, 0.0, True, busy_until=ledger.busy_until(worker), behind_s=ledger.behind_s(worker))
    return max(0.0, belief.queue_s(now))


def test_work_is_counted_at_dispatch_and_passes_with_time() -> None:
    ledger = WorkLedger()
    ledger.dispatched(1, "a", 3.0, 10.0)
    ledger.dispatched(2, "a", 2.0, 10.0)
    assert queue_s(ledger, "a", 10.0) == 5.0
    assert queue_s(ledger, "a", 12.0) == 3.0
    assert queue_s(ledger, "b", 10.0) == 0.0


def test_what_waits_behind_a_late_prefill_still_has_to_be_done() -> None:
    ledger = WorkLedger()
    ledger.dispatched(1, "a", 1.0, 0.0)
    ledger.dispatched(2, "a", 4.0, 0.0)
    assert queue_s(ledger, "a", 100.0) == 4.0
    ledger.finished(1, 100.0)
    assert queue_s(ledger, "a", 101.0) == 3.0


def test_an_idle_worker_begins_when_it_is_given_work() -> None:
    ledger = WorkLedger()
    ledger.dispatched(1, "a", 1.0, 0.0)
    ledger.finished(1, 1.0)
    ledger.dispatched(2, "a", 2.0, 50.0)
    assert queue_s(ledger, "a", 50.5) == 1.5


def test_the_end_of_a_request_is_counted_once() -> None:
    ledger = WorkLedger()
    ledger.dispatched(1, "a", 1.0, 0.0)
    ledger.dispatched(2, "a", 1.0, 0.0)
    ledger.finished(1, 0.5)
    ledger.finished(1, 0.7)
    assert queue_s(ledger, "a", 0.5) == 1.0


def test_work_that_came_through_other_brokers_is_added_to_ours() -> None:
    ledger = WorkLedger()
    ledger.dispatched(1, "a", 2.0, 0.0)
    ledger.heard("a", 7.0, 0.0)
    assert queue_s(ledger, "a", 0.0) == 7.0
    ledger.heard("a", 1.5, 0.5)
    assert queue_s(ledger, "a", 0.5) == 1.5
    ledger.heard("b", 3.0, 0.5)
    assert queue_s(ledger, "b", 1.5) == 2.0
    ledger.heard("b", 0.0, 2.0)
    assert queue_s(ledger, "b", 2.0) == 0.0


def test_a_worker_that_is_gone_leaves_nothing() -> None:
    ledger = WorkLedger()
    ledger.dispatched(1, "a", 2.0, 0.0)
    ledger.forget("a")
    ledger.finished(1, 1.0)
    assert queue_s(ledger, "a", 0.0) == 0.0


@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from("ab"), st.floats(0.01, 5)), max_size=40))
def test_the_queue_is_the_work_of_those_who_wait(steps: list[tuple[int, str, float]]) -> None:
    """With no time passing: the sum of what was dispatched and not finished, however calls are mixed."""
    ledger, waiting = WorkLedger(), dict[int, tuple[str, float]]()
    for call, worker, seconds in steps:
        if call in waiting:
            ledger.finished(call, 0.0)
            del waiting[call]
        else:
            ledger.dispatched(call, worker, seconds, 0.0)
            waiting[call] = worker, seconds
        for name in "ab":
            expected = sum(work for owner, work in waiting.values() if owner == name)
            assert queue_s(ledger, name, 0.0) == pytest.approx(expected, abs=1e-9)


def test_the_price_of_delay_is_the_rate_of_arrivals_over_the_idle_share() -> None:
    ledger = WorkLedger()
    for number in range(4000):
        ledger.dispatched(number, "a", 0.5, number / 4)
        ledger.finished(number, number / 4)
    # Four a second on four workers is one each, and half a second each is half of the time.
    assert ledger.delay_price(1000.0, 4) == pytest.approx(1.0 / (1.0 - 0.5), rel=0.02)
    assert ledger.delay_price(1000.0, 1) == pytest.approx(4.0 / (1.0 - MOST_BUSY), rel=0.02)
    assert ledger.delay_price(1000.0 + 20 * WINDOW_S, 4) < 1e-6


def test_without_traffic_or_workers_a_delay_costs_nothing() -> None:
    assert WorkLedger().delay_price(5.0, 4) == 0.0
    ledger = WorkLedger()
    ledger.dispatched(1, "a", 1.0, 0.0)
    assert ledger.delay_price(0.0, 0) == 0.0
