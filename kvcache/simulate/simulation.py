"""The simulation: a trace, workers and brokers, moved through time event by event.

Deterministic: the same trace, setup and seed give the same result, bit for bit. Everything random (the workers'
names, and with them the ring; which events are lost) is drawn from the seed.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Literal

from bus.errors import BadArgument
from kvcache.routing.views import IndexState, Refusal
from kvcache.simulate.broker import ModelBroker
from kvcache.simulate.costs import Costs
from kvcache.simulate.routers import Router
from kvcache.simulate.traces import Arrival
from kvcache.simulate.worker import Engine, Job, ModelWorker, Order

BEAT_S = 0.25
EVENT_DELAY_S = 0.02
REPLAY_S = 2.0
"""By when a broker that was started anew has been told again what its workers hold, if they tell it."""


@dataclass(frozen=True, slots=True)
class Change:
    """At `at` seconds: a worker is added, removed or becomes `factor` times slower; or all brokers are restarted.

    worker: its number. replay: whether workers then tell the broker what they hold, or only what changes.
    """

    at: float
    kind: Literal["add", "remove", "slow", "restart"]
    worker: int = 0
    factor: float = 1.0
    replay: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """event_loss: the share of event batches that never arrive and are never repaired. can_pull: workers may pull.
    names: of the workers, drawn from the seed if there are none. engine: None for one prefill at a time.
    """

    num_workers: int = 8
    cache_tokens: int = 3_000_000
    costs: Costs = field(default_factory=Costs)
    order: Order = "shortest"
    num_brokers: int = 1
    event_loss: float = 0.0
    can_pull: bool = True
    changes: tuple[Change, ...] = ()
    seed: int = 0
    names: tuple[str, ...] = ()
    engine: Engine | None = None

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.num_brokers < 1 or self.cache_tokens < 0:
            raise BadArgument("a cluster has at least one worker and one broker, and no less than an empty cache")
        if self.names and len(set(self.names)) != self.num_workers:
            raise BadArgument(f"{self.num_workers} workers need as many names, all different: {self.names}")
        if not 0.0 <= self.event_loss <= 1.0:
            raise BadArgument(f"the share of lost events is from 0 to 1, not {self.event_loss}")


@dataclass(slots=True)
class Outcome:
    """One request. ttft_s: None if nobody served it. hit_tokens: not computed, pulled ones included."""

    arrival: Arrival
    ttft_s: float | None = None
    hit_tokens: int = 0
    pulled_tokens: int = 0
    worker: str = ""


@dataclass(slots=True)
class Result:
    """busy_s, evicted_tokens: by worker, those that left included. reasons: how often each decided."""

    setup: Setup
    outcomes: list[Outcome]
    busy_s: dict[str, float]
    evicted_tokens: int
    reasons: dict[str, int]


class Simulation:
    """`make_router` is called once for every broker that is started."""

    def __init__(self, trace: Sequence[Arrival], setup: Setup, make_router: Callable[[], Router]) -> None:
        self._trace = trace
        self._setup = setup
        self._make_router = make_router
        self._random = random.Random(setup.seed)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._outcomes = [Outcome(arrival) for arrival in trace]
        drawn = [f"{self._random.getrandbits(32):08x}" for _ in range(setup.num_workers)]
        self._names = list(setup.names) or drawn
        self._workers = {name: self._make_worker(name) for name in self._names}
        self._gone: list[ModelWorker] = []
        self._reasons: dict[str, int] = {}
        self._retired: list[ModelBroker] = []
        self._brokers = [self._make_broker() for _ in range(setup.num_brokers)]
        self._beats = setup.num_brokers > 1
        self._open = len(trace)

    def run(self, progress: Callable[[int], None] = lambda done: None) -> Result:
        """Until every request has ended. `progress` is told now and then how many have arrived."""
        for number, arrival in enumerate(self._trace):
            self._at(arrival.at, partial(self._arrive, number))
        for change in self._setup.changes:
            self._at(change.at, partial(self._change, change))
        if self._beats:
            self._at(BEAT_S, self._beat)
        while self._events and self._open:
            now, order, act = heapq.heappop(self._events)
            act(now)
            if not order & 1023:
                progress(len(self._trace) - self._open)
        workers = [*self._workers.values(), *self._gone]
        for broker in (*self._retired, *self._brokers):
            for reason, times in broker.reasons.items():
                self._reasons[reason] = self._reasons.get(reason, 0) + times
        return Result(
            self._setup,
            self._outcomes,
            {worker.name: worker.busy_s for worker in workers},
            sum(worker.cache.evicted_tokens for worker in workers),
            self._reasons,
        )

    # --- events -----------------------------------------------------------------------------------

    def _at(self, when: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))

    def _arrive(self, number: int, now: float) -> None:
        arrival = self._trace[number]
        broker = self._brokers[number % len(self._brokers)]
        choice = broker.choose(arrival, now)
        if isinstance(choice, Refusal):
            self._open -= 1
            return
        worker = self._workers[choice.worker_id]
        job = Job(number, arrival, broker, now)
        if choice.pull is not None and choice.pull.source in self._workers:
            worker.pull(job, self._workers[choice.pull.source], choice.pull.num_tokens, now)
        broker.dispatched(job, choice, now)
        worker.enqueue(job)
        if job.ready_at > now:
            self._at(job.ready_at, lambda now: self._start(worker, now))
        self._start(worker, now)

    def _start(self, worker: ModelWorker, now: float) -> None:
        if worker.name not in self._workers:
            return
        until = worker.start(now, self._num_beside(worker) if self._setup.costs.crowding else 0)
        if until is not None:
            self._at(until, lambda now: self._stepped(worker, now))

    def _num_beside(self, worker: ModelWorker) -> int:
        return sum(other.is_busy for other in self._workers.values() if other is not worker)

    def _stepped(self, worker: ModelWorker, now: float) -> None:
        if worker.name not in self._workers:
            return
        for job in worker.step_over():
            self._prefilled(worker, job, now)
        self._start(worker, now)

    def _prefilled(self, worker: ModelWorker, job: Job, now: float) -> None:
        stored, evicted, ends_at = worker.finish_prefill(job, now)
        outcome = self._outcomes[job.number]
        outcome.ttft_s, outcome.worker = now - job.arrival.at, worker.name
        outcome.hit_tokens, outcome.pulled_tokens = job.hit_tokens, job.pulled_tokens
        if job.broker in self._brokers:
            job.broker.first_token(job, worker.name, now)
        self._tell(worker, stored, evicted, now)
        self._at(ends_at, lambda now: self._finish(worker, job))

    def _finish(self, worker: ModelWorker, job: Job) -> None:
        if worker.name not in self._workers:
            return
        worker.finish(job)
        self._open -= 1
        if job.broker in self._brokers:
            job.broker.ended(job, worker.name)

    def _tell(self, worker: ModelWorker, stored: list[bytes], evicted: list[bytes], now: float) -> None:
        """A batch of block events to every broker; each may lose it."""

        def arrive(broker: ModelBroker) -> Callable[[float], None]:
            return lambda now: broker.changed(worker.name, stored, evicted) if worker.name in self._workers else None

        for broker in self._brokers:
            if not self._setup.event_loss or self._random.random() >= self._setup.event_loss:
                self._at(now + EVENT_DELAY_S, arrive(broker))

    def _beat(self, now: float) -> None:
        for worker in self._workers.values():
            backlog_s = worker.backlog_s(now)
            for broker in self._brokers:
                broker.heard(worker.name, backlog_s, now)
        self._at(now + BEAT_S, self._beat)

    # --- changes ----------------------------------------------------------------------------------

    def _change(self, change: Change, now: float) -> None:
        match change.kind:
            case "add":
                name = f"{self._random.getrandbits(32):08x}"
                self._names.append(name)
                self._workers[name] = self._make_worker(name)
                for broker in self._brokers:
                    broker.joined(name)
            case "remove":
                self._lose(self._names[change.worker], now)
            case "slow":
                self._workers[self._names[change.worker]].slowness = change.factor
            case "restart":
                self._restart(change.replay, now)

    def _lose(self, name: str, now: float) -> None:
        """The worker is gone with its cache; whoever had no last token asks again, through its own broker."""
        worker = self._workers.pop(name)
        self._gone.append(worker)
        for broker in self._brokers:
            broker.left(name)
        for job in worker.jobs.values():
            if self._outcomes[job.number].ttft_s is None:
                self._arrive(job.number, now)
            else:
                self._open -= 1  # the rest of its tokens comes from another worker, and is not modelled

    def _restart(self, replay: bool, now: float) -> None:
        """New brokers that know nothing of their workers but that they are there, and what beats tell."""
        self._retired += self._brokers
        self._brokers = [self._make_broker(IndexState.BLIND) for _ in self._brokers]
        if not self._beats:
            self._beats = True
            self._beat(now)
        if replay:
            self._at(now + REPLAY_S, self._replay)

    def _replay(self, now: float) -> None:
        for broker in self._brokers:
            for worker in self._workers.values():
                broker.holds(worker.name, worker.cache.nodes())
                broker.knows(worker.name, IndexState.EXACT)

    def _make_worker(self, name: str) -> ModelWorker:
        setup = self._setup
        return ModelWorker(name, setup.costs, setup.cache_tokens, setup.order, setup.engine)

    def _make_broker(self, state: IndexState = IndexState.EXACT) -> ModelBroker:
        can_pull = self._setup.can_pull and self._setup.costs.pull_s is not None
        return ModelBroker(self._make_router(), list(self._workers), can_pull, state)
