"""A modelled worker: one prefill at a time out of a queue, decodes beside it, a prefix cache, pulls that run ahead.

Prefills go in the order of our own scheduler (`kvcache.places`), or first come, first served.

It computes a prompt from the first token that its cache, or what was pulled for that request, does not cover, and
caches the whole prompt when it is done. Only the simulation moves time; this file says what happens at a moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvcache.places import place_of
from kvcache.simulate.cache import ModelCache
from kvcache.simulate.costs import Costs
from kvcache.simulate.traces import Arrival

Order = Literal["fifo", "shortest"]
SLICE_S = 0.25
"""With `shortest`, how long a prefill runs before another may take its turn: a chunk of the prompt."""


@dataclass(slots=True, eq=False)
class Job:
    """A request at a worker. pulled: leading nodes fetched for it. ready_at: when they have arrived."""

    number: int
    arrival: Arrival
    broker: object
    sent_at: float
    pulled: int = 0
    pulled_tokens: int = 0
    pull_took_s: float = 0.0
    ready_at: float = 0.0
    hit_tokens: int = 0
    prefill_s: float = 0.0
    remaining_s: float = 0.0
    is_begun: bool = False
    decodes: int = 0


class ModelWorker:
    """busy_s: time spent on prefills. slowness: by how much longer everything takes than `costs` say."""

    def __init__(self, name: str, costs: Costs, cache_tokens: int, order: Order = "shortest") -> None:
        self.name = name
        self.cache = ModelCache(cache_tokens)
        self.slowness = 1.0
        self.busy_s = 0.0
        self.decodes = 0
        self.running: Job | None = None
        self.jobs: dict[int, Job] = {}
        self._costs = costs
        self._order: Order = order
        self._queue: list[Job] = []
        self._link_free_at = 0.0
        self._slice_until = 0.0

    def enqueue(self, job: Job) -> None:
        self._queue.append(job)
        self.jobs[job.number] = job

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
        return self.running is not None or self.decodes > 0

    def start(self, now: float, num_beside: int = 0) -> tuple[Job, float] | None:
        """Run the next prefill, or a slice of it; the job and until when. None while one runs or none can.

        num_beside: how many other workers are busy now.
        """
        if self.running is not None:
            return None
        ready = [job for job in self._queue if job.ready_at <= now]
        if not ready:
            return None
        job = ready[0] if self._order == "fifo" else min(ready, key=self._place)
        if not job.is_begun:
            self._begin(job)
        seconds = job.remaining_s if self._order == "fifo" else min(SLICE_S, job.remaining_s)
        job.remaining_s -= seconds
        longer_s = seconds * self._costs.crowding * num_beside
        job.prefill_s += longer_s
        if job.remaining_s <= 0.0:
            self._queue.remove(job)
        self.running, self._slice_until = job, now + seconds + longer_s
        return job, self._slice_until

    def pause(self) -> None:
        """The slice is over and the prefill is not."""
        self.running = None

    def _begin(self, job: Job) -> None:
        arrival = job.arrival
        job.hit_tokens = self._hit(job)
        job.decodes, job.is_begun = self.decodes, True
        job.prefill_s = self.slowness * self._costs.rates.prefill_s(arrival.num_tokens, job.hit_tokens, self.decodes)
        job.remaining_s = job.prefill_s
        self.cache.touch(arrival.cached[0])

    def finish_prefill(self, job: Job, now: float) -> tuple[list[bytes], list[bytes], float]:
        """The first token is there: the nodes newly cached, those evicted for them, and when the last token comes."""
        self.running = None
        self.busy_s += job.prefill_s
        self.decodes += 1
        stored, evicted = self.cache.store(*job.arrival.cached)
        return stored, evicted, now + self.slowness * self._costs.step_s * job.arrival.output_tokens

    def finish(self, job: Job) -> None:
        """The last token was sent."""
        self.decodes -= 1
        del self.jobs[job.number]

    def backlog_s(self, now: float) -> float:
        """Seconds of prefill that are still to be done here, as the worker would tell it."""
        slice_s = max(0.0, self._slice_until - now) if self.running is not None else 0.0
        return slice_s + sum(self._remaining_s(job) for job in self._queue)

    def _place(self, job: Job) -> float:
        return place_of(job.sent_at, 0, self._remaining_s(job))

    def _remaining_s(self, job: Job) -> float:
        if job.is_begun:
            return job.remaining_s
        return self.slowness * self._costs.rates.prefill_s(job.arrival.num_tokens, self._hit(job))

    def _hit(self, job: Job) -> int:
        """Tokens of its prompt that need no computing; one does."""
        nodes, ends = job.arrival.cached
        covered = max(self.cache.held(nodes), job.pulled)
        return min(ends[covered - 1] if covered else 0, job.arrival.num_tokens - 1)
