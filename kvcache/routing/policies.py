"""Policies: given a key, the ring and what is known of each worker, which one serves.

A policy is a pure function with one signature, selected by name per broker or per request. It sees
loads that the broker counted when it dispatched, so two requests that arrive together do not both see
an idle worker. A key that names a sequence never gets here with a choice: its owner serves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import msgspec

from bus.errors import BadArgument
from kvcache.ring import UNIT_WEIGHT, HashRing
from kvcache.routing.keys import RoutingKey

LOAD_BOUND = 1.25


class Load(msgspec.Struct, frozen=True, gc=False):
    """What the broker knows of one worker. inflight: dispatched and not ended.

    turn: its virtual time, in requests for each 100 of weight. The broker starts a worker that is new or was away
    at the time of the others (start-time fair queueing, Goyal, Vin, Cheng 1996, section 2), so it need not catch up.
    """

    inflight: int
    weight: int
    turn: float
    is_available: bool

    @property
    def per_weight(self) -> float:
        return self.inflight * UNIT_WEIGHT / self.weight


class Choice(msgspec.Struct, frozen=True, gc=False):
    worker_id: str
    reason: str


Policy: TypeAlias = Callable[[RoutingKey, HashRing, Mapping[str, Load]], Choice | None]
"""Returns None when no worker is available."""


def consistent_hash(key: RoutingKey, ring: HashRing, loads: Mapping[str, Load]) -> Choice | None:
    """The key's owner; the next on the ring while the owner is not available."""
    if not key.key:
        return least_loaded(key, ring, loads)
    for rank, worker in enumerate(ring.preference(key.key)):
        if loads[worker].is_available:
            return Choice(worker, f"consistent_hash: {'owner' if rank == 0 else f'successor {rank}'} of {key.text}")
    return None


def bounded_load(key: RoutingKey, ring: HashRing, loads: Mapping[str, Load]) -> Choice | None:
    """The first worker on the key's preference list whose load stays within 1.25 of its fair share.

    Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018, section 2), by weight.
    """
    if not key.key:
        return least_loaded(key, ring, loads)
    available = {worker: load for worker, load in loads.items() if load.is_available}
    for rank, worker in enumerate(ring.preference(key.key)):
        if worker in available and available[worker].inflight < load_limit(available, worker):
            return Choice(worker, f"bounded_load: {'owner' if rank == 0 else f'successor {rank}'} of {key.text}")
    return None


def load_limit(available: Mapping[str, Load], worker: str) -> float:
    """How many requests `worker` may have before it takes one more: 1.25 of its share of all, this one included."""
    total = 1 + sum(load.inflight for load in available.values())
    weights = sum(load.weight for load in available.values())
    return LOAD_BOUND * total * available[worker].weight / weights


def least_loaded(key: RoutingKey, ring: HashRing, loads: Mapping[str, Load]) -> Choice | None:
    """The worker with the fewest requests in flight for its weight; among equals the one whose turn it is."""
    available = [worker for worker in ring.workers if loads[worker].is_available]
    if not available:
        return None
    worker = min(available, key=lambda name: (loads[name].per_weight, loads[name].turn))
    return Choice(worker, f"least_loaded: {loads[worker].inflight} in flight")


def round_robin(key: RoutingKey, ring: HashRing, loads: Mapping[str, Load]) -> Choice | None:
    """The worker whose turn it is: each gets as many as its weight says."""
    available = [worker for worker in ring.workers if loads[worker].is_available]
    if not available:
        return None
    return Choice(min(available, key=lambda name: loads[name].turn), "round_robin: its turn")


POLICIES: dict[str, Policy] = {
    "consistent_hash": consistent_hash,
    "bounded_load": bounded_load,
    "least_loaded": least_loaded,
    "round_robin": round_robin,
}
DEFAULT_POLICY = "bounded_load"


def policy_by_name(name: str) -> Policy:
    """Raises BadArgument that names the policies there are."""
    policy = POLICIES.get(name)
    if policy is None:
        raise BadArgument(f"policy {name!r} does not exist; use one of {', '.join(POLICIES)}")
    return policy
