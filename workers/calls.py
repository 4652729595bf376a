"""Calls: the requests that brokers have handed to this worker and that have no final answer yet.

A call is known by its link and the broker's number for it; who asked is a `RequestKey`, whose tenant and
client are the broker's word. The table makes every answer, so that it can promise: exactly one final
answer per call, none after it, and none over a session that is gone. It remembers the calls of a session that
this worker gave up by itself, as long as the broker may still wait for them. What the work of a call is stands
in `generations` and `kv_plane`.
"""

from __future__ import annotations

import enum
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from bus import wire
from bus.errors import ErrorCode, KVCacheError
from bus.messages import Assign, Dispatched, Failed, Generate, Message, PullOrder, Reply, StreamEnd
from bus.traces import Span, TraceContext, sampled
from bus.wire import Buffer
from kvcache.logs import about
from workers.block_changes import BlockChange
from workers.engine_api import Command

SPAN_NAME = "kvcache.worker"
MAX_RELEASED = 16_384
"""Some MB; far more than what a broker lets one client have in flight, all of which may be given up at once."""

log = logging.getLogger(__name__)


class CallId(NamedTuple):
    """`number` is the broker's; `link` says which broker."""

    link: int
    number: int


class RequestKey(NamedTuple):
    """Who asked for what. Retries of one request have one key."""

    tenant: str
    client: bytes
    req_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request in progress. deadline: monotonic seconds. reason: why the broker chose this worker.

    pull: where it says that the beginning of the prompt may be copied from.
    newest, version, copies: see `bus.messages.Assign`. label: how logs call it.
    opened_at: monotonic seconds. trace: what it is a part of, if that is recorded.
    """

    id: CallId
    request: RequestKey
    message: Dispatched
    deadline: float
    reason: str
    pull: PullOrder | None
    newest: int = 0
    version: int = 0
    copies: int = 1
    label: str = ""
    opened_at: float = 0.0
    trace: TraceContext | None = None


class Channel(enum.Enum):
    """The two connections to each broker."""

    CONTROL = enum.auto()
    BULK = enum.auto()


@dataclass(frozen=True, slots=True)
class Send:
    """One message for a broker. `call`: whose work suffers if it cannot be sent. `point`: where a test may drop it."""

    link: int
    channel: Channel
    frames: Sequence[Buffer]
    call: CallId | None = None
    point: str = ""


@dataclass(frozen=True, slots=True)
class Publish:
    """One message on a stream's topic, through one broker."""

    link: int
    topic: bytes
    frame: bytes


@dataclass(frozen=True, slots=True)
class Tell:
    """A command for the engine."""

    command: Command


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop what still waits to be sent to a broker that does not answer; it belongs to no session."""

    link: int


@dataclass(frozen=True, slots=True)
class ToPeer:
    """One message for the worker at an address, to which a connection is made if there is none."""

    url: str
    frames: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class HangUp:
    """Close the connection to that address, with all that waits to be sent over it."""

    url: str


@dataclass(frozen=True, slots=True)
class ToCaller:
    """One message for a worker, or whoever it is, that speaks at our own endpoint."""

    peer: bytes
    frames: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell followers of block events, who are no part of this system."""

    changes: Sequence[BlockChange]


@dataclass(frozen=True, slots=True)
class Record:
    """A span that ends now."""

    span: Span


Action: TypeAlias = Send | Publish | Tell | Forget | ToPeer | HangUp | ToCaller | Announce | Record


