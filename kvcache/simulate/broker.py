"""A modelled broker: the real routing code (keys, ring, index, ledger, rates, policies) behind plain calls.

What a real broker hears by messages, this one is told by method calls; what it decides, it decides by the same
functions. It may know less than there is to know (lost events, a restart, other brokers), never more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import inf

from msgspec.structs import replace

from kvcache.ring import UNIT_WEIGHT, HashRing
from kvcache.routing.index import NodeIndex
from kvcache.routing.keys import PrefixKeys
from kvcache.routing.ledger import WorkLedger
from kvcache.routing.links import LinkBook
from kvcache.routing.pending import PendingPrefixes
from kvcache.routing.rates import RateBook
from kvcache.routing.shares import Shares
from kvcache.routing.views import Belief, Choice, IndexState, Refusal, Request
from kvcache.simulate.routers import Router
from kvcache.simulate.traces import Arrival
from kvcache.simulate.worker import Job

TENANT = ""
TENANT_SECRET = bytes(16)
"""Known, so that equal runs are equal."""
TICK_S = 1.0


class ModelBroker:
    """`can_pull`: whether workers reach each other; what that costs is learned."""

    def __init__(self, router: Router, workers: Sequence[str], can_pull: bool, state: IndexState) -> None:
        self.router = router
        self.reasons: Counter[str] = Counter()
        self._keys = PrefixKeys()
        self._index = NodeIndex(secret=TENANT_SECRET)
        self._ledger = WorkLedger()
        self._pending = PendingPrefixes()
        self._shares = Shares()
        self._book = RateBook()
        self._links = LinkBook()
        self._can_pull = can_pull
        self._now = self._refreshed_at = 0.0
        self._states: dict[str, IndexState] = {}
        self._inflight: Counter[str] = Counter()
        self._decodes: Counter[str] = Counter()
        self._turns: dict[str, float] = {}
        self._turn = 0.0
        self._beliefs: dict[str, Belief] = {}
        self._ring = HashRing(
            dict.fromkeys(workers, UNIT_WEIGHT)
        )  # once: of a thousand workers it has 8 million points
        for worker in workers:
            self._meet(worker, state)

    # --- workers come and go ----------------------------------------------------------------------

    def joined(self, worker: str) -> None:
        self._ring = HashRing({**self._ring.weights, worker: UNIT_WEIGHT}, before=self._ring)
        self._meet(worker, IndexState.EXACT)

    def left(self, worker: str) -> None:
        others = {name: weight for name, weight in self._ring.weights.items() if name != worker}
        self._ring = HashRing(others, before=self._ring)
        self._index.clear(worker)
        self._ledger.forget(worker)
        self._pending.forget(worker)
        self._book.forget(worker)
        self._links.forget(worker)
        self._inflight[worker] = self._decodes[worker] = 0
        del self._beliefs[worker], self._states[worker]
        self.router.left(worker)

    def knows(self, worker: str, state: IndexState) -> None:
        """How far the index is to be trusted for `worker` from now on."""
        self._states[worker] = state
        self._refresh(worker)

    # --- requests ---------------------------------------------------------------------------------

    def choose(self, arrival: Arrival, now: float) -> Choice | Refusal:
        if not self._ring.workers:
            return Refusal("no worker is there")
        self._now = now
        if now > self._refreshed_at + TICK_S:
            self._refreshed_at = now
            self._index.sweep()
            for worker in self._ring.workers:
                self._refresh(worker)
        held, hits = self._hits(arrival)
        request = Request(
            self._keys.key(TENANT, arrival.chain, len(self._ring), now),
            now=now,
            num_tokens=arrival.num_tokens,
            hits=hits,
            held=held,
            delay_price=self._ledger.delay_price(now, len(self._ring)),
            due_tokens=self._shares.due_tokens(
                tuple(zip(arrival.chain, arrival.ends, strict=True)), hits, self._beliefs, now
            ),
        )
        return self.router.choose(arrival, request, self._ring, self._beliefs)

    def dispatched(self, job: Job, choice: Choice, now: float) -> None:
        """Count the load at once: the next decision must see it."""
        worker, arrival = choice.worker_id, job.arrival
        belief = self._beliefs[worker]
        hit = max(self._hits(arrival)[1].get(worker, 0), choice.pull.num_tokens if choice.pull else 0)
        seconds = belief.rates.prefill_s(arrival.num_tokens, min(hit, arrival.num_tokens - 1), belief.decodes)
        self._book.tried(worker, self._ledger.idle_s(worker, now))
        self._ledger.dispatched(job.number, worker, seconds, now)
        self._pending.dispatched(job.number, worker, arrival.chain)
        self._shares.arrived(zip(arrival.chain, arrival.ends, strict=True), now)
        if job.pulled_tokens:
            self._links.ordered(job.number, worker)
        self._inflight[worker] += 1
        self._turn = max(self._turn, self._turns[worker])
        self._turns[worker] = self._turn + 1.0
        self._refresh(worker)
        self.reasons[choice.reason.partition(" of ")[0]] += 1
        self.router.dispatched(job, worker)

    def first_token(self, job: Job, worker: str, now: float) -> None:
        """A worker's report of its own work, and that it has a place for another."""
        self._ledger.finished(job.number, now)
        self._pending.finished(job.number)
        self._links.over(job.number)
        self._now = now
        self._index.stored(worker, job.arrival.chain)
        self._decodes[worker] += 1
        self._book.prefilled(worker, job.arrival.num_tokens, job.hit_tokens, job.decodes, job.prefill_s)
        if job.pulled_tokens:
            self._links.measured(worker, job.pulled_tokens, job.pull_took_s, now)
        self._refresh(worker)
        self.router.first_token(job, worker)

    def ended(self, job: Job, worker: str) -> None:
        self._inflight[worker] -= 1
        self._decodes[worker] -= 1
        self._refresh(worker)
        self.router.ended(job, worker)

    # --- what workers tell ------------------------------------------------------------------------

    def changed(self, worker: str, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """A batch of a worker's block events."""
        self._index.stored(worker, stored)
        self._index.removed(worker, removed)

    def heard(self, worker: str, backlog_s: float, now: float) -> None:
        """A worker's beat."""
        self._ledger.heard(worker, backlog_s, now)
        self._refresh(worker)

    def holds(self, worker: str, nodes: Sequence[bytes]) -> None:
        """A snapshot of all that a worker holds."""
        self._index.clear(worker)
        self._index.stored(worker, nodes)

    def _meet(self, worker: str, state: IndexState) -> None:
        self._states[worker] = state
        self._turns[worker] = self._turn
        self._refresh(worker)

    def _hits(self, arrival: Arrival) -> tuple[dict[str, int], dict[str, int]]:
        """Leading tokens that each worker holds, and that it holds or is computing already."""
        held = {worker: arrival.ends[count - 1] for worker, count in self._index.lookup(arrival.chain).items()}
        hits = dict(held)
        for worker, count in self._pending.lookup(arrival.chain).items():
            hits[worker] = max(arrival.ends[count - 1], hits.get(worker, 0))
        return held, hits

    def _refresh(self, worker: str) -> None:
        rates = self._book.rates(worker, self._ledger.idle_s(worker, self._now))
        is_known = self._can_pull and self._book.is_learned
        pull_s = self._links.pull_s(worker, rates.token_s, self._now) if is_known else inf
        self._beliefs[worker] = Belief(
            inflight=self._inflight[worker],
            weight=UNIT_WEIGHT,
            turn=self._turns[worker],
            is_available=True,
            busy_until=self._ledger.busy_until(worker),
            behind_s=self._ledger.behind_s(worker),
            decodes=self._decodes[worker],
            index=self._states[worker],
            rates=replace(rates, pull_s=pull_s),
        )
