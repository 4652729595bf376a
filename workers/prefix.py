"""The prefix index: from block digest to the block that holds those tokens' KV.

A tree in effect: each entry knows its parent's block and how many children it has, so entries leave leaf
first and what is indexed can always be reached from a root. The digest finds an entry; its token ids and
its parent must then match too, so not even a forged or colliding digest leads to other tokens' KV.

Every change returns an event, numbered without gaps, for whoever mirrors the index elsewhere. Which blocks
are held or evicted is not decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kvcache.hashing import TOKEN_BYTES, BlockHash
from workers.batch import BlockId


@dataclass(frozen=True, slots=True)
class BlockStored:
    sequence: int
    digest: BlockHash


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    sequence: int
    digest: BlockHash


@dataclass(frozen=True, slots=True)
class Cleared:
    sequence: int


BlockEvent: TypeAlias = BlockStored | BlockRemoved | Cleared


@dataclass(slots=True)
class _Entry:
    block: BlockId
    digest: BlockHash
    parent: BlockId | None
    tokens: bytes
    num_children: int = 0


class PrefixIndex:
    """Blocks of `block_size` tokens by their digest. Token ids come encoded (`hashing.encode_token_ids`)."""

    def __init__(self, block_size: int) -> None:
        self._block_bytes = block_size * TOKEN_BYTES
        self._by_digest: dict[BlockHash, _Entry] = {}
        self._by_block: dict[BlockId, _Entry] = {}
        self._sequence = 0

    def __contains__(self, block: BlockId) -> bool:
        return block in self._by_block

    def is_leaf(self, block: BlockId) -> bool:
        """Whether this indexed block has no indexed child, and so may be removed."""
        return self._by_block[block].num_children == 0

    def longest(self, digests: Sequence[BlockHash], tokens: bytes) -> list[BlockId]:
        """Blocks of the longest indexed prefix: the digests' chain, as far as token ids agree with it."""
        blocks: list[BlockId] = []
        parent = None
        for position, digest in enumerate(digests):
            start = position * self._block_bytes
            block = self.find(digest, parent, tokens[start : start + self._block_bytes])
            if block is None:
                break
            blocks.append(block)
            parent = block
        return blocks

    def find(self, digest: BlockHash, parent: BlockId | None, tokens: bytes) -> BlockId | None:
        """The block with this digest, parent and tokens, or None if there is none."""
        entry = self._by_digest.get(digest)
        if entry is None or entry.parent != parent or entry.tokens != tokens:
            return None
        return entry.block

    def insert(self, block: BlockId, digest: BlockHash, parent: BlockId | None, tokens: bytes) -> BlockStored | None:
        """Index a full block under its parent's block (None for the first of a sequence).

        None, and nothing changed, if the digest is taken, or if the parent is not indexed: an entry that no
        walk from the root can reach would only waste its block.
        """
        assert block not in self._by_block, f"block {block} is indexed already"
        assert len(tokens) == self._block_bytes, "only full blocks are indexed"
        if digest in self._by_digest or (parent is not None and parent not in self._by_block):
            return None
        entry = _Entry(block, digest, parent, tokens)
        self._by_digest[digest] = self._by_block[block] = entry
        if parent is not None:
            self._by_block[parent].num_children += 1
        return BlockStored(self._next(), digest)

    def remove(self, block: BlockId) -> BlockRemoved:
        """Forget a leaf."""
        entry = self._by_block.pop(block)
        assert entry.num_children == 0, f"block {block} is removed before its {entry.num_children} children"
        del self._by_digest[entry.digest]
        if entry.parent is not None:
            self._by_block[entry.parent].num_children -= 1
        return BlockRemoved(self._next(), entry.digest)

    def flush(self) -> tuple[list[BlockId], Cleared]:
        """Forget everything; returns the blocks that were indexed, and the event."""
        blocks = list(self._by_block)
        self._by_digest.clear()
        self._by_block.clear()
        return blocks, Cleared(self._next())

    def check(self) -> None:
        """Assert that the two maps agree, that parents are indexed and that child counts are right."""
        assert len(self._by_digest) == len(self._by_block), "the two maps differ in size"
        children: dict[BlockId | None, int] = {}
        for entry in self._by_digest.values():
            assert self._by_block[entry.block] is entry, "the two maps disagree"
            assert entry.parent is None or entry.parent in self._by_block, "an entry has lost its parent"
            children[entry.parent] = children.get(entry.parent, 0) + 1
        for block, entry in self._by_block.items():
            assert entry.num_children == children.get(block, 0), f"block {block} has a wrong child count"

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence
