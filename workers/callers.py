"""Other workers that ask to copy from this one: how they are called and answered, and who has to wait for what.

A ticket that is shown and not known is parked: the broker's word may be on its way, so it has `GRACE_S`. What is
copied, and what to do for who has shown a good one, is the business of `peer_holder` and `sequence_giver`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Generic, TypeAlias, TypeVar

from bus import wire
from bus.errors import Conflict, Forbidden, KVCacheError
from bus.messages import Grant, Message
from bus.wire import Buffer
from workers.calls import Action, ToCaller
from workers.tickets import Tickets

GRACE_S = 0.25
IDLE_S = 2.0
"""Whoever copies and says nothing for so long is forgotten."""
MAX_PARKED = 16
UNKNOWN = "the broker has not announced this ticket"

CopyKey: TypeAlias = tuple[bytes, bytes]
"""The link that asks, and its number for the copy."""

Ask = TypeVar("Ask")


class Parked(Generic[Ask]):
    """The tickets that a broker announced, and the askers that wait for one. Ask: what they asked."""

    def __init__(self) -> None:
        self._tickets = Tickets()
        self._waiting: dict[CopyKey, tuple[bytes, Ask, float]] = {}  # with their ticket, and until when

    def granted(self, grant: Grant, now: float) -> list[tuple[CopyKey, Ask]]:
        """A ticket; returns who has shown it already, and waits no more."""
        self._tickets.add(grant, now)
        shown = [(key, ask) for key, (ticket, ask, _) in self._waiting.items() if ticket == grant.ticket]
        for key, _ in shown:
            del self._waiting[key]
        return shown

    def show(self, key: CopyKey, ticket: bytes, ask: Ask, under_way: Collection[CopyKey], now: float) -> bool:
        """Whether the ticket is known; if not, the asker waits for it. Raises Conflict if that copy is under way or
        waits already, Forbidden if too many wait."""
        if key in under_way or key in self._waiting:
            raise Conflict("a copy with this id is under way")
        if ticket in self._tickets:
            return True
        if len(self._waiting) >= MAX_PARKED:
            raise Forbidden(f"{UNKNOWN}, and too many wait for such word")
        self._waiting[key] = ticket, ask, now + GRACE_S
        return False

    def take(self, ticket: bytes, worker_id: str, now: float) -> Grant:
        """What this worker may copy; the ticket is used up. Raises Forbidden."""
        return self._tickets.take(ticket, worker_id, now)

    def drop(self, key: CopyKey) -> None:
        """It does not wait any more, if it did."""
        self._waiting.pop(key, None)

    def tick(self, now: float) -> list[Action]:
        """Refuse who has waited long enough."""
        self._tickets.expire(now)
        late = [key for key, (_, _, until) in self._waiting.items() if now >= until]
        for key in late:
            del self._waiting[key]
        return [refuse(key, Forbidden(UNKNOWN)) for key in late]


def say(key: CopyKey, message: Message, *payload: Buffer) -> ToCaller:
    """A message to who copies."""
    return ToCaller(key[0], [wire.encode(message), *payload])


def refuse(key: CopyKey, error: KVCacheError) -> ToCaller:
    """The end of a copy, or what it gets instead."""
    return say(key, wire.failed(key[1], error))
