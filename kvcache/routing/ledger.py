"""The work that each worker was given: how long until it has done the prefills dispatched to it.

A request is entered when it is dispatched, with the seconds its prefill should take, and leaves at its first
token or its end, whichever is first. Not counting work at once is how routers make hot spots: requests that
arrive together would all see the same idle worker.

Invariant: a worker's `pending` are its requests without a first token, in order of dispatch, and its head is
taken to be in work since `head_since`; nothing else is remembered.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from math import exp


@dataclass(slots=True)
class _Account:
    pending: dict[Hashable, float] = field(default_factory=dict)
    total_s: float = 0.0
    head_since: float = 0.0
    others_s: float = 0.0
    others_at: float = 0.0


WINDOW_S = 60.0
"""Traffic of longer ago than this says little: many prefills long, and short against the swings of a day."""
MOST_BUSY = 0.95
"""The price grows without bound as idleness goes to 0, where the queue it is derived from is never empty."""


class WorkLedger:
    """Seconds of prefill that each worker still has before it. A call is whatever names a request in flight."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._worker_of: dict[Hashable, str] = {}
        self._begun_at: float | None = None
        self._faded_at = 0.0
        self._arrivals = 0.0
        self._work_s = 0.0

    def dispatched(self, call: Hashable, worker: str, seconds: float, now: float) -> None:
        """`worker` was given a prefill that should take `seconds` of its time."""
        account = self._accounts.setdefault(worker, _Account())
        if not account.pending:
            account.head_since, account.total_s = now, 0.0
        account.pending[call] = seconds
        account.total_s += seconds
        self._worker_of[call] = worker
        self._fade(now)
        self._arrivals += 1.0
        self._work_s += seconds

    def finished(self, call: Hashable, now: float) -> None:
        """The prefill is over: the first token came, or the request ended without one. No news the second time."""
        worker = self._worker_of.pop(call, None)
        if worker is None:
            return
        account = self._accounts[worker]
        account.total_s -= account.pending.pop(call)
        account.head_since = now

    def heard(self, worker: str, backlog_s: float, now: float) -> None:
        """A worker said how much prefill waits there, whoever sent it: what is not ours came through other brokers."""
        account = self._accounts.setdefault(worker, _Account())
        account.others_s = 0.0
        own_s = max(0.0, self.busy_until(worker) - now, self.behind_s(worker)) if account.pending else 0.0
        account.others_s = max(0.0, backlog_s - own_s)
        account.others_at = now

    def forget(self, worker: str) -> None:
        """The worker is gone and its requests with it."""
        account = self._accounts.pop(worker, _Account())
        for call in account.pending:
            del self._worker_of[call]

    def busy_until(self, worker: str) -> float:
        """When it should be done with all it was given; in the past if it is idle or later than it should be."""
        account = self._accounts.get(worker)
        if account is None:
            return 0.0
        begun = account.head_since if account.pending else account.others_at
        return begun + account.total_s + account.others_s

    def behind_s(self, worker: str) -> float:
        """What waits behind the request in work: it remains to be done even if that one takes longer than it should."""
        account = self._accounts.get(worker)
        if account is None or not account.pending:
            return 0.0
        return max(0.0, account.total_s - next(iter(account.pending.values()))) + account.others_s

    def idle_s(self, worker: str, now: float) -> float:
        """For how long it has had nothing to compute, as far as is known here."""
        account = self._accounts.get(worker)
        if account is None or account.pending or account.others_s > 0.0:
            return 0.0
        return max(0.0, now - account.head_since)

    def delay_price(self, now: float, num_workers: int) -> float:
        """How much longer all later requests wait together, for each second of work put behind a second of queue.

        In a queue with arrivals at rate l that is busy for a share r of the time it is l / (1 - r), 1/seconds.
        Both are those of the traffic of about the last minute, through this broker, for each of its workers.
        """
        self._fade(now)
        if self._begun_at is None or not num_workers:
            return 0.0
        # What the decayed sums would be of a constant rate since the beginning, for a rate of 1.
        seconds = max(1.0, WINDOW_S * (1.0 - exp((self._begun_at - now) / WINDOW_S)))
        busy = min(MOST_BUSY, self._work_s / seconds / num_workers)
        return self._arrivals / seconds / num_workers / (1.0 - busy)

    def _fade(self, now: float) -> None:
        if self._begun_at is None:
            self._begun_at = self._faded_at = now
        fade = exp((self._faded_at - now) / WINDOW_S)
        self._arrivals *= fade
        self._work_s *= fade
        self._faded_at = now
