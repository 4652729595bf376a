"""The requests that lately waited longest for their first token, each with why it went where it did.

Bounded: for each minute its slowest, and a few minutes; so the answer is exact but for the begun minute at the far end.
Holds figures, names of workers and models, and request ids; nothing that anybody asked or was answered. Core.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from heapq import nlargest
from operator import attrgetter

import msgspec

from bus.errors import KVCacheError
from bus.stats import Candidate
from kvcache.client.results import Done, Event, Start, Token

NUM_SHOWN = 10
NUM_MINUTES = 10
MINUTE_S = 60.0
MAX_CANDIDATES = 8
WATCHED_S = 3600.0
"""How long after somebody looked requests are explained in full, which costs the broker something for each worker."""


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    """What a placement rested on. num_candidates: of all of which `candidates` are the first.

    Without an explanation in full only the first two are known.
    """

    worker_id: str
    reason: str
    policy: str = ""
    num_tokens: int = 0
    pull_from: str = ""
    num_candidates: int = 0
    candidates: tuple[Candidate, ...] = ()


class Slow(msgspec.Struct, frozen=True, kw_only=True):
    """One request, as the gateway saw it. at: Unix seconds of its end.

    ttft_s: to its first token, or to its end if there was none. outcome: `stop`, `length`, `gone` (the caller left) or
    the name of an error. queue_ms, prefill_ms: by the worker that ended it. Of several outputs the slowest.
    """

    at: float
    request_id: str
    ttft_s: float
    total_s: float
    outcome: str
    model: str = ""
    worker_id: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    resumes: int = 0
    num_outputs: int = 1
    routing: Routing | None = None


class Slowest:
    """See the module. `version` changes whenever what is shown does."""

    def __init__(self) -> None:
        self._minutes: deque[tuple[int, list[Slow]]] = deque()
        self._looked_at = float("-inf")
        self.version = 0

    def is_watched(self, at: float) -> bool:
        """Whether somebody looked lately."""
        return at - self._looked_at < WATCHED_S

    def add(self, request: Slow) -> None:
        minute = int(request.at // MINUTE_S)
        self._drop_old(minute)
        if not self._minutes or self._minutes[-1][0] < minute:
            self._minutes.append((minute, []))
        kept = self._minutes[-1][1]
        if len(kept) < NUM_SHOWN or request.ttft_s > kept[-1].ttft_s:
            kept.append(request)
            kept.sort(key=attrgetter("ttft_s"), reverse=True)
            del kept[NUM_SHOWN:]
            self.version += 1

    def shown(self, at: float) -> tuple[Slow, ...]:
        """The slowest of the last minutes, the slowest first, for somebody who looks."""
        self._looked_at = at
        self._drop_old(int(at // MINUTE_S))
        every = (request for _, kept in self._minutes for request in kept)
        return tuple(nlargest(NUM_SHOWN, every, key=attrgetter("ttft_s")))

    def _drop_old(self, minute: int) -> None:
        while self._minutes and self._minutes[0][0] <= minute - NUM_MINUTES:
            self._minutes.popleft()
            self.version += 1


class Progress:
    """What is known so far of one request: where its first output went, and how its slowest one ended.

    began_at, now: monotonic seconds.
    """

    def __init__(self, began_at: float) -> None:
        self._began_at = began_at
        self._start: Start | None = None
        self._done: Done | None = None
        self._error = ""
        self._first_token_s: float | None = None

    def fold(self, events: Iterable[Event], now: float) -> None:
        """Events of any of its outputs."""
        for event in events:
            match event:
                case Token():
                    if self._first_token_s is None:
                        self._first_token_s = now - self._began_at
                case Start():
                    self._start = self._start or event
                case Done():
                    if self._done is None or event.timings.ttft_s > self._done.timings.ttft_s:
                        self._done = event

    def fail(self, error: KVCacheError) -> None:
        """One of its outputs ended with this, and so do all."""
        self._error = error.code.name.lower()

    def sum_up(self, request_id: str, num_outputs: int, now: float, at: float) -> Slow:
        """It has ended. at: Unix seconds."""
        elapsed_s = now - self._began_at
        start, done = self._start, self._done
        ttft_s = done.timings.ttft_s if done else self._first_token_s
        return Slow(
            at=at,
            request_id=request_id,
            ttft_s=round(elapsed_s if ttft_s is None else ttft_s, 4),
            total_s=round(elapsed_s, 4),
            outcome=self._error or (done.finish_reason if done else "gone"),
            model=start.model if start else "",
            worker_id=done.worker_id if done else start.worker_id if start else "",
            prompt_tokens=start.prompt_tokens if start else 0,
            cached_tokens=start.cached_tokens if start else 0,
            completion_tokens=done.usage.completion_tokens if done else 0,
            queue_ms=round(done.timings.queue_ms, 1) if done else 0.0,
            prefill_ms=round(done.timings.prefill_ms, 1) if done else 0.0,
            resumes=done.timings.resumes if done else 0,
            num_outputs=num_outputs,
            routing=_routing(start) if start else None,
        )


def _routing(start: Start) -> Routing:
    explanation = start.explanation
    if explanation is None:
        return Routing(worker_id=start.worker_id, reason=start.reason)
    return Routing(
        policy=explanation.policy,
        worker_id=explanation.worker_id,
        reason=explanation.reason,
        num_tokens=explanation.num_tokens,
        pull_from=explanation.pull_from,
        num_candidates=len(explanation.candidates),
        candidates=explanation.candidates[:MAX_CANDIDATES],
    )
