"""A modelled cache: leading runs, leaves evicted first, never more than its capacity."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcache.simulate.cache import ModelCache

PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=5)


def chain(path: list[int]) -> list[bytes]:
    return [bytes(path[:depth]) for depth in range(1, len(path) + 1)]


def test_the_leaf_used_longest_ago_goes_first() -> None:
    cache = ModelCache(40)
    assert cache.store([b"a", b"ab"], [10, 20]) == ([b"ab", b"a"], [])
    assert cache.store([b"a", b"ac"], [10, 20]) == ([b"ac"], [])
    cache.touch([b"a", b"ab"])
    assert cache.store([b"x", b"y"], [10, 20]) == ([b"y", b"x"], [b"ac"])
    assert cache.held([b"a", b"ab"]) == 2
    assert cache.held([b"a", b"ac"]) == 1


def test_a_prompt_longer_than_the_cache_keeps_its_beginning() -> None:
    cache = ModelCache(25)
    stored, evicted = cache.store([b"a", b"b", b"c"], [10, 20, 30])
    assert set(stored) == {b"a", b"b", b"c"}
    assert evicted == [b"c"]
    assert cache.held([b"a", b"b", b"c"]) == 2


@given(st.lists(PATHS, max_size=40), st.integers(0, 60))
def test_what_is_reported_is_what_is_held_and_no_child_outlives_its_parent(paths: list[list[int]], size: int) -> None:
    cache, known = ModelCache(size), set[bytes]()
    for path in paths:
        nodes = chain(path)
        stored, evicted = cache.store(nodes, [10 * depth for depth in range(1, len(nodes) + 1)])
        assert not set(stored) & known
        known |= set(stored)
        known -= set(evicted)
        assert known == set(cache.nodes())
        assert cache.used == 10 * len(known) <= size
        assert all(len(node) == 1 or node[:-1] in known for node in known)
