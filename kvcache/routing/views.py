"""What a policy is shown and what it answers: the request, a belief of each worker, the choice.

All frozen values. Beliefs hold nothing of one request and only times that do not pass by themselves
(`busy_until`), so whoever keeps them makes a new one when a worker's state changed and not per request.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from math import inf

import msgspec

from kvcache.ring import UNIT_WEIGHT
from kvcache.routing.keys import RoutingKey


class IndexState(Enum):
    """How far to trust what the index says of a worker.

    EXACT: all its events arrived. DEGRADED: some are missing, so it may hold more or less. BLIND: nothing is known.
    """

    EXACT = "exact"
    DEGRADED = "degraded"
    BLIND = "blind"


class Rates(msgspec.Struct, frozen=True, gc=False):
    """How quick a worker is, in seconds, as learned from what it reported.

    token_s: to prefill one token. context_s: added to that for each token of context before it (attention).
    decode_share: by how much of itself a prefill gets longer with each sequence that decodes beside it.
    pull_s: to fetch the KV of one token from a peer; infinite if it cannot. is_learned: measured, not assumed.
    """

    token_s: float = 1e-3
    context_s: float = 0.0
    decode_share: float = 0.0
    pull_s: float = inf
    is_learned: bool = False

    def prefill_s(self, num_tokens: int, num_cached: int) -> float:
        """Seconds to prefill a prompt of which the first `num_cached` tokens need not be computed."""
        context = (num_tokens * num_tokens - num_cached * num_cached) / 2
        return self.token_s * (num_tokens - num_cached) + self.context_s * context


UNKNOWN_RATES = Rates()


class Belief(msgspec.Struct, frozen=True, gc=False):
    """What the broker believes of one worker.

    inflight: dispatched and not ended. weight: capacity, 100 is one worker's worth.
    turn: its virtual time, in requests for each 100 of weight. The broker starts a worker that is new or was away
    at the time of the others (start-time fair queueing, Goyal, Vin, Cheng 1996, section 2), so it need not catch up.
    busy_until: when it should be done with the prefills it was given, on the clock of `Request.now`.
    decodes: sequences past their first token. index: how far `Request.hits` is to be trusted for it.
    eviction_s: what it is expected to cost, in seconds of prefill to be done again, to cache one more token there;
    0 while it has room.
    """

    inflight: int
    weight: int
    turn: float
    is_available: bool
    busy_until: float = 0.0
    decodes: int = 0
    index: IndexState = IndexState.BLIND
    rates: Rates = UNKNOWN_RATES
    eviction_s: float = 0.0

    @property
    def per_weight(self) -> float:
        return self.inflight * UNIT_WEIGHT / self.weight


class Request(msgspec.Struct, frozen=True, gc=False):
    """A request to be placed.

    num_tokens: of its prompt, estimated from bytes where only a worker can tell. hits: how many leading tokens of
    it a worker holds, by the index; whoever holds none may be left out. deadline_s: what remains of its time.
    """

    key: RoutingKey
    now: float = 0.0
    num_tokens: int = 0
    hits: Mapping[str, int] = {}
    deadline_s: float = inf
    tenant: str = ""


class Pull(msgspec.Struct, frozen=True, gc=False):
    """Fetch the KV of the first `num_tokens` tokens from worker `source`, as far as it is not there."""

    source: str
    num_tokens: int


class Estimate(msgspec.Struct, frozen=True, gc=False):
    """What a request is expected to cost on one worker, in seconds: `total_s` is the sum that workers compete by."""

    worker_id: str
    hit_tokens: int
    queue_s: float
    prefill_s: float
    eviction_s: float
    total_s: float
    pull: Pull | None = None


class Choice(msgspec.Struct, frozen=True, gc=False):
    """Who serves. reason: `policy: why`. estimates: of every candidate, where the policy makes any."""

    worker_id: str
    reason: str
    pull: Pull | None = None
    estimates: tuple[Estimate, ...] = ()


class Refusal(msgspec.Struct, frozen=True, gc=False):
    """Nobody serves it now; asking again after `retry_after_s` may help."""

    reason: str
    retry_after_s: float = 0.2
