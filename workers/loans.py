"""Runs of blocks that are held for a copy: lent to another worker, or being filled with what another one has.

A loan keeps blocks findable and in place while their bytes travel, and nothing more: it never keeps a sequence
out. When room runs short all loans are revoked, before any sequence is evicted or preempted; whoever copies finds
out at the next slice and does without. Numbers only; the bytes are the model's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NewType

from bus.errors import NotFound
from kvcache.hashing import BlockHash, HashSeed
from workers.batch import BlockId
from workers.prefix_cache import PrefixCache

LoanId = NewType("LoanId", bytes)


class Loans:
    """The loans of one pool. Every one that is opened is ended with `end`, revoked or not."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._loans: dict[LoanId, list[BlockId]] = {}

    def __len__(self) -> int:
        return len(self._loans)

    def __contains__(self, loan: LoanId) -> bool:
        return loan in self._loans

    def open(self, loan: LoanId, digests: Sequence[BlockHash], tokens: bytes) -> int:
        """Hold the longest findable prefix of this chain; returns how many blocks that is."""
        assert loan not in self._loans, f"loan {loan.hex()} is open already"
        blocks = self._cache.longest(digests, tokens)
        self._cache.pool.pin(blocks)
        self._loans[loan] = blocks
        return len(blocks)

    def blocks(self, loan: LoanId) -> Sequence[BlockId]:
        """What is held, in the order of the chain. Raises NotFound if the loan was revoked."""
        if loan not in self._loans:
            raise NotFound("the blocks were needed for a sequence; what was to be copied may be gone")
        return self._loans[loan]

    def fill(
        self,
        loan: LoanId,
        fresh: Sequence[BlockId],
        digests: Sequence[BlockHash],
        tokens: Sequence[bytes],
        seed: HashSeed,
        write: Callable[[Sequence[BlockId]], None],
    ) -> int:
        """Add blocks behind those that are held: `write` gives them their bytes, then they can be found.

        fresh: held by the caller, who passes them on. digests, tokens: one each per block. seed: theirs. Returns
        how many blocks the loan holds then. Raises what `write` raises; the fresh blocks are free again then, and
        nothing else changed.
        """
        try:
            write(fresh)
        except Exception:
            self._cache.pool.unpin(fresh)
            raise
        run = self._loans[loan]
        for block, digest, of_block in zip(fresh, digests, tokens, strict=True):
            run.append(self._cache.publish(block, digest, run[-1] if run else None, of_block, seed))
        return len(run)

    def end(self, loan: LoanId) -> None:
        """Let go of the blocks, which stay findable. Nothing if it was revoked, or never opened."""
        self._cache.pool.unpin(self._loans.pop(loan, []))

    def revoke(self) -> None:
        """End all of them, because their blocks are needed."""
        for loan in list(self._loans):
            self.end(loan)

    def held(self) -> Iterator[BlockId]:
        """Every block once for each loan that holds it."""
        return (block for blocks in self._loans.values() for block in blocks)
