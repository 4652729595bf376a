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
from dataclasses import dataclass

HALF_LIFE_S = 60.0
MIN_EVIDENCE = 16.0
MAX_NODES = 20_000
FIRST_DEPTH = 2


@dataclass(frozen=True, slots=True)
class RoutingKey:
    """key: bytes for the ring, empty when the request has nothing to be keyed by. named: a sequence id was given."""

    key: bytes
    text: str
    named: bool = False


NO_KEY = RoutingKey(b"", "none")


def sequence_key(tenant: str, seq_id: str) -> RoutingKey:
    """The key of an explicit sequence: every request that names it goes to its owner."""
    return RoutingKey(b"s\x00" + tenant.encode() + b"\x00" + seq_id.encode(), f"sequence {seq_id!r}", named=True)


class PrefixKeys:
    """Chooses the depth at which a digest chain is cut, from what arrived lately."""

    def __init__(self) -> None:
        self._counts: OrderedDict[bytes, tuple[float, float]] = OrderedDict()
        self._total = (0.0, 0.0)

    def key(self, tenant: str, chain: Sequence[bytes], num_workers: int, now: float) -> RoutingKey:
        """The key for `chain`, counting this arrival.

        Descends from the second node on while a node's share of recent arrivals is above 1/(2 * num_workers)
        and rests on at least 16 of them (fewer say nothing).
        """
        if not chain:
            return NO_KEY
        self._total = (_decayed(self._total, now) + 1.0, now)
        counts = [self._count(node, now) for node in chain]
        depth = self._depth(counts, num_workers)
        node = chain[depth - 1]
        return RoutingKey(b"p\x00" + tenant.encode() + b"\x00" + node, f"prefix node {depth}/{len(chain)} {node.hex()}")

    def peek(self, tenant: str, chain: Sequence[bytes], num_workers: int, now: float) -> RoutingKey:
        """The key that `key` would give now, without counting an arrival."""
        if not chain:
            return NO_KEY
        depth = self._depth([_decayed(self._counts.get(node, (0.0, now)), now) for node in chain], num_workers)
        node = chain[depth - 1]
        return RoutingKey(b"p\x00" + tenant.encode() + b"\x00" + node, f"prefix node {depth}/{len(chain)} {node.hex()}")

    def _depth(self, counts: Sequence[float], num_workers: int) -> int:
        hot = max(MIN_EVIDENCE, self._total[0] / (2 * max(1, num_workers)))
        depth = min(FIRST_DEPTH, len(counts))
        while depth < len(counts) and counts[depth - 1] > hot:
            depth += 1
        return depth

    def _count(self, node: bytes, now: float) -> float:
        count = _decayed(self._counts.get(node, (0.0, now)), now) + 1.0
        self._counts[node] = (count, now)
        self._counts.move_to_end(node)
        if len(self._counts) > MAX_NODES:
            self._counts.popitem(last=False)
        return count


def _decayed(entry: tuple[float, float], now: float) -> float:
    count, at = entry
    return count * 0.5 ** ((now - at) / HALF_LIFE_S) if count else 0.0
