"""From a request to the key that the ring is asked with.

A request that names a sequence is keyed by it. Any other is keyed by a node of its prompt's digest
chain (`kvcache.hashing.routing_chain`): deep enough that one key does not carry one worker's worth of
all traffic, shallow enough that prompts which share a long beginning meet on one worker. A shared
system prompt puts every request behind the same first block, so the first block alone is never the
key; from the second on we descend while a node is hot, by a counter that halves every minute.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

HALF_LIFE_S = 60.0
MIN_EVIDENCE = 16.0
MAX_NODES = 20_000
FIRST_DEPTH = 2
MAX_WORTH = 2.0**64


class RoutingKey(msgspec.Struct, frozen=True, gc=False):
    """key: bytes for the ring, empty when the request has nothing to be keyed by. named: a sequence id was given."""

    key: bytes
    text: str
    named: bool = False


NO_KEY = RoutingKey(b"", "none")


def sequence_key(tenant: str, seq_id: str) -> RoutingKey:
    """The key of an explicit sequence: every request that names it goes to its owner."""
    return RoutingKey(b"s\x00" + tenant.encode() + b"\x00" + seq_id.encode(), f"sequence {seq_id!r:.300}", named=True)


class PrefixKeys:
    """Chooses the depth at which a digest chain is cut, from what arrived lately.

    Old arrivals do not lose worth, new ones gain it (forward decay: Cormode, Shkapenyuk, Srivastava, Xu 2009,
    section 3), so that counting one is an addition and only the ratio to an arrival's worth now means anything.
    """

    def __init__(self) -> None:
        self._counts: OrderedDict[bytes, float] = OrderedDict()
        self._total = 0.0
        self._epoch: float | None = None

    def key(self, tenant: str, chain: Sequence[bytes], num_workers: int, now: float) -> RoutingKey:
        """The key for `chain`, counting this arrival.

        Descends from the second node on while a node's share of recent arrivals is above 1/(2 * num_workers)
        and rests on more than 16 of them (fewer say nothing).
        """
        if not chain:
            return NO_KEY
        worth = self._worth(now)
        if worth > MAX_WORTH:
            worth = self._rescale(worth, now)
        self._total += worth
        counts = self._counts
        for node in chain:
            counts[node] = counts.get(node, 0.0) + worth
            counts.move_to_end(node)
        while len(counts) > MAX_NODES:
            counts.popitem(last=False)
        return self._cut(tenant, chain, num_workers, worth)

    def peek(self, tenant: str, chain: Sequence[bytes], num_workers: int, now: float) -> RoutingKey:
        """The key that `chain` has now, without counting an arrival."""
        return self._cut(tenant, chain, num_workers, self._worth(now)) if chain else NO_KEY

    def _cut(self, tenant: str, chain: Sequence[bytes], num_workers: int, worth: float) -> RoutingKey:
        hot = max(MIN_EVIDENCE * worth, self._total / (2 * max(1, num_workers)))
        depth = min(FIRST_DEPTH, len(chain))
        while depth < len(chain) and self._counts.get(chain[depth - 1], 0.0) > hot:
            depth += 1
        node = chain[depth - 1]
        return RoutingKey(b"p\x00" + tenant.encode() + b"\x00" + node, f"prefix node {depth}/{len(chain)} {node.hex()}")

    def _worth(self, now: float) -> float:
        """What an arrival counts now: twice as much with every half-life."""
        if self._epoch is None:
            self._epoch = now
        return float(2.0 ** min((now - self._epoch) / HALF_LIFE_S, 1000.0))

    def _rescale(self, worth: float, now: float) -> float:
        """Make an arrival count 1 again, before the numbers outgrow a float."""
        for node in self._counts:
            self._counts[node] /= worth
        self._total /= worth
        self._epoch = now
        return 1.0
