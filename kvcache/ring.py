"""The consistent hash: keys to workers, the same on every process and machine, with nothing to remember.

A ring of virtual nodes (Karger et al. 1997, "Consistent hashing and random trees", section 4), weighted
by capacity. A worker's points depend on its own id alone, so one that joins or leaves N others moves
about 1/(N+1) of the keys and only to or from itself. 8192 points per worker keep each share within
about 1.1 % (one over the root of the points) of its weight; the points come from one digest of the
worker's id and a counter-based mixer (splitmix64, Steele et al. 2014), so building costs little.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import TypeAlias

import numpy as np

POINTS_PER_WORKER = 8192
UNIT_WEIGHT = 100

Positions: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint64]]


def key_hash(key: bytes) -> int:
    """Where a key lies on the ring: 64 bits of blake2b."""
    return int.from_bytes(blake2b(key, digest_size=8, person=b"kvcache-ring").digest(), "little")


class HashRing:
    """An immutable ring over `{worker id: weight}`; a weight of 100 is one worker's worth of keys."""

    def __init__(self, weights: Mapping[str, int]) -> None:
        self.workers: tuple[str, ...] = tuple(sorted(weights))
        self.weights: dict[str, int] = {worker: weights[worker] for worker in self.workers}
        if any(weight < 1 for weight in self.weights.values()):
            raise ValueError("weights must be at least 1")
        self.epoch: str = _epoch(self.weights)
        points = [_points(worker, weight) for worker, weight in self.weights.items()]
        owners = [np.full(len(p), index, np.uint32) for index, p in enumerate(points)]
        positions = np.concatenate(points) if points else np.empty(0, np.uint64)
        order = np.argsort(positions, kind="stable")
        self._positions = array("Q", positions[order].tobytes())
        self._owners = array("I", (np.concatenate(owners)[order] if owners else np.empty(0, np.uint32)).tobytes())
        self._shares = _shares(positions[order], np.frombuffer(self._owners, np.uint32), len(self.workers))

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
        return self._shares[self.workers.index(worker)] if worker in self.weights else 0.0


def _points(worker: str, weight: int) -> Positions:
    seed = int.from_bytes(blake2b(worker.encode(), digest_size=8, person=b"kvcache-node").digest(), "little")
    count = max(1, POINTS_PER_WORKER * weight // UNIT_WEIGHT)
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _shares(positions: Positions, owners: np.ndarray[tuple[int], np.dtype[np.uint32]], num_workers: int) -> list[float]:
    gaps = np.diff(positions, prepend=positions[-1:])  # modulo 2**64, so the first wraps around right
    totals: list[float] = (np.bincount(owners, gaps.astype(np.float64), num_workers) / 2.0**64).tolist()
    return totals


def _epoch(weights: Mapping[str, int]) -> str:
    """An identifier (not an order) of the live set, equal wherever the set is equal."""
    text = "\n".join(f"{worker}={weight}" for worker, weight in weights.items())
    return blake2b(text.encode(), digest_size=6).hexdigest()
