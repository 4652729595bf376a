"""A modelled worker: prefills out of a queue, decodes beside them, a prefix cache, pulls that run ahead.

Prefills go in the order of our own scheduler (`kvcache.places`), or first come, first served; one at a time, or, of a
worker whose `Engine` is told, several in a step.

It computes a prompt from the first token that its cache, or what was pulled for that request, does not cover, and
caches the whole prompt when it is done. Only the simulation moves time; this file says what happens at a moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from kvcache.places import place_of
from kvcache.simulate.cache import ModelCache
from kvcache.simulate.costs import Costs
from kvcache.simulate.traces import Arrival

Order = Literal["fifo", "shortest"]
SAME_MOMENT = 1e-6
"""A share of a step of decodes that is rounding."""
SLICE_S = 0.25
"""With `shortest`, how long a prefill runs before another may take its turn: a chunk of the prompt."""


@dataclass(frozen=True, slots=True)
class Engine:
    """How a worker's engine computes prompts, where that is to be modelled; arrivals then need `fine` nodes.

    A step takes `step_tokens` tokens of as many prompts as they do for; those that are over then have their first
    tokens at its end. It reads all weights, which is what one of decodes costs, and its tokens come on top. Decodes
    run one step after the other, and a prompt that comes during one waits for the next. Cached blocks of
    `block_tokens` are found when a prompt begins to be computed; one that begins alike and goes on otherwise only
    when it arrives, for then its beginning is copied.
    """

    step_tokens: int
    block_tokens: int

    def kept(self, arrival: Arrival) -> int:
        """Tokens of its prompt that can be found later: those of blocks that it fills, with its output."""
        computed = arrival.num_tokens + max(0, arrival.output_tokens - 1)  # nobody computes after the last one
        return min(arrival.num_tokens, computed - computed % self.block_tokens)


@dataclass(slots=True, eq=False)
class Job:
    """A request at a worker. pulled: leading nodes fetched for it. ready_at: when they have arrived.

    found: leading nodes that were there when it came. left_tokens: to be computed, with `Engine` only.
    """

    number: int
    arrival: Arrival
    broker: object
    sent_at: float
    pulled: int = 0
    pulled_tokens: int = 0
    pull_took_s: float = 0.0
    ready_at: float = 0.0
    found: int = 0
    left_tokens: int = 0
    hit_tokens: int = 0
    prefill_s: float = 0.0
    remaining_s: float = 0.0
    is_begun: bool = False
    decodes: int = 0


class ModelWorker:
    """busy_s: time spent on prefills. slowness: by how much longer everything takes than `costs` say."""

    def __init__(
        self, name: str, costs: Costs, cache_tokens: int, order: Order = "shortest", engine: Engine | None = None
    ) -> None:
        self.name = name
        self.cache = ModelCache(cache_tokens)
        self.slowness = 1.0
        self.busy_s = 0.0
        self.decodes = 0
        self.jobs: dict[int, Job] = {}
        self._costs = costs
        self._order: Order = order
        self._engine = engine
        self._queue: list[Job] = []
        self._running: list[Job] = []
        self._link_free_at = 0.0
        self._step_until = 0.0

    def enqueue(self, job: Job) -> None:
        self._queue.append(job)
        self.jobs[job.number] = job
        if self._engine is not None:
            job.found = self.cache.held(job.arrival.cached[0])

    def pull(self, job: Job, source: ModelWorker, num_tokens: int, now: float) -> None:
        """Begin to fetch what `source` holds of the job's first `num_tokens` tokens and this worker does not."""
        arrival = job.arrival
        nodes, ends = arrival.cached
        theirs, own = source.cache.held(nodes), self.cache.held(nodes)
        while theirs and ends[theirs - 1] > num_tokens:
            theirs -= 1
        if theirs <= own or self._costs.pull_s is None:
            return
        job.pulled = theirs
        job.pulled_tokens = ends[theirs - 1] - (ends[own - 1] if own else 0)
        start = max(now, self._link_free_at)
        job.pull_took_s = self._costs.pull_start_s + job.pulled_tokens * self._costs.pull_s
        job.ready_at = self._link_free_at = start + job.pull_took_s

    @property
    def is_busy(self) -> bool:
        """Whether it computes anything."""
        return bool(self._running) or self.decodes > 0

    def start(self, now: float, num_beside: int = 0) -> float | None:
        """Begin the next step: a prefill, or parts of some; until when. None while one runs or none can.

        With an `Engine`, a step of decodes may have to end first: that is until when, then.
        num_beside: how many other workers are busy now.
        """
        if self._running:
            return None
        ready = [job for job in self._queue if job.ready_at <= now]
        if not ready:
            return None
        if (rest_s := self._rest_of_decodes(now)) > 0.0:
            return now + rest_s
        shares = self._one(ready) if self._engine is None else self._several(ready, self._engine)
        seconds = sum(shares.values())
        longer_s = self._step_s(seconds) * (1.0 + self._costs.crowding * num_beside) - seconds
        for job, share_s in shares.items():
            job.remaining_s -= share_s
            job.prefill_s += longer_s * share_s / seconds
            if job.remaining_s <= 0.0:
                self._queue.remove(job)
        self._running, self._step_until = list(shares), now + seconds + longer_s
        return self._step_until

    def step_over(self) -> list[Job]:
        """The step is over: the jobs whose prefill is, too. `finish_prefill` each."""
        done = [job for job in self._running if job.remaining_s <= 0.0]
        self._running = []
        return done

    def _rest_of_decodes(self, now: float) -> float:
        """Seconds until the step that decodes run has ended, with `Engine` only; 0 if none runs."""
        step_s = self.slowness * self._costs.step_s
        if self._engine is None or not self.decodes or not step_s:
            return 0.0
        steps = (now - self._step_until) / step_s
        rest = ceil(steps - SAME_MOMENT) - steps
        return rest * step_s if rest > SAME_MOMENT else 0.0

    def _step_s(self, seconds: float) -> float:
        """How long a step takes whose prompts would take so long at the pace of full ones.

        That pace is what was measured, on long prompts: of each step it has a share that reads the weights.
        """
        if self._engine is None:
            return seconds
        full_s = self._costs.rates.prefill_s(self._engine.step_tokens, 0)
        return self.slowness * self._costs.step_s + seconds * max(0.0, 1.0 - self._costs.step_s / full_s)

    def _one(self, ready: Sequence[Job]) -> dict[Job, float]:
        """The next job, and how long it runs before another may take its turn."""
        job = ready[0] if self._order == "fifo" else min(ready, key=self._place)
        if not job.is_begun:
            self._begin(job)
        return {job: job.remaining_s if self._order == "fifo" else min(SLICE_S, job.remaining_s)}

    def _several(self, ready: Sequence[Job], engine: Engine) -> dict[Job, float]:
        """The jobs that take part in a step, in their order, and how long each part of it is."""
        room, shares = engine.step_tokens, dict[Job, float]()
        for job in ready if self._order == "fifo" else sorted(ready, key=self._place):
            if not room:
                break
            if not job.is_begun:
                if self._waits(job, engine):
                    continue
                self._begin(job)
            num_tokens = min(room, job.left_tokens)
            shares[job] = job.remaining_s * num_tokens / job.left_tokens
            if num_tokens == job.left_tokens:
                shares[job] = job.remaining_s
            job.left_tokens -= num_tokens
            room -= num_tokens
        return shares

    def _waits(self, job: Job, engine: Engine) -> bool:
        """Whether another computes the job's next block already: it finds it in the cache afterwards."""
        nodes = job.arrival.cached[0]
        end = self.cache.held(nodes) // engine.block_tokens * engine.block_tokens + engine.block_tokens
        return end <= len(nodes) and any(
            other.is_begun and nodes[end - 1 : end] == other.arrival.cached[0][end - 1 : end] for other in self._queue
        )

    def _begin(self, job: Job) -> None:
        arrival = job.arrival
        job.hit_tokens = self._hit(job)
        job.decodes, job.is_begun = self.decodes, True
        job.prefill_s = self.slowness * self._costs.rates.prefill_s(arrival.num_tokens, job.hit_tokens, self.decodes)
        job.remaining_s = job.prefill_s
        job.left_tokens = arrival.num_tokens - job.hit_tokens
        self.cache.touch(arrival.cached[0])

    def finish_prefill(self, job: Job, now: float) -> tuple[list[bytes], list[bytes], float]:
        """The first token is there: the nodes newly cached, those evicted for them, and when the last token comes."""
        self.busy_s += job.prefill_s
        self.decodes += 1
        nodes, ends = job.arrival.cached
        if self._engine is not None:
            nodes = nodes[: self._engine.kept(job.arrival)]
        stored, evicted = self.cache.store(nodes, ends)
        return stored, evicted, now + self.slowness * self._costs.step_s * job.arrival.output_tokens

    def finish(self, job: Job) -> None:
        """The last token was sent."""
        self.decodes -= 1
        del self.jobs[job.number]

    def backlog_s(self, now: float) -> float:
        """Seconds of prefill that are still to be done here, as the worker would tell it."""
        step_s = max(0.0, self._step_until - now) if self._running else 0.0
        return step_s + sum(self._remaining_s(job) for job in self._queue)

    def _place(self, job: Job) -> float:
        return place_of(job.sent_at, 0, self._remaining_s(job))

    def _remaining_s(self, job: Job) -> float:
        if job.is_begun:
            return job.remaining_s
        return self.slowness * self._costs.rates.prefill_s(job.arrival.num_tokens, self._hit(job))

    def _hit(self, job: Job) -> int:
        """Tokens of its prompt that need no computing; one does."""
        nodes, ends = job.arrival.cached
        held = self.cache.held(nodes)
        if self._engine is not None:
            held = max(held - held % self._engine.block_tokens, job.found)
        covered = max(held, job.pulled)
        return min(ends[covered - 1] if covered else 0, job.arrival.num_tokens - 1)
