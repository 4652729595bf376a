"""Eviction: each policy's order against a slow search through all leaves, and what each is for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.batch import BlockId
from workers.blocks import BlockPool
from workers.eviction import ATTENTION_TOKENS, EVICTION_POLICIES, VALUES, EvictionPolicy, EvictionQueue

BLOCK_SIZE = 1024


@dataclass
class Prefix:
    """One block and the way to it, with what a slow evictor would remember of it."""

    path: list[BlockId]
    num_hits: int = 0
    rank: tuple[float, int] = (0.0, 0)


class SlowEvictor:
    """A pool beside a list of prefixes, in which the next victim is looked for from scratch."""

    def __init__(self, policy: EvictionPolicy, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE, policy)
        self._value = VALUES[policy]
        self._prefixes: dict[BlockId, Prefix] = {}
        self._floor = 0.0
        self._tick = 0

    def use(self, choice: int, num_new: int) -> None:
        """A sequence shares the path to one of the blocks there are, adds some of its own, and ends."""
        paths = [prefix.path for prefix in self._prefixes.values()]
        shared = [] if not paths or choice % 4 == 0 else paths[choice % len(paths)]
        self.pool.pin(shared)
        self.pool.count_hits(shared)
        for block in shared:
            self._prefixes[block].num_hits += 1
        while num_new > self.pool.num_free and self.pool.num_available > self.pool.num_free:
            self.evict(shared)
        added = self.pool.allocate(min(num_new, self.pool.num_free)) or []
        path = [*shared, *added]
        for at in range(len(shared), len(path)):
            self.pool.keep(path[at], path[at - 1] if at else None)
            self._prefixes[path[at]] = Prefix(path[: at + 1])
        for block in reversed(path):
            self._tick += 1
            prefix = self._prefixes[block]
            depth = (len(prefix.path) - 1) * BLOCK_SIZE
            prefix.rank = (self._value(prefix.num_hits, depth, self._floor), self._tick)
        self.pool.unpin(path)

    def evict(self, held: list[BlockId]) -> None:
        inner = {prefix.path[-2] for prefix in self._prefixes.values() if len(prefix.path) > 1}
        leaves = self._prefixes.keys() - inner - set(held)
        expected = min(leaves, key=lambda block: self._prefixes[block].rank)
        assert self.pool.evict(1) == [expected]
        self._floor = max(self._floor, self._prefixes.pop(expected).rank[0])


@settings(max_examples=150, deadline=None)
@given(
    policy=st.sampled_from(EVICTION_POLICIES),
    uses=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4)), max_size=40),
)
def test_every_victim_is_the_leaf_of_least_value(policy: EvictionPolicy, uses: list[tuple[int, int]]) -> None:
    slow = SlowEvictor(policy, 9)
    for choice, num_new in uses:
        slow.use(choice, num_new)
        slow.pool.check()


def filled(policy: EvictionPolicy, *, again: int) -> tuple[BlockPool, list[BlockId]]:
    """Three prefixes of one block each, let go in order; the first served `again` times more, before the others."""
    pool = BlockPool(3, BLOCK_SIZE, policy)
    blocks = pool.allocate(3)
    assert blocks is not None
    for block in blocks:
        pool.keep(block, None)
    for _ in range(again):
        pool.count_hits(blocks[:1])
    for block in blocks:
        pool.unpin([block])
    return pool, blocks


def test_lru_goes_by_the_last_use_alone() -> None:
    pool, blocks = filled("lru", again=9)
    assert pool.evict(3) == blocks


@pytest.mark.parametrize("policy", ["lfu", "cost"])
def test_block_that_serves_often_outlives_those_used_later(policy: EvictionPolicy) -> None:
    pool, blocks = filled(policy, again=2)
    assert pool.evict(3) == [blocks[1], blocks[2], blocks[0]]


@pytest.mark.parametrize("policy", ["lfu", "cost"])
def test_block_that_served_often_long_ago_goes_in_the_end(policy: EvictionPolicy) -> None:
    pool, (old, *_) = filled(policy, again=5)
    for _ in range(100):
        fresh = pool.evict(1)
        if fresh == [old]:
            return
        blocks = pool.allocate(1)
        assert blocks is not None
        pool.keep(blocks[0], None)
        pool.count_hits(blocks)
        pool.unpin(blocks)
    raise AssertionError("it is kept for ever")


def test_cost_keeps_what_takes_longest_to_compute_again() -> None:
    queue = EvictionQueue("cost")
    for block, depth in ((BlockId(0), 2 * ATTENTION_TOKENS), (BlockId(1), 0), (BlockId(2), ATTENTION_TOKENS)):
        queue.add(block, num_hits=0, depth=depth, is_leaf=True)
    assert [queue.pop() for _ in range(3)] == [1, 2, 0]


def test_queue_does_not_grow_with_blocks_that_come_and_go() -> None:
    queue = EvictionQueue("lru")
    for _ in range(10_000):
        queue.add(BlockId(0), num_hits=0, depth=0, is_leaf=True)
        queue.discard(BlockId(0))
        queue.check()
