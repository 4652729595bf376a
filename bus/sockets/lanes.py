"""Kinds of traffic and the socket options of each; what may become of a message that is sent."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from bus.limits import CHUNK_BYTES

CONTROL_MESSAGE_BYTES = CHUNK_BYTES + 64 * 1024


class Sent(enum.Enum):
    """What became of a send. QUEUED goes out in order unless the peer leaves; FULL and GONE were not sent at all."""

    DONE = enum.auto()
    QUEUED = enum.auto()
    FULL = enum.auto()
    GONE = enum.auto()


@dataclass(frozen=True, slots=True)
class Lane:
    """Socket options of one kind of traffic; queue_limit is ours, in messages per peer, beyond libzmq's HWM.

    silence_ms: how long a connection may say nothing at all before libzmq ends it. A message counts when it is whole.
    0: for ever, where peers may not know ZeroMQ's heartbeats.
    """

    send_hwm: int
    receive_hwm: int
    max_message_bytes: int
    queue_limit: int
    silence_ms: int
    zero_copy: bool = False


CONTROL = Lane(
    send_hwm=256, receive_hwm=256, max_message_bytes=CONTROL_MESSAGE_BYTES, queue_limit=1024, silence_ms=1500
)
# A chunk has so long to arrive, so the slowest link that carries bulk data does some 70 kB/s.
BULK = Lane(
    send_hwm=4,
    receive_hwm=4,
    max_message_bytes=CHUNK_BYTES + 4096,
    queue_limit=64,
    silence_ms=15_000,
    zero_copy=True,
)
TOKENS = Lane(send_hwm=4000, receive_hwm=4000, max_message_bytes=16 * 1024, queue_limit=0, silence_ms=3000)
SUBSCRIPTIONS = Lane(send_hwm=4000, receive_hwm=1000, max_message_bytes=64, queue_limit=0, silence_ms=3000)
# Readers are not ours. A replay is queued whole, twice what is kept of events, and shares its bytes with the others.
KV_EVENTS = Lane(send_hwm=10_000, receive_hwm=64, max_message_bytes=64, queue_limit=20_000, silence_ms=0)
