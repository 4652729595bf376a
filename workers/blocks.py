"""The block pool: who holds which block of KV memory. Numbers only; the memory itself is the runner's.

    free    ref_count 0, content worthless            --allocate--> held
    held    ref_count > 0, one per sequence using it  --last unpin--> cached if kept, else free
    cached  ref_count 0, content findable by prefix   --pin--> held,  --evict--> free

Only this class moves a block between the three. It knows nothing of tokens: the prefix index says
`keep` when a block can be found again, and below which one, and `forget` when it no longer can.

Kept blocks form trees, and leave leaf first. A sequence holds every block before one it holds, and `unpin`
lets go of the tail first, so below a cached block all are cached. Which leaf goes is the policy's to say
(`workers.eviction`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workers.batch import BlockId
from workers.eviction import EvictionPolicy, EvictionQueue

HIT_CLASSES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCounts:
    """Where the blocks are now, and totals since the pool was made.

    hits: times that a block served another sequence. evictions: cached blocks forgotten for want of room.
    by_hits: kept blocks by how often each has served so far: never, 1, 2-3, 4-7, ...
    """

    total: int
    free: int
    held: int
    cached: int
    hits: int
    evictions: int
    by_hits: tuple[int, ...]


@dataclass(slots=True)
class _Kept:
    """A block's place in its tree; `depth` counts the blocks above it."""

    parent: BlockId | None
    depth: int
    num_children: int = 0


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, all free at first. Raises ValueError if there would be none."""

    def __init__(self, num_blocks: int, block_size: int = 1, policy: EvictionPolicy = "lru") -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least 1 block, not {num_blocks}")
        self.num_blocks = num_blocks
        self._free = [BlockId(block) for block in reversed(range(num_blocks))]
        self._ref_counts = [0] * num_blocks
        self._num_hits = [0] * num_blocks
        self._by_hits = [0] * HIT_CLASSES
        self._block_size = block_size
        self._cached = EvictionQueue(policy)
        self._kept: dict[BlockId, _Kept] = {}
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
            self._num_hits[block] = 0
        return blocks

    def pin(self, blocks: Iterable[BlockId]) -> None:
        """Add a holder to each of these held or cached blocks."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                assert block in self._cached, f"block {block} is free: it has no content to share"
                self._cached.discard(block)
            self._ref_counts[block] += 1

    def unpin(self, blocks: Sequence[BlockId]) -> None:
        """Drop a holder from each. `blocks` is in the order of a sequence; the tail is let go first."""
        for block in reversed(blocks):
            assert self._ref_counts[block] > 0, f"block {block} is not held"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] > 0:
                continue
            kept = self._kept.get(block)
            if kept is None:
                self._free.append(block)
            else:
                depth = kept.depth * self._block_size
                self._cached.add(block, num_hits=self._num_hits[block], depth=depth, is_leaf=kept.num_children == 0)

    def count_hits(self, blocks: Iterable[BlockId]) -> None:
        """Each of these held blocks serves one more sequence than the one that computed it."""
        for block in blocks:
            self._hits += 1
            self._num_hits[block] += 1
            if block in self._kept:
                self._by_hits[_hit_class(self._num_hits[block] - 1)] -= 1
                self._by_hits[_hit_class(self._num_hits[block])] += 1

    def keep(self, block: BlockId, parent: BlockId | None) -> None:
        """The held block can be found by its prefix from now on, so it outlives its holders as cached.

        parent: the kept block without which it is of no use, None for the first of a prefix.
        """
        assert self._ref_counts[block] > 0, f"block {block} is not held"
        assert block not in self._kept, f"block {block} is kept already"
        depth = 0
        if parent is not None:
            self._kept[parent].num_children += 1
            depth = self._kept[parent].depth + 1
        self._kept[block] = _Kept(parent, depth)
        self._by_hits[_hit_class(self._num_hits[block])] += 1

    def forget(self, block: BlockId) -> None:
        """The kept leaf can no longer be found: a cached one becomes free, a held one will."""
        num_children = self._kept[block].num_children
        assert num_children == 0, f"block {block} is forgotten before its {num_children} children"
        if self._ref_counts[block] == 0:
            self._cached.discard(block)
            self._free.append(block)
        self._leave_tree(block)

    def evict(self, num: int) -> list[BlockId]:
        """Free up to `num` cached blocks, the least valuable leaf first, and return them to be un-indexed."""
        evicted: list[BlockId] = []
        while len(evicted) < num and self._cached:
            block = self._cached.pop()
            self._leave_tree(block)
            self._free.append(block)
            evicted.append(block)
        self._evictions += len(evicted)
        return evicted

    def _leave_tree(self, block: BlockId) -> None:
        kept = self._kept.pop(block)
        self._by_hits[_hit_class(self._num_hits[block])] -= 1
        if kept.parent is not None:
            above = self._kept[kept.parent]
            above.num_children -= 1
            if above.num_children == 0 and kept.parent in self._cached:
                self._cached.expose(kept.parent)

    def counts(self) -> PoolCounts:
        free, cached = len(self._free), len(self._cached)
        return PoolCounts(
            total=self.num_blocks,
            free=free,
            held=self.num_blocks - free - cached,
            cached=cached,
            hits=self._hits,
            evictions=self._evictions,
            by_hits=tuple(self._by_hits),
        )

    def check(self) -> None:
        """Assert that every block is in exactly one place and that its reference count agrees."""
        free, cached = set(self._free), self._cached.blocks()
        held = {BlockId(block) for block, count in enumerate(self._ref_counts) if count > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(held) + len(cached) == self.num_blocks, "a block is nowhere or in two places"
        assert not free & cached, "a block is both free and cached"
        assert not (free | cached) & held, "a held block is free or cached"
        assert cached <= self._kept.keys() <= cached | held, "cached and findable disagree"
        self._cached.check()
        assert min(self._ref_counts) >= 0, "a reference count is negative"
        assert sum(self._by_hits) == len(self._kept), "a kept block is not counted by its hits"
        children = Counter(kept.parent for kept in self._kept.values())
        for block, kept in self._kept.items():
            assert kept.num_children == children[block], f"block {block} has a wrong child count"
            assert kept.parent is None or kept.parent in self._kept, "a kept block lost its parent"


def _hit_class(num_hits: int) -> int:
    """0 for none, else one more than the whole part of its binary logarithm."""
    return min(num_hits.bit_length(), HIT_CLASSES - 1)
