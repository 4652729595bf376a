"""The prefix index: from block digest to the block that holds those tokens' KV.

Trees in effect: each entry knows its parent's block and its children, so entries leave leaf first and what
is indexed can always be reached from a root. The digest finds an entry; its token ids and its parent must
then match too, so not even a forged or colliding digest leads to other tokens' KV. Siblings are kept in the
order of their tokens, which puts next to each other those that begin alike: the block that shares the most
of its beginning with a given one is found by bisection. Which blocks are held or evicted is not decided here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from kvcache.hashing import TOKEN_BYTES, BlockHash, HashSeed
from workers.batch import BlockId


@dataclass(slots=True, eq=False)
class _Entry:
    block: BlockId
    digest: BlockHash
    parent: BlockId | None
    tokens: bytes
    seed: HashSeed
    children: list[_Entry] = field(default_factory=list)  # by their tokens


_by_tokens = attrgetter("tokens")


class PrefixIndex:
    """Blocks of `block_size` tokens by their digest. Token ids come encoded (`hashing.encode_token_ids`)."""

    def __init__(self, block_size: int) -> None:
        self._block_bytes = block_size * TOKEN_BYTES
        self._by_digest: dict[BlockHash, _Entry] = {}
        self._by_block: dict[BlockId, _Entry] = {}
        self._roots: dict[BlockHash, list[_Entry]] = {}  # first blocks by their seed's root; by their tokens

    def __len__(self) -> int:
        return len(self._by_block)

    def __contains__(self, block: BlockId) -> bool:
        return block in self._by_block

    def is_leaf(self, block: BlockId) -> bool:
        """Whether this indexed block has no indexed child, and so may be removed."""
        return not self._by_block[block].children

    def digest(self, block: BlockId) -> BlockHash:
        """Of this indexed block."""
        return self._by_block[block].digest

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

    def most_alike(self, seed: HashSeed, parent: BlockId | None, tokens: bytes) -> tuple[BlockId, int] | None:
        """Of the blocks after `parent`, the one whose tokens begin most like these, and how many do.

        None if none shares even the first token, or `parent` is not indexed.
        """
        siblings = self._siblings(seed, parent)
        at = bisect_left(siblings, tokens, key=_by_tokens)
        alike = [(_num_alike(entry.tokens, tokens), entry.block) for entry in siblings[max(0, at - 1) : at + 1]]
        num_tokens, block = max(alike, default=(0, BlockId(0)))
        return (block, num_tokens) if num_tokens else None

    def insert(self, block: BlockId, digest: BlockHash, parent: BlockId | None, tokens: bytes, seed: HashSeed) -> bool:
        """Index a full block under its parent's block (None for the first of a sequence).

        False, and nothing changed, if the digest is taken, or if the parent is not indexed: an entry that no
        walk from the root can reach would only waste its block.
        """
        assert block not in self._by_block, f"block {block} is indexed already"
        assert len(tokens) == self._block_bytes, "only full blocks are indexed"
        if digest in self._by_digest or (parent is not None and parent not in self._by_block):
            return False
        entry = _Entry(block, digest, parent, tokens, seed)
        self._by_digest[digest] = self._by_block[block] = entry
        siblings = self._roots.setdefault(seed.root, []) if parent is None else self._by_block[parent].children
        insort(siblings, entry, key=_by_tokens)
        return True

    def remove(self, block: BlockId) -> None:
        """Forget a leaf."""
        entry = self._by_block.pop(block)
        assert not entry.children, f"block {block} is removed before its {len(entry.children)} children"
        del self._by_digest[entry.digest]
        siblings = self._siblings(entry.seed, entry.parent)
        del siblings[bisect_left(siblings, entry.tokens, key=_by_tokens)]
        if entry.parent is None and not siblings:
            del self._roots[entry.seed.root]

    def below(self, block: BlockId) -> list[BlockId]:
        """This indexed block and all that hang on it, children before their parents."""
        found = [self._by_block[block]]
        for entry in found:  # grows while it is gone through
            found += entry.children
        return [entry.block for entry in reversed(found)]

    def matching(self, is_wanted: Callable[[HashSeed], bool]) -> list[BlockId]:
        """The blocks of all trees whose seed is wanted, children before their parents."""
        tops = [entry for siblings in self._roots.values() for entry in siblings if is_wanted(entry.seed)]
        return [block for entry in tops for block in self.below(entry.block)]

    def check(self) -> None:
        """Assert that the two maps agree, that parents are indexed and that child counts are right."""
        assert len(self._by_digest) == len(self._by_block), "the two maps differ in size"
        hanging = {entry.block: list[_Entry]() for entry in self._by_digest.values()}
        tops: dict[BlockHash, list[_Entry]] = {}
        for entry in self._by_digest.values():
            assert self._by_block[entry.block] is entry, "the two maps disagree"
            assert entry.parent is None or entry.parent in self._by_block, "an entry has lost its parent"
            siblings = tops.setdefault(entry.seed.root, []) if entry.parent is None else hanging[entry.parent]
            siblings.append(entry)
        for siblings in (*tops.values(), *hanging.values()):
            siblings.sort(key=_by_tokens)
        assert tops == self._roots, "the first blocks are not all there, or out of order"
        for block, entry in self._by_block.items():
            assert entry.children == hanging[block], f"block {block} has wrong children"

    def _siblings(self, seed: HashSeed, parent: BlockId | None) -> list[_Entry]:
        """The indexed blocks after `parent`, the index's own list if there are any."""
        if parent is None:
            return self._roots.get(seed.root, [])
        entry = self._by_block.get(parent)
        return [] if entry is None else entry.children


def _num_alike(one: bytes, two: bytes) -> int:
    """How many tokens two encoded runs have in common at their beginning."""
    pairs = zip(memoryview(one).cast("I"), memoryview(two).cast("I"), strict=False)
    return next(
        (at for at, (first, second) in enumerate(pairs) if first != second), min(len(one), len(two)) // TOKEN_BYTES
    )
