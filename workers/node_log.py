"""What this worker tells its brokers of the chain nodes it holds: changes by number, and on demand everything.

The engine says which nodes it can reuse from now on and which no longer; here they are numbered, kept for a while
so that lost ones can be told again, and told to each broker at its own pace: at most one report of changes in
20 ms, which says all that has come since. A broker that is new, or has missed more than the log remembers, is told
everything in parts, and changes again from there. A node counts as held while any block it was found in is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TypeAlias

from bus import wire
from bus.limits import MAX_CHANGED_NODES
from bus.messages import Message, NodeRun, NodesChanged, NodesHeld
from workers.nodes import NodeChange

LOG_CHANGES = 65_536
MAX_RUNS_BYTES = 4096
RUN_BYTES = 32
"""A header holds 8 KiB: each run has a few bytes, 32 here to be sure of 128 runs at most, and its tenant's name."""
REPORT_S = 0.02
PARTS_PER_REPORT = 4

Report: TypeAlias = tuple[Message, bytes]
"""A message and its payload."""


@dataclass(slots=True)
class _Listener:
    """One broker. sent: the last change it was told. Of a snapshot as of `sent`, `rest` is still to be told."""

    sent: int = 0
    due: float = float("-inf")
    next_part: int = 0
    rest: deque[NodeChange] | None = None


class NodeLog:
    """One worker's nodes over all its models. `log_changes`: how many changes can be told again."""

    def __init__(self, *, log_changes: int = LOG_CHANGES) -> None:
        self._held: dict[str, dict[bytes, int]] = {}
        self._log: deque[NodeChange] = deque(maxlen=log_changes)
        self._latest = 0
        self._listeners: dict[int, _Listener] = {}

    def __len__(self) -> int:
        """How many nodes are held."""
        return sum(map(len, self._held.values()))

    # --- what the engine says ---

    def note(self, changes: Iterable[NodeChange]) -> None:
        """Blocks with these nodes can be reused from now on, or no longer."""
        for change in changes:
            held = self._held.setdefault(change.tenant, {})
            before = held.get(change.node, 0)
            if change.is_stored:
                held[change.node] = before + 1
                is_new = before == 0
            elif before > 1:
                held[change.node] = before - 1
                is_new = False
            else:
                del held[change.node]
                is_new = True
                if not held:
                    del self._held[change.tenant]
            if is_new:
                self._latest += 1
                self._log.append(change)

    # --- brokers ---

    def joined(self, link: int) -> None:
        """A new session: it knows nothing, and is told everything."""
        self._listeners[link] = _Listener()
        self._begin_snapshot(self._listeners[link])

    def left(self, link: int) -> None:
        """The session is over."""
        self._listeners.pop(link, None)

    def asked(self, link: int, after: int) -> None:
        """A broker misses the changes after that one; 0: everything."""
        listener = self._listeners.get(link)
        if listener is None:
            return
        if 0 < after <= self._latest:  # whether the log goes back so far is seen when it is told
            listener.sent, listener.rest = after, None
        else:
            self._begin_snapshot(listener)

    def sent(self, link: int) -> int:
        """The number of the last change that was told on this link; what is not there is 0."""
        listener = self._listeners.get(link)
        return 0 if listener is None or listener.rest is not None else listener.sent

    def reports(self, link: int, now: float) -> list[Report]:
        """What is to be said on this link now; nothing while the last report is not 20 ms ago."""
        listener = self._listeners.get(link)
        if listener is None or now < listener.due:
            return []
        if listener.rest is None and listener.sent == self._latest:
            return []
        listener.due = now + REPORT_S
        if listener.rest is None and self._latest - listener.sent > len(self._log):
            self._begin_snapshot(listener)
        if listener.rest is not None:
            return [report for _ in range(PARTS_PER_REPORT) for report in self._next_part(listener)]
        return [self._changes(listener)]

    # --- inside ---

    def _begin_snapshot(self, listener: _Listener) -> None:
        listener.sent, listener.next_part = self._latest, 0
        listener.rest = deque(NodeChange(tenant, node, True) for tenant, held in self._held.items() for node in held)

    def _next_part(self, listener: _Listener) -> list[Report]:
        """The next part of the snapshot, if there is one; the last one may be empty."""
        rest = listener.rest
        if rest is None:
            return []
        runs, nodes = _pack(islice(rest, MAX_CHANGED_NODES))
        for _ in range(len(nodes) // 8):
            rest.popleft()
        part = NodesHeld(
            after=listener.sent,
            part=listener.next_part,
            is_last=not rest,
            runs=runs,
            payload=wire.describe([nodes]),
        )
        listener.next_part += 1
        listener.rest = rest or None
        return [(part, nodes)]

    def _changes(self, listener: _Listener) -> Report:
        """The changes that follow, as many as one report holds."""
        untold = list(islice(reversed(self._log), self._latest - listener.sent))
        runs, nodes = _pack(islice(reversed(untold), MAX_CHANGED_NODES))
        report = NodesChanged(first=listener.sent + 1, runs=runs, payload=wire.describe([nodes]))
        listener.sent += len(nodes) // 8
        return report, nodes


def _pack(changes: Iterable[NodeChange]) -> tuple[tuple[NodeRun, ...], bytes]:
    """Changes in their order, as far as they fit one report."""
    runs: list[NodeRun] = []
    nodes: list[bytes] = []
    room = MAX_RUNS_BYTES
    for (tenant, is_stored), run in groupby(changes, key=lambda change: (change.tenant, change.is_stored)):
        room -= RUN_BYTES + len(tenant.encode())
        if room < 0:
            break
        before = len(nodes)
        nodes += (change.node for change in run)
        runs.append(NodeRun(tenant, is_stored, len(nodes) - before))
    return tuple(runs), b"".join(nodes)
