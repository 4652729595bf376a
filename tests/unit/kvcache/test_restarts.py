"""The core that decides whether a child that ended is started again."""

from __future__ import annotations

import pytest

from kvcache.restarts import RestartCounter, RestartPolicy

POLICY = RestartPolicy(first_delay_s=1.0, max_delay_s=4.0, stable_s=30.0, max_failures=5)


def ends(counter: RestartCounter, *lives: float) -> list[float | None]:
    """Let the child live for each of these seconds in turn; the delays it is given."""
    delays, now = [], 100.0
    for life in lives:
        counter.started(now)
        now += life
        delays.append(counter.ended(now))
    return delays


def test_delays_double_up_to_the_longest() -> None:
    assert ends(RestartCounter(POLICY), 0.1, 0.1, 0.1, 0.1) == [1.0, 2.0, 4.0, 4.0]


def test_failures_in_a_row_are_a_crash_loop() -> None:
    counter = RestartCounter(POLICY)
    assert ends(counter, *[0.1] * 5)[-1] is None
    assert counter.failures == POLICY.max_failures


@pytest.mark.parametrize(("life", "delay"), [(29.9, 4.0), (30.0, 1.0)])
def test_only_a_long_life_forgets_earlier_failures(life: float, delay: float) -> None:
    assert ends(RestartCounter(POLICY), 0.1, 0.1, life)[-1] == delay


def test_a_child_that_runs_long_each_time_is_never_given_up() -> None:
    assert ends(RestartCounter(POLICY), *[31.0] * 50) == [1.0] * 50
