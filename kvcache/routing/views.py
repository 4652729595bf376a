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
    decode_s: added for each sequence that decodes beside it. start_tokens: as many tokens more a prompt costs, however
    short it is, since a step reads all weights.
    pull_s: to fetch the KV of one token from a peer; infinite if it cannot. is_learned: measured, not assumed.
    """

    token_s: float = 1e-3
    context_s: float = 0.0
    decode_s: float = 0.0
    pull_s: float = inf
    is_learned: bool = False
    start_tokens: int = 0

    def prefill_s(self, num_tokens: int, num_cached: int, decodes: int = 0) -> float:
        """Seconds to prefill a prompt of which the first `num_cached` tokens need not be computed."""
        computed = num_tokens - num_cached
        if computed <= 0:
            return 0.0
        context = (num_tokens + num_cached) / 2
        more_s = computed * (self.context_s * context + self.decode_s * decodes)
        return (computed + self.start_tokens) * self.token_s + more_s


UNKNOWN_RATES = Rates()


class Belief(msgspec.Struct, frozen=True, gc=False):
    """What the broker believes of one worker.

    inflight: dispatched and not ended. weight: capacity, 100 is one worker's worth.
    turn: its virtual time, in requests for each 100 of weight. The broker starts a worker that is new or was away
    at the time of the others (start-time fair queueing, Goyal, Vin, Cheng 1996, section 2), so it need not catch up.
    busy_until: when it should be done with the prefills it was given, on the clock of `Request.now`.
    behind_s: what waits there behind the prefill in work, so even if that one takes longer than it should.
    decodes: sequences past their first token. index: how far `Request.hits` is to be trusted for it.
    """

    inflight: int
    weight: int
    turn: float
    is_available: bool
    busy_until: float = 0.0
    behind_s: float = 0.0
    decodes: int = 0
    index: IndexState = IndexState.BLIND
    rates: Rates = UNKNOWN_RATES

    @property
    def per_weight(self) -> float:
        return self.inflight * UNIT_WEIGHT / self.weight

    def queue_s(self, now: float) -> float:
        """Seconds until it could begin another prefill."""
        return max(self.busy_until - now, self.behind_s)


class Request(msgspec.Struct, frozen=True, gc=False):
    """A request to be placed.

    num_tokens: of its prompt, estimated from bytes where only a worker can tell. hits: how many leading tokens of
    it a worker holds or is computing; whoever has none may be left out. held: of those, what is there already, which
    is all that others can fetch. deadline_s: what remains of its time.
    delay_price: see `kvcache.routing.ledger.WorkLedger.delay_price`. due_tokens: of its leading tokens another copy is
    due, see `kvcache.routing.shares`.
    """

    key: RoutingKey
    now: float = 0.0
    num_tokens: int = 0
    hits: Mapping[str, int] = {}
    held: Mapping[str, int] = {}
    deadline_s: float = inf
    delay_price: float = 0.0
    tenant: str = ""
    due_tokens: int = 0


class Pull(msgspec.Struct, frozen=True, gc=False):
    """Fetch the KV of the first `num_tokens` tokens from worker `source`, as far as it is not there.

    budget_s: give up after that, and compute: what computing it takes, so a pull at worst doubles that.
    """

    source: str
    num_tokens: int
    budget_s: float = inf


class Estimate(msgspec.Struct, frozen=True, gc=False):
    """What a request is expected to cost on one worker, in seconds.

    first_token_s: until its first token, by what waits there (`queue_s`), its prefill and its pull, which runs while
    others are served. delay_s: what later requests wait longer because of it. They add up to `total_s`.
    """

    worker_id: str
    hit_tokens: int
    queue_s: float
    prefill_s: float
    first_token_s: float
    delay_s: float
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
