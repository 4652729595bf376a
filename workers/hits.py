"""How well the prefix cache serves whom: tokens looked up and found, per tenant and salt, in a table of bounded size.

A salt is a secret among those who share it, so what is reported is a name made from it: the beginning of the digest
that all its blocks hang on.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from bus.stats import SaltStats
from kvcache.hashing import BlockHash, HashSeed

MAX_SALTS = 256
"""Remembered; of more, those that were used least recently are forgotten with their counts."""
TOP_SALTS = 16
"""Reported: those that looked up the most."""
NAME_BYTES = 8


@dataclass(slots=True)
class _Salt:
    seed: HashSeed
    lookup_tokens: int = 0
    hit_tokens: int = 0


class HitTable:
    """`lookup_tokens` and `hit_tokens` are totals over all, those forgotten included."""

    def __init__(self) -> None:
        self.lookup_tokens = 0
        self.hit_tokens = 0
        self._salts: OrderedDict[BlockHash, _Salt] = OrderedDict()
        self._top: tuple[SaltStats, ...] | None = ()

    def count(self, seed: HashSeed, *, lookup_tokens: int = 0, hit_tokens: int = 0) -> None:
        self.lookup_tokens += lookup_tokens
        self.hit_tokens += hit_tokens
        salt = self._salts.setdefault(seed.root, _Salt(seed))
        self._salts.move_to_end(seed.root)
        salt.lookup_tokens += lookup_tokens
        salt.hit_tokens += hit_tokens
        if len(self._salts) > MAX_SALTS:
            self._salts.popitem(last=False)
        self._top = None

    def top(self) -> tuple[SaltStats, ...]:
        """Those that looked up the most tokens, the most first."""
        if self._top is None:  # asked after each step, changed by few of them
            busiest = sorted(self._salts.items(), key=lambda item: -item[1].lookup_tokens)[:TOP_SALTS]
            self._top = tuple(_stats(root, salt) for root, salt in busiest)
        return self._top


def _stats(root: BlockHash, salt: _Salt) -> SaltStats:
    return SaltStats(
        tenant=salt.seed.tenant,
        salt=root[:NAME_BYTES].hex() if salt.seed.cache_salt else "",
        lookup_tokens=salt.lookup_tokens,
        hit_tokens=salt.hit_tokens,
    )
