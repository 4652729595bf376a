"""The block pool: all-or-nothing allocation, sharing, leaf-first eviction, and its accounting."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.batch import BlockId
from workers.blocks import BlockPool


def taken(pool: BlockPool, num: int) -> list[BlockId]:
    blocks = pool.allocate(num)
    assert blocks is not None
    return blocks


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4)
    first = taken(pool, 3)
    assert pool.allocate(2) is None
    assert pool.counts().free == 1
    second = taken(pool, 1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_block_is_free_again_only_when_its_last_holder_leaves() -> None:
    pool = BlockPool(2)
    blocks = taken(pool, 1)
    pool.pin(blocks)
    pool.unpin(blocks)
    assert pool.num_free == 1
    pool.unpin(blocks)
    assert pool.num_free == 2
    pool.check()


def test_kept_block_becomes_cached_and_can_be_taken_up_again() -> None:
    pool = BlockPool(2)
    blocks = taken(pool, 1)
    pool.keep(blocks[0], None)
    pool.unpin(blocks)
    assert (pool.counts().cached, pool.num_free, pool.num_available) == (1, 1, 2)
    pool.pin(blocks)
    counts = pool.counts()
    assert (counts.cached, counts.held) == (0, 1)
    pool.check()


def test_allocate_never_takes_a_cached_block_by_itself() -> None:
    pool = BlockPool(1)
    blocks = taken(pool, 1)
    pool.keep(blocks[0], None)
    pool.unpin(blocks)
    assert pool.allocate(1) is None
    assert pool.evict(1) == blocks
    assert pool.allocate(1) == blocks


def test_eviction_takes_the_tail_of_the_least_recent_sequence_first() -> None:
    pool = BlockPool(6)
    old, new = taken(pool, 3), taken(pool, 3)
    for block in old + new:
        pool.keep(block, None)
    pool.unpin(new)
    pool.unpin(old)
    pool.pin(new)  # used again: now `old` is the least recent
    pool.unpin(new)
    assert pool.evict(4) == [*reversed(old), new[2]]
    assert pool.counts().evictions == 4
    assert pool.evict(9) == [new[1], new[0]]
    pool.check()


def test_eviction_leaves_held_blocks_alone() -> None:
    pool = BlockPool(2)
    held = taken(pool, 2)
    for block in held:
        pool.keep(block, None)
    assert pool.evict(2) == []
    assert pool.counts().held == 2


def test_forgotten_block_is_free_at_once_or_when_let_go() -> None:
    pool = BlockPool(2)
    cached, held = taken(pool, 2)
    pool.keep(cached, None)
    pool.keep(held, None)
    pool.unpin([cached])
    pool.forget(cached)
    pool.forget(held)
    assert pool.counts().free == 1
    pool.unpin([held])
    assert pool.counts().free == 2
    assert pool.kept() == frozenset()
    pool.check()


def test_inner_block_is_evicted_only_when_its_last_child_is_gone() -> None:
    pool = BlockPool(5)
    top, *below = taken(pool, 4)
    pool.keep(top, None)
    for child in below:
        pool.keep(child, top)
    pool.unpin([top, *below])
    pool.pin([top, below[1]])
    pool.unpin([top, below[1]])
    assert pool.evict(2) == [below[2], below[0]]
    with pytest.raises(AssertionError, match="before its 1 children"):
        pool.forget(top)
    pool.check()
    pool.forget(below[1])
    assert pool.evict(9) == [top]
    pool.check()


def test_hits_are_counted_per_block_from_its_allocation_on() -> None:
    pool = BlockPool(3)
    blocks = taken(pool, 2)
    pool.count_hits(blocks[:1])
    pool.keep(blocks[0], None)
    pool.keep(blocks[1], blocks[0])
    for _ in range(4):
        pool.count_hits(blocks[1:])
    counts = pool.counts()
    assert (counts.hits, counts.by_hits[:4]) == (5, (0, 1, 0, 1))
    pool.unpin(blocks)
    pool.evict(2)
    assert sum(pool.counts().by_hits) == 0
    fresh = taken(pool, 1)
    pool.keep(fresh[0], None)
    assert pool.counts().by_hits[0] == 1
    pool.check()


def test_misuse_of_a_block_is_caught() -> None:
    pool = BlockPool(1)
    with pytest.raises(AssertionError, match="is free"):
        pool.pin([BlockId(0)])
    with pytest.raises(AssertionError, match="not held"):
        pool.unpin([BlockId(0)])
    with pytest.raises(AssertionError, match="not held"):
        pool.keep(BlockId(0), None)
    pool.check()


def test_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 block, not 0"):
        BlockPool(0)


class PoolMachine(RuleBasedStateMachine):
    """Holders come, share and leave at random; a plain dict says what each block's state must be."""

    SIZE = 7

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.SIZE)
        self.holders: list[list[BlockId]] = []
        self.kept: set[BlockId] = set()

    def refs(self, block: BlockId) -> int:
        return sum(holder.count(block) for holder in self.holders)

    @rule(num=st.integers(0, SIZE + 1))
    def allocate(self, num: int) -> None:
        free = self.SIZE - len(self.kept | {block for holder in self.holders for block in holder})
        blocks = self.pool.allocate(num)
        assert (blocks is None) == (num > free)
        if blocks:
            self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        shared = holder[: data.draw(st.integers(1, len(holder)))]
        self.pool.pin(shared)
        self.holders.append(shared)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.unpin(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.holders))))
        if block not in self.kept:
            self.pool.keep(block, None)
            self.kept.add(block)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def forget_or_revive(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.kept)))
        if data.draw(st.booleans()):
            self.pool.forget(block)
            self.kept.remove(block)
        else:
            self.pool.pin([block])
            self.holders.append([block])

    @rule(num=st.integers(0, 3))
    def evict(self, num: int) -> None:
        evictable = {block for block in self.kept if self.refs(block) == 0}
        evicted = self.pool.evict(num)
        assert len(evicted) == min(num, len(evictable))
        assert set(evicted) <= evictable
        self.kept -= set(evicted)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check()
        for block in map(BlockId, range(self.SIZE)):
            assert self.pool.ref_count(block) == self.refs(block)
        assert self.pool.kept() == self.kept
        assert self.pool.counts().cached == sum(self.refs(block) == 0 for block in self.kept)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolAgainstModel = PoolMachine.TestCase
