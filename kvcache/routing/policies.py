"""Policies: given a request, the ring and what is believed of each worker, which one serves.

A policy is a pure function with one signature, selected by name per broker or per request. It sees
loads that the broker counted when it dispatched, so two requests that arrive together do not both see
an idle worker. A key that names a sequence never gets here with a choice: its owner serves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from bus.errors import BadArgument
from kvcache.ring import HashRing
from kvcache.routing.prefix import NOBODY, prefix
from kvcache.routing.views import Belief, Choice, Refusal, Request

LOAD_BOUND = 1.25

Policy: TypeAlias = Callable[[Request, HashRing, Mapping[str, Belief]], Choice | Refusal]
"""Chooses among the ring's workers; `beliefs` has one of each. Refuses when no worker is available."""


def consistent_hash(request: Request, ring: HashRing, beliefs: Mapping[str, Belief]) -> Choice | Refusal:
    """The key's owner; the next on the ring while the owner is not available."""
    key = request.key
    if not key.key:
        return least_loaded(request, ring, beliefs)
    for rank, worker in enumerate(ring.preference(key.key)):
        if beliefs[worker].is_available:
            return Choice(worker, f"consistent_hash: {'owner' if rank == 0 else f'successor {rank}'} of {key.text}")
    return NOBODY


def bounded_load(request: Request, ring: HashRing, beliefs: Mapping[str, Belief]) -> Choice | Refusal:
    """The first worker on the key's preference list whose load stays within 1.25 of its fair share.

    Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018, section 2), by weight.
    """
    key = request.key
    if not key.key:
        return least_loaded(request, ring, beliefs)
    available = {worker: belief for worker, belief in beliefs.items() if belief.is_available}
    for rank, worker in enumerate(ring.preference(key.key)):
        if worker in available and available[worker].inflight < load_limit(available, worker):
            return Choice(worker, f"bounded_load: {'owner' if rank == 0 else f'successor {rank}'} of {key.text}")
    return NOBODY


def load_limit(available: Mapping[str, Belief], worker: str) -> float:
    """How many requests `worker` may have before it takes one more: 1.25 of its share of all, this one included."""
    total = 1 + sum(belief.inflight for belief in available.values())
    weights = sum(belief.weight for belief in available.values())
    return LOAD_BOUND * total * available[worker].weight / weights


def least_loaded(request: Request, ring: HashRing, beliefs: Mapping[str, Belief]) -> Choice | Refusal:
    """The worker with the fewest requests in flight for its weight; among equals the one whose turn it is."""
    available = [worker for worker in ring.workers if beliefs[worker].is_available]
    if not available:
        return NOBODY
    worker = min(available, key=lambda name: (beliefs[name].per_weight, beliefs[name].turn))
    return Choice(worker, f"least_loaded: {beliefs[worker].inflight} in flight")


def round_robin(request: Request, ring: HashRing, beliefs: Mapping[str, Belief]) -> Choice | Refusal:
    """The worker whose turn it is: each gets as many as its weight says."""
    available = [worker for worker in ring.workers if beliefs[worker].is_available]
    if not available:
        return NOBODY
    return Choice(min(available, key=lambda name: beliefs[name].turn), "round_robin: its turn")


POLICIES: dict[str, Policy] = {
    "consistent_hash": consistent_hash,
    "bounded_load": bounded_load,
    "prefix": prefix,
    "least_loaded": least_loaded,
    "round_robin": round_robin,
}
DEFAULT_POLICY = "prefix"


def policy_by_name(name: str) -> Policy:
    """Raises BadArgument that names the policies there are."""
    policy = POLICIES.get(name)
    if policy is None:
        raise BadArgument(f"policy {name!r} does not exist; use one of {', '.join(POLICIES)}")
    return policy
