"""The client's membership at a broker: say hello until welcomed, then show life, and start again when it falls silent.

A broker that restarts knows nobody, so silence means another hello, which is harmless if it was only slow. A
`Welcome` with another session means that all which was under way there is forgotten. Core: no sockets, no clock.
"""

from __future__ import annotations

import msgspec

from bus import wire
from bus.messages import Beat, Goodbye, Hello, Message, Welcome

HELLO_S = 0.25
MISSED_BEATS = 3


class Session:
    """limits: the last welcome, None before the first. renewed_at: when a broker was last found to know us no more."""

    def __init__(self, instance: bytes, software: str, now: float) -> None:
        self.is_joined = False
        self.limits: Welcome | None = None
        self.renewed_at = float("-inf")
        self._hello = Hello(instance=instance, major=wire.MAJOR, minor=wire.MINOR, software=software)
        self._session = b""
        self._heard_at = now
        self._due_at = now
        self._beats = 0

    def heard(self, now: float) -> None:
        """Something came from the broker."""
        self._heard_at = now

    def leave(self, now: float) -> None:
        """The broker said goodbye: whoever answers next knows nothing of what was under way."""
        self._session = b""
        self.is_joined = False
        self._due_at = now

    def welcome(self, message: Welcome, now: float) -> bool:
        """The broker took us in; True if it knows nothing of what was under way."""
        is_new = message.session != self._session
        if self.limits is not None and is_new:
            self.renewed_at = now
        self.limits = message
        self._session = message.session
        self.is_joined = True
        self._due_at = now + message.heartbeat_ms / 1000
        return is_new

    def tick(self, now: float) -> Message | None:
        """What is to be said now to join or to stay; None if nothing is due."""
        if self.limits is not None and now - self._heard_at > MISSED_BEATS * self.limits.heartbeat_ms / 1000:
            self.is_joined = False
        if now < self._due_at:
            return None
        if not self.is_joined or self.limits is None:
            self._due_at = now + HELLO_S
            self._hello = msgspec.structs.replace(self._hello, number=self._hello.number + 1)
            return self._hello
        self._due_at = now + self.limits.heartbeat_ms / 1000
        self._beats += 1
        return Beat(beat=self._beats)

    def goodbye(self) -> Message | None:
        """What to say when the client closes; None if nobody listens."""
        return Goodbye(reason="the client closes") if self.is_joined else None
