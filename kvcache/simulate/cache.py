"""A modelled worker's prefix cache: which nodes of which chains it holds, least recently used leaf first.

A node is one block of a prompt, named by all before it, so a node is only of use with its parents. Every use
of a chain touches it from its end to its beginning; so a parent is always younger than its children, and
evicting the oldest node evicts a leaf.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class ModelCache:
    """Nodes with their tokens, at most `capacity` tokens in all. Invariant: `used` is the sum over the nodes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.evicted_tokens = 0
        self._nodes: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def nodes(self) -> list[bytes]:
        """All nodes, the next to be evicted first."""
        return list(self._nodes)

    def held(self, chain: Sequence[bytes]) -> int:
        """How many leading nodes of `chain` are here."""
        nodes = self._nodes
        for depth, node in enumerate(chain):
            if node not in nodes:
                return depth
        return len(chain)

    def touch(self, chain: Sequence[bytes]) -> None:
        """The leading nodes that are here were used."""
        for node in reversed(chain[: self.held(chain)]):
            self._nodes.move_to_end(node)

    def store(self, chain: Sequence[bytes], ends: Sequence[int]) -> tuple[list[bytes], list[bytes]]:
        """Keep all of `chain`, whose node i ends at token `ends[i]`. Returns the new nodes and those evicted for them.

        A chain that is longer than the whole cache loses its own end.
        """
        nodes, new = self._nodes, []
        for index in range(len(chain) - 1, -1, -1):
            node = chain[index]
            if node in nodes:
                nodes.move_to_end(node)
            else:
                nodes[node] = tokens = ends[index] - (ends[index - 1] if index else 0)
                self.used += tokens
                new.append(node)
        return new, self._evict()

    def _evict(self) -> list[bytes]:
        evicted = []
        while self.used > self.capacity:
            node, tokens = self._nodes.popitem(last=False)
            self.used -= tokens
            self.evicted_tokens += tokens
            evicted.append(node)
        return evicted
