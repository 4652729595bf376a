"""The consistent hash: keys to workers, the same on every process and machine, with nothing to remember.

A ring of virtual nodes (Karger et al. 1997, "Consistent hashing and random trees", section 4), weighted
by capacity. A worker's points depend on its own id alone, so one that joins or leaves N others moves
about 1/(N+1) of the keys and only to or from itself. 8192 points per worker keep each share within
about 1.1 % (one over the root of the points) of its weight; the points come from one digest of the
worker's id and a counter-based mixer (splitmix64, Steele et al. 2014), so building costs little. Of a ring that
differs in a few workers only their points are taken out or sorted in.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import cached_property
from hashlib import blake2b
from typing import TypeAlias

import numpy as np

POINTS_PER_WORKER = 8192
UNIT_WEIGHT = 100

Positions: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint64]]
Owners: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint32]]

NO_POSITIONS: Positions = np.empty(0, np.uint64)
NO_OWNERS: Owners = np.empty(0, np.uint32)


def key_hash(key: bytes) -> int:
    """Where a key lies on the ring: 64 bits of blake2b."""
    return int.from_bytes(blake2b(key, digest_size=8, person=b"kvcache-ring").digest(), "little")


class HashRing:
    """An immutable ring over `{worker id: weight}`; a weight of 100 is one worker's worth of keys.

    before: another ring, which this one is made from. Without it the ring is the same and takes longer to make.
    """

    def __init__(self, weights: Mapping[str, int], before: HashRing | None = None) -> None:
        self.workers: tuple[str, ...] = tuple(sorted(weights))
        self.weights: dict[str, int] = {worker: weights[worker] for worker in self.workers}
        if any(weight < 1 for weight in self.weights.values()):
            raise ValueError("weights must be at least 1")
        self.epoch: str = _epoch(self.weights)
        kept = {} if before is None else dict(before.weights.items() & self.weights.items())
        old, old_owners = (NO_POSITIONS, NO_OWNERS) if before is None else self._taken_over(before, kept)
        fresh = [(i, _points(it, self.weights[it])) for i, it in enumerate(self.workers) if it not in kept]
        new = np.concatenate([NO_POSITIONS, *(points for _, points in fresh)])
        new_owners = np.concatenate([NO_OWNERS, *(np.full(len(points), i, np.uint32) for i, points in fresh)])
        order = np.argsort(new, kind="stable")
        # Two workers have a point in common on one of a million rings of 512. Whose it is depends on who was there
        # first, so that brokers may disagree on one key in four million, which costs a miss.
        at = np.searchsorted(old, new[order], side="right")
        self._positions = array("Q", np.insert(old, at, new[order]).tobytes())
        self._owners = array("I", np.insert(old_owners, at, new_owners[order]).tobytes())

    def __len__(self) -> int:
        return len(self.workers)

    def owner(self, key: bytes) -> str:
        """The worker a key belongs to. Raises LookupError on an empty ring."""
        if not self.workers:
            raise LookupError("the ring is empty")
        return self.workers[self._owners[bisect_right(self._positions, key_hash(key)) % len(self._positions)]]

    def preference(self, key: bytes) -> Iterator[str]:
        """All workers, the owner first, then in the order in which they would take over."""
        size, seen = len(self._owners), set[int]()
        start = bisect_right(self._positions, key_hash(key)) if size else 0
        for step in range(size):
            index = self._owners[(start + step) % size]
            if index not in seen:
                seen.add(index)
                yield self.workers[index]
                if len(seen) == len(self.workers):
                    return

    def share(self, worker: str) -> float:
        """The part of the key space (0 to 1) that is `worker`'s; 0 for one that is not on the ring."""
        return self._shares.get(worker, 0.0)

    @cached_property
    def _shares(self) -> dict[str, float]:
        positions = np.frombuffer(self._positions, np.uint64)
        gaps = np.diff(positions, prepend=positions[-1:])  # modulo 2**64, so the first wraps around right
        totals = np.bincount(np.frombuffer(self._owners, np.uint32), gaps.astype(np.float64), len(self.workers))
        return dict(zip(self.workers, (totals / 2.0**64).tolist(), strict=True))

    def _taken_over(self, before: HashRing, kept: Mapping[str, int]) -> tuple[Positions, Owners]:
        """The points of `kept` on the ring before, in order, and whose they are on this one."""
        gone = len(self.workers)
        numbers = {worker: number for number, worker in enumerate(self.workers) if worker in kept}
        renumbered = np.array([numbers.get(worker, gone) for worker in before.workers], np.uint32)
        positions, owners = np.frombuffer(before._positions, np.uint64), np.frombuffer(before._owners, np.uint32)
        owners = renumbered[owners]
        if len(kept) == len(before.workers):
            return positions, owners
        stays = owners != gone
        return positions[stays], owners[stays]


def _points(worker: str, weight: int) -> Positions:
    seed = int.from_bytes(blake2b(worker.encode(), digest_size=8, person=b"kvcache-node").digest(), "little")
    count = max(1, POINTS_PER_WORKER * weight // UNIT_WEIGHT)
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _epoch(weights: Mapping[str, int]) -> str:
    """An identifier (not an order) of the live set, equal wherever the set is equal."""
    text = "\n".join(f"{worker}={weight}" for worker, weight in weights.items())
    return blake2b(text.encode(), digest_size=6).hexdigest()
