"""The worker's side of a lease: for how long it may still act as the owner of what it holds.

The broker grants `lease_ms` in its answer to a beat. The broker counts from hearing the beat, the worker
from *sending* it, so the worker always stops first. A process that did not run for a while (SIGSTOP, a
paused machine, a blocked loop) cannot know what happened meanwhile: a late tick voids the lease, and only
an answer to a beat sent after it brings the lease back.

Only monotonic time, passed in. The broker's side is in kvcache.broker.
"""

from __future__ import annotations

from collections import OrderedDict

LOOP_LAG_LIMIT_S = 0.5
MAX_UNANSWERED = 64


class WorkerLease:
    """One worker's lease from one broker. `tick` often (the beat's period or less): a gap voids the lease."""

    def __init__(self, now: float) -> None:
        self._last_tick = now
        self._sent: OrderedDict[int, float] = OrderedDict()
        self._expires_at = float("-inf")

    def tick(self, now: float) -> float:
        """Notice that the loop runs; returns how late it is, in seconds since the last tick.

        Call it before anything else is done with what arrived in the meantime.
        """
        gap = now - self._last_tick
        self._last_tick = now
        if gap > LOOP_LAG_LIMIT_S:
            self.void()
        return gap

    def void(self) -> None:
        """Give the lease up, with every grant still on its way."""
        self._sent.clear()
        self._expires_at = float("-inf")

    def sent(self, beat: int, now: float) -> None:
        """A beat leaves now; its answer will count from here."""
        self._sent[beat] = now
        if len(self._sent) > MAX_UNANSWERED:
            self._sent.popitem(last=False)

    def granted(self, beat: int, lease_ms: int) -> bool:
        """The broker answered `beat`. False if that beat is not known or was sent before a lapse."""
        sent_at = self._sent.pop(beat, None)
        if sent_at is None:
            return False
        self._expires_at = max(self._expires_at, sent_at + lease_ms / 1000)
        return True

    def is_held(self, now: float) -> bool:
        """Whether the worker may publish and acknowledge writes: unexpired, and the loop has run lately."""
        return now < self._expires_at and now - self._last_tick <= LOOP_LAG_LIMIT_S
