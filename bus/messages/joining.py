"""Joining, staying and leaving: hellos, the welcome, beats, and a worker's figures."""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from bus.messages.fields import U32, U63, Id16, Message, Millis, Name, Parts, Text

MAX_BEAT_MODELS = 32


class WorkerState(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class ModelState(enum.StrEnum):
    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class Hello(Message, frozen=True):
    """A client joins. `instance` is random per client object; it scopes request ids with the peer's user id.

    number: of the hellos to one broker, so that one that is read late, from a connection that ended, is known as such.
    """

    opcode = 1
    instance: Id16
    major: U32
    minor: U32
    software: Name
    number: U63 = 0


class WorkerHello(Message, frozen=True):
    """A worker joins. Of two with one `worker_id`, the higher `incarnation` of the same user wins.

    peer_url: where other workers reach it to copy KV; empty if they cannot.
    sequences: how many named sequences it holds, of which it will tell. number: as in `Hello`.
    """

    opcode = 2
    worker_id: Name
    incarnation: U63
    major: U32
    minor: U32
    weight: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100
    state: WorkerState = WorkerState.READY
    pid: U63 = 0
    software: Name = ""
    peer_url: Name = ""
    sequences: U63 = 0
    number: U63 = 0


class Welcome(Message, frozen=True):
    """The broker accepts a peer. `session` is its secret for the bulk lane; limits hold for what it sends.

    first_call: to a worker, the first call of this session. What the bulk lane brings of earlier ones is void.
    """

    opcode = 3
    session: Id16
    incarnation: U63
    major: U32
    minor: U32
    heartbeat_ms: Millis
    lease_ms: Millis
    max_inline_bytes: U63
    max_prompt_bytes: U63
    max_tensor_bytes: U63
    chunk_bytes: U63
    window_tokens: U63
    first_call: U63 = 0


class AttachBulk(Message, frozen=True):
    """The first message on a bulk connection: whose it is."""

    opcode = 4
    session: Id16


class Beat(Message, frozen=True):
    """A client lives. The broker answers each with a `BrokerBeat`."""

    opcode = 5
    beat: U63


class WorkerBeat(Message, frozen=True):
    """A worker lives, and its engine moves: `progress` counts steps. Asks for its lease to be renewed.

    changes: the number of the last `NodesChanged` change that it has told this broker. backlog_tokens: to be computed
    there, whoever asked for them, before every request has its first token.
    """

    opcode = 6
    beat: U63
    state: WorkerState
    running: U32
    waiting: U32
    progress: U63
    kv_used_bytes: U63
    kv_total_bytes: U63
    models: Annotated[tuple[tuple[Name, ModelState], ...], msgspec.Meta(max_length=MAX_BEAT_MODELS)] = ()
    changes: U63 = 0
    backlog_tokens: U63 = 0


class BrokerBeat(Message, frozen=True):
    """Answers the beat of that number; the lease runs from when the beat was *sent*."""

    opcode = 7
    beat: U63
    lease_ms: Millis


class Goodbye(Message, frozen=True):
    """The sender leaves; nothing more comes from it."""

    opcode = 8
    reason: Text


class WorkerStatus(Message, frozen=True):
    """A worker's figures, pushed each second; the payload is a `bus.stats.WorkerStats`."""

    opcode = 9
    payloads = (1, 1)
    payload: Parts
