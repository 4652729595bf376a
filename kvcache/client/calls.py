"""One request under way, as a state machine: messages in, actions out. `core` says when it begins and begins again.

A call has one `key`, the request id of its first attempt, which names it to the user; its effects are applied once
however often it is sent. A call answers with actions, of which exactly one ends it: `Settle` or `Fail`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import msgspec

from bus.errors import KVCacheError, MalformedMessage
from bus.messages import Append, AttachBulk, Chunk, Message, Put, Welcome
from bus.wire import Buffer
from kvcache.client.results import Event


@dataclass(frozen=True, slots=True)
class ToControl:
    """Send on the control lane."""

    message: Message
    payload: Sequence[Buffer] = ()


@dataclass(frozen=True, slots=True)
class ToBulk:
    """Send on the bulk lane, when it has room. A chunk's payload is described when it is sent."""

    message: AttachBulk | Put | Append | Chunk
    payload: Sequence[Buffer] = ()


@dataclass(frozen=True, slots=True)
class Watch:
    """Subscribe to a stream."""

    stream_id: bytes


@dataclass(frozen=True, slots=True)
class Unwatch:
    """Subscribe to it no longer."""

    stream_id: bytes


class Emit(msgspec.Struct, frozen=True):  # as `Deliver`
    """Something for the reader of a generation."""

    key: bytes
    event: Event


@dataclass(frozen=True, slots=True)
class Settle:
    """The call ends with its value."""

    key: bytes
    value: Any


@dataclass(frozen=True, slots=True)
class Fail:
    """The call, or this attempt of it, ends with an error."""

    key: bytes
    error: KVCacheError


Action: TypeAlias = ToControl | ToBulk | Watch | Unwatch | Emit | Settle | Fail

NO_ACTIONS: tuple[Action, ...] = ()


class Call(Protocol):
    """What `core` knows of a request. `progress` counts what has been gained: a retry after some is a first one."""

    key: bytes
    req_id: bytes
    deadline: float

    @property
    def progress(self) -> int:
        return 0

    def begin(self, attempt: int, limits: Welcome, now: float) -> Sequence[Action]:
        """Send it, for the first time or again. `attempt` counts from 0."""

    def receive(self, message: Message, payload: Sequence[Buffer], now: float) -> Sequence[Action]:
        """An answer within it came. Raises MalformedMessage for one that does not belong there."""

    def tick(self, now: float) -> Sequence[Action]:
        """Time has passed while it was under way."""
        return NO_ACTIONS

    def may_retry(self, error: KVCacheError) -> bool:
        """Whether another attempt may end better."""
        return error.retryable

    def leave(self, *, tell: bool) -> Sequence[Action]:
        """This attempt is over. tell: nobody else has told its worker, so do."""
        return NO_ACTIONS


Make: TypeAlias = Callable[..., Message]
Read: TypeAlias = Callable[[Any, Sequence[Buffer]], Any]


class UnaryCall(Call):
    """One message out, one answer back.

    make: the message, from `req_id`, `attempt` and `deadline_ms`; `payload` goes with it. read: the value of an answer,
    or None if it is no answer to this request.
    """

    def __init__(self, key: bytes, deadline: float, make: Make, read: Read, payload: Sequence[Buffer] = ()) -> None:
        self.key = self.req_id = key
        self.deadline = deadline
        self._make = make
        self._read = read
        self._payload = payload

    def begin(self, attempt: int, limits: Welcome, now: float) -> Sequence[Action]:
        left_ms = remaining_ms(self.deadline, now)
        return [ToControl(self._make(req_id=self.req_id, attempt=attempt, deadline_ms=left_ms), self._payload)]

    def receive(self, message: Message, payload: Sequence[Buffer], now: float) -> Sequence[Action]:
        value = self._read(message, payload)
        if value is None:
            raise unexpected(message)
        return [Settle(self.key, value)]


def remaining_ms(deadline: float, now: float) -> int:
    """What is left of the time, in whole milliseconds, and at least one: nothing is sent too late on purpose."""
    return max(1, int((deadline - now) * 1000))


def unexpected(message: Message) -> MalformedMessage:
    """The error for an answer of a kind that the request cannot have."""
    return MalformedMessage(f"{type(message).__name__} is no answer to this request")
