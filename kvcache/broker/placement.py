"""From a request to a worker: the routing policies applied to the broker's view of its members."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from math import inf
from typing import NamedTuple

import msgspec

from bus import messages as m
from bus.errors import BadArgument, Conflict, NoWorkers, Overloaded
from bus.stats import Candidate, Explanation
from kvcache.broker.directory import Name
from kvcache.broker.knowledge import Knowledge, Prompt
from kvcache.broker.members import Worker, Workers
from kvcache.broker.moves import Moves
from kvcache.broker.pulls import MAX_PULL_TOKENS
from kvcache.broker.sequences import Sequences
from kvcache.hashing import ROUTING_FINE_NODES
from kvcache.routing.keys import PrefixKeys, RoutingKey, sequence_key
from kvcache.routing.policies import DEFAULT_POLICY, load_limit, policy_by_name
from kvcache.routing.prefix import estimate_one
from kvcache.routing.views import Choice, Pull, Refusal

RETRY_AFTER_MS = 200
MAX_RETRY_S = 3600.0
LEARN_AFTER_MS = 50
COMING = 1
"""`NoWorkers.detail`: wait for it."""
NAMELESS = "seq_id must not be empty"

SPELLED = (m.Tokenize, m.Detokenize)
"""What any worker answers alike, so whoever has least to do should."""

Placed = m.Dispatched | m.Route

NAMED = (m.ListSequences, m.FlushPrefixCache)
"""What names its worker, so there is nothing to choose."""

POLICED = (m.Generate, m.Route)
"""What a policy may place: all else names its sequence, or its worker."""


class Place(NamedTuple):
    """The worker for a request, and why it. prompt: what is known of it, if the request has one."""

    choice: Choice
    worker: Worker
    prompt: Prompt | None = None


class Placement:
    """Chooses; counts what it chose: `routed` by policy, `reasons` also by the first word of why."""

    def __init__(self, policy: str, workers: Workers, knowledge: Knowledge, sequences: Sequences, moves: Moves) -> None:
        self.routed: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self._policy = policy
        self._workers = workers
        self._knowledge = knowledge
        self._sequences = sequences
        self._moves = moves
        self._prefixes = PrefixKeys()

    def place(self, tenant: str, message: Placed, now: float) -> Place:
        """The worker for a request. Raises NoWorkers, Overloaded or BadArgument."""
        if isinstance(message, NAMED):
            return self._named(message.worker_id)
        self._check_ready()
        if isinstance(message, SPELLED):
            return self._anyone(now)
        prompt = self._knowledge.read(tenant, message) if isinstance(message, POLICED) else None
        if message.seq_id:
            choice = self._holder(tenant, message, prompt, now)
        elif isinstance(message, POLICED) and prompt is not None:
            choice = self._by_policy(tenant, message, prompt, now)
        else:
            raise BadArgument(NAMELESS)
        if isinstance(message, m.Generate) and message.pull_from in self._workers.by_id:
            # Of a worker that has gone nothing can be copied, and its absence is no reason to fail.
            choice = msgspec.structs.replace(choice, pull=Pull(message.pull_from, MAX_PULL_TOKENS))
        if not isinstance(message, m.Route):
            self._count(choice)
        return Place(choice, self._workers.by_id[choice.worker_id], prompt)

    def place_all(self, tenant: str, message: m.Delete) -> tuple[Choice, list[Worker]]:
        """Every worker that may hold the sequence, its owner first. Raises as `place` does."""
        self._check_ready()
        if not message.seq_id:
            raise BadArgument(NAMELESS)
        key = sequence_key(tenant, message.seq_id)
        self._holders(Name(tenant, message.seq_id), key)  # of one that is just handed over a copy might be missed
        workers = [self._workers.by_id[name] for name in self._workers.ring.preference(key.key)]
        for worker in workers:
            self._check_room(worker, key)
        choice = Choice(workers[0].id, f"all: whoever holds {key.text}")
        self._count(choice)
        return choice, workers

    def key(self, tenant: str, message: m.Generate, now: float) -> RoutingKey:
        """What the prompt is keyed by now, which is empty if nothing is known of it."""
        return self._peek(tenant, message.chain, now)

    def explain(self, tenant: str, message: m.Generate | m.Route, place: Place, now: float) -> Explanation:
        """The same decision with everything it rested on."""
        ring, beliefs, choice = self._workers.ring, self._knowledge.beliefs(now), place.choice
        hits = place.prompt.hits if place.prompt is not None else {}
        estimates = {estimate.worker_id: estimate for estimate in choice.estimates}
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
            num_tokens=place.prompt.num_tokens if place.prompt is not None else 0,
            candidates=tuple(
                Candidate(
                    worker_id=worker,
                    rank=rank,
                    load=beliefs[worker].inflight,
                    weight=beliefs[worker].weight,
                    limit=round(load_limit(available, worker), 3) if worker in available else 0.0,
                    note="" if worker in available else "suspect or full",
                    index=beliefs[worker].index.value,
                    hit_tokens=hits.get(worker, 0),
                    queue_s=round(beliefs[worker].queue_s(now), 4),
                    prefill_s=round(estimates[worker].prefill_s, 4) if worker in estimates else None,
                    total_s=round(estimates[worker].total_s, 4) if worker in estimates else None,
                )
                for rank, worker in enumerate(order)
            ),
        )

    def _named(self, worker_id: str) -> Place:
        worker = self._workers.by_id.get(worker_id)
        if worker is None:
            raise BadArgument(f"no live worker is called {worker_id!r}")
        return Place(Choice(worker_id, "named: the request names the worker"), worker)

    def _anyone(self, now: float) -> Place:
        available = self._workers.available(self._workers.ring.workers, now)
        if not available:
            raise Overloaded("every worker is full", retry_after_ms=RETRY_AFTER_MS)
        choice = Choice(self._workers.least_busy(available), "least_loaded: any worker can tell")
        self._count(choice)
        return Place(choice, self._workers.by_id[choice.worker_id])

    def _holder(self, tenant: str, message: Placed, prompt: Prompt | None, now: float) -> Choice:
        """A sequence is where its newest version is; while nobody has it, its owner on the ring serves it.

        If several have it, they take turns, which also keeps them from forgetting it. An owner that is to begin it
        pulls what others have of the prompt, where that pays, since the prefix cannot choose the worker here.
        """
        assert not isinstance(message, NAMED + SPELLED)
        if isinstance(message, POLICED) and message.policy not in {"", "consistent_hash"}:
            raise BadArgument(f"a request with a seq_id goes to its owner; leave out policy {message.policy!r}")
        self._check_learned(now)
        key = sequence_key(tenant, message.seq_id)
        owner = self._workers.ring.owner(key.key)
        holders = self._holders(Name(tenant, message.seq_id), key)
        available = self._workers.available(holders, now)
        chosen = self._workers.least_busy(available) if available else (holders or [owner])[0]
        if not isinstance(message, m.Route):
            self._check_room(self._workers.by_id[chosen], key)
        if chosen == owner:
            begun = Choice(owner, f"consistent_hash: owner of {key.text}")
            return begun if holders or prompt is None else self._helped(tenant, message, begun, key, prompt, now)
        also = "also" if owner in holders else "not"
        if self._moves.moves_to(Name(tenant, message.seq_id), owner):
            also = "not yet"
        return Choice(chosen, f"holder: has {key.text}; its owner {owner} has it {also}")

    def _helped(
        self, tenant: str, message: Placed, choice: Choice, key: RoutingKey, prompt: Prompt, now: float
    ) -> Choice:
        """The same worker, with the pull that the default policy would have it make."""
        if self._policy != DEFAULT_POLICY or (isinstance(message, POLICED) and message.policy):
            return choice
        deadline_s = message.deadline_ms / 1000 if isinstance(message, m.Generate) else inf
        request = self._knowledge.request(tenant, key, prompt, deadline_s, now)
        estimate = estimate_one(request, choice.worker_id, self._knowledge.beliefs(now))
        return msgspec.structs.replace(choice, pull=estimate.pull, estimates=(estimate,))

    def place_write(self, tenant: str, seq_id: str, rf: int, now: float) -> tuple[Choice, list[Worker]]:
        """The workers that a change goes to: those that have the sequence, or else its owner and who follows that.

        Raises as `place` does, and Conflict if fewer have the sequence than are to have it.
        """
        self._check_ready()
        if not seq_id:
            raise BadArgument(NAMELESS)
        self._check_learned(now)
        name, key = Name(tenant, seq_id), sequence_key(tenant, seq_id)
        holders = self._holders(name, key)[: max(rf, self._sequences.rf(name))]  # the others' copies are stale then
        targets = list(self._sequences.targets(name)) or holders
        choice = Choice(self._workers.ring.owner(key.key), f"consistent_hash: owner of {key.text}")
        if not targets:
            targets = self._first(key, rf, now)
        elif len(targets) < rf and self._moves.wants(name):
            raise NoWorkers(f"another copy of {key.text} is being made", retry_after_ms=LEARN_AFTER_MS, detail=COMING)
        elif len(targets) < rf:
            raise Conflict(
                f"{key.text} has a copy on worker {targets[0]} only; delete it and put it anew, or write with rf=1"
            )
        elif choice.worker_id not in targets:
            choice = Choice(targets[0], f"holder: has {key.text}, which its owner {choice.worker_id} has not")
        if len(targets) > 1:
            choice = Choice(targets[0], f"replicated: {key.text} on {' and '.join(targets)}")
        workers = [self._workers.by_id[target] for target in targets]
        for worker in workers:
            self._check_room(worker, key)
        self._count(choice)
        return choice, workers

    def _holders(self, name: Name, key: RoutingKey) -> list[str]:
        """The workers on the ring that have the newest version, in the order of the ring's preference.

        Raises NoWorkers if a worker that leaves has it, and another one will.
        """
        ring = self._workers.ring
        holders = ring.weights.keys() & self._sequences.use(name).holders
        if not holders and self._moves.is_due(name):
            self._moves.asked(name)
            text = f"{key.text} is being handed over by a worker that leaves"
            raise NoWorkers(text, retry_after_ms=LEARN_AFTER_MS, detail=COMING)
        if len(holders) < 2:
            return list(holders)
        return list(islice((worker for worker in ring.preference(key.key) if worker in holders), len(holders)))

    def _first(self, key: RoutingKey, rf: int, now: float) -> list[str]:
        """The owner, and those that follow it on the ring and can serve. Raises NoWorkers if they are not `rf`."""
        ring = self._workers.ring
        owner = ring.owner(key.key)
        others = [other for other in ring.preference(key.key) if other != owner] if rf > 1 else []
        found = [owner, *self._workers.available(others, now)[: rf - 1]]
        if len(found) < rf:
            raise NoWorkers(f"{rf} workers are to have {key.text}, and {len(found)} can", retry_after_ms=RETRY_AFTER_MS)
        return found

    def _check_learned(self, now: float) -> None:
        if self._sequences.is_learning(now):
            text = "a worker that has just joined still tells what it holds"
            raise NoWorkers(text, retry_after_ms=LEARN_AFTER_MS, detail=COMING)

    def _by_policy(self, tenant: str, message: m.Generate | m.Route, prompt: Prompt, now: float) -> Choice:
        policy = policy_by_name(message.policy or self._policy)
        if isinstance(message, m.Route):
            key, deadline_s = self._peek(tenant, message.chain, now), inf
        else:
            key = self._prefixes.key(tenant, message.chain[:ROUTING_FINE_NODES], len(self._workers.ring), now)
            deadline_s = message.deadline_ms / 1000
        request = self._knowledge.request(tenant, key, prompt, deadline_s, now)
        choice = policy(request, self._workers.ring, self._knowledge.beliefs(now))
        if isinstance(choice, Refusal):
            raise Overloaded(choice.reason, retry_after_ms=int(min(choice.retry_after_s, MAX_RETRY_S) * 1000))
        return choice

    def _check_ready(self) -> None:
        if not self._workers.ring.workers:
            raise NoWorkers("no worker is ready", retry_after_ms=RETRY_AFTER_MS)

    def _check_room(self, worker: Worker, key: RoutingKey) -> None:
        if self._workers.is_full(worker):
            raise Overloaded(f"worker {worker.id}, which may hold {key.text}, is full", retry_after_ms=RETRY_AFTER_MS)

    def _count(self, choice: Choice) -> None:
        policy, _, why = choice.reason.partition(": ")
        first = why.partition(" ")[0]
        self.routed[policy] += 1
        self.reasons[f"{policy}: {first}" if first.isalpha() else policy] += 1

    def _peek(self, tenant: str, chain: m.Chain, now: float) -> RoutingKey:
        return self._prefixes.peek(tenant, chain[:ROUTING_FINE_NODES], len(self._workers.ring), now)
