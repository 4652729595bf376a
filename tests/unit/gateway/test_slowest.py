"""Which requests are remembered, and what of them."""

from __future__ import annotations

from bus.errors import Overloaded
from bus.stats import Candidate, Explanation
from kvcache.client.results import Done, Start, Timings, Token, Usage
from kvcache.gateway.slowest import MAX_CANDIDATES, NUM_MINUTES, NUM_SHOWN, WATCHED_S, Progress, Slow, Slowest

AT = 60_000.0
EXPLANATION = Explanation(
    policy="prefix",
    key="k",
    worker_id="w1",
    reason="prefix: 4 of 10 tokens",
    ring_epoch="e",
    num_tokens=10,
    candidates=tuple(Candidate(worker_id=f"w{rank}", rank=rank, load=0, weight=100) for rank in range(20)),
)
START = Start("w1", "prefix", "m", 10, 4, EXPLANATION)


def slow(ttft_s: float, at: float = AT) -> Slow:
    return Slow(at=at, request_id=f"r{ttft_s}", ttft_s=ttft_s, total_s=ttft_s, outcome="stop")


def done(ttft_s: float) -> Done:
    return Done("ab", "stop", Usage(10, 4, 2), Timings(ttft_s, 0.9, 1.0, 7.0, 8.0, 9.0, 1), "w2", "prefix", "r")


def times(slowest: Slowest, at: float = AT) -> list[float]:
    return [request.ttft_s for request in slowest.shown(at)]


def test_the_slowest_are_kept_whatever_their_order() -> None:
    slowest = Slowest()
    for number in range(50):
        slowest.add(slow(float(number * 37 % 50)))
    assert times(slowest) == [float(number) for number in range(49, 49 - NUM_SHOWN, -1)]


def test_old_ones_make_room_for_newer_ones() -> None:
    slowest = Slowest()
    slowest.add(slow(9.0))
    later = AT + 60.0 * (NUM_MINUTES - 1)
    slowest.add(slow(1.0, later))
    assert times(slowest, later) == [9.0, 1.0]
    version = slowest.version
    assert times(slowest, later + 60.0) == [1.0]
    assert slowest.version > version


def test_a_request_that_changes_nothing_leaves_the_version() -> None:
    slowest = Slowest()
    for _ in range(NUM_SHOWN):
        slowest.add(slow(5.0))
    version = slowest.version
    slowest.add(slow(1.0))
    assert slowest.version == version


def test_a_request_is_summed_up_by_its_slowest_output() -> None:
    progress = Progress(100.0)
    progress.fold([START, Token(0, 1, "a")], 100.1)
    progress.fold([done(0.4), done(0.2)], 100.9)
    found = progress.sum_up("r", 2, 101.0, AT)
    assert (found.ttft_s, found.total_s, found.outcome, found.worker_id) == (0.4, 1.0, "stop", "w2")
    assert (found.prompt_tokens, found.cached_tokens, found.queue_ms, found.resumes) == (10, 4, 7.0, 1)
    assert found.routing is not None
    assert (found.routing.worker_id, found.routing.reason) == ("w1", "prefix: 4 of 10 tokens")
    assert (found.routing.num_candidates, len(found.routing.candidates)) == (20, MAX_CANDIDATES)


def test_without_an_explanation_the_reason_is_still_told() -> None:
    progress = Progress(100.0)
    progress.fold([Start("w1", "prefix", "m", 10, 4)], 100.1)
    routing = progress.sum_up("r", 1, 101.0, AT).routing
    assert routing is not None
    assert (routing.worker_id, routing.reason, routing.candidates) == ("w1", "prefix", ())


def test_explanations_are_wanted_only_after_somebody_looked() -> None:
    slowest = Slowest()
    assert not slowest.is_watched(AT)
    slowest.shown(AT)
    assert slowest.is_watched(AT + WATCHED_S - 1)
    assert not slowest.is_watched(AT + WATCHED_S)


def test_a_failure_has_the_name_of_its_error_and_the_time_of_its_first_token() -> None:
    progress = Progress(100.0)
    progress.fold([START, Token(0, 1, "a")], 100.3)
    progress.fail(Overloaded("full", retry_after_ms=1))
    assert progress.sum_up("r", 1, 102.0, AT).outcome == "overloaded"
    assert progress.sum_up("r", 1, 102.0, AT).ttft_s == 0.3


def test_a_caller_that_left_before_the_first_token_waited_all_the_time() -> None:
    found = Progress(100.0).sum_up("r", 1, 102.5, AT)
    assert (found.ttft_s, found.outcome, found.worker_id, found.routing) == (2.5, "gone", "", None)
