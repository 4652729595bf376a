"""Links: tried with care, believed when measured, rested when they fail."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.routing.links import MAX_OPEN, MOST_REST_S, PULL_SHARE, REST_S, TRUST_S, TRY_SHARE, LinkBook

TOKEN_S = 1e-3
TRIAL_S = TRY_SHARE * TOKEN_S


def test_a_link_nobody_used_is_tried_one_pull_at_a_time_where_it_pays_at_any_price() -> None:
    book = LinkBook()
    assert 0.0 < book.pull_s("a", TOKEN_S, 0.0) == TRIAL_S <= PULL_SHARE * TOKEN_S
    book.ordered("call", "a")
    assert book.pull_s("a", TOKEN_S, 0.0) == inf
    assert book.pull_s("b", TOKEN_S, 0.0) == TRIAL_S
    book.over("call")
    book.over("call")
    book.over("of no pull")
    assert book.pull_s("a", TOKEN_S, 0.0) == TRIAL_S


def test_what_was_measured_replaces_the_guess_and_weighs_by_tokens() -> None:
    book = LinkBook()
    book.measured("a", 10_000, 1.0, 0.0)
    assert book.pull_s("a", TOKEN_S, 1.0) == book.measured_s("a") == pytest.approx(1e-4)
    book.measured("a", 10, 0.5, 0.0)
    assert book.pull_s("a", TOKEN_S, 1.0) < 2e-4
    for _ in range(60):
        book.measured("a", 1000, 0.3, 0.0)
    assert book.pull_s("a", TOKEN_S, 1.0) == pytest.approx(3e-4, rel=0.01)


def test_a_measured_link_takes_as_many_pulls_as_a_worker_makes() -> None:
    book = LinkBook()
    book.measured("a", 1000, 0.1, 0.0)
    for call in range(MAX_OPEN):
        assert book.pull_s("a", TOKEN_S, 0.0) == pytest.approx(1e-4)
        book.ordered(call, "a")
    assert book.pull_s("a", TOKEN_S, 0.0) == inf
    book.over(0)
    assert book.pull_s("a", TOKEN_S, 0.0) == pytest.approx(1e-4)


def test_a_link_that_was_too_slow_may_show_later_that_it_no_longer_is() -> None:
    book = LinkBook()
    book.measured("a", 100, 1.0, 0.0)
    assert book.pull_s("a", TOKEN_S, TRUST_S - 1) == pytest.approx(1e-2)
    assert book.pull_s("a", TOKEN_S, TRUST_S) == TRIAL_S
    book.ordered("try", "a")
    assert book.pull_s("a", TOKEN_S, TRUST_S) == pytest.approx(1e-2)


def test_a_link_that_fails_rests_for_longer_each_time_until_a_pull_comes_whole() -> None:
    book, now, rest_s = LinkBook(), 0.0, REST_S
    for _ in range(10):
        book.failed("a", now)
        assert book.pull_s("a", TOKEN_S, now + 0.99 * rest_s) == inf
        now += rest_s
        assert book.pull_s("a", TOKEN_S, now) == TRIAL_S
        rest_s = min(MOST_REST_S, 2 * rest_s)
    assert rest_s == MOST_REST_S
    book.measured("a", 1000, 0.1, now)
    book.failed("a", now)
    assert book.pull_s("a", TOKEN_S, now + REST_S) == pytest.approx(1e-4)


@pytest.mark.parametrize(("tokens", "seconds"), [(0, 1.0), (-5, 1.0), (9, 0.0), (9, -1.0), (9, inf), (9, float("nan"))])
def test_figures_that_cannot_be_are_passed_over(tokens: int, seconds: float) -> None:
    book = LinkBook()
    book.measured("a", tokens, seconds, 0.0)
    assert book.measured_s("a") == inf
    assert book.pull_s("a", TOKEN_S, 0.0) == TRIAL_S


@given(st.lists(st.tuples(st.sampled_from(["ordered", "over", "forget"]), st.integers(0, 9), st.sampled_from("ab"))))
def test_open_pulls_are_those_that_are_open(happenings: list[tuple[str, int, str]]) -> None:
    book, open_pulls = LinkBook(), dict[int, str]()
    for what, call, worker in happenings:
        if what == "ordered" and call not in open_pulls:
            book.ordered(call, worker)
            open_pulls[call] = worker
        elif what == "over":
            book.over(call)
            open_pulls.pop(call, None)
        elif what == "forget":
            book.forget(worker)
            open_pulls = {it: name for it, name in open_pulls.items() if name != worker}
        for name in "ab":
            is_free = name not in open_pulls.values()
            assert (book.pull_s(name, TOKEN_S, 0.0) == TRIAL_S) == is_free
