"""Sequences of which nobody could take a copy, until they are tried again: soon at first, then ever more seldom.

The times double, so that a cluster without room is not kept busy with asking for it. Bounded: beyond `MAX_LATER` names
are not remembered, and are found again when the ring changes or a request needs them.
"""

from __future__ import annotations

import heapq

from kvcache.broker.directory import Name

FIRST_S = 1.0
MAX_S = 64.0
MAX_LATER = 65_536


class Later:
    """Names with how often nobody could: their rounds."""

    def __init__(self) -> None:
        self._rounds: dict[Name, int] = {}
        self._queue: list[tuple[float, Name]] = []

    def __len__(self) -> int:
        return len(self._rounds)

    def __contains__(self, name: Name) -> bool:
        return name in self._rounds

    def add(self, name: Name, rounds: int, now: float) -> None:
        """Nobody could, now for the `rounds`-th time, from 1."""
        if name not in self._rounds and len(self._rounds) < MAX_LATER:
            self._rounds[name] = rounds
            heapq.heappush(self._queue, (now + min(MAX_S, FIRST_S * 2 ** (rounds - 1)), name))

    def take(self, now: float) -> list[tuple[Name, int]]:
        """Those whose time has come, with their rounds."""
        due: list[tuple[Name, int]] = []
        while self._queue and self._queue[0][0] <= now:
            _, name = heapq.heappop(self._queue)
            due.append((name, self._rounds.pop(name)))
        return due

    def clear(self) -> None:
        self._rounds.clear()
        self._queue.clear()
