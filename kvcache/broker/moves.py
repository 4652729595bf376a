"""Which named sequences are to be copied to which workers, so that they outlive the workers that have them.

    WAITING   some worker should have a copy of it and has none: its holder drains, or another holder was lost
    COPYING   one worker was told to copy it from another (`CopySequence`); at most `MAX_PER_WORKER` at either
    (gone)    enough workers on the ring have it, or nobody can be found who could: it was tried with each

A copy keeps its version, so a write that overtakes it makes the copy a stale one like any other. What a worker that
drains has comes first, the most recently used before the rest; what a request asks for meanwhile before all that.
When nothing is left to be copied from it, that worker is told so. Everything here may be lost and is found out again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from bus import messages as m
from bus.errors import ErrorCode, error_from_wire
from kvcache.broker.directory import Name
from kvcache.broker.journal import Journal, News
from kvcache.broker.members import Worker, Workers
from kvcache.broker.pulls import can_pull, order_copy
from kvcache.broker.sends import Send, to_worker
from kvcache.broker.sequences import Sequences
from kvcache.routing.keys import sequence_key

MAX_PER_WORKER = 4
"""Copies under way from one worker, or to one: enough to hide their round trips, few beside its requests."""
BUDGET_S = 10.0
"""As long as a worker that drains waits."""
SETTLE_S = 1.0
"""After a worker came, before it is asked what lacks a copy: with a broker that restarts they come one by one."""
MAX_TRIES = 5
"""Of a copy to one worker: writes overtake it, or one end has too many, or stalls."""
TRANSIENT = (ErrorCode.CONFLICT, ErrorCode.OVERLOADED, ErrorCode.CONNECTION_LOST)
MAX_HOPELESS = 65_536
LOOK_AHEAD = 64
"""Of those that wait, how many are looked at for one that can begin."""


class Wait(NamedTuple):
    """What has been tried. refused: the workers that could not take it. tries: that failed otherwise."""

    refused: tuple[str, ...] = ()
    tries: int = 0


class Move(NamedTuple):
    """A copy under way. until: when it counts as failed, monotonic seconds."""

    name: Name
    source: Worker
    target: Worker
    until: float
    wait: Wait


class Moves:
    """All copies of sequences that are to be made. `new_id` makes 16 secret random bytes."""

    def __init__(self, workers: Workers, sequences: Sequences, journal: Journal, new_id: Callable[[], bytes]) -> None:
        self.num_done = 0
        self.failed: Counter[str] = Counter()
        self._workers = workers
        self._sequences = sequences
        self._journal = journal
        self._new_id = new_id
        self._waiting: OrderedDict[Name, Wait] = OrderedDict()
        self._again: dict[Name, Wait] = {}  # they wait from the next tick on
        self._copying: dict[bytes, Move] = {}
        self._by_name: dict[Name, bytes] = {}
        self._load: Counter[str] = Counter()  # copies under way, by the worker at either end
        self._draining: set[str] = set()
        self._hopeless: set[Name] = set()  # nobody was found who could take them, or give them
        self._looks_at: float | None = None

    def __len__(self) -> int:
        """How many wait or are under way."""
        return len(self._waiting) + len(self._again) + len(self._copying)

    def is_due(self, name: Name) -> bool:
        """Whether it is to be copied, or just is."""
        return name in self._waiting or name in self._by_name or name in self._again

    def wants(self, name: Name) -> bool:
        """Whether another copy of it can still be hoped for, now that a write waits for one. A worker's death may have
        cut the write short that was to make it."""
        if name not in self._hopeless:
            self._consider(name)
        return self.is_due(name)

    def asked(self, name: Name) -> None:
        """A request waits for this one."""
        if name in self._waiting:
            self._waiting.move_to_end(name, last=False)

    # --- what happens to workers ---

    def changed(self, worker: Worker, now: float) -> list[Send]:
        """A worker has joined, or is in another state than before."""
        self._looks_at = now + SETTLE_S
        self._hopeless.clear()
        for name, wait in self._waiting.items():
            self._waiting[name] = wait._replace(refused=())
        if worker.state is not m.WorkerState.DRAINING:
            self._draining.discard(worker.id)
            return []
        self._draining.add(worker.id)
        for name in reversed(self._sequences.names_of(worker.id)):
            self._consider(name)
            self.asked(name)
        return [*self._begin(now), *self._dismiss()]

    def losing(self, worker: Worker) -> None:
        """A worker is off the ring and about to be forgotten: what others have too may need another copy."""
        self._draining.discard(worker.id)
        for ticket, move in list(self._copying.items()):
            if worker in (move.source, move.target):
                self._stop(ticket)
                self._again[move.name] = move.wait
        held = self._sequences.holds(worker.id)
        for name in self._sequences.replicated():
            if name in held and self._lacks(name) and not self.is_due(name):
                self._again[name] = Wait()

    # --- what becomes of copies ---

    def copied(self, worker: Worker, report: m.SequenceCopied, now: float) -> list[Send]:
        """A worker has copied what it was told to, or could not. Of anything else it says nothing is believed."""
        move = self._copying.get(report.ticket)
        if move is None or move.target is not worker:
            return []
        self._stop(report.ticket)
        if report.code:
            self._failed(move, report.code)
        else:
            self.num_done += 1
            self._sequences.wrote(worker, move.name, report.version, now)
            self._consider(move.name)  # one more may be missing, or this one came too late
        return [*self._begin(now), *self._sequences.take_late()]

    def tick(self, now: float) -> list[Send]:
        """Time has passed."""
        for ticket, move in list(self._copying.items()):
            if now >= move.until:
                self._stop(ticket)
                self._failed(move, ErrorCode.DEADLINE)
        if len(self._hopeless) > MAX_HOPELESS:  # some have been deleted since; they are tried once more, if asked for
            self._hopeless.clear()
        self._waiting.update(self._again)
        self._again.clear()
        if self._looks_at is not None and now >= self._looks_at:
            self._looks_at = None
            for name in self._sequences.replicated():
                self._consider(name)
        return [*self._begin(now), *self._dismiss()]

    def check(self) -> None:
        """Assert that the books agree, and that nobody copies who is not there."""
        assert self._by_name == {move.name: ticket for ticket, move in self._copying.items()}
        live = self._workers.by_id.values()
        assert all(move.source in live and move.target in live for move in self._copying.values())
        assert not self._waiting.keys() & self._by_name.keys()
        assert self._draining <= self._workers.by_id.keys()

    # --- inside ---

    def _consider(self, name: Name) -> None:
        """It waits for a copy from now on, if it lacks one."""
        if self._lacks(name) and not self.is_due(name):
            self._waiting[name] = Wait()

    def _lacks(self, name: Name) -> bool:
        """Whether fewer workers on the ring have it than should, and any worker has it at all."""
        holders, ring = self._sequences.find(name).holders, self._workers.ring
        there = sum(holder in ring.weights for holder in holders)
        return bool(holders) and there < min(self._sequences.rf(name), len(ring))

    def _begin(self, now: float) -> list[Send]:
        """Order what can be copied now."""
        sends: list[Send] = []
        for name in list(islice(self._waiting, LOOK_AHEAD)):
            wait = self._waiting[name]
            target = self._target(name, wait) if self._lacks(name) else None
            if target is None:
                self._give_up(name)
            elif not self._sequences.is_in_flux(name):
                sends += self._order(name, wait, target, now)
        return sends

    def _target(self, name: Name, wait: Wait) -> Worker | None:
        """The next worker of the ring's preference that has no copy and has not refused one; None if there is none."""
        holders = self._sequences.find(name).holders
        others = (other for other in self._workers.ring.preference(sequence_key(*name).key) if other not in holders)
        found = next((other for other in others if other not in wait.refused), None)
        return None if found is None else self._workers.by_id[found]

    def _order(self, name: Name, wait: Wait, target: Worker, now: float) -> list[Send]:
        """Have it copied there, rather from who stays than from who leaves. Nothing, if there is no link to spare."""
        place, ring = self._sequences.find(name), self._workers.ring
        holders = [self._workers.by_id[holder] for holder in place.holders]
        sources = [source for source in holders if can_pull(source, target)]
        if not sources:
            self._give_up(name)
            return []
        source = min(sources, key=lambda worker: (worker.id not in ring.weights, self._load[worker.id]))
        if max(self._load[source.id], self._load[target.id]) >= MAX_PER_WORKER:
            return []
        del self._waiting[name]
        ticket = self._new_id()
        self._copying[ticket] = Move(name, source, target, now + BUDGET_S, wait)
        self._by_name[name] = ticket
        self._load.update((source.id, target.id))
        return list(order_copy(name, place.version, source, target, ticket, BUDGET_S))

    def _give_up(self, name: Name) -> None:
        del self._waiting[name]
        if self._lacks(name):
            self._hopeless.add(name)

    def _stop(self, ticket: bytes) -> None:
        move = self._copying.pop(ticket)
        del self._by_name[move.name]
        self._load.subtract((move.source.id, move.target.id))

    def _failed(self, move: Move, code: int) -> None:
        """Try again there, or with another worker, or not at all: its holder may not have it any more."""
        self.failed[error_from_wire(code, "").code.name] += 1
        if code == ErrorCode.NOT_FOUND:
            self._hopeless.add(move.name)
            return
        wait = move.wait._replace(tries=move.wait.tries + 1)
        if code not in TRANSIENT or wait.tries >= MAX_TRIES:
            wait = Wait((*wait.refused, move.target.id))
        self._again[move.name] = wait

    def _dismiss(self) -> list[Send]:
        """Let go of workers that drain and from which nothing is to be copied any more."""
        sends: list[Send] = []
        for worker_id in list(self._draining):
            held = self._sequences.holds(worker_id)
            if self._load[worker_id] or any(self.is_due(name) for name in held):
                continue
            self._draining.remove(worker_id)
            ring = self._workers.ring.weights.keys()
            num_left = sum(ring.isdisjoint(self._sequences.find(name).holders) for name in held)
            sends.append(to_worker(self._workers.by_id[worker_id], m.HandedOver(num_left=num_left)))
            if held:
                there = len(held) - num_left
                text = f"worker {worker_id} drains: {there} of its {len(held)} sequences are elsewhere too"
                self._journal.news.append(News(text, is_bad=num_left > 0))
        return sends
