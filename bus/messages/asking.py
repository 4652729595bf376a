"""Asking about the cluster: figures, workers, health, and where a key would be routed."""

from __future__ import annotations

import enum

from bus.messages.fields import Chain, Id16, Message, Name, Parts, SeqId, Text


class QueryKind(enum.StrEnum):
    STATS = "stats"
    WORKERS = "workers"
    HEALTH = "health"


class Query(Message, frozen=True):
    """What is known of the cluster: all figures, workers as the broker sees them, or only whether it is healthy."""

    opcode = 16
    req_id: Id16
    kind: QueryKind


class Route(Message, frozen=True):
    """Which worker would serve this key now, and why; nothing is dispatched."""

    opcode = 17
    req_id: Id16
    seq_id: SeqId = ""
    chain: Chain = ()
    policy: Name = ""


class QueryReply(Message, frozen=True):
    """The answer to a `Query`; the payload is a `bus.stats.ClusterStats`."""

    opcode = 18
    payloads = (1, 1)
    req_id: Id16
    payload: Parts


class Routed(Message, frozen=True):
    """The answer to a `Route`, and sent with a `Generate(explain=True)`; payload: `bus.stats.Explanation`."""

    opcode = 19
    payloads = (1, 1)
    req_id: Id16
    worker_id: Name
    reason: Text
    payload: Parts
