"""Which worker holds which node: the least that the simulator needs of a routing index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class NodeIndex:
    """A bit for each worker at each node. Invariant: no node without a worker is kept."""

    def __init__(self) -> None:
        self._masks: dict[bytes, int] = {}
        self._bits: dict[str, int] = {}
        self._names: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._masks)

    def stored(self, worker: str, nodes: Iterable[bytes]) -> None:
        bit = self._bit(worker)
        masks = self._masks
        for node in nodes:
            masks[node] = masks.get(node, 0) | bit

    def removed(self, worker: str, nodes: Iterable[bytes]) -> None:
        bit = self._bit(worker)
        masks = self._masks
        for node in nodes:
            left = masks.get(node, 0) & ~bit
            if left:
                masks[node] = left
            else:
                masks.pop(node, None)

    def clear(self, worker: str) -> None:
        """The worker holds nothing, or nothing is known of it."""
        bit = self._bits.pop(worker, None)
        if bit is not None:
            del self._names[bit]
            self._masks = {node: mask & ~bit for node, mask in self._masks.items() if mask & ~bit}

    def lookup(self, chain: Sequence[bytes]) -> dict[str, int]:
        """How many leading nodes of `chain` each worker holds; those that hold none are left out."""
        held: dict[str, int] = {}
        get, alive = self._masks.get, -1
        depth = 0
        for node in chain:
            here = get(node, 0) & alive
            if here != alive:
                if depth:
                    self._note(alive & ~here, depth, held)
                if not here:
                    return held
                alive = here
            depth += 1
        if depth:
            self._note(alive, depth, held)
        return held

    def _note(self, mask: int, depth: int, held: dict[str, int]) -> None:
        while mask:
            bit = mask & -mask
            held[self._names[bit]] = depth
            mask ^= bit

    def _bit(self, worker: str) -> int:
        bit = self._bits.get(worker)
        if bit is None:
            bit = 1
            while bit in self._names:
                bit <<= 1
            self._bits[worker], self._names[bit] = bit, worker
        return bit
