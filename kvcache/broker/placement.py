"""From a request to a worker: the routing policies applied to the broker's view of its members."""

from __future__ import annotations

from collections import Counter

import msgspec

from bus import messages as m
from bus.errors import BadArgument, NoWorkers, Overloaded
from bus.stats import Candidate, Explanation
from kvcache.broker.members import Worker, Workers
from kvcache.broker.pulls import MAX_PULL_TOKENS
from kvcache.routing.keys import PrefixKeys, RoutingKey, sequence_key
from kvcache.routing.policies import load_limit, policy_by_name
from kvcache.routing.views import Choice, Pull, Refusal, Request

RETRY_AFTER_MS = 200
NAMELESS = "seq_id must not be empty"

Placed = m.Dispatched | m.Route

NAMED = (m.ListSequences, m.FlushPrefixCache)
"""What names its worker, so there is nothing to choose."""

POLICED = (m.Generate, m.Route)
"""What a policy may place: all else names its sequence, or its worker."""


class Placement:
    """Chooses; counts what it chose by policy. `routed` maps a reason's first word to how often it decided."""

    def __init__(self, policy: str, workers: Workers) -> None:
        self.routed: Counter[str] = Counter()
        self._policy = policy
        self._workers = workers
        self._prefixes = PrefixKeys()

    def place(self, tenant: str, message: Placed, now: float) -> tuple[Choice, Worker]:
        """The worker for a request, and why. Raises NoWorkers, Overloaded or BadArgument."""
        if isinstance(message, NAMED):
            return self._named(message.worker_id)
        self._check_ready()
        choice = self._owner(tenant, message) if message.seq_id else self._by_policy(tenant, message, now)
        if isinstance(message, m.Generate) and message.pull_from in self._workers.by_id:
            # Of a worker that has gone nothing can be copied, and its absence is no reason to fail.
            choice = msgspec.structs.replace(choice, pull=Pull(message.pull_from, MAX_PULL_TOKENS))
        if not isinstance(message, m.Route):
            self._count(choice)
        return choice, self._workers.by_id[choice.worker_id]

    def place_all(self, tenant: str, message: m.Delete) -> tuple[Choice, list[Worker]]:
        """Every worker that may hold the sequence, its owner first. Raises as `place` does."""
        self._check_ready()
        if not message.seq_id:
            raise BadArgument(NAMELESS)
        key = sequence_key(tenant, message.seq_id)
        workers = [self._workers.by_id[name] for name in self._workers.ring.preference(key.key)]
        for worker in workers:
            self._check_room(worker, key)
        choice = Choice(workers[0].id, f"all: whoever holds {key.text}")
        self._count(choice)
        return choice, workers

    def explain(self, tenant: str, message: m.Generate | m.Route, choice: Choice, now: float) -> Explanation:
        """The same decision with everything it rested on."""
        ring, beliefs = self._workers.ring, self._workers.beliefs(now)
        key = sequence_key(tenant, message.seq_id) if message.seq_id else self._peek(tenant, message.chain, now)
        order = list(ring.preference(key.key)) if key.key else list(ring.workers)
        available = {worker: belief for worker, belief in beliefs.items() if belief.is_available}
        return Explanation(
            policy="consistent_hash" if key.named else message.policy or self._policy,
            key=key.text,
            worker_id=choice.worker_id,
            reason=choice.reason,
            pull_from=choice.pull.source if choice.pull else "",
            ring_epoch=ring.epoch,
            candidates=tuple(
                Candidate(
                    worker_id=worker,
                    rank=rank,
                    load=beliefs[worker].inflight,
                    weight=beliefs[worker].weight,
                    limit=round(load_limit(available, worker), 3) if worker in available else 0.0,
                    note="" if worker in available else "suspect or full",
                )
                for rank, worker in enumerate(order)
            ),
        )

    def _named(self, worker_id: str) -> tuple[Choice, Worker]:
        worker = self._workers.by_id.get(worker_id)
        if worker is None:
            raise BadArgument(f"no live worker is called {worker_id!r}")
        return Choice(worker_id, "named: the request names the worker"), worker

    def _owner(self, tenant: str, message: Placed) -> Choice:
        """A sequence lives on its owner and nowhere else, so its requests have no second choice."""
        assert not isinstance(message, NAMED)
        if isinstance(message, POLICED) and message.policy not in {"", "consistent_hash"}:
            raise BadArgument(f"a request with a seq_id goes to its owner; leave out policy {message.policy!r}")
        key = sequence_key(tenant, message.seq_id)
        owner = self._workers.ring.owner(key.key)
        if not isinstance(message, m.Route):
            self._check_room(self._workers.by_id[owner], key)
        return Choice(owner, f"consistent_hash: owner of {key.text}")

    def _by_policy(self, tenant: str, message: Placed, now: float) -> Choice:
        if not isinstance(message, POLICED):
            raise BadArgument(NAMELESS)
        policy = policy_by_name(message.policy or self._policy)
        if isinstance(message, m.Route):
            request = Request(self._peek(tenant, message.chain, now), now=now, tenant=tenant)
        else:
            key = self._prefixes.key(tenant, message.chain, len(self._workers.ring), now)
            request = Request(key, now=now, deadline_s=message.deadline_ms / 1000, tenant=tenant)
        choice = policy(request, self._workers.ring, self._workers.beliefs(now))
        if isinstance(choice, Refusal):
            raise Overloaded(choice.reason, retry_after_ms=int(choice.retry_after_s * 1000))
        return choice

    def _check_ready(self) -> None:
        if not self._workers.ring.workers:
            raise NoWorkers("no worker is ready", retry_after_ms=RETRY_AFTER_MS)

    def _check_room(self, worker: Worker, key: RoutingKey) -> None:
        if self._workers.is_full(worker):
            raise Overloaded(f"worker {worker.id}, which may hold {key.text}, is full", retry_after_ms=RETRY_AFTER_MS)

    def _count(self, choice: Choice) -> None:
        self.routed[choice.reason.partition(":")[0]] += 1

    def _peek(self, tenant: str, chain: m.Chain, now: float) -> RoutingKey:
        return self._prefixes.peek(tenant, chain, len(self._workers.ring), now)
