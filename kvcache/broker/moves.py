"""Which named sequences are to be copied to which workers, so that they outlive the workers that have them.

    WAITING   some worker should have a copy of it and has none: its holder drains, or another holder was lost
    COPYING   one worker was told to copy it from another (`CopySequence`); at most `MAX_PER_WORKER` at either
    LATER     each worker was tried, and none could take it; all are tried again after a while (`later`)
    (gone)    enough workers on the ring have it, or there is nothing to be copied

A copy keeps its version, so a write that overtakes it makes the copy a stale one like any other. What a worker that
drains has comes first, the most recently used before the rest; what a request asks for meanwhile before all that.
When nothing is left to be copied from it, nor any prompt to be fetched (`warming`), that worker is told so. Everything
here may be lost and is found out again.

When all that is done, what another worker owns since the ring has changed moves there (`homing`). It is copied in the
same way; when the copy is there, whoever need not have one any more is told to let go of it, so that its room is free.
Until then requests go where it was, and from then on where it is: the broker says which, in one order for all.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from bus import messages as m
from bus.errors import ErrorCode, error_from_wire
from bus.stats import Holdings
from kvcache.broker.directory import Name
from kvcache.broker.homing import SETTLE_S, Goal, Homing
from kvcache.broker.journal import Journal, News
from kvcache.broker.later import Later
from kvcache.broker.members import Worker, Workers
from kvcache.broker.pulls import can_pull, order_copy
from kvcache.broker.sends import Send, to_worker
from kvcache.broker.sequences import Sequences
from kvcache.routing.keys import sequence_key

MAX_PER_WORKER = 4
"""Copies under way from one worker, or to one: enough to hide their round trips, few beside its requests."""
BUDGET_S = 10.0
"""As long as a worker that drains waits."""
MAX_TRIES = 5
"""Of a copy to one worker: writes overtake it, or one end has too many, or stalls."""
TRANSIENT = (ErrorCode.CONFLICT, ErrorCode.OVERLOADED, ErrorCode.CONNECTION_LOST)
MAX_HOPELESS = 65_536
LOOK_AHEAD = 64
"""Of those that wait, how many are looked at for one that can begin."""


class Wait(NamedTuple):
    """What has been tried. refused: the workers that could not take it. tries: that failed otherwise. rounds: how often
    all had been tried before."""

    refused: tuple[str, ...] = ()
    tries: int = 0
    rounds: int = 0


class Move(NamedTuple):
    """A copy under way, since `began_at`, monotonic seconds. goal: what it is for if it is no more than homing."""

    name: Name
    source: Worker
    target: Worker
    began_at: float
    wait: Wait = Wait()
    goal: Goal | None = None


class Moves:
    """All copies of sequences that are to be made. `new_id` makes 16 secret random bytes.

    is_needed(worker_id, now): whether a worker that drains is to stay for another reason.
    """

    def __init__(
        self,
        workers: Workers,
        sequences: Sequences,
        journal: Journal,
        new_id: Callable[[], bytes],
        is_needed: Callable[[str, float], bool],
    ) -> None:
        self.num_done = 0
        self.num_moved = 0
        self.failed: Counter[str] = Counter()
        self._workers = workers
        self._sequences = sequences
        self._journal = journal
        self._new_id = new_id
        self._is_needed = is_needed
        self._waiting: OrderedDict[Name, Wait] = OrderedDict()
        self._again: dict[Name, Wait] = {}  # they wait from the next tick on
        self._copying: dict[bytes, Move] = {}
        self._by_name: dict[Name, bytes] = {}
        self._load: Counter[str] = Counter()  # copies under way, by the worker at either end
        self._draining: set[str] = set()
        self._hopeless: set[Name] = set()  # there is nothing to be copied: what a generation left, for one
        self._later = Later()
        self._looks_at: float | None = None
        self._homing = Homing(workers, sequences, self.is_due)

    def __len__(self) -> int:
        """How many wait or are under way, but for those that are only to move."""
        return len(self._waiting) + len(self._again) + len(self._copying)

    def is_due(self, name: Name) -> bool:
        """Whether it is to be copied, or just is."""
        return name in self._waiting or name in self._by_name or name in self._again

    @property
    def num_to_move(self) -> int:
        """How many were found that another worker owns, and are to move there when there is time."""
        return len(self._homing)

    def moves_to(self, name: Name, worker_id: str) -> bool:
        """Whether it is to move to this worker, or just does."""
        ticket = self._by_name.get(name)
        if ticket is not None:
            return self._copying[ticket].target.id == worker_id
        return self._homing.awaits(name, worker_id)

    def wants(self, name: Name) -> bool:
        """Whether another copy of it can still be hoped for, now that a write waits for one. A worker's death may have
        cut the write short that was to make it."""
        if name not in self._hopeless and name not in self._later:
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
        self._later.clear()
        for name, wait in self._waiting.items():
            self._waiting[name] = wait._replace(refused=())
        if worker.state is not m.WorkerState.DRAINING:
            self._draining.discard(worker.id)
            return []
        return self._drains(worker, now)

    def told(self, worker: Worker, holdings: Holdings, now: float, *, is_first: bool) -> list[Send]:
        """A worker has told what it holds. is_first: and that is all of it, since it joined. If it drains already, only
        then is it known what is to be copied; it may have joined anew while it did, and then waits to hear again that
        it may leave. What it tells later was written since, by who had begun before it drained."""
        if worker.state is not m.WorkerState.DRAINING or not worker.is_known:
            return []
        if is_first:
            return self._drains(worker, now)
        names = [Name(one.tenant, one.seq_id) for one in holdings.sequences if one.is_held]
        for name in names:
            self._consider(name)
        if not any(map(self.is_due, names)):
            return []
        self._draining.add(worker.id)
        return self._begin(now)

    def losing(self, worker: Worker) -> None:
        """A worker is off the ring and about to be forgotten: what others have too may need another copy."""
        self._draining.discard(worker.id)
        for ticket, move in list(self._copying.items()):
            if worker in (move.source, move.target):
                self._stop(ticket, now=move.began_at)  # what it cost is no matter any more
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
        if report.code:
            self._failed(report.ticket, report.code, now)
            return self._begin(now)
        is_new = report.version >= self._sequences.find(move.name).version
        is_there = is_new and not self._sequences.is_in_flux(move.name)  # else a write has overtaken it, or may have
        self._stop(report.ticket, now, is_moved=is_there, may_retry=not is_there)
        self.num_done += 1
        self.num_moved += move.goal is not None and is_there
        self._sequences.wrote(worker, move.name, report.version, now)
        self._consider(move.name)  # one more may be missing, or this one came too late
        releases = self._release(move.name) if move.goal is not None and is_there else []
        return [*releases, *self._begin(now), *self._sequences.take_late()]

    def tick(self, now: float) -> list[Send]:
        """Time has passed."""
        for ticket, move in list(self._copying.items()):
            if now >= move.began_at + BUDGET_S:
                self._failed(ticket, ErrorCode.DEADLINE, now)
        if len(self._hopeless) > MAX_HOPELESS:  # some have been deleted since; they are tried once more, if asked for
            self._hopeless.clear()
        for name, rounds in self._later.take(now):
            if not self.is_due(name):
                self._again[name] = Wait(rounds=rounds)
        self._waiting.update(self._again)
        self._again.clear()
        if self._looks_at is not None and now >= self._looks_at:
            self._looks_at = None
            for name in self._sequences.replicated():
                self._consider(name)
        self._homing.tick(now)
        return [*self._begin(now), *self._dismiss(now)]

    def check(self) -> None:
        """Assert that the books agree, and that nobody copies who is not there."""
        assert self._by_name == {move.name: ticket for ticket, move in self._copying.items()}
        live = self._workers.by_id.values()
        assert all(move.source in live and move.target in live for move in self._copying.values())
        assert not self._waiting.keys() & self._by_name.keys()
        assert self._draining <= self._workers.by_id.keys()
        ends = Counter(worker.id for move in self._copying.values() for worker in (move.source, move.target))
        assert self._load == ends
        assert self._load.keys() == ends.keys()

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

    def _drains(self, worker: Worker, now: float) -> list[Send]:
        self._draining.add(worker.id)
        for name in reversed(self._sequences.names_of(worker.id)):
            self._consider(name)
            self.asked(name)
        return self._begin(now)

    def _begin(self, now: float) -> list[Send]:
        """Order what can be copied now."""
        sends: list[Send] = []
        for name in list(islice(self._waiting, LOOK_AHEAD)):
            wait = self._waiting[name]
            target = self._target(name, wait) if self._lacks(name) else None
            if target is None:
                self._give_up(name, now)
            elif not self._sequences.is_in_flux(name):
                sends += self._order(name, wait, target, now)
        goals = [] if self._waiting else self._homing.take(now)
        return [*sends, *(send for goal in goals for send in self._copy(Move(*goal, now, goal=goal)))]

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
            self._give_up(name, now)
            return []
        source = min(sources, key=lambda worker: (worker.id not in ring.weights, self._load[worker.id]))
        if max(self._load[source.id], self._load[target.id]) >= MAX_PER_WORKER:
            return []
        del self._waiting[name]
        return self._copy(Move(name, source, target, now, wait))

    def _copy(self, move: Move) -> list[Send]:
        ticket, version = self._new_id(), self._sequences.find(move.name).version
        self._copying[ticket] = move
        self._by_name[move.name] = ticket
        self._load.update((move.source.id, move.target.id))
        first = self._sequences.take_late()  # the target may have to let go of a copy that is no good
        return [*first, *order_copy(move.name, version, move.source, move.target, ticket, BUDGET_S)]

    def _release(self, name: Name) -> list[Send]:
        """Have those let go of it who need not have it any more. Not while it is written: the write may go to them."""
        return [self._sequences.release(worker, name) for worker in self._homing.surplus(name)]

    def _give_up(self, name: Name, now: float) -> None:
        wait = self._waiting.pop(name)
        if self._lacks(name):
            self._later.add(name, wait.rounds + 1, now)

    def _stop(self, ticket: bytes, now: float, *, is_moved: bool = False, may_retry: bool = False) -> Move:
        move = self._copying.pop(ticket)
        del self._by_name[move.name]
        self._load -= Counter((move.source.id, move.target.id))  # which keeps nobody who has none
        if move.goal is not None:
            self._homing.ended(move.goal, now - move.began_at, now, is_moved=is_moved, may_retry=may_retry)
        return move

    def _failed(self, ticket: bytes, code: int, now: float) -> None:
        """Try again there, or with another worker, or not at all: its holder may not have it any more."""
        move = self._stop(ticket, now, may_retry=code != ErrorCode.NOT_FOUND)
        if move.goal is None or code != ErrorCode.NOT_FOUND:  # what a generation left stays where it is: no failure
            self.failed[error_from_wire(code, "").code.name] += 1
        if code == ErrorCode.NOT_FOUND:
            self._hopeless.add(move.name)
            return
        wait = move.wait._replace(tries=move.wait.tries + 1)
        if code not in TRANSIENT or wait.tries >= MAX_TRIES:
            wait = wait._replace(refused=(*wait.refused, move.target.id), tries=0)
        if move.goal is None or self._lacks(move.name):  # its holder may have begun to drain meanwhile
            self._again[move.name] = wait

    def _dismiss(self, now: float) -> list[Send]:
        """Let go of workers that drain and from which nothing is to be copied any more."""
        sends: list[Send] = []
        for worker_id in list(self._draining):
            held = self._sequences.holds(worker_id)
            if not self._workers.by_id[worker_id].is_known:  # it has joined just now, and still tells what it has
                continue
            if self._load[worker_id] or any(map(self.is_due, held)) or self._is_needed(worker_id, now):
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
