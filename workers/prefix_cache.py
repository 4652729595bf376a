"""Blocks that can be found again: the block pool and the prefix index, moved together.

What is indexed is kept by the pool, what the pool evicts leaves the index, and with it the chain nodes by which
brokers know of it. Sequences live elsewhere; here there are blocks, digests and tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcache.hashing import BlockHash, HashSeed
from workers.batch import BlockId
from workers.block_changes import AllDropped, BlockAdded, BlockChange, BlockDropped
from workers.blocks import BlockPool
from workers.eviction import EvictionPolicy
from workers.nodes import BlockNodes, NodeChange
from workers.prefix import PrefixIndex


class PrefixCache:
    """`num_blocks` blocks of `block_size` tokens. Raises ValueError unless both are at least 1.

    tells_blocks: whether changes of findable blocks are kept until `take_block_changes`.
    """

    def __init__(
        self, num_blocks: int, block_size: int, policy: EvictionPolicy = "lru", *, tells_blocks: bool = False
    ) -> None:
        if block_size < 1:
            raise ValueError(f"a block needs at least 1 token, not {block_size}")
        self.block_size = block_size
        self.policy = policy
        self.pool = BlockPool(num_blocks, block_size, policy)
        self._index = PrefixIndex(block_size)
        self._nodes = BlockNodes()
        self._changes: list[BlockChange] = []
        self._tells_blocks = tells_blocks

    def longest(self, digests: Sequence[BlockHash], tokens: bytes) -> list[BlockId]:
        """Blocks of the longest prefix that can be shared; pin them before anything is allocated."""
        return self._index.longest(digests, tokens)

    def most_alike(self, seed: HashSeed, parent: BlockId | None, tokens: bytes) -> tuple[BlockId, int] | None:
        """The block after `parent` that has the most of these tokens at its beginning, and how many; None if none has.

        It is not to be shared, since it goes on otherwise, but those tokens' KV may be copied.
        """
        return self._index.most_alike(seed, parent, tokens)

    def allocate(self, num: int) -> list[BlockId] | None:
        """Take `num` blocks, evicting cached ones where free ones run out; None, and nothing changed, if too few."""
        if num > self.pool.num_available:
            return None
        for block in self.pool.evict(max(0, num - self.pool.num_free)):
            self._unindex(block)
        return self.pool.allocate(num)

    def publish(
        self, block: BlockId, digest: BlockHash, parent: BlockId | None, tokens: bytes, seed: HashSeed
    ) -> BlockId:
        """Make a full, computed block findable, and return the block that its holder is to use from now on.

        That is another block when the same tokens were published before: the holder's own is let go, so that
        equal prefixes share memory and descendants are always held together with the ancestors they hang on.
        """
        twin = self.exchange(block, digest, parent, tokens)
        if twin is not None:
            return twin
        if self._index.insert(block, digest, parent, tokens, seed):
            self.pool.keep(block, parent)
            if self._tells_blocks:
                above = None if parent is None else self._index.digest(parent)
                self._changes.append(BlockAdded(digest, above, tokens, seed))
        return block

    def exchange(self, block: BlockId, digest: BlockHash, parent: BlockId | None, tokens: bytes) -> BlockId | None:
        """Let go of a held block for the findable one with the same tokens; None, and nothing changed, if none is."""
        twin = self._index.find(digest, parent, tokens)
        if twin is not None:
            self.pool.pin([twin])
            self.pool.unpin([block])
        return twin

    def is_exclusive(self, block: BlockId) -> bool:
        """Whether the one holder of this block may write into it, after `withdraw`: nobody shares or builds on it."""
        return self.pool.ref_count(block) == 1 and (block not in self._index or self._index.is_leaf(block))

    def withdraw(self, block: BlockId) -> None:
        """Make an exclusive block unfindable, because its holder is about to write into it."""
        if block in self._index:
            self._unindex(block)
            self.pool.forget(block)

    def flush(self, is_wanted: Callable[[HashSeed], bool] = lambda seed: True) -> int:
        """Make all blocks of the wanted seeds unfindable; returns how many there were.

        Cached ones become free, held ones stay with their holders.
        """
        num_changes = len(self._changes)
        num_blocks = self._forget(self._index.matching(is_wanted))
        if self._tells_blocks and num_blocks and not len(self._index):
            self._changes[num_changes:] = [AllDropped()]
        return num_blocks

    def drop(self, block: BlockId) -> int:
        """Make a block unfindable, and all that hang on it, if it is still findable; returns how many there were."""
        return self._forget(self._index.below(block)) if block in self._index else 0

    def attach(self, block: BlockId, tenant: str, node: bytes) -> None:
        """`node` of a tenant's chain ends in this block, if it can be found."""
        if block in self._index:
            self._nodes.attach(block, tenant, node)

    def take_node_changes(self) -> tuple[NodeChange, ...]:
        """The nodes that came and went with their blocks since the last call."""
        return self._nodes.take_changes()

    def take_block_changes(self) -> tuple[BlockChange, ...]:
        """What has become of findable blocks since the last call, if that is told at all."""
        changes, self._changes = tuple(self._changes), []
        return changes

    def check(self) -> None:
        """Assert the invariants of pool and index, and that they agree on every cached block."""
        self.pool.check()
        self._index.check()
        findable = {block for block in map(BlockId, range(self.pool.num_blocks)) if block in self._index}
        assert self.pool.kept() == findable, "the pool keeps other blocks than the index finds"

    def _forget(self, leaves_first: Sequence[BlockId]) -> int:
        for block in leaves_first:
            self._unindex(block)
            self.pool.forget(block)
        return len(leaves_first)

    def _unindex(self, block: BlockId) -> None:
        if self._tells_blocks:
            self._changes.append(BlockDropped(self._index.digest(block)))
        self._index.remove(block)
        self._nodes.detach(block)
