"""What is due when: constant-time add and discard, in buckets of a quarter second.

Nearly every entry is discarded long before it is due, which a heap would keep until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

BUCKET_S = 0.25

T = TypeVar("T")


class Deadlines(Generic[T]):
    """Entries are compared by identity; each is told back at most once, up to a bucket after its time."""

    def __init__(self) -> None:
        self._buckets: dict[int, dict[int, T]] = {}

    def add(self, entry: T, at: float) -> None:
        self._buckets.setdefault(int(at / BUCKET_S), {})[id(entry)] = entry

    def discard(self, entry: T, at: float) -> None:
        index = int(at / BUCKET_S)
        bucket = self._buckets.get(index)
        if bucket is not None:
            bucket.pop(id(entry), None)
            if not bucket:
                del self._buckets[index]

    def due(self, now: float) -> Iterator[T]:
        """Take out all entries whose bucket has passed."""
        passed = [index for index in self._buckets if (index + 1) * BUCKET_S <= now]
        for index in sorted(passed):
            yield from self._buckets.pop(index).values()

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))
