"""On how many workers a beginning is due: by its share of the traffic since it appeared, and by who has it already."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.routing.keys import HALF_LIFE_S
from kvcache.routing.shares import MAX_BEGINNINGS, Beginning, Shares
from kvcache.routing.views import Belief, Rates

HOT: list[Beginning] = [("hot", 8000)]
WORKERS = 4


def after(requests: Sequence[list[Beginning]], pause_s: float = 0.1) -> tuple[Shares, float]:
    shares = Shares()
    for number, beginnings in enumerate(requests):
        shares.arrived(beginnings, number * pause_s)
    return shares, len(requests) * pause_s


def own(number: int) -> list[Beginning]:
    return [(number, 8000)]


def cluster(*token_s: float) -> dict[str, Belief]:
    rates = [Rates(token_s=it, is_learned=True) for it in token_s]
    return {str(number): Belief(0, 100, 0.0, True, rates=it) for number, it in enumerate(rates)}


EQUAL = cluster(*[1e-3] * WORKERS)


def hits(*tokens: int) -> dict[str, int]:
    return {str(number): it for number, it in enumerate(tokens)}


def num_due(shares: Shares, now: float, beliefs: dict[str, Belief] = EQUAL) -> int:
    """On how many workers, from the first on, HOT can be before no further copy is due."""
    copies = range(len(beliefs) + 1)
    return next(n for n in copies if not shares.due_tokens(HOT, hits(*[8000] * n), beliefs, now))


def test_what_everybody_has_is_due_everywhere_and_nowhere_twice() -> None:
    assert num_due(*after([HOT] * 100)) == WORKERS


def test_what_half_of_the_traffic_has_is_due_on_half_of_the_workers() -> None:
    shares, now = after([HOT if number % 2 else own(number) for number in range(200)])
    assert num_due(shares, now) == WORKERS / 2


def test_a_slow_worker_is_the_last_that_a_copy_is_due_on_and_what_has_left_does_not_count() -> None:
    shares, now = after([own(number) if number % 10 == 0 else HOT for number in range(200)])
    assert num_due(shares, now) == WORKERS
    assert num_due(shares, now, cluster(1e-3, 1e-3, 1e-3, 4e-3)) == 3
    assert shares.due_tokens(HOT, dict.fromkeys("abcdef", 8000), EQUAL, now) == 8000
    assert num_due(shares, now, cluster(0.0, 0.0, 0.0, 0.0)) == WORKERS


def test_a_new_beginning_is_known_after_a_few_requests() -> None:
    shares, now = after([own(number) for number in range(1000)] + [HOT] * 5)
    assert num_due(shares, now) >= 2


def test_nothing_is_due_of_a_prompt_that_is_new_or_was_asked_for_long_ago() -> None:
    shares, now = after([HOT] + [own(number) for number in range(100)])
    assert shares.due_tokens(HOT, {}, EQUAL, now) == 0
    assert shares.due_tokens([("never", 100)], {}, EQUAL, now) == 0
    assert Shares().due_tokens(HOT, {}, EQUAL, now) == 0


def test_of_a_hot_beginning_and_what_follows_it_only_the_beginning_is_due() -> None:
    shares, now = after([[*HOT, (number, 9000)] for number in range(100)])
    assert shares.due_tokens([*HOT, (7, 9000)], hits(8000), EQUAL, now) == 8000


def test_what_is_hot_is_due_however_old_and_rare_its_own_beginning_is() -> None:
    old: list[Beginning] = [("old", 2000)]
    shares, now = after([old] + [own(number) for number in range(500)] + [[*old, *HOT]] * 20)
    assert shares.due_tokens(old, {}, EQUAL, now) == 0
    assert shares.due_tokens([*old, *HOT], {}, EQUAL, now) == 8000


def test_what_was_seen_twice_is_not_due_twice() -> None:
    assert num_due(*after([HOT])) == 1
    assert num_due(*after([HOT] * 2)) <= 2


def test_who_has_less_of_it_does_not_count_as_having_it() -> None:
    shares, now = after([HOT] * 100)
    assert shares.due_tokens(HOT, hits(*[7999] * WORKERS), EQUAL, now) == 8000
    assert shares.due_tokens(HOT, hits(*[9000] * WORKERS), EQUAL, now) == 0


def test_a_beginning_that_has_gone_out_of_use_is_soon_due_nowhere() -> None:
    shares, now = after([HOT] * 100)
    for number in range(100):
        shares.arrived(own(number), now)
    assert num_due(shares, now) == WORKERS / 2
    for number in range(100):
        now += HALF_LIFE_S / 10
        shares.arrived(own(number), now)
    assert num_due(shares, now) == 0


@pytest.mark.parametrize("at", [0.0, 63 * HALF_LIFE_S, 65 * HALF_LIFE_S, 2000 * HALF_LIFE_S])
def test_shares_are_the_same_whenever_the_traffic_comes(at: float) -> None:
    shares = Shares()
    shares.arrived(own(0), 0.0)
    for _ in range(100):
        shares.arrived(HOT, at)
    assert num_due(shares, at) == WORKERS
    later = at + 65 * HALF_LIFE_S  # when numbers are made small again
    for _ in range(100):
        shares.arrived(HOT, later)
    assert num_due(shares, later) == WORKERS
    for number in range(100):
        shares.arrived(own(number), later)
    assert num_due(shares, later) == WORKERS / 2


def test_only_the_last_beginnings_are_remembered() -> None:
    shares, now = after([HOT] * 10)
    shares.arrived([(number, number) for number in range(MAX_BEGINNINGS)], now)
    assert len(shares) == MAX_BEGINNINGS
    assert shares.due_tokens(HOT, {}, EQUAL, now) == 0


@given(
    st.lists(st.tuples(st.text("abc", min_size=1, max_size=4), st.floats(0, 200)), max_size=40),
    st.lists(st.integers(0, 50), max_size=9),
    st.integers(1, 9),
)
def test_no_more_is_due_than_the_prompt_has_nor_more_copies_than_workers(
    requests: list[tuple[str, float]], held: list[int], workers: int
) -> None:
    shares, now, beliefs = Shares(), 0.0, cluster(*[1e-3] * workers)
    for text, pause_s in requests:
        now += pause_s
        beginnings: list[Beginning] = [(text[:end], end * 10) for end in range(1, len(text) + 1)]
        assert shares.due_tokens(beginnings, hits(*held), beliefs, now) in {0, *(tokens for _, tokens in beginnings)}
        assert shares.due_tokens(beginnings, hits(*[len(text) * 10] * workers), beliefs, now) == 0
        shares.arrived(beginnings, now)
