"""The block pool: who holds which block of KV memory. Numbers only; the memory itself is the runner's.

    free    ref_count 0, content worthless            --allocate--> held
    held    ref_count > 0, one per sequence using it  --last unpin--> cached if kept, else free
    cached  ref_count 0, content findable by prefix   --pin--> held,  --evict--> free

Only this class moves a block between the three. It knows nothing of tokens: the prefix index says
`keep` when a block can be found again and `forget` when it no longer can.

Eviction is least recently used and needs no search for leaves. A sequence holds every block before one
it holds, and `unpin` lets go of the tail first, so a block is always released after its descendants:
release order is leaf-first order, and the head of one queue is the block to evict (O(1)).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from workers.batch import BlockId


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCounts:
    """Where the blocks are now, and totals since the pool was made.

    hits: cached blocks taken up again. evictions: cached blocks forgotten for want of room.
    """

    total: int
    free: int
    held: int
    cached: int
    allocations: int
    hits: int
    evictions: int


class BlockPool:
    """`num_blocks` blocks, all free at first. Raises ValueError if there would be none."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least 1 block, not {num_blocks}")
        self.num_blocks = num_blocks
        self._free = [BlockId(block) for block in reversed(range(num_blocks))]
        self._ref_counts = [0] * num_blocks
        self._cached: OrderedDict[BlockId, None] = OrderedDict()
        self._kept: set[BlockId] = set()
        self._allocations = 0
        self._hits = 0
        self._evictions = 0

    @property
    def num_available(self) -> int:
        """Blocks that can be had without taking any from a holder: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def ref_count(self, block: BlockId) -> int:
        return self._ref_counts[block]

    def kept(self) -> frozenset[BlockId]:
        """The blocks that outlive their holders: all that were kept and not forgotten."""
        return frozenset(self._kept)

    def allocate(self, num: int) -> list[BlockId] | None:
        """Take `num` free blocks, each with one holder; None (and nothing changed) if fewer are free.

        Cached blocks are not touched: `evict` first, so that whoever indexes them hears of it.
        """
        if num > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(num)]
        for block in blocks:
            self._ref_counts[block] = 1
        self._allocations += num
        return blocks

    def pin(self, blocks: Iterable[BlockId]) -> None:
        """Add a holder to each of these held or cached blocks."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                assert block in self._cached, f"block {block} is free: it has no content to share"
                del self._cached[block]
                self._hits += 1
            self._ref_counts[block] += 1

    def unpin(self, blocks: Sequence[BlockId]) -> None:
        """Drop a holder from each. `blocks` is in the order of a sequence; the tail is let go first."""
        for block in reversed(blocks):
            assert self._ref_counts[block] > 0, f"block {block} is not held"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] > 0:
                continue
            if block in self._kept:
                self._cached[block] = None
            else:
                self._free.append(block)

    def keep(self, block: BlockId) -> None:
        """The held block can be found by its prefix from now on, so it outlives its holders as cached."""
        assert self._ref_counts[block] > 0, f"block {block} is not held"
        self._kept.add(block)

    def forget(self, block: BlockId) -> None:
        """The kept block can no longer be found: a cached one becomes free, a held one will."""
        self._kept.remove(block)
        if self._ref_counts[block] == 0:
            del self._cached[block]
            self._free.append(block)

    def evict(self, num: int) -> list[BlockId]:
        """Free up to `num` cached blocks, least recently held first, and return them to be un-indexed."""
        evicted = list(islice(self._cached, num))
        for block in evicted:
            self.forget(block)
        self._evictions += len(evicted)
        return evicted

    def counts(self) -> PoolCounts:
        free, cached = len(self._free), len(self._cached)
        return PoolCounts(
            total=self.num_blocks,
            free=free,
            held=self.num_blocks - free - cached,
            cached=cached,
            allocations=self._allocations,
            hits=self._hits,
            evictions=self._evictions,
        )

    def check(self) -> None:
        """Assert that every block is in exactly one place and that its reference count agrees."""
        free, cached = set(self._free), set(self._cached)
        held = {BlockId(block) for block, count in enumerate(self._ref_counts) if count > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(held) + len(cached) == self.num_blocks, "a block is nowhere or in two places"
        assert not free & cached, "a block is both free and cached"
        assert not (free | cached) & held, "a held block is free or cached"
        assert cached <= self._kept <= cached | held, "cached and findable disagree"
        assert min(self._ref_counts) >= 0, "a reference count is negative"
