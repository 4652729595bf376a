"""Who may copy from this worker: tickets that the broker announced, each good for one copy, and soon.

A ticket is 16 random bytes that the broker told to the two workers concerned and to nobody else. It is bound to
who asks, to a tenant and to how much of a prompt it is for; this worker keeps the time, so no clocks are compared.
"""

from __future__ import annotations

from bus.errors import Forbidden
from bus.messages import Grant

MAX_TICKETS = 4096


class Tickets:
    """Tickets that were granted and not used. The oldest goes when there are too many."""

    def __init__(self) -> None:
        self._grants: dict[bytes, tuple[Grant, float]] = {}

    def __len__(self) -> int:
        return len(self._grants)

    def __contains__(self, ticket: bytes) -> bool:
        return ticket in self._grants

    def add(self, grant: Grant, now: float) -> None:
        if len(self._grants) >= MAX_TICKETS:
            del self._grants[next(iter(self._grants))]
        self._grants[grant.ticket] = (grant, now + grant.ttl_ms / 1000)

    def take(self, ticket: bytes, worker_id: str, now: float) -> Grant:
        """What this worker may copy; the ticket is used up, even by one it is not for. Raises Forbidden."""
        grant, expires_at = self._grants.pop(ticket, (None, 0.0))
        if grant is None or now >= expires_at or grant.target != worker_id:
            raise Forbidden("this ticket is not good here, or not any more; the broker gives a new one for each copy")
        return grant

    def expire(self, now: float) -> None:
        """Forget those whose time is up."""
        for ticket in [ticket for ticket, (_, expires_at) in self._grants.items() if now >= expires_at]:
            del self._grants[ticket]
