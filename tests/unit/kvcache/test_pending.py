"""Pending prefixes: what is on its way counts, from its first node on, until it is there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcache.routing.pending import PendingPrefixes

CHAINS = st.lists(st.sampled_from([b"1", b"2"]), max_size=4).map(
    lambda steps: [b"/".join(steps[:depth]) for depth in range(1, len(steps) + 1)]
)


def test_a_second_request_finds_what_the_first_is_computing() -> None:
    pending = PendingPrefixes()
    pending.dispatched(1, "a", [b"x", b"y"])
    pending.dispatched(2, "b", [b"x"])
    assert pending.lookup([b"x", b"y", b"z"]) == {"a": 2, "b": 1}
    pending.finished(1)
    pending.finished(1)
    assert pending.lookup([b"x", b"y"]) == {"b": 1}


def test_nothing_is_kept_of_a_worker_that_is_gone() -> None:
    pending = PendingPrefixes()
    pending.dispatched(1, "a", [b"x"])
    pending.dispatched(2, "b", [b"x", b"y"])
    pending.forget("b")
    assert pending.lookup([b"x", b"y"]) == {"a": 1}
    pending.finished(1)
    assert len(pending) == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc"), CHAINS), max_size=40), CHAINS)
def test_it_equals_the_longest_common_beginning_with_what_is_pending(
    steps: list[tuple[int, str, list[bytes]]], asked: list[bytes]
) -> None:
    pending, open_ = PendingPrefixes(), dict[int, tuple[str, list[bytes]]]()
    for call, worker, chain in steps:
        if call in open_:
            pending.finished(call)
            del open_[call]
        else:
            pending.dispatched(call, worker, chain)
            open_[call] = worker, chain
    expected: dict[str, int] = {}
    for worker, chain in open_.values():
        common = sum(asked[: depth + 1] == chain[: depth + 1] for depth in range(min(len(asked), len(chain))))
        if common:
            expected[worker] = max(common, expected.get(worker, 0))
    assert pending.lookup(asked) == expected