class Calls:
    """The table. It answers; what to answer is the business of others."""

    def __init__(self) -> None:
        self._calls: dict[CallId, Call] = {}
        self._disowned: dict[CallId, bytes] = {}  # with their request ids
        self._released: OrderedDict[CallId, None] = OrderedDict()  # before they were here, oldest first

    def __len__(self) -> int:
        return len(self._calls)

    def open(self, link: int, assign: Assign, message: Dispatched, now: float) -> Call:
        call = Call(
            id=CallId(link, assign.call),
            request=RequestKey(assign.tenant, assign.client, message.req_id),
            message=message,
            deadline=now + assign.deadline_ms / 1000,
            reason=assign.reason,
            pull=assign.pull,
            newest=assign.newest,
            version=assign.version,
            copies=assign.copies,
            opened_at=now,
            trace=sampled(assign.trace or message.trace) if isinstance(message, Generate) else None,
            label=(message.label if isinstance(message, Generate) else "") or message.req_id.hex(),
        )
        self._calls[call.id] = call
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s begins, %s", type(message).__name__, call.reason, extra=about(call.label))
        return call

    def find(self, call_id: CallId) -> Call | None:
        """The call of that id, None if it has ended or never was."""
        return self._calls.get(call_id)

    def of_link(self, link: int) -> list[Call]:
        return [call for call in self._calls.values() if call.id.link == link]

    def overdue(self, now: float) -> list[Call]:
        return [call for call in self._calls.values() if call.deadline <= now]

    def everything(self) -> Iterator[Call]:
        """All open calls, for whoever is about to end them."""
        return iter(list(self._calls.values()))

    def say(self, call: Call, message: Message, *payload: Buffer, channel: Channel = Channel.CONTROL) -> list[Action]:
        """An answer that is not the last one. Nothing, if the call is over."""
        if call.id not in self._calls:
            return []
        return [_answer(call.id, message, payload, channel, final=False)]

    def finish(
        self,
        call: Call,
        message: Message,
        *payload: Buffer,
        channel: Channel = Channel.CONTROL,
        version: int = 0,
    ) -> list[Action]:
        """The last answer; to a write with the version that it made. Nothing, if the call is over already."""
        if self._calls.pop(call.id, None) is None:
            return []
        _log_end(call, message)
        answer = _answer(call.id, message, payload, channel, final=True, version=version)
        return [answer] if call.trace is None else [answer, Record(_span(call, call.trace, message))]

    def fail(self, call: Call, error: KVCacheError) -> list[Action]:
        """The last answer, a bad one."""
        return self.finish(call, wire.failed(call.request.req_id, error))

    def refuse(self, call_id: CallId, req_id: bytes, error: KVCacheError) -> list[Action]:
        """The one answer to a request that is no call here: it never became one, or was disowned."""
        return [_answer(call_id, wire.failed(req_id, error), (), Channel.CONTROL, final=True)]

    def forget(self, call: Call) -> list[Action]:
        """Nobody waits for it any more."""
        if self._calls.pop(call.id, None) is None:
            return []
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s ends: nobody waits for it", type(call.message).__name__, extra=about(call.label))
        return [] if call.trace is None else [Record(_span(call, call.trace, None))]

    def disown(self, call: Call) -> list[Action]:
        """We give its session up. Its broker may not have, and then waits for an answer."""
        self._disowned[call.id] = call.request.req_id
        return self.forget(call)

    def settle(self, call_id: CallId) -> None:
        """If it was disowned: nobody waits for it any more."""
        self._disowned.pop(call_id, None)

    def release(self, call_id: CallId) -> None:
        """Nobody waits for a call that is not here: it has ended, or is still to come, on the other lane."""
        self._released[call_id] = None
        if len(self._released) > MAX_RELEASED:
            self._released.popitem(last=False)

    def is_released(self, call_id: CallId) -> bool:
        """Whether nobody waits any more for a call that is to begin now."""
        return call_id in self._released

    def forget_released(self, link: int) -> None:
        """A session ended, after which the broker may be another one and count anew."""
        for call_id in [call_id for call_id in self._released if call_id.link == link]:
            del self._released[call_id]

    def take_disowned(self, link: int) -> list[tuple[CallId, bytes]]:
        """The calls of that link that were disowned, with their request ids. They are forgotten now."""
        ids = [call_id for call_id in self._disowned if call_id.link == link]
        return [(call_id, self._disowned.pop(call_id)) for call_id in ids]


def _log_end(call: Call, message: Message) -> None:
    """A fault of ours is always told, so that a traceback nearby can be joined to its request; all else in detail only.

    An error's words stay out: they may quote what the client sent.
    """
    kind = type(call.message).__name__
    if isinstance(message, Failed):
        code = ErrorCode(message.code)
        level = logging.WARNING if code is ErrorCode.INTERNAL else logging.DEBUG
        log.log(level, "%s ends: %s", kind, code.name, extra=about(call.label))
    elif log.isEnabledFor(logging.DEBUG):
        log.debug("%s ends: %s", kind, _figures(message), extra=about(call.label))


def _span(call: Call, trace: TraceContext, end: Message | None) -> Span:
    """A generation's, by OpenTelemetry's names where it has some (semantic conventions for generative AI)."""
    attributes: dict[str, str | int | float] = {"kvcache.request.id": call.label}
    if isinstance(call.message, Generate) and call.message.model:
        attributes["gen_ai.request.model"] = call.message.model
    if not isinstance(end, StreamEnd):
        error = ErrorCode(end.code).name if isinstance(end, Failed) else "nobody waits for it"
        return Span(name=SPAN_NAME, parent=trace, started_at=call.opened_at, attributes=attributes, error=error)
    attributes |= {
        "gen_ai.usage.input_tokens": end.prompt_tokens,
        "gen_ai.usage.output_tokens": end.num_tokens,
        "gen_ai.response.finish_reasons": end.finish_reason.value,
        "kvcache.cached_tokens": end.cached_tokens,
    }
    spent = (("queue", end.queue_ms), ("prefill", end.prefill_ms), ("decode", end.decode_ms))
    parts = tuple((name, ms / 1000) for name, ms in spent)
    return Span(name=SPAN_NAME, parent=trace, started_at=call.opened_at, attributes=attributes, parts=parts)


def _figures(message: Message) -> str:
    if not isinstance(message, StreamEnd):
        return "done"
    spent = f"queue {message.queue_ms:.1f} ms, prefill {message.prefill_ms:.1f} ms, decode {message.decode_ms:.1f} ms"
    cached = f"{message.cached_tokens} of {message.prompt_tokens} prompt tokens cached"
    return f"{message.finish_reason}, {message.num_tokens} tokens, {cached}, {spent}"


def _answer(
    call_id: CallId, message: Message, payload: Sequence[Buffer], channel: Channel, *, final: bool, version: int = 0
) -> Send:
    envelope = wire.encode(Reply(call=call_id.number, final=final, version=version))
    return Send(call_id.link, channel, [envelope, wire.encode(message), *payload], call_id)
