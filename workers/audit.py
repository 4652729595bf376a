"""Audits: a share of the blocks that were found in the cache is computed again, and compared with what is there.

Each goes into a block of its own, in a forward pass of its own over the prefix as it lies in the pool, so no request
computes anything else than it would without. Where the two differ by more than rounding, everything that hangs on
the same first block is forgotten, because it may be an earlier block that is wrong: a cache may always miss.

Which blocks are looked at is decided by counting, without chance: one in `1 / share` of each kind of place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvcache.hashing import HashSeed, block_digests, encode_token_ids
from workers.batch import BlockId, Slice
from workers.prefix_cache import PrefixCache

MAX_PENDING = 64
"""More than that are not waited for: when hits come that fast, others will be looked at."""

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class Audit:
    """One block to compute again: `piece` computes it into `scratch`, after the blocks before it in `path`.

    All of them are held until the end of the audit. `path` ends with the block that is looked at.
    """

    path: tuple[BlockId, ...]
    scratch: BlockId
    piece: Slice

    @property
    def block(self) -> BlockId:
        return self.path[-1]


@dataclass(frozen=True, slots=True)
class AuditCounts:
    """passed, failed: of those that were made. skipped: not made, for want of room, or the block was gone by then."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class _Suspect:
    """A block by its prefix: all tokens up to its end."""

    seed: HashSeed
    token_ids: tuple[int, ...]


class Auditor:
    """share: of the blocks that are found, 0 for none, to 1. tolerance: how far the same block may differ."""

    def __init__(self, cache: PrefixCache, share: float, tolerance: float) -> None:
        self._cache = cache
        self._share = share
        self._tolerance = tolerance
        self._num_seen = 0
        self._pending: deque[_Suspect] = deque()
        self._passed = self._failed = self._skipped = 0

    def counts(self) -> AuditCounts:
        return AuditCounts(self._passed, self._failed, self._skipped)

    def note(self, seed: HashSeed, token_ids: Sequence[int], num_cached: int) -> None:
        """The first `num_cached` of these tokens were found; some of their blocks are to be looked at."""
        if self._share == 0:
            return
        size = self._cache.block_size
        for stop in range(size, num_cached + 1, size):
            self._num_seen += 1
            # Steps of the golden ratio meet every rhythm that requests may have (a Weyl sequence).
            if self._num_seen * _GOLDEN % 1.0 < self._share:
                self._pending.append(_Suspect(seed, tuple(token_ids[:stop])))
        while len(self._pending) > MAX_PENDING:
            self._pending.popleft()
            self._skipped += 1

    def begin(self) -> Audit | None:
        """The next one, to be made now and ended; None if there is none."""
        while self._pending:
            audit = self._prepare(self._pending.popleft())
            if audit is not None:
                return audit
            self._skipped += 1
        return None

    def end(self, audit: Audit, difference: float | None) -> bool:
        """Let go of its blocks. False: the block is wrong, and what begins like it was dropped.

        difference: how far it is from what was computed, as `Model.difference` says; None if that is not known.
        """
        self._cache.pool.unpin([*audit.path, audit.scratch])
        if difference is None:
            self._skipped += 1
            return True
        if difference <= self._tolerance:  # never so for what is not a number
            self._passed += 1
            return True
        self._failed += 1
        self._cache.drop(audit.path[0])
        return False

    def _prepare(self, suspect: _Suspect) -> Audit | None:
        """None, with nothing changed, if the block is not there any more or there is no room for another."""
        token_ids, size = suspect.token_ids, self._cache.block_size
        path = self._cache.longest(block_digests(suspect.seed, token_ids), encode_token_ids(token_ids))
        start = len(token_ids) - size
        if len(path) * size < len(token_ids):
            return None
        self._cache.pool.pin(path)
        scratch = self._cache.allocate(1)
        if scratch is None:
            self._cache.pool.unpin(path)
            return None
        table = (*path[:-1], *scratch)
        piece = Slice(token_ids=token_ids[start:], start=start, block_table=table, wants_logits=False)
        return Audit(tuple(path), scratch[0], piece)
