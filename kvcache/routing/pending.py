"""Prefixes that are being computed: nodes of requests that were dispatched and have no first token yet.

A worker computes a cold prefix once if all who want it go there: those that come second find it on its way
(single flight). What is pending is always a whole chain from its first node on, so the longest of it and
of what the index knows is what a worker will hold when the request is served.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


class PendingPrefixes:
    """Chains by call. Invariant: `_nodes[node][worker]` is how many pending chains with that node `worker` has."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, tuple[str, Sequence[Hashable]]] = {}
        self._nodes: dict[Hashable, dict[str, int]] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def dispatched(self, call: Hashable, worker: str, chain: Sequence[Hashable]) -> None:
        self._calls[call] = worker, chain
        for node in chain:
            counts = self._nodes.setdefault(node, {})
            counts[worker] = counts.get(worker, 0) + 1

    def finished(self, call: Hashable) -> None:
        """Its first token came, or it ended without one. No news the second time."""
        worker, chain = self._calls.pop(call, ("", ()))
        for node in chain:
            counts = self._nodes[node]
            counts[worker] -= 1
            if not counts[worker]:
                del counts[worker]
                if not counts:
                    del self._nodes[node]

    def forget(self, worker: str) -> None:
        """The worker is gone, and what it was computing."""
        for call in [call for call, (name, _) in self._calls.items() if name == worker]:
            self.finished(call)

    def lookup(self, chain: Sequence[Hashable]) -> dict[str, int]:
        """How many leading nodes of `chain` are on their way on each worker; those with none are left out."""
        found: dict[str, int] = {}
        for depth, node in enumerate(chain, 1):
            counts = self._nodes.get(node)
            if counts is None:
                break
            for worker in counts:
                if found.get(worker, 0) == depth - 1:
                    found[worker] = depth
        return found
