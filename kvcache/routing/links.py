"""What fetching KV from a peer costs each worker, learned from the pulls that it was told to make.

A link that nobody has used is worth a try and no more: one pull at a time, only where it would pay even at twice
the guess, a quarter of computing. The first pull that comes whole replaces that guess; one that fails
rests the link, for longer each time. What was measured is believed while pulls go on, and for `TRUST_S` after: then a
link that was too slow may show in one more try that it no longer is.

Invariant: a pull is open from its order to its request's first token or end, and at most `MAX_OPEN` are at one worker.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from math import inf

PULL_SHARE = 0.5
"""A pull must cost at most this share of the prefill that it saves: the link may be busy, the holder may evict."""
TRY_SHARE = 0.5 * PULL_SHARE
"""What a link that was never measured is taken to cost of computing: should it cost twice that, it still pays."""
MAX_OPEN = 4
"""As many as a worker makes at a time; it would refuse more, and compute."""
MEMORY = 8
"""Reports after which one counts 1/e."""
LEAST_S = 1e-6
"""Nothing comes sooner."""
TRUST_S = 60.0
REST_S = 5.0
MOST_REST_S = 300.0


@dataclass(slots=True)
class _Link:
    """tokens, seconds: of the pulls that came whole, old ones fading. rest_s: how long the next failure costs."""

    num_open: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    measured_at: float = -inf
    rests_until: float = -inf
    rest_s: float = REST_S

    @property
    def pull_s(self) -> float:
        return self.seconds / self.tokens if self.tokens else inf


class LinkBook:
    """The links of all workers, each by the worker that fetches."""

    def __init__(self) -> None:
        self._links: dict[str, _Link] = {}
        self._worker_of: dict[Hashable, str] = {}

    def pull_s(self, worker: str, token_s: float, now: float) -> float:
        """Seconds to fetch the KV of one token, to be planned with now; infinite while nothing should be fetched.

        token_s: what computing one takes there, at the least.
        """
        link = self._links.get(worker, _UNUSED)
        if now < link.rests_until or link.num_open >= MAX_OPEN:
            return inf
        if link.num_open or now < link.measured_at + TRUST_S:
            return link.pull_s
        return min(link.pull_s, TRY_SHARE * token_s)

    def measured_s(self, worker: str) -> float:
        """As `pull_s`, but only what was measured."""
        return self._links.get(worker, _UNUSED).pull_s

    def ordered(self, call: Hashable, worker: str) -> None:
        """`worker` is to fetch something before it serves this call."""
        self._link(worker).num_open += 1
        self._worker_of[call] = worker

    def over(self, call: Hashable) -> None:
        """The call has its first token, or ended without one. No news the second time, or if it fetched nothing."""
        worker = self._worker_of.pop(call, None)
        if worker is not None:
            self._links[worker].num_open -= 1

    def measured(self, worker: str, num_tokens: int, seconds: float, now: float) -> None:
        """Pulls that came whole brought `num_tokens`, in so many seconds. Figures that cannot be are passed over."""
        if num_tokens <= 0 or not LEAST_S <= seconds < inf:
            return
        link = self._link(worker)
        fade = 1.0 - 1.0 / MEMORY
        link.tokens = fade * link.tokens + num_tokens
        link.seconds = fade * link.seconds + seconds
        link.measured_at, link.rest_s = now, REST_S

    def failed(self, worker: str, now: float) -> None:
        """Pulls of this worker failed, and none came whole."""
        link = self._link(worker)
        link.rests_until = now + link.rest_s
        link.rest_s = min(MOST_REST_S, 2 * link.rest_s)

    def forget(self, worker: str) -> None:
        """The worker is gone and its requests with it."""
        if self._links.pop(worker, None) is not None:
            self._worker_of = {call: name for call, name in self._worker_of.items() if name != worker}

    def _link(self, worker: str) -> _Link:
        return self._links.setdefault(worker, _Link())


_UNUSED = _Link()
