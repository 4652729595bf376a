"""How any request ends badly, and the envelopes of requests between broker and worker, which are calls there."""

from __future__ import annotations

from typing import Annotated

import msgspec

from bus.messages.copying import PullOrder
from bus.messages.fields import I63, MAX_MILLIS, U32, U63, Copies, Id16, Message, Millis, Name, Text, TraceParent


class Failed(Message, frozen=True):
    """The one bad end of any request. `req_id` is all zero when the request could not be read that far."""

    opcode = 96
    req_id: Id16
    code: U32
    message: Text
    retryable: bool
    retry_after_ms: Millis = 0
    detail: I63 = 0


class Assign(Message, frozen=True):
    """Envelope, broker to worker: a request begins. The client's own frames follow untouched.

    call: the broker's number for it. tenant, client: who asks, by the broker's word. reason: why this worker.
    pull: where to copy the KV of the prompt's beginning from, if that pays.
    newest: the newest version of the sequence that the broker has heard of; an older copy must not answer.
    version: what a write makes it. copies: how many workers are given this write.
    trace: the broker's own span, if it records one; else that of the request counts.
    """

    opcode = 112
    call: U63
    tenant: Name
    client: Id16
    deadline_ms: Millis
    reason: Text
    pull: PullOrder | None = None
    newest: U63 = 0
    version: U63 = 0
    copies: Copies = 1
    trace: TraceParent = ""


class Forward(Message, frozen=True):
    """Envelope, broker to worker: more of a request that was assigned (a cancel, an ack, a chunk)."""

    opcode = 113
    call: U63


class Reply(Message, frozen=True):
    """Envelope, worker to broker: an answer within a call; `final` ends it. The answer's frames follow untouched.

    version: that of the sequence, if this answers a write that took effect.
    """

    opcode = 114
    call: U63
    final: bool
    version: U63 = 0


class Release(Message, frozen=True):
    """Broker to worker: nobody waits for this call any more; stop its work. No answer is expected."""

    opcode = 115
    call: U63


class Relay(Message, frozen=True):
    """Envelope, worker to broker and on to another worker of the same user, for two that cannot reach each other.

    worker_id: on the way to the broker, for whom; from there, by whom. is_answer: of who is copied from; else it is a
    request. What one worker says to the other follows untouched.
    """

    opcode = 117
    worker_id: Name
    is_answer: bool


class Prefilled(Message, frozen=True):
    """Worker to broker: this call's first token is out. How much was computed for it, and in what time.

    num_cached of its num_tokens were there. compute_ms: its part of the steps it was in, by tokens.
    """

    opcode = 116
    call: U63
    num_tokens: U63
    num_cached: U63
    compute_ms: Annotated[float, msgspec.Meta(ge=0, le=MAX_MILLIS)]
