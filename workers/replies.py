"""What was answered lately to requests that must not take effect twice.

A retry carries the id of the request it repeats: it gets the answer that was lost, and changes nothing.
The same id with another body is no retry but a mistake, and is refused. Bounded in time and number;
the oldest go first. Ids mean something only together with the tenant and the client that chose them.

A sequence takes its answers along when it is copied to another worker: a retry may find it there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

from bus.errors import Conflict
from bus.limits import MAX_RECEIPTS
from bus.messages import Generate, KvDone, Message
from bus.stats import Receipt
from workers.calls import RequestKey
from workers.keys import SequenceKey

KEEP_S = 60.0
MAX_ENTRIES = 10_000

_encoder = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class _Entry:
    body: bytes
    at: float
    reply: KvDone | None = None
    sequence: SequenceKey | None = None


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

    def __init__(self, *, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._entries: OrderedDict[RequestKey, _Entry] = OrderedDict()
        self._of: dict[SequenceKey, dict[RequestKey, None]] = {}  # those with a reply, oldest first

    def __len__(self) -> int:
        return len(self._entries)

    def claim(self, request: RequestKey, message: Message, now: float) -> KvDone | None:
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

    def keep(self, request: RequestKey, sequence: SequenceKey, reply: KvDone) -> None:
        """The claimed request took effect on this sequence, with this answer."""
        entry = self._entries.get(request)
        if entry is not None:
            entry.reply, entry.sequence = reply, sequence
            self._of.setdefault(sequence, {})[request] = None

    def receipts(self, sequence: SequenceKey) -> tuple[Receipt, ...]:
        """What was answered to changes of this sequence, the latest at most, oldest first."""
        found = list(self._of.get(sequence, ()))[-MAX_RECEIPTS:]
        return tuple(_receipt(request, self._entries[request]) for request in found)

    def adopt(self, sequence: SequenceKey, receipts: Iterable[Receipt], now: float) -> None:
        """Another worker gave these answers, and the sequence is here now."""
        self._expire(now)
        for receipt in receipts:
            request = RequestKey(sequence.tenant, receipt.client, receipt.req_id)
            entry = self._entries.setdefault(request, _Entry(receipt.body, now))
            if entry.reply is None:  # it may have been tried here before the sequence came, in vain
                done = KvDone(req_id=receipt.req_id, length=receipt.length, count=receipt.count, duplicate=True)
                entry.body = receipt.body
                self.keep(request, sequence, done)

    def _expire(self, now: float) -> None:
        while self._entries:
            oldest = next(iter(self._entries.values()))
            if len(self._entries) < self._max_entries and now - oldest.at <= KEEP_S:
                return
            request, entry = self._entries.popitem(last=False)
            if entry.sequence is not None:
                others = self._of[entry.sequence]
                del others[request]
                if not others:
                    del self._of[entry.sequence]


def _receipt(request: RequestKey, entry: _Entry) -> Receipt:
    assert entry.reply is not None, "an answer is kept of what has none"
    return Receipt(request.client, request.req_id, entry.body, entry.reply.length, entry.reply.count)
