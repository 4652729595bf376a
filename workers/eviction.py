"""Which cached block goes first when room is needed: what a block is worth, and a queue of those that may go.

A policy is a pure function. It values a block when its last holder lets go of it, from how often it was used again
(`num_hits`), how many tokens stand before it (`depth`), and `floor`, the value of the block that was evicted last:
what was worth much long ago is overtaken by what is used now. Equals go in the order in which they were let go.

The queue gives up leaves only, whatever the policy: an inner block is of use without its children, they are none
without it. Adding, taking out and evicting cost O(log n).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

from workers.batch import BlockId

EvictionPolicy = Literal["lru", "lfu", "cost"]
EVICTION_POLICIES: tuple[EvictionPolicy, ...] = get_args(EvictionPolicy)

Value: TypeAlias = Callable[[int, int, float], float]
"""Of (num_hits, depth, floor)."""

ATTENTION_TOKENS = 4096
"""Attending to this many tokens costs a token about as much as all else: 2 * parameters = 4 * tokens * layers * width.
3,900 for a model of 135 million parameters, 26,000 for one of 7 billion."""

MAX_STALE = 64

_Rank: TypeAlias = tuple[float, int, BlockId]


def lru(num_hits: int, depth: int, floor: float) -> float:
    """Least recently used goes first: all are worth the same, so the order in which they were let go decides."""
    return 0.0


def lfu(num_hits: int, depth: int, floor: float) -> float:
    """Least frequently used goes first, with dynamic aging (Arlitt et al. 2000, LFU-DA)."""
    return floor + num_hits


def cost(num_hits: int, depth: int, floor: float) -> float:
    """GreedyDual-Size (Cao and Irani 1997) with frequency: what computing it again costs, by the chance that it must.

    All blocks have one size. A later token attends to more, so it costs more; the first use counts as one.
    """
    return floor + (1 + num_hits) * (1 + depth / ATTENTION_TOKENS)


VALUES: dict[EvictionPolicy, Value] = {"lru": lru, "lfu": lfu, "cost": cost}


class EvictionQueue:
    """The cached blocks, and among them the leaves, least valuable first."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._value = VALUES[policy]
        self._floor = 0.0
        self._num_added = 0
        self._ranks: dict[BlockId, _Rank] = {}
        self._heap: list[_Rank] = []  # of leaves, and of blocks that have left since

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, block: BlockId) -> bool:
        return block in self._ranks

    def blocks(self) -> frozenset[BlockId]:
        return frozenset(self._ranks)

    def add(self, block: BlockId, *, num_hits: int, depth: int, is_leaf: bool) -> None:
        """A block became cached; its value is settled now. An inner one waits for `expose`."""
        self._num_added += 1
        self._ranks[block] = (self._value(num_hits, depth, self._floor), self._num_added, block)
        if is_leaf:
            self.expose(block)

    def expose(self, block: BlockId) -> None:
        """A cached block has lost its last child and may go."""
        heapq.heappush(self._heap, self._ranks[block])
        self._sweep()

    def discard(self, block: BlockId) -> None:
        """It is cached no more."""
        del self._ranks[block]
        self._sweep()

    def pop(self) -> BlockId:
        """Take out the leaf that is worth least. There must be a cached block; then there is a leaf."""
        rank = heapq.heappop(self._heap)
        while not self._is_current(rank):
            rank = heapq.heappop(self._heap)
        value, _, block = rank
        self._floor = max(self._floor, value)
        del self._ranks[block]
        self._sweep()
        return block

    def check(self) -> None:
        """Assert that there is a leaf when there is a block, and that entries of what has left do not pile up."""
        leaves = {block for _, _, block in filter(self._is_current, self._heap)}
        assert bool(leaves) == bool(self._ranks), "blocks are cached, and no leaf among them"
        assert len(self._heap) <= 2 * len(self._ranks) + MAX_STALE, "the queue keeps what has left"

    def _sweep(self) -> None:
        """Drop the entries of what has left when they are too many, so that a cache that never evicts stays small."""
        if len(self._heap) > 2 * len(self._ranks) + MAX_STALE:
            self._heap = [rank for rank in self._heap if self._is_current(rank)]
            heapq.heapify(self._heap)

    def _is_current(self, rank: _Rank) -> bool:
        return self._ranks.get(rank[2]) == rank
