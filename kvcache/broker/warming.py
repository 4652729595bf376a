"""The prompts that are wanted most, so that a worker can have their KV from others before it is asked for them.

A prompt counts under its routing key, with a half-life; from the second time on the newest one of that key is kept.
Soon after the ring has changed, what a worker that is new owns waits for it, the most wanted first, and so does what
nobody holds but a worker that drains, which stays for it, though for `STAY_S` at most. Each is then sent to the new
owner as a request of the broker's own, of the lowest class and for one token, that is to pull what another holds: so it
is found, checked and paid for like any other pull, and nothing is begun that nobody holds, or while requests wait at
either end. What has not been sent after `WARM_S` never is: by then requests have brought what they need.

Kept prompts are in memory only, within `MAX_BYTES`; the least recently asked for go first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import msgspec

from bus import messages as m
from bus import wire
from bus.limits import MAX_PRIORITY
from bus.wire import Buffer
from kvcache.broker.homing import SETTLE_S
from kvcache.broker.knowledge import Knowledge, Prompt
from kvcache.broker.members import Worker, Workers
from kvcache.broker.pulls import can_pull
from kvcache.routing.keys import HALF_LIFE_S, RoutingKey
from kvcache.routing.views import Choice, Pull

MIN_WORTH = 1.5
"""Two requests half a minute ago, or more of them: one says nothing of the next."""
MAX_PROMPT_BYTES = 256 * 1024
MAX_BYTES = 8 << 20
MAX_KEYS = 2000
MAX_LOOKED_AT = 256
"""The first few are most of what a cache is worth; about 10 ms, if a worker drains."""
WARM_S = 30.0
STAY_S = 3.0
"""Some pulls of a second; a cluster that is busy would have a worker that drains wait in vain."""
DEADLINE_MS = 10_000
LOOK_AHEAD = 8
"""Of those that wait for one worker, how many are looked at for one whose holder has time."""


@dataclass(slots=True)
class Wanted:
    """What is asked for under one key. worth: requests, each half as much after a half-life; as of `at`.

    leaving: those who held it when the ring changed, if all of them drained then.
    """

    tenant: str
    key: bytes
    worth: float
    at: float
    message: m.Generate | None = None
    prompt: bytes = b""
    leaving: frozenset[str] = frozenset()

    def worth_at(self, now: float) -> float:
        return float(self.worth * 2.0 ** ((self.at - now) / HALF_LIFE_S))


@dataclass(frozen=True, slots=True)
class Warming:
    """A request to make. frames: the message and its payload."""

    worker: Worker
    tenant: str
    message: m.Generate
    prompt: Prompt
    choice: Choice
    frames: list[Buffer]

    @property
    def source(self) -> str:
        """Who is to give."""
        assert self.choice.pull is not None
        return self.choice.pull.source


class Demand:
    """`new_id` makes 16 secret random bytes."""

    def __init__(self, workers: Workers, knowledge: Knowledge, new_id: Callable[[], bytes]) -> None:
        self._workers = workers
        self._knowledge = knowledge
        self._new_id = new_id
        self._wanted: OrderedDict[bytes, Wanted] = OrderedDict()  # least recently asked for first
        self.num_bytes = 0  # of prompts that are kept
        self._ring = workers.ring
        self._looks_at: float | None = None
        self._known: set[bytes] = set()  # sessions of workers that have been on the ring
        self._queues: dict[str, deque[Wanted]] = {}  # by target, the most wanted first
        self._until = self._stay_until = 0.0
        self._under_way: dict[str, str] = {}  # by target, who is to give

    def __len__(self) -> int:
        """How many are to be sent to workers."""
        return sum(map(len, self._queues.values()))

    def asked(self, tenant: str, key: RoutingKey, message: m.Generate, prompt: Buffer, now: float) -> None:
        """A request with this prompt was placed. It is copied if it is kept."""
        wanted = self._wanted.get(key.key)
        if wanted is None:
            wanted = self._wanted[key.key] = Wanted(tenant, key.key, 0.0, now)
        wanted.worth, wanted.at = wanted.worth_at(now) + 1.0, now
        self._wanted.move_to_end(key.key)
        if wanted.worth > 1.0 and memoryview(prompt).nbytes <= MAX_PROMPT_BYTES:
            self.num_bytes += memoryview(prompt).nbytes - len(wanted.prompt)
            wanted.message, wanted.prompt = message, bytes(prompt)
        while self.num_bytes > MAX_BYTES or len(self._wanted) > MAX_KEYS:
            _, oldest = self._wanted.popitem(last=False)
            self.num_bytes -= len(oldest.prompt)

    def tick(self, now: float) -> list[Warming]:
        """What is to be sent now."""
        if self._workers.ring is not self._ring:
            self._ring = self._workers.ring
            self._looks_at = now if self._is_anyone_leaving() else now + SETTLE_S  # who leaves does not wait for this
        if self._looks_at is not None and now >= self._looks_at:
            self._looks_at, self._until, self._stay_until = None, now + WARM_S, now + STAY_S
            self._look(now)
        if now >= self._until:
            self._queues.clear()
        return [warming for target in list(self._queues) for warming in self._next(target, now)]

    def ended(self, worker_id: str) -> None:
        """A request that was sent there is over, however it ended."""
        self._under_way.pop(worker_id, None)

    def needs(self, worker_id: str, now: float) -> bool:
        """Whether a worker that drains is to stay a little, since it alone holds what others are to fetch."""
        waiting = (wanted for queue in self._queues.values() for wanted in queue)
        is_needed = worker_id in self._under_way.values() or any(worker_id in wanted.leaving for wanted in waiting)
        return is_needed and now < self._stay_until

    def check(self) -> None:
        """Assert that the books agree."""
        assert self.num_bytes == sum(len(wanted.prompt) for wanted in self._wanted.values())
        assert all(self._queues.values())

    # --- inside ---

    def _look(self, now: float) -> None:
        """Queue what new workers own, and what nobody holds but one that drains."""
        ring, by_id = self._workers.ring, self._workers.by_id
        new = {worker for worker in ring.workers if by_id[worker].session not in self._known}
        self._known = {by_id[worker].session for worker in ring.workers}
        kept = [wanted for wanted in self._wanted.values() if wanted.message is not None]
        kept.sort(key=lambda wanted: wanted.worth_at(now), reverse=True)
        is_anyone_leaving = self._is_anyone_leaving()
        queues: dict[str, deque[Wanted]] = {}
        for wanted in kept[:MAX_LOOKED_AT] if ring.workers else ():
            owner = ring.owner(wanted.key)
            wanted.leaving = self._leaving(wanted) if is_anyone_leaving else frozenset()
            if (owner in new or wanted.leaving) and wanted.worth_at(now) >= MIN_WORTH:
                queues.setdefault(owner, deque()).append(wanted)
        self._queues = queues

    def _is_anyone_leaving(self) -> bool:
        return any(worker.state is m.WorkerState.DRAINING for worker in self._workers.by_id.values())

    def _leaving(self, wanted: Wanted) -> frozenset[str]:
        """Who holds it, if nobody does who stays."""
        assert wanted.message is not None
        held = self._knowledge.read(wanted.tenant, wanted.message).held
        return frozenset(held) if self._workers.ring.weights.keys().isdisjoint(held) else frozenset()

    def _next(self, target: str, now: float) -> list[Warming]:
        """The most wanted one that can be sent to this worker; those that need not be leave its queue."""
        worker = self._workers.by_id.get(target)
        if worker is None or target in self._under_way or not self._has_time(worker, now):
            return []
        queue = self._queues[target]
        found: list[Warming] = []
        for wanted in list(islice(queue, LOOK_AHEAD)):
            warming = self._warming(worker, wanted)
            if warming is not None and not self._has_time(self._workers.by_id[warming.source], now):
                continue
            queue.remove(wanted)
            if warming is not None:
                self._under_way[target] = warming.source
                found.append(warming)
                break
        if not queue:
            del self._queues[target]
        return found

    def _warming(self, worker: Worker, wanted: Wanted) -> Warming | None:
        """The request; None if nobody has more of the prompt than this worker, or its model is not ready here."""
        assert wanted.message is not None
        message = msgspec.structs.replace(
            wanted.message,
            req_id=self._new_id(),
            attempt=0,
            deadline_ms=DEADLINE_MS,
            stream_id=self._new_id(),
            epoch=0,
            sampling=m.Sampling(max_tokens=1),
            policy="",
            explain=False,
            pull_from="",
            priority=MAX_PRIORITY,
            label="",
            trace="",
            payload=wire.describe([wanted.prompt]),
        )
        prompt = self._knowledge.read(wanted.tenant, message)
        held = {name: num for name, num in prompt.held.items() if can_pull(self._workers.by_id[name], worker)}
        source = max(held, key=lambda name: (held[name], name), default="")
        if not source or held[source] <= prompt.hits.get(worker.id, 0) or not _serves(worker, message.model):
            return None
        choice = Choice(worker.id, f"warming: {source} holds it", Pull(source, held[source]))
        return Warming(worker, wanted.tenant, message, prompt, choice, [wire.encode(message), wanted.prompt])

    def _has_time(self, worker: Worker, now: float) -> bool:
        return self._workers.is_available(worker, now) and not worker.has_waiting


def _serves(worker: Worker, model: str) -> bool:
    """Whether that model is in its memory; any, if none is named. Loading one is for who asks for it."""
    models = worker.beat.models if worker.beat is not None else ()
    return any(state is m.ModelState.READY and model in {"", name} for name, state in models)
