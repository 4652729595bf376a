"""Rates: learned from what prefills took, however they are mixed, and never absurd."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kvcache.ring import HashRing
from kvcache.routing.keys import RoutingKey
from kvcache.routing.ledger import WorkLedger
from kvcache.routing.prefix import prefix
from kvcache.routing.rates import HOPE_HALF_LIFE_S, MEMORY, START_TOKENS, RateBook, RateLearner
from kvcache.routing.views import UNKNOWN_RATES, Belief, Choice, Rates, Request

TRUE = Rates(token_s=1e-4, context_s=2e-9, decode_s=3e-6, is_learned=True, start_tokens=START_TOKENS)
PREFILLS = [(500, 0, 0), (9000, 3000, 4), (60_000, 0, 1), (2000, 1500, 12), (30_000, 29_000, 0), (800, 0, 7)]


def teach(learner: RateLearner, rates: Rates, times: int = 20) -> None:
    for _ in range(times):
        for num_tokens, cached, decodes in PREFILLS:
            learner.prefilled(num_tokens, cached, decodes, rates.prefill_s(num_tokens, cached, decodes))


def report(book: RateBook, worker: str, rates: Rates, times: int = 20) -> None:
    for _ in range(times):
        for num_tokens, cached, decodes in PREFILLS:
            book.prefilled(worker, num_tokens, cached, decodes, rates.prefill_s(num_tokens, cached, decodes))


def times_slower(rates: Rates, factor: float) -> Rates:
    return replace(
        rates, token_s=rates.token_s * factor, context_s=rates.context_s * factor, decode_s=rates.decode_s * factor
    )


def test_all_three_rates_are_found() -> None:
    learner = RateLearner(UNKNOWN_RATES)
    teach(learner, TRUE)
    assert learner.rates.is_learned
    for num_tokens, cached, decodes in [(1000, 0, 0), (100_000, 50_000, 8)]:
        expected = TRUE.prefill_s(num_tokens, cached, decodes)
        assert learner.rates.prefill_s(num_tokens, cached, decodes) == pytest.approx(expected, rel=0.02)


def test_the_first_figure_replaces_what_was_assumed() -> None:
    learner = RateLearner(UNKNOWN_RATES)
    learner.prefilled(1000, 0, 0, 0.25)
    assert learner.rates.prefill_s(1000, 0) == pytest.approx(0.25)
    assert learner.rates.prefill_s(2000, 0) == pytest.approx(0.5, rel=0.05)


def test_prompts_of_a_token_do_not_teach_that_each_token_takes_a_step() -> None:
    """They take as long as reading the weights does: 30 ms each, 100 in turns with none cached and most cached."""
    learner = RateLearner(UNKNOWN_RATES)
    for num_tokens, cached in [(1, 0), (4001, 4000)] * 50:
        learner.prefilled(num_tokens, cached, 0, 0.03)
    assert learner.rates.prefill_s(500, 499) == pytest.approx(0.03, rel=0.05)
    assert learner.rates.prefill_s(40_000, 0) < 60, "20 s by the token; each as a step would be 1,200"


def test_a_worker_that_slows_down_is_followed() -> None:
    learner = RateLearner(UNKNOWN_RATES)
    teach(learner, TRUE)
    slow = times_slower(TRUE, 3.0)
    teach(learner, slow, times=1 + 3 * MEMORY // len(PREFILLS))
    assert learner.rates.prefill_s(10_000, 0) == pytest.approx(slow.prefill_s(10_000, 0), rel=0.1)


@given(
    st.lists(
        st.tuples(st.integers(0, 200_000), st.integers(0, 200_000), st.integers(0, 99), st.floats(-1, 1e4)),
        max_size=20,
    )
)
def test_no_figures_make_a_rate_negative_or_infinite(figures: list[tuple[int, int, int, float]]) -> None:
    learner = RateLearner(UNKNOWN_RATES)
    for num_tokens, cached, decodes, seconds in figures:
        learner.prefilled(num_tokens, cached, decodes, seconds)
        for rate in (learner.rates.token_s, learner.rates.context_s, learner.rates.decode_s):
            assert 0.0 <= rate < inf


@pytest.mark.parametrize("seconds", [0.0, -1.0, inf, float("nan")])
def test_figures_that_cannot_be_are_passed_over(seconds: float) -> None:
    learner = RateLearner(UNKNOWN_RATES)
    learner.prefilled(100, 0, 0, seconds)
    learner.prefilled(100, 100, 0, 1.0)
    assert learner.rates == UNKNOWN_RATES


def test_a_worker_that_has_said_nothing_is_like_the_others() -> None:
    book = RateBook()
    assert (book.rates("a"), book.is_learned) == (UNKNOWN_RATES, False)
    report(book, "a", TRUE)
    report(book, "b", TRUE)
    assert book.rates("new").token_s == pytest.approx(TRUE.token_s, rel=0.05)
    assert not book.rates("new").is_learned
    assert book.is_learned
    book.forget("a")
    book.forget("b")
    assert book.rates("new") == UNKNOWN_RATES


def test_what_an_idle_worker_is_slower_than_the_quickest_is_halved_with_every_half_life() -> None:
    book = RateBook()
    report(book, "quick", TRUE)
    report(book, "slow", times_slower(TRUE, 9.0))
    for half_lives, factor in [(0, 9.0), (1, 5.0), (2, 3.0), (3, 2.0), (100, 1.0)]:
        rates = book.rates("slow", half_lives * HOPE_HALF_LIFE_S)
        for prompt in [(1000, 0, 0), (100_000, 50_000, 8)]:
            assert rates.prefill_s(*prompt) == pytest.approx(factor * TRUE.prefill_s(*prompt), rel=0.05)
    assert book.rates("quick", 1e9) == book.rates("quick")


def test_nobody_is_hoped_to_be_quicker_than_all_that_are_left() -> None:
    book = RateBook()
    report(book, "quick", TRUE)
    report(book, "slow", times_slower(TRUE, 9.0))
    book.rates("slow", 1e9)
    book.forget("quick")
    assert book.rates("slow", 1e9) == book.rates("slow")


def serve(book: RateBook, ledger: WorkLedger, true: dict[str, Rates], times: range) -> dict[str, int]:
    """How many prompts each worker gets, one a second and one at a time, from the policy."""
    ring, served = HashRing(dict.fromkeys(true, 100)), dict.fromkeys(true, 0)
    for now in times:
        beliefs = {
            worker: Belief(0, 100, 0.0, is_available=True, rates=book.rates(worker, ledger.idle_s(worker, now)))
            for worker in true
        }
        choice = prefix(Request(prefix_key(now), now, 4000), ring, beliefs)
        assert isinstance(choice, Choice)
        compute(book, ledger, choice.worker_id, true[choice.worker_id], now)
        served[choice.worker_id] += 1
    return served


def compute(book: RateBook, ledger: WorkLedger, worker: str, rates: Rates, now: float) -> None:
    book.tried(worker, ledger.idle_s(worker, now))
    ledger.dispatched((worker, now), worker, 1.0, now)
    assert ledger.idle_s(worker, now + 1e9) == 0.0
    book.prefilled(worker, 4000, 0, 0, rates.prefill_s(4000, 0))
    ledger.finished((worker, now), now)


def prefix_key(number: int) -> RoutingKey:
    return RoutingKey(number.to_bytes(8, "big"), str(number))


def test_a_worker_that_was_stopped_once_gets_its_share_again() -> None:
    book, ledger = RateBook(), WorkLedger()
    quick = Rates(token_s=1e-3)
    compute(book, ledger, "a", quick, 0)
    compute(book, ledger, "b", times_slower(quick, 100.0), 0)
    assert serve(book, ledger, {"a": quick, "b": quick}, range(1, 100))["b"] == 0
    assert serve(book, ledger, {"a": quick, "b": quick}, range(100, 200))["b"] > 0
    served = serve(book, ledger, {"a": quick, "b": quick}, range(200, 700))
    assert served["b"] > 0.3 * served["a"]


def test_a_worker_that_is_slow_gets_no_more_than_a_trickle() -> None:
    book, ledger = RateBook(), WorkLedger()
    true = {"a": Rates(token_s=1e-3), "b": Rates(token_s=8e-3)}
    for worker, rates in true.items():
        compute(book, ledger, worker, rates, 0)
    assert 5 <= serve(book, ledger, true, range(1, 1000))["b"] <= 20, "it is to be tried about once in 80 s"
