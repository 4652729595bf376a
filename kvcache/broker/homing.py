"""Which named sequences are to move because the ring has changed: to a worker that owns them now and has them not.

Soon after a change of the ring all sequences are looked at, the most recently used first, some at each tick. What is
found waits in the order in which it is wanted, by the worker that it is to move to. Moving it is never urgent, since a
sequence is served wherever it is:

- one sequence at a time moves to a worker, and one from it, and never while requests wait at either end;
- what a worker spends on moves is a quarter of its time (`Allowance`): a slow link or a busy worker moves less;
- what failed goes to the end of the line, and whoever has no room is asked again ever more seldom. A newcomer gets what
  the ring gives it, which is its share, as far as it has free room.

Here it is only said what should move; `moves` has it done.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from kvcache.broker.directory import Name
from kvcache.broker.members import Worker, Workers
from kvcache.broker.pulls import can_pull
from kvcache.broker.sequences import Sequences
from kvcache.routing.keys import sequence_key

SETTLE_S = 1.0
"""After the ring changed: with a broker or a cluster that restarts, workers come one by one."""
LOOKS_PER_TICK = 500
"""About 2 ms."""
LOOK_AHEAD = 64
"""Of those that wait for one worker, how many are looked at for one whose holder has time."""
SHARE = 0.25
BURST_S = 1.0
PAUSE_S = 1.0
MAX_PAUSE_S = 64.0


class Goal(NamedTuple):
    """A sequence that is to move."""

    name: Name
    source: Worker
    target: Worker


class Allowance:
    """Seconds that each worker may spend: `SHARE` of those that pass, at most `BURST_S` saved. Debts are paid off."""

    def __init__(self) -> None:
        self._credit: dict[str, tuple[float, float]] = {}  # by worker, and at what time

    def left(self, worker_id: str, now: float) -> float:
        """What it has, at `now`; negative if it owes."""
        credit, at = self._credit.get(worker_id, (BURST_S, now))
        return min(BURST_S, credit + SHARE * (now - at))

    def spend(self, worker_id: str, seconds: float, now: float) -> None:
        self._credit[worker_id] = self.left(worker_id, now) - seconds, now

    def keep(self, workers: set[str]) -> None:
        """Forget all others."""
        self._credit = {worker: credit for worker, credit in self._credit.items() if worker in workers}


class Homing:
    """is_due(name): whether it is to be copied for a better reason, or is just being copied."""

    def __init__(self, workers: Workers, sequences: Sequences, is_due: Callable[[Name], bool]) -> None:
        self._workers = workers
        self._sequences = sequences
        self._is_due = is_due
        self._ring = workers.ring
        self._looks_at: float | None = None
        self._unseen: Iterator[Name] = iter(())
        self._found: dict[str, OrderedDict[Name, None]] = {}  # by target, the most wanted first
        self._under_way: set[str] = set()  # workers at either end
        self._allowance = Allowance()
        self._pauses: dict[str, tuple[float, float]] = {}  # by target: for how long, and until when

    def __len__(self) -> int:
        """How many were found that have not begun to move."""
        return sum(map(len, self._found.values()))

    def tick(self, now: float) -> None:
        """Look at some more, if there are any to look at."""
        if self._workers.ring is not self._ring:
            self._ring, self._looks_at = self._workers.ring, now + SETTLE_S
        if self._looks_at is not None and now >= self._looks_at and not self._sequences.is_learning(now):
            self._looks_at = None
            self._found.clear()
            self._pauses.clear()
            self._allowance.keep(set(self._workers.by_id))
            self._unseen = iter(self._sequences.recent())
        for name in islice(self._unseen, LOOKS_PER_TICK):
            self._add(self._goal(name))

    def take(self, now: float) -> list[Goal]:
        """What may begin to move now."""
        goals: list[Goal] = []
        for target in list(self._found):
            goal = self._next(target, now)
            if goal is not None:
                self._under_way |= {goal.source.id, goal.target.id}
                goals.append(goal)
            if not self._found[target]:
                del self._found[target]
        return goals

    def ended(self, goal: Goal, seconds: float, now: float, *, is_moved: bool, may_retry: bool = False) -> None:
        """It took so long, whether or not it was of use."""
        ends = {goal.source.id, goal.target.id}
        self._under_way -= ends
        for worker_id in ends:
            self._allowance.spend(worker_id, seconds, now)
        if is_moved:
            self._pauses.pop(goal.target.id, None)
        elif may_retry:
            pause_s = min(MAX_PAUSE_S, 2 * self._pauses.get(goal.target.id, (PAUSE_S / 2, 0.0))[0])
            self._pauses[goal.target.id] = pause_s, now + pause_s
            self._add(self._goal(goal.name))

    def awaits(self, name: Name, worker_id: str) -> bool:
        """Whether it was found and is to move to this worker."""
        return name in self._found.get(worker_id, ())

    def surplus(self, name: Name) -> list[Worker]:
        """Who has a copy that nobody needs: enough of those that the ring prefers have it too."""
        ring, holders = self._workers.ring, self._sequences.find(name).holders
        in_order = [worker for worker in ring.preference(sequence_key(*name).key) if worker in holders]
        return [self._workers.by_id[worker] for worker in in_order[self._sequences.rf(name) :]]

    def check(self) -> None:
        """Assert that nobody is thought of as busy who is not there, and that no line is empty."""
        assert self._under_way <= self._workers.by_id.keys()
        assert all(self._found.values())

    # --- inside ---

    def _goal(self, name: Name) -> Goal | None:
        """Where it should move, and from where; None if it is where the ring wants it, or cannot move."""
        ring, holders = self._workers.ring, self._sequences.find(name).holders
        there = [holder for holder in holders if holder in ring.weights]
        rf = min(self._sequences.rf(name), len(ring))
        if not there or len(there) < rf:  # it is gone, or lacks a copy, which is another matter
            return None
        wanted = list(islice(ring.preference(sequence_key(*name).key), rf))
        lacking = next((worker for worker in wanted if worker not in holders), None)
        if lacking is None:
            return None
        target = self._workers.by_id[lacking]
        there.sort(key=lambda holder: holder in wanted)  # rather from who need not have it
        source = next((self._workers.by_id[it] for it in there if can_pull(self._workers.by_id[it], target)), None)
        return None if source is None else Goal(name, source, target)

    def _add(self, goal: Goal | None) -> None:
        if goal is not None:
            self._found.setdefault(goal.target.id, OrderedDict())[goal.name] = None

    def _next(self, target: str, now: float) -> Goal | None:
        """The first in this line that can begin. What need not move any more leaves the line."""
        names = self._found[target]
        if not self._has_time(target, now) or now < self._pauses.get(target, (0.0, now))[1]:
            return None
        for name in list(islice(names, LOOK_AHEAD)):
            goal = self._goal(name)
            if goal is None or goal.target.id != target:
                del names[name]
            elif not self._is_waiting(name) and self._has_time(goal.source.id, now):
                del names[name]
                return goal
        return None

    def _is_waiting(self, name: Name) -> bool:
        """Whether something is going on with it that comes first."""
        return self._is_due(name) or self._sequences.is_in_flux(name)

    def _has_time(self, worker_id: str, now: float) -> bool:
        """Whether a worker has nothing better to do."""
        worker = self._workers.by_id.get(worker_id)
        if worker is None or worker_id in self._under_way or self._allowance.left(worker_id, now) <= 0:
            return False
        return not worker.has_waiting and self._workers.is_available(worker, now)
