"""Explicit sequences: where they live and how new they are, from what workers tell and answer.

Every write gets a version when it is dispatched, and every request goes out with the newest version that was ever
heard of, so that a worker with an older copy does not answer from it, even before it was told to drop that. What
is known here is lost with the process and told again by the workers; until they have, requests that name a
sequence are asked to come again, for two seconds at most.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from bus import messages as m
from bus import wire
from bus.stats import Holding, Holdings, pack
from kvcache.broker.directory import Directory, Name, Place
from kvcache.broker.members import Worker, Workers
from kvcache.broker.sends import Port, Send, to_worker
from kvcache.broker.versions import Versions

LEARN_S = 2.0


@dataclass(slots=True)
class _Flux:
    """Writes of one sequence that are in flight: how many, to which workers, and the versions those told meanwhile.

    rf: how many workers are to have it, by the writes. missed: by worker, the first version that it may be without.
    """

    num_writes: int = 0
    rf: int = 1
    targets: tuple[str, ...] = ()
    told: dict[str, int] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)


class Sequences:
    """`wall_ms`: milliseconds since 1970, at `now` (monotonic seconds)."""

    def __init__(self, workers: Workers, *, wall_ms: int, now: float) -> None:
        self._workers = workers
        self._directory = Directory()
        self._versions = Versions(wall_ms, now)
        self._in_flux: dict[Name, _Flux] = {}
        self._late: list[Send] = []
        self._released: dict[str, dict[Name, int]] = {}  # by worker, until it says what became of them

    def __len__(self) -> int:
        return len(self._directory)

    def use(self, name: Name) -> Place:
        """Where the newest version is, for a request that is about to go there."""
        return self._directory.use(name)

    def find(self, name: Name) -> Place:
        """As `use`, for whoever only wants to know."""
        return self._directory.find(name)

    def rf(self, name: Name) -> int:
        """How many workers are to have it."""
        return self._directory.rf(name)

    def replicated(self) -> list[Name]:
        """Those that more than one worker is to have."""
        return self._directory.replicated()

    def recent(self) -> list[Name]:
        """All that somebody holds, most recently used first."""
        return self._directory.recent()

    def names_of(self, worker_id: str) -> list[Name]:
        """What a worker holds, most recently used first."""
        return self._directory.names_of(worker_id)

    def holds(self, worker_id: str) -> frozenset[Name] | set[Name]:
        """As `names_of`, in no order; not to be changed or kept."""
        return self._directory.holds(worker_id)

    def is_learning(self, now: float) -> bool:
        """Whether a worker that joined just now may still tell of copies that nobody else has, or of newer ones."""
        workers = self._workers.by_id.values()
        return any(not worker.is_known and now - worker.joined_at < LEARN_S for worker in workers)

    def next_version(self, now: float) -> int:
        return self._versions.next(now)

    # --- writes ----------------------------------------------------------------------------------

    def targets(self, name: Name) -> tuple[str, ...]:
        """The workers that writes in flight go to: another one must go to the same, so that their copies stay equal."""
        flux = self._in_flux.get(name)
        return () if flux is None else flux.targets

    def is_in_flux(self, name: Name) -> bool:
        """Whether writes of it are in flight."""
        return name in self._in_flux

    def is_copied(self, name: Name) -> bool:
        """Whether more than one worker has it, is to have it, or is written to."""
        return self.rf(name) > 1 or len(self.targets(name)) > 1 or len(self.find(name).holders) > 1

    def begin_write(self, name: Name, targets: tuple[str, ...] = (), rf: int = 1) -> None:
        """A write goes out. Until the last one has ended, nothing that is told of the sequence takes effect here:
        workers that get the same writes have them at different times, and neither's copy is stale for that."""
        flux = self._in_flux.setdefault(name, _Flux())
        flux.num_writes += 1
        flux.targets = flux.targets or targets
        flux.rf = max(flux.rf, rf)

    def missed(self, worker_id: str, name: Name, version: int) -> None:
        """A write in flight, which makes this version, has failed at a worker, or nobody knows what became of it there.
        Elsewhere it may have taken effect."""
        missed = self._in_flux[name].missed
        missed[worker_id] = min(version, missed.get(worker_id, version))

    def end_write(self, name: Name) -> None:
        """A write has ended, however it did."""
        flux = self._in_flux[name]
        flux.num_writes -= 1
        if flux.num_writes:
            return
        del self._in_flux[name]
        stale: set[str] = set()
        for worker_id, version in flux.told.items():
            stale.update(self._directory.told(worker_id, name, version))
        self._directory.want(name, flux.rf)
        self._drop(stale.difference(self._directory.find(name).holders), name)
        self._late += [self.release(self._workers.by_id[holder], name) for holder in self._apart(name, flux.missed)]

    def wrote(self, worker: Worker, name: Name, version: int, now: float) -> None:
        """A worker has written this version; whoever holds an older one drops it."""
        self._versions.saw(version, now)
        self._released.get(worker.id, {}).pop(name, None)
        self._told(worker, name, version)

    def take_late(self) -> list[Send]:
        """Whom to tell of newer versions than theirs."""
        late, self._late = self._late, []
        return late

    # --- what workers tell -----------------------------------------------------------------------

    def told(self, worker: Worker, holdings: Holdings, now: float, *, is_complete: bool) -> None:
        """A worker tells what it has and had. Raises MalformedMessage for versions that cannot be."""
        for one in holdings.sequences:
            self._versions.saw(one.version, now)
            name = Name(one.tenant, one.seq_id)
            if self._has_crossed(worker, name, one):
                continue
            if one.is_held:
                self._told(worker, name, one.version)
                self._directory.want(name, one.rf)
            else:
                self._untold(worker, name)
                self._directory.gone(worker.id, name, one.version)
        worker.is_known = worker.is_known or is_complete

    def deleted(self, name: Name, version: int) -> None:
        """No worker has it any more, and copies that turn up later are stale."""
        self._directory.mark(name, version)

    def release(self, worker: Worker, name: Name) -> Send:
        """Tell the worker to let go of it, which others have in the same version. Nothing goes there any more from now
        on, and that it holds this is no news until it has said what became of it."""
        version = self._directory.find(name).version
        self._released.setdefault(worker.id, {})[name] = version
        self._directory.gone(worker.id, name, version)
        return to_worker(worker, m.ReleaseSequence(tenant=name.tenant, seq_id=name.seq_id, version=version))

    def regained(self, worker: Worker) -> None:
        """The worker is back in its session and tells all that it has, as it is after all that it was told."""
        self._released.pop(worker.id, None)

    def forget(self, worker: Worker) -> None:
        """The worker is lost, with all that it held."""
        self._directory.forget(worker.id)
        self._released.pop(worker.id, None)
        for flux in self._in_flux.values():
            flux.told.pop(worker.id, None)
            flux.targets = tuple(target for target in flux.targets if target != worker.id)

    def check(self) -> None:
        """Assert that the books agree, and that only live workers are in them."""
        self._directory.check()
        assert self._directory.workers() <= self._workers.by_id.keys()
        assert self._released.keys() <= self._workers.by_id.keys()

    # --- details ---------------------------------------------------------------------------------

    def _has_crossed(self, worker: Worker, name: Name, told: Holding) -> bool:
        """Whether this was said before the worker heard that it is to let go of it."""
        released = self._released.get(worker.id, {})
        if told.is_held and told.version <= released.get(name, 0):
            return True
        released.pop(name, None)
        return False

    def _told(self, worker: Worker, name: Name, version: int) -> None:
        flux = self._in_flux.get(name)
        if flux is not None:
            flux.told[worker.id] = max(version, flux.told.get(worker.id, 0))
        else:
            self._drop(self._directory.told(worker.id, name, version), name)

    def _untold(self, worker: Worker, name: Name) -> None:
        flux = self._in_flux.get(name)
        if flux is not None:
            flux.told.pop(worker.id, None)

    def _apart(self, name: Name, missed: Mapping[str, int]) -> Sequence[str]:
        """Holders whose copies may differ from what others hold although a later write has made their versions equal:
        they may be without one before that. If that is so of all, the first is not among them."""
        version, holders = self._directory.find(name)
        apart = [holder for holder in holders if missed.get(holder, version) < version]
        return apart[1:] if len(apart) == len(holders) else apart

    def _drop(self, holders: Collection[str], name: Name) -> None:
        if not holders:
            return
        newer = Holding(name.tenant, name.seq_id, self._directory.find(name).version)
        self._late += [_drop_from(self._workers.by_id[holder], newer) for holder in sorted(holders)]


def _drop_from(worker: Worker, newer: Holding) -> Send:
    """Tell a worker of a version that is newer than what it holds."""
    payload = pack(Holdings(sequences=(newer,)))
    message = m.DropSequences(payload=wire.describe([payload]))
    return Send(Port.WORKER, worker.link, [wire.encode(message), payload])
