"""From what workers report of themselves to the index: numbering, gaps, repair.

A worker numbers its changes from 1 on. Changes that follow the last one known are applied; what was known already
is ignored; a gap means that some were lost. The broker then asks for all that is later, and gets the changes again
from the worker's log, or, when they are no longer in it, everything the worker holds (`NodesHeld`, in parts, as of
one change). What arrives between a gap and its repair is not used: the repair contains it.

    BLIND     nothing is known yet: it has just joined
    DEGRADED  something is missing: a gap, a part of the first snapshot, or more than the worker's share of the table
    EXACT     equal to what the worker held at its last report

Until a whole snapshot has arrived, the one before goes on being used. Only `Feed` changes a state.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from math import inf

from bus.errors import MalformedMessage
from bus.messages import NodeRun, NodesChanged, NodesHeld
from kvcache.routing.index import NODE_BYTES, Holder, Keys, NodeIndex
from kvcache.routing.views import IndexState

PATIENCE_S = 1.0
"""Without progress in what is awaited, ask again after this."""
SNAPSHOTS = 4
"""That may begin at once; then one each `PATIENCE_S`, which is as often as they are asked for. Each may replace a
worker's whole share of the index, so one that sends them all the time would have the broker do nothing else."""


class Happening(enum.Enum):
    """What can happen to a feed. PART: of a snapshot, not its last. WHOLE: its last. CUT: the share was used up."""

    PART = enum.auto()
    WHOLE = enum.auto()
    GAP = enum.auto()
    REPAIRED = enum.auto()
    CUT = enum.auto()


TRANSITIONS: dict[tuple[IndexState, Happening], IndexState] = {
    (IndexState.BLIND, Happening.PART): IndexState.DEGRADED,
    (IndexState.BLIND, Happening.WHOLE): IndexState.EXACT,
    (IndexState.BLIND, Happening.GAP): IndexState.BLIND,
    (IndexState.DEGRADED, Happening.PART): IndexState.DEGRADED,
    (IndexState.DEGRADED, Happening.WHOLE): IndexState.EXACT,
    (IndexState.DEGRADED, Happening.GAP): IndexState.DEGRADED,
    (IndexState.DEGRADED, Happening.REPAIRED): IndexState.EXACT,
    (IndexState.DEGRADED, Happening.CUT): IndexState.DEGRADED,
    (IndexState.EXACT, Happening.PART): IndexState.DEGRADED,
    (IndexState.EXACT, Happening.WHOLE): IndexState.EXACT,
    (IndexState.EXACT, Happening.GAP): IndexState.DEGRADED,
    (IndexState.EXACT, Happening.REPAIRED): IndexState.EXACT,
    (IndexState.EXACT, Happening.CUT): IndexState.DEGRADED,
}
"""BLIND knows neither a repair nor a cut: before the first part of a snapshot there is nothing to repair or to cut."""


