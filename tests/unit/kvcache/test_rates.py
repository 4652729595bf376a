"""Rates: learned from what prefills took, however they are mixed, and never absurd."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.routing.rates import MEMORY, RateBook, RateLearner
from kvcache.routing.views import UNKNOWN_RATES, Rates

TRUE = Rates(token_s=1e-4, context_s=2e-9, decode_s=3e-6, is_learned=True)
PREFILLS = [(500, 0, 0), (9000, 3000, 4), (60_000, 0, 1), (2000, 1500, 12), (30_000, 29_000, 0), (800, 0, 7)]


def teach(learner: RateLearner, rates: Rates, times: int = 20) -> None:
    for _ in range(times):
        for num_tokens, cached, decodes in PREFILLS:
            learner.prefilled(num_tokens, cached, decodes, rates.prefill_s(num_tokens, cached, decodes))


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
    assert learner.rates.prefill_s(2000, 0) == pytest.approx(0.5, rel=0.01)


def test_a_worker_that_slows_down_is_followed() -> None:
    learner = RateLearner(UNKNOWN_RATES)
    teach(learner, TRUE)
    slow = Rates(token_s=3e-4, context_s=6e-9, decode_s=9e-6)
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
    teach(book.learner("a"), TRUE)
    teach(book.learner("b"), TRUE)
    assert book.rates("new").token_s == pytest.approx(TRUE.token_s, rel=0.05)
    assert not book.rates("new").is_learned
    assert book.is_learned
    book.forget("a")
    book.forget("b")
    assert book.rates("new") == UNKNOWN_RATES
