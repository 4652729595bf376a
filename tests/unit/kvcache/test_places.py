"""Places in line: short before long, high before low, and nobody is overtaken for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcache.places import CLASS_S, WAIT_PER_LEFT, place_of

TIMES = st.floats(0, 1e6)
LENGTHS = st.floats(0, 1e6)


@given(TIMES, LENGTHS, TIMES, LENGTHS)
def test_nobody_is_overtaken_by_one_of_its_class_that_comes_a_class_later(
    one: float, one_left: float, other: float, other_left: float
) -> None:
    if other >= one + CLASS_S:
        assert place_of(other, 0, other_left) >= place_of(one, 0, one_left)


@given(LENGTHS, LENGTHS, st.integers(-100, 99))
def test_of_those_that_come_together_no_length_outweighs_a_class(left: float, other_left: float, priority: int) -> None:
    assert place_of(5.0, priority, left) <= place_of(5.0, priority + 1, other_left)


@given(LENGTHS, LENGTHS)
def test_of_those_that_come_together_the_shorter_is_first(left: float, other_left: float) -> None:
    if left <= other_left:
        assert place_of(5.0, 0, left) <= place_of(5.0, 0, other_left)
    assert place_of(5.0, 0, 1.0) == 5.0 + WAIT_PER_LEFT