class Feed:
    """One worker's reports, from its join to its end. `ask` says when something must be asked of it."""

    def __init__(self, index: NodeIndex, worker_id: str, now: float) -> None:
        self.state = IndexState.BLIND
        self.num_gaps = 0
        self._index = index
        self._worker_id = worker_id
        self._shown: Holder | None = None
        self._filling: Holder | None = None
        self._next_part = 0
        self._room = float(SNAPSHOTS)  # for snapshots that begin, as of `_room_at`
        self._room_at = now
        self._wants_all = False  # a snapshot was passed over, so no changes can tell what is held
        self._known = 0
        self._ask_at = now + PATIENCE_S  # it sends a snapshot by itself

    @property
    def num_nodes(self) -> int:
        """How many nodes the index has of it."""
        return self._shown.num_nodes if self._shown is not None else 0

    # --- what the worker says ---

    def changed(self, message: NodesChanged, nodes: bytes, now: float) -> None:
        """Raises MalformedMessage if the nodes are not as many as its runs say."""
        changes = self._read(message.runs, nodes)
        last = message.first - 1 + len(nodes) // NODE_BYTES
        if message.first > self._known + 1:
            self._missed(now)
        if self._shown is None or self._filling is not None or message.first > self._known + 1 or last <= self._known:
            return
        skip = self._known + 1 - message.first
        for run, keys in changes:
            fresh = keys[skip:] if skip else keys
            skip = max(0, skip - len(keys))
            if run.is_stored:
                self._index.store(self._shown, fresh)
            else:
                self._index.remove(self._shown, fresh)
        self._known = last
        self._move(Happening.REPAIRED)
        if not self._wants_all:
            self._ask_at = inf
        self._check_share(self._shown, now)

    def held(self, message: NodesHeld, nodes: bytes, now: float) -> None:
        """A part of a snapshot; the first begins a new one, or is passed over if there were too many.

        Raises MalformedMessage as above.
        """
        changes = self._read(message.runs, nodes)
        if not all(run.is_stored for run in message.runs):
            raise MalformedMessage("a snapshot is of nodes that are held, not of any that were removed")
        if message.part == 0 and not self._takes_snapshot(now):
            self._missed(now)
            self._drop_filling()
            self._ask_at, self._wants_all = now + PATIENCE_S, True
            return
        if message.part == 0:
            self._drop_filling()
            self._filling = self._index.open(self._worker_id)
            if self._shown is None:
                self._show(self._filling)
        elif self._filling is None or message.part != self._next_part:
            self._missed(now)
            self._drop_filling()
            return
        assert self._filling is not None
        self._next_part = message.part + 1
        for _, keys in changes:
            self._index.store(self._filling, keys)
        self._ask_at = now + PATIENCE_S
        if not message.is_last:
            self._move(Happening.PART)
            return
        holder, self._filling = self._filling, None
        self._show(holder)
        self._known = message.after
        self._ask_at, self._wants_all = inf, False
        self._move(Happening.WHOLE)
        self._check_share(holder, now)

    def told(self, last: int, now: float) -> None:
        """The worker says in its beat that it has told changes up to `last`; those came before the beat, or never."""
        if last > self._known and self._filling is None:
            self._missed(now)

    # --- what follows ---

    def ask(self, now: float) -> int | None:
        """The number after which changes are missing, when it is time to ask for them; None while it is not.

        0 stands for everything: no changes can make good what is known.
        """
        if now < self._ask_at:
            return None
        self._ask_at = now + PATIENCE_S
        self._drop_filling()
        return self._known if self._shown is not None and not self._shown.is_cut and not self._wants_all else 0

    def close(self) -> None:
        """The worker is gone, and with it all that it held."""
        for holder in {self._shown, self._filling} - {None}:
            assert holder is not None
            self._index.close(holder)
        self._shown = self._filling = None

    def _takes_snapshot(self, now: float) -> bool:
        self._room = min(float(SNAPSHOTS), self._room + (now - self._room_at) / PATIENCE_S)
        self._room_at = now
        if self._room < 1.0:
            return False
        self._room -= 1.0
        return True

    def _missed(self, now: float) -> None:
        if self._ask_at == inf:  # else it is asked for, or about to be
            self.num_gaps += 1
            self._ask_at = now
        self._move(Happening.GAP)

    def _check_share(self, holder: Holder, now: float) -> None:
        """A worker that holds more than its share is known in part; when the share grows it is asked again."""
        share = self._index.share
        if holder.num_nodes > share:  # others have joined: what is over is given back by beginning anew
            holder.is_cut = True
            self._ask_at = now
        if holder.is_cut:
            self._move(Happening.CUT)
            if holder.num_nodes < share * 3 // 4:
                self._ask_at = now

    def _show(self, holder: Holder) -> None:
        self._index.show(holder)
        self._shown = holder

    def _drop_filling(self) -> None:
        """A snapshot that was not finished. If nothing else is known of the worker, what there is of it stays."""
        if self._filling is not None and self._filling is not self._shown:
            self._index.close(self._filling)
        self._filling = None

    def _read(self, runs: Sequence[NodeRun], nodes: bytes) -> list[tuple[NodeRun, Keys]]:
        if len(nodes) != NODE_BYTES * sum(run.count for run in runs):
            raise MalformedMessage(f"{len(nodes)} bytes of nodes are not those of {sum(r.count for r in runs)} changes")
        read: list[tuple[NodeRun, Keys]] = []
        start = 0
        for run in runs:
            end = start + run.count * NODE_BYTES
            read.append((run, self._index.keys(nodes[start:end], run.tenant)))
            start = end
        return read

    def _move(self, happening: Happening) -> None:
        self.state = TRANSITIONS[self.state, happening]
