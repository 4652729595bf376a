"""The default policy: the worker on which a request costs least, itself and all who come after it.

For every worker, in seconds, from rates that were learned and work that was counted when it was dispatched:

    first token  = max(queue, pull) + prefill of what neither its cache nor the pull covers
    delay        = price * (prefill * queue + own ** 2 / 2)
    total        = first token + delay

`delay` is what the prefill takes from others: each later request at that worker waits longer by it until the
queue has run empty, and price, arrivals a second over the worker's idle share, says how many those are. It is the
size-aware value function of a first-come queue (Hyytiä, Penttinen, Aalto 2012, "Size- and state-aware dispatching",
section 3). With it a cached prefix is worth more the busier the cluster is, and an idle cluster answers soonest.

`own` is the prefill without what makes a copy that is due: a beginning which a share of the traffic has is due on that
share of the workers (`kvcache.routing.shares`). Its copies are each paid once, and those who come while one is made
have others to go to; so it is cheap where nobody waits, and only a queue that waits for it anyway is charged.

Estimates are not exact, so all workers near the best are equals, and among equals what is lasting decides: the
longest prefix already there, then the ring's order. So prompts that share a beginning meet without any index, on
any broker, after any restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from operator import attrgetter

from kvcache.ring import HashRing
from kvcache.routing.links import PULL_SHARE
from kvcache.routing.views import Belief, Choice, Estimate, IndexState, Pull, Refusal, Request

NEAR = 0.15
"""Totals within this share of the least are equal: about what a learned rate is off by."""
NEAR_S = 0.05
"""And so are those within two beats of a cluster's pulse: what happens between an event and the news of it."""
NEAR_BLIND = 0.5
"""While any index is not exact, hits are missing from the totals, and the ring may cost this much more."""
PULL_START_S = 0.01
"""Before a pull's first byte: a message there and back, and both engines only look for copies between two steps."""
LEAST_BUDGET_S = 0.1
"""A pull is never given less: one step of either engine may be in its way."""

_FIRST_TOKEN = attrgetter("first_token_s")
_TOTAL = attrgetter("total_s")

NOBODY = Refusal("every worker is full or has fallen silent")


def prefix(request: Request, ring: HashRing, beliefs: Mapping[str, Belief]) -> Choice | Refusal:
    """See above. Refuses what no worker can begin to answer within its deadline, if rates are measured."""
    estimates = estimate_all(request, ring, beliefs)
    if not estimates:
        return NOBODY
    soonest = min(estimates, key=_FIRST_TOKEN)
    if soonest.first_token_s > request.deadline_s and beliefs[soonest.worker_id].rates.is_learned:
        text = f"a first token would take {soonest.first_token_s:.1f} s, and {request.deadline_s:.1f} s are left"
        return Refusal(f"prefix: {text}", retry_after_s=max(0.2, soonest.first_token_s - request.deadline_s))
    chosen, why = _among_equals(request, ring, beliefs, _near(estimates, beliefs))
    return Choice(chosen.worker_id, f"prefix: {why}", chosen.pull, tuple(estimates))


def estimate_all(request: Request, ring: HashRing, beliefs: Mapping[str, Belief]) -> list[Estimate]:
    """What the request would cost on each available worker, in the ring's own order."""
    source = _longest(request, beliefs)
    return [
        _estimate(request, worker, belief, source)
        for worker in ring.workers
        if (belief := beliefs[worker]).is_available
    ]


def estimate_one(request: Request, worker: str, beliefs: Mapping[str, Belief]) -> Estimate:
    """What the request would cost on this worker, which is to serve it whatever that is: its pull is what helps."""
    return _estimate(request, worker, beliefs[worker], _longest(request, beliefs))


def _longest(request: Request, beliefs: Mapping[str, Belief]) -> Pull | None:
    """Where most of the prompt could be fetched from: among equals the first by name, so that all agree."""
    hits = [(tokens, worker) for worker, tokens in request.held.items() if tokens and worker in beliefs]
    if not hits:
        return None
    tokens, worker = max(hits, key=lambda hit: (hit[0], hit[1]))
    return Pull(worker, tokens)


def _estimate(request: Request, worker: str, belief: Belief, source: Pull | None) -> Estimate:
    """Once for each worker and request, so it is written for speed: by the thousand it is most of a decision."""
    rates, num_tokens, decodes = belief.rates, request.num_tokens, belief.decodes
    hit = request.hits.get(worker, 0)
    queue_s = start_s = max(0.0, belief.busy_until - request.now, belief.behind_s)
    prefill_s = rates.prefill_s(num_tokens, hit if hit < num_tokens else num_tokens, decodes)
    pull = None
    if source is not None and source.num_tokens > hit and rates.pull_s < inf:
        covered = min(source.num_tokens, num_tokens)
        pulled_s = PULL_START_S + rates.pull_s * (covered - hit)
        if pulled_s <= PULL_SHARE * prefill_s:  # which is more than a pull can save
            helped_s = rates.prefill_s(num_tokens, covered, decodes)
            saved_s = prefill_s - helped_s
            if pulled_s <= PULL_SHARE * saved_s:
                pull = Pull(source.source, source.num_tokens, max(LEAST_BUDGET_S, saved_s))
                start_s, prefill_s = max(queue_s, pulled_s), helped_s
    first_token_s = start_s + prefill_s
    own_s = prefill_s
    if request.due_tokens > (hit if pull is None else pull.num_tokens):
        own_s = rates.prefill_s(num_tokens, min(request.due_tokens, num_tokens), decodes)
    delay_s = request.delay_price * (prefill_s * queue_s + own_s * own_s / 2)
    return Estimate(worker, hit, queue_s, prefill_s, first_token_s, delay_s, first_token_s + delay_s, pull)


def _near(estimates: list[Estimate], beliefs: Mapping[str, Belief]) -> dict[str, Estimate]:
    least = min(map(_TOTAL, estimates))
    exact = IndexState.EXACT
    is_exact = all(beliefs[estimate.worker_id].index is exact for estimate in estimates)
    limit = least + max(NEAR_S, (NEAR if is_exact else NEAR_BLIND) * least)
    return {estimate.worker_id: estimate for estimate in estimates if estimate.total_s <= limit}


def _among_equals(
    request: Request, ring: HashRing, beliefs: Mapping[str, Belief], near: dict[str, Estimate]
) -> tuple[Estimate, str]:
    most = max(estimate.hit_tokens for estimate in near.values())
    if most:
        near = {worker: estimate for worker, estimate in near.items() if estimate.hit_tokens == most}
    by_ring = len(near) > 1 and bool(request.key.key)
    if by_ring:
        first = near[next(worker for worker in ring.preference(request.key.key) if worker in near)]
    else:
        first = min(near.values(), key=lambda estimate: (estimate.total_s, beliefs[estimate.worker_id].turn))
    if first.pull is not None:
        return first, f"pulls {first.pull.num_tokens} tokens from {first.pull.source}"
    if most:
        return first, f"has {most} of {request.num_tokens} tokens"
    return first, f"first on the ring of {request.key.text}" if by_ring else "least to wait for"
