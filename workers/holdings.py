"""Which named sequences this worker holds, in which version, and what its brokers have still to be told of it.

A version comes from the broker with the write that it numbers, and grows with every write. Of what was dropped a
mark stays for a while: brokers learn from it that older copies elsewhere are stale, also those that start later.
A broker that welcomes us is told everything, least recently written first, then what changes, in pages. All that
is remembered per broker is which names it has still to hear of, so a name that changes often is told once.
"""

from __future__ import annotations

from collections import OrderedDict

from bus.stats import Holding, Holdings
from workers.keys import SequenceKey

MAX_MARKS = 10_000
PAGE_SEQUENCES = 256


class HeldSequences:
    """Versions by name. `num_links`: how many brokers there are to be told."""

    def __init__(self, num_links: int, *, max_marks: int = MAX_MARKS) -> None:
        self._max_marks = max_marks
        self._held: OrderedDict[SequenceKey, int] = OrderedDict()  # least recently written first
        self._copies: dict[SequenceKey, int] = {}  # of those whose last write had more than one, or that were copied
        self._rf: dict[SequenceKey, int] = {}  # of those that more than one worker is to have
        self._marks: OrderedDict[SequenceKey, int] = OrderedDict()  # oldest first
        self._untold: list[dict[SequenceKey, None] | None] = [None] * num_links  # None: it has not welcomed us

    def __len__(self) -> int:
        return len(self._held)

    def version(self, key: SequenceKey) -> int:
        """The version that is held; 0 if none is."""
        return self._held.get(key, 0)

    def newest(self, key: SequenceKey) -> int:
        """The newest version that is known of here, held or not."""
        return max(self._held.get(key, 0), self._marks.get(key, 0))

    def rf(self, key: SequenceKey) -> int:
        """How many workers are to have it."""
        return self._rf.get(key, 1)

    def copied(self, key: SequenceKey) -> int:
        """Another worker takes a copy of what is held; returns how many may have this version then."""
        self._copies[key] = self._copies.get(key, 1) + 1
        return self._copies[key]

    def took(self, key: SequenceKey, version: int, copies: int, rf: int) -> None:
        """What is held now is a copy of another worker's, one of so many. Newer than all that is known of here."""
        self._copies.pop(key, None)
        self.wrote(key, version, copies, rf)

    def wrote(self, key: SequenceKey, version: int, copies: int = 1, rf: int = 1) -> int:
        """A write took effect, with which the sequence has this version, or a later one that it has already.

        copies: how many workers were given the write. If that is fewer than had the last one, its broker does not know
        of one that has a copy: that must not count as equal to ours, so our version is greater then. rf: how many
        workers are to have it, which is remembered.
        Returns the version.
        """
        if rf > 1:
            self._rf[key] = max(rf, self.rf(key))
        seen = max(self._held.pop(key, 0), self._marks.pop(key, 0))
        self._held[key] = max(version, seen + (copies < self._copies.pop(key, 1)))
        if copies > 1:
            self._copies[key] = copies
        self._changed(key)
        return self._held[key]

    def kept(self, key: SequenceKey) -> None:
        """It is held (again) under the last version that was marked."""
        if key not in self._held:
            self._held[key] = self._marks.pop(key, 1)
            self._changed(key)

    def mark(self, key: SequenceKey, version: int) -> None:
        """Say what version it will be when it is `kept`, or is to be when it is held already."""
        if key in self._held:
            self.wrote(key, version)
        else:
            self._mark(key, version)

    def dropped(self, key: SequenceKey, version: int = 0) -> None:
        """It is not held any more: evicted, or deleted by a write of this version."""
        held = self._held.pop(key, 0)
        self._copies.pop(key, None)
        self._rf.pop(key, None)
        if held or version:
            self._mark(key, max(held, version))
            self._changed(key)

    def joined(self, link: int) -> None:
        """A broker welcomes us that knows nothing of us."""
        self._untold[link] = dict.fromkeys([*self._marks, *self._held])

    def left(self, link: int) -> None:
        """A broker is gone."""
        self._untold[link] = None

    def next_page(self, link: int) -> tuple[Holdings, bool] | None:
        """What this broker is to be told next, and whether that is all for now; None if there is nothing."""
        untold = self._untold[link]
        if not untold:
            return None
        keys = [key for key, _ in zip(untold, range(PAGE_SEQUENCES), strict=False)]
        for key in keys:
            del untold[key]
        return Holdings(sequences=tuple(map(self._holding, keys))), not untold

    # --- details ---

    def _holding(self, key: SequenceKey) -> Holding:
        held = self._held.get(key)
        version = self._marks.get(key, 0) if held is None else held
        return Holding(key.tenant, key.seq_id, version, held is not None, self.rf(key))

    def _mark(self, key: SequenceKey, version: int) -> None:
        self._marks[key] = max(version, self._marks.pop(key, 0))
        while len(self._marks) > self._max_marks:
            self._marks.popitem(last=False)

    def _changed(self, key: SequenceKey) -> None:
        for untold in self._untold:
            if untold is not None:
                untold[key] = None
