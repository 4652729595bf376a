"""Which workers hold which named sequences, in which version: what the broker was told, never more.

Soft state: workers tell it all when they join, and what changes; a write's answer tells of it at once. For each
sequence the newest version ever heard of is kept, with the workers that hold just that. A worker that tells of
an older one is to drop it. When nobody holds the newest any more (it was deleted or evicted, or its worker is lost)
a mark of it stays, so that an older copy which turns up later is known to be stale.

Bounded: the least recently used are forgotten. Where a sequence is then, its owner on the ring is asked, and the
worst that follows is a miss.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

MAX_HELD = 200_000
MAX_MARKS = 100_000


class Name(NamedTuple):
    """A client's name for a sequence; tenants have names of their own."""

    tenant: str
    seq_id: str


class Place(NamedTuple):
    """The newest version of a sequence (0: never heard of) and the workers that hold it."""

    version: int
    holders: tuple[str, ...] = ()


NOWHERE = Place(0)


class Directory:
    """Places by name; each change returns the workers whose copy has become stale."""

    def __init__(self, *, max_held: int = MAX_HELD, max_marks: int = MAX_MARKS) -> None:
        self._max_held = max_held
        self._max_marks = max_marks
        self._held: OrderedDict[Name, Place] = OrderedDict()  # least recently used first
        self._marks: OrderedDict[Name, int] = OrderedDict()  # oldest first
        self._names_of: dict[str, set[Name]] = {}
        self._rf: dict[Name, int] = {}  # of those that more than one worker is to have

    def __len__(self) -> int:
        """How many sequences somebody holds."""
        return len(self._held)

    def find(self, name: Name) -> Place:
        """Where its newest version is."""
        return self._held.get(name) or Place(self._marks.get(name, 0))

    def use(self, name: Name) -> Place:
        """As `find`, for a request: what is used stays known longest."""
        if name in self._held:
            self._held.move_to_end(name)
        return self.find(name)

    def rf(self, name: Name) -> int:
        """How many workers are to have it."""
        return self._rf.get(name, 1)

    def want(self, name: Name, rf: int) -> None:
        """At least so many workers are to have it, until nobody does."""
        if name in self._held and rf > self.rf(name):
            self._rf[name] = rf

    def replicated(self) -> list[Name]:
        """Those that more than one worker is to have."""
        return list(self._rf)

    def recent(self) -> list[Name]:
        """All that somebody holds, most recently used first."""
        return list(reversed(self._held))

    def names_of(self, worker_id: str) -> list[Name]:
        """What a worker holds the newest version of, most recently used first."""
        names = self._names_of.get(worker_id, set())
        return [name for name in reversed(self._held) if name in names] if names else []

    def holds(self, worker_id: str) -> frozenset[Name] | set[Name]:
        """As `names_of`, in no order; not to be changed or kept."""
        return self._names_of.get(worker_id, frozenset())

    def told(self, worker_id: str, name: Name, version: int) -> tuple[str, ...]:
        """A worker holds this version. Returns the workers that are to drop theirs, maybe this one itself."""
        before = self.find(name)
        if version < before.version:
            self._leave(worker_id, name)
            return (worker_id,)
        if version == before.version:
            self._set(name, Place(version, tuple(sorted({*before.holders, worker_id}))))
            return ()
        self._set(name, Place(version, (worker_id,)))
        return tuple(holder for holder in before.holders if holder != worker_id)

    def gone(self, worker_id: str, name: Name, version: int) -> None:
        """A worker holds it no more; `version` is that which it had, or that of its deletion."""
        self._leave(worker_id, name)
        self.mark(name, version)

    def mark(self, name: Name, version: int) -> None:
        """A version existed. Copies that are older are stale from now on."""
        if version > self.find(name).version:
            self._set(name, Place(version))

    def forget(self, worker_id: str) -> None:
        """The worker is lost, with all that it held."""
        for name in list(self._names_of.get(worker_id, ())):
            self._leave(worker_id, name)

    def workers(self) -> set[str]:
        """Who holds anything."""
        return set(self._names_of)

    def check(self) -> None:
        """Assert that the books agree."""
        assert self._held.keys().isdisjoint(self._marks.keys())
        listed = {(holder, name) for name, place in self._held.items() for holder in place.holders}
        assert listed == {(worker, name) for worker, names in self._names_of.items() for name in names}
        assert all(place.holders for place in self._held.values())
        assert len(self._held) <= self._max_held
        assert len(self._marks) <= self._max_marks
        assert all(self._names_of.values())
        assert self._rf.keys() <= self._held.keys()

    # --- details ---------------------------------------------------------------------------------

    def _leave(self, worker_id: str, name: Name) -> None:
        place = self._held.get(name)
        if place is not None and worker_id in place.holders:
            self._set(name, Place(place.version, tuple(holder for holder in place.holders if holder != worker_id)))

    def _set(self, name: Name, place: Place) -> None:
        self._marks.pop(name, None)
        self._unlist(name)
        if place.holders:
            self._held[name] = place  # one that is known keeps its place in the order of use: being told of is no use
            for holder in place.holders:
                self._names_of.setdefault(holder, set()).add(name)
        else:
            self._held.pop(name, None)
            self._rf.pop(name, None)
            self._marks[name] = place.version
        while len(self._held) > self._max_held:
            oldest = next(iter(self._held))
            self._unlist(oldest)
            del self._held[oldest]
            self._rf.pop(oldest, None)
        while len(self._marks) > self._max_marks:
            self._marks.popitem(last=False)

    def _unlist(self, name: Name) -> None:
        """Nobody is said to hold it."""
        for holder in self._held.get(name, NOWHERE).holders:
            names = self._names_of[holder]
            names.discard(name)
            if not names:
                del self._names_of[holder]
