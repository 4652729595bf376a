"""What was answered lately to requests that must not take effect twice.

A retry carries the id of the request it repeats: it gets the answer that was lost, and changes nothing.
The same id with another body is no retry but a mistake, and is refused. Bounded in time and number;
the oldest go first. Ids mean something only together with the tenant and the client that chose them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

from bus.errors import Conflict
from bus.messages import Generate, Message
from workers.calls import RequestKey

KEEP_S = 60.0
MAX_ENTRIES = 10_000

_encoder = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class _Entry:
    body: bytes
    at: float
    reply: Message | None = None


def body_hash(message: Message) -> bytes:
    """A digest of what a request asks for: all of it but what differs from one attempt to the next.

    Payload bytes count by their lengths and checksums; those that follow in chunks do not count.
    """
    varying: dict[str, Any] = {"attempt": 0, "deadline_ms": 0}
    if isinstance(message, Generate):
        varying |= {"epoch": 0, "stream_id": bytes(16), "payload": message.payload[:1], "explain": False}
    encoded = _encoder.encode(msgspec.structs.replace(message, **varying))
    return blake2b(bytes([message.opcode]) + encoded, digest_size=16).digest()


class Replies:
    """Entries by request, oldest first."""

    def __init__(self, *, keep_s: float = KEEP_S, max_entries: int = MAX_ENTRIES) -> None:
        self._keep_s = keep_s
        self._max_entries = max_entries
        self._entries: OrderedDict[RequestKey, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def claim(self, request: RequestKey, message: Message, now: float) -> Message | None:
        """Note that this request is being served; returns its answer if it was given one already.

        None means: go ahead. Raises Conflict if the id was used for something else.
        """
        self._expire(now)
        body = body_hash(message)
        known = self._entries.get(request)
        if known is None:
            self._entries[request] = _Entry(body, now)
            return None
        if known.body != body:
            raise Conflict("this request id was used for a different request; make a new id for each request")
        return known.reply

    def keep(self, request: RequestKey, reply: Message) -> None:
        """The claimed request took effect, with this answer."""
        entry = self._entries.get(request)
        if entry is not None:
            entry.reply = reply

    def _expire(self, now: float) -> None:
        while self._entries:
            oldest = next(iter(self._entries.values()))
            if len(self._entries) < self._max_entries and now - oldest.at <= self._keep_s:
                return
            self._entries.popitem(last=False)
