"""The client's decisions: which request is sent when, again or no more, and what each answer means.

Messages and `now` go in, actions come out; sockets and clocks are in `connection`. Invariants:

- every call that was submitted ends in exactly one `Settle` or `Fail`, at the latest `GRACE_S` after its deadline;
- nothing is sent before a broker has welcomed us, and all that was under way is sent again to one that knows
  nothing of it, under the same ids;
- at most `MAX_OUT` requests are out, generations aside, so that one client's thousand calls wait here rather than
  overrun a worker; each begins in its turn, and at most `MAX_READS` of them have chunks on their way to us;
- writes wait for each other on the bulk lane, ours by a limit of what is under way, and those of other clients as TCP's
  senders do: whoever finds no room takes half as much from then on, tries again within its deadline, and takes more
  again bit by bit as writes succeed (Jacobson 1988, "Congestion Avoidance and Control");
- only what may end better is tried again: within its deadline, a few times, and within the budget, which a worker's
  loss does not touch. While a broker restarts, the deadline alone is the limit.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bus import wire
from bus.errors import (
    ConnectionLost,
    Corrupt,
    DeadlineExceeded,
    Draining,
    KVCacheError,
    NoWorkers,
    Overloaded,
    UnsupportedVersion,
    WorkerLost,
    error_from_wire,
)
from bus.messages import (
    AttachBulk,
    BrokerBeat,
    Failed,
    Goodbye,
    KvValue,
    Message,
    StreamBeat,
    StreamTokens,
    SubAck,
    Welcome,
)
from bus.wire import Buffer
from kvcache.client.calls import NO_ACTIONS, Action, Call, Fail, Settle, ToBulk, ToControl, Unwatch, Watch
from kvcache.client.retries import RetryBudget, retry_delay
from kvcache.client.session import Session
from kvcache.client.streams import GenerateCall
from kvcache.client.transfers import ReadCall, WriteCall

log = logging.getLogger(__name__)

GRACE_S = 0.75
FIRST_CONTACT_S = 5.0
RESTART_GRACE_S = 10.0
REJOIN_SPREAD_S = 0.1
MAX_PENDING = 4096
MAX_OUT = 256
MAX_READS = 7
"""Each may have `GET_CREDIT` chunks and what announces them under way: together they fit into the 64 messages that a
broker or a worker keeps for a peer beyond what it can send, and refuses more."""
MAX_UPLOADED = 28
"""A write begins on the bulk lane while fewer messages of others are under way there, so that there are 36 at most:
half of what the broker keeps for a worker."""
ATTACH_S = 1.0


@dataclass(slots=True)
class Pending:
    """A call and how far its attempts have got. `attempt` is the number of the next one."""

    call: Call
    submitted_at: float
    not_before: float
    attempt: int = 0
    is_out: bool = False
    is_queued: bool = False
    retries: int = 0
    failures: int = 0
    progress: int = 0


class ClientCore:
    """One client's state. `jitter` draws numbers from 0 to 1; `url` is for messages to people."""

    def __init__(
        self,
        instance: bytes,
        *,
        url: str,
        software: str,
        max_retries: int,
        jitter: Callable[[], float],
        now: float,
    ) -> None:
        self._url = url
        self._session = Session(instance, software, now)
        self._max_retries = max_retries
        self._jitter = jitter
        self._budget = RetryBudget(now)
        self._refusal: UnsupportedVersion | None = None
        self._pending: dict[bytes, Pending] = {}  # by key
        self._by_request: dict[bytes, Pending] = {}  # by the id of the attempt that is out
        self._by_stream: dict[bytes, Pending] = {}
        self._attach_by: float | None = None  # the bulk lane is not known to be ours yet; then go on without
        self._out: set[bytes] = set()  # keys of the calls that are out and count
        self._queue: deque[Pending] = deque()  # those that have not begun because too many were out
        self._reading: set[bytes] = set()  # keys of the reads that may have chunks under way
        self._announced: deque[Pending] = deque()  # reads whose values wait until they may
        self._uploading: dict[bytes, int] = {}  # by key of a write that is out: messages it may have under way
        self._upload_limit = MAX_UPLOADED
        self._writes: deque[Pending] = deque()  # those that have not begun because too many would be

    @property
    def is_joined(self) -> bool:
        """Whether a broker has welcomed us and still answers."""
        return self._session.is_joined

    def is_pending(self, req_id: bytes) -> bool:
        """Whether an attempt with this request id is out; if not, what is left of it need not be sent."""
        return req_id in self._by_request

    # --- from the user ---------------------------------------------------------------------------

    def submit(self, call: Call, now: float) -> list[Action]:
        """Take a call on. It is sent at once if a broker is there."""
        if self._refusal is not None:
            return [self._named(call, self._refusal)]
        if len(self._pending) >= MAX_PENDING:
            return [self._named(call, Overloaded(f"this client has {MAX_PENDING} requests under way"))]
        self._budget.earn()
        pending = Pending(call, now, now)
        self._pending[call.key] = pending
        return self._begin(pending, now) if self._can_begin else []

    def abandon(self, key: bytes) -> list[Action]:
        """Nobody waits for this call any more. Unknown and ended ones are none of our business."""
        pending = self._pending.get(key)
        return [] if pending is None else self._end(pending, tell=True)

    def consume(self, key: bytes, upto: int, now: float) -> list[Action]:
        """The reader of a generation has used its tokens below `upto`."""
        pending = self._pending.get(key)
        if pending is None or not isinstance(pending.call, GenerateCall):
            return []
        return self._apply(pending, pending.call.consume(upto, now), now)

    def close(self) -> list[Action]:
        """The client ends: stop what runs for it, and say goodbye."""
        actions = [action for pending in list(self._pending.values()) for action in self._end(pending, tell=True)]
        goodbye = self._session.goodbye()
        return actions if goodbye is None else [*actions, ToControl(goodbye)]

    # --- from the broker -------------------------------------------------------------------------

    def on_message(self, message: Message, payload: Sequence[Buffer], now: float) -> list[Action]:
        """A message on the control or the bulk lane."""
        self._session.heard(now)
        match message:
            case BrokerBeat():
                return []
            case Welcome():
                return self._welcomed(message, now)
            case Goodbye():
                self._session.leave(now)
                return []
            case Failed():
                actions = self._on_failed(message, now)
            case _:
                actions = self._answered(getattr(message, "req_id", b""), message, payload, now)
        return [*actions, *self._begin_queued(now)] if self._queue or self._announced or self._writes else actions

    def on_attached(self, now: float) -> list[Action]:
        """The bulk lane has said whose it is: what is asked for now can be answered on it."""
        if self._attach_by is None:  # it was known before
            return []
        self._attach_by = None
        return self._begin_due(now)

    def on_broken(self, req_id: bytes, error: KVCacheError, now: float) -> list[Action]:
        """An answer to this request could not be read."""
        self._session.heard(now)
        pending = self._by_request.get(req_id)
        if pending is None:
            log.warning("a message from the broker could not be read: %s", error)
            return []
        return self._failed(pending, error, now, tell=True)

    def on_stream(self, stream_id: bytes, message: SubAck | StreamTokens | StreamBeat, now: float) -> list[Action]:
        """A message on a stream that was subscribed to."""
        pending = self._by_stream.get(stream_id)
        return [] if pending is None else self._receive(pending, message, (), now)

    def on_unsent(self, req_id: bytes, now: float) -> list[Action]:
        """Our own queue to the broker is full, so this request did not leave."""
        pending = self._by_request.get(req_id)
        if pending is None:
            return []
        return self._failed(pending, Overloaded("too much is waiting to be sent to the broker"), now, tell=False)

    # --- time ------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """Time has passed; call it every 50 ms or so."""
        due = self._session.tick(now)
        actions: list[Action] = [] if due is None else [ToControl(due)]
        if self._attach_by is not None and now >= self._attach_by:
            self._attach_by = None
        for pending in list(self._pending.values()):
            if pending.call.key in self._pending:
                actions += self._tick_one(pending, now)
        return [*actions, *self._begin_queued(now)]

    def _tick_one(self, pending: Pending, now: float) -> Sequence[Action]:
        deadline = pending.call.deadline
        if pending.is_out and now >= deadline + GRACE_S:
            return self._give_up(pending, DeadlineExceeded("the deadline passed and no answer came"), tell=True)
        if not pending.is_out:
            if not self._session.is_joined:
                return self._check_contact(pending, now)
            if now >= deadline:
                return self._give_up(
                    pending, DeadlineExceeded("the deadline passed before it could be sent"), tell=False
                )
            return self._begin_if_due(pending, now)
        return self._apply(pending, pending.call.tick(now), now) if self._session.is_joined else NO_ACTIONS

    def _check_contact(self, pending: Pending, now: float) -> Sequence[Action]:
        """Nobody answers. A broker that was there may come back; one that never was gets a few seconds."""
        until = pending.call.deadline
        if self._session.limits is None:
            until = min(until, pending.submitted_at + FIRST_CONTACT_S)
        if now < until:
            return NO_ACTIONS
        waited = now - pending.submitted_at
        error = ConnectionLost(f"no broker answers at {self._url} (waited {waited:.1f} s); is one running there?")
        return self._give_up(pending, error, tell=False)

    # --- attempts and their ends -----------------------------------------------------------------

    @property
    def _can_begin(self) -> bool:
        return self._session.is_joined and self._attach_by is None

    def _begin_due(self, now: float) -> list[Action]:
        return [a for pending in list(self._pending.values()) for a in self._begin_if_due(pending, now)]

    def _begin_if_due(self, pending: Pending, now: float) -> Sequence[Action]:
        if pending.is_out or pending.is_queued or now < pending.not_before or not self._can_begin:
            return NO_ACTIONS
        return self._begin(pending, now)

    def _begin(self, pending: Pending, now: float) -> list[Action]:
        limits = self._session.limits
        assert limits is not None
        if not isinstance(pending.call, GenerateCall):
            if len(self._out) >= MAX_OUT:
                pending.is_queued = True
                self._queue.append(pending)
                return []
            num_messages = pending.call.num_messages(limits) if isinstance(pending.call, WriteCall) else 0
            if num_messages and not self._may_upload:
                pending.is_queued = True
                self._writes.append(pending)
                return []
            if num_messages:
                self._uploading[pending.call.key] = num_messages
            self._out.add(pending.call.key)
        if isinstance(pending.call, ReadCall):
            pending.call.has_turn = self._take_turn(pending.call.key)
        attempt, pending.attempt = pending.attempt, pending.attempt + 1
        pending.is_out = True
        try:
            actions = pending.call.begin(attempt, limits, now)
        except KVCacheError as error:
            return self._give_up(pending, error, tell=False)
        self._by_request[pending.call.req_id] = pending
        return self._apply(pending, actions, now)

    def _begin_queued(self, now: float) -> list[Action]:
        """Let those begin, or go on, that have waited for others to end, as far as there is room."""
        actions: list[Action] = []
        while self._announced and len(self._reading) < MAX_READS:
            pending = self._announced.popleft()
            if isinstance(pending.call, ReadCall) and pending.is_out and pending.call.waits:
                self._take_turn(pending.call.key)
                actions += pending.call.go_on()
        while self._can_begin and len(self._out) < MAX_OUT:
            if self._writes and self._may_upload:
                pending = self._writes.popleft()
            elif self._queue:
                pending = self._queue.popleft()
            else:
                break
            pending.is_queued = False
            if pending.call.key in self._pending:
                actions += self._begin(pending, now)
        return actions

    @property
    def _may_upload(self) -> bool:
        return sum(self._uploading.values()) < self._upload_limit

    def _take_turn(self, key: bytes) -> bool:
        """Let a read have chunks under way, if there is room for them."""
        if len(self._reading) >= MAX_READS:
            return False
        self._reading.add(key)
        return True

    def _welcomed(self, message: Welcome, now: float) -> list[Action]:
        if not self._session.welcome(message, now):
            return []
        self._attach_by = now + ATTACH_S
        actions: list[Action] = []
        for pending in list(self._pending.values()):
            if pending.is_out:  # spread out: every other client of that broker does the same now
                actions += self._suspend(pending, now, tell=False)
                pending.not_before = now + REJOIN_SPREAD_S * self._jitter()
        return [*actions, ToBulk(AttachBulk(session=message.session))]

    def _answered(self, req_id: bytes, message: Message, payload: Sequence[Buffer], now: float) -> list[Action]:
        pending = self._by_request.get(req_id)
        return [] if pending is None else self._receive(pending, message, payload, now)

    def _receive(self, pending: Pending, message: Message, payload: Sequence[Buffer], now: float) -> list[Action]:
        try:
            actions = pending.call.receive(message, payload, now)
        except KVCacheError as error:
            return self._failed(pending, error, now, tell=True)
        if isinstance(message, KvValue) and isinstance(pending.call, ReadCall) and pending.call.waits:
            self._announced.append(pending)
        return self._apply(pending, actions, now)

    def _on_failed(self, message: Failed, now: float) -> list[Action]:
        error = error_from_wire(
            message.code, message.message, detail=message.detail, retry_after_ms=message.retry_after_ms
        )
        pending = self._by_request.get(message.req_id)
        if pending is not None:
            return self._failed(pending, error, now, tell=False)
        if message.req_id == wire.NO_REQUEST:
            log.warning("the broker refuses a message: %s", error)
            if isinstance(error, UnsupportedVersion):
                self._refusal = error
                return [a for p in list(self._pending.values()) for a in self._give_up(p, error, tell=False)]
        return []

    def _apply(self, pending: Pending, actions: Sequence[Action], now: float) -> list[Action]:
        """Take note of what a call does that concerns the core too."""
        result: list[Action] = []
        for action in actions:
            match action:
                case Fail():
                    return [*result, *self._failed(pending, action.error, now, tell=True)]
                case Settle():
                    if pending.call.key in self._uploading:
                        self._upload_limit = min(MAX_UPLOADED, self._upload_limit + 1)
                    return [*result, *self._end(pending, tell=False), action]
                case Watch():
                    self._by_stream[action.stream_id] = pending
                case Unwatch():
                    self._by_stream.pop(action.stream_id, None)
                case _:
                    pass
            result.append(action)
        return result

    def _failed(self, pending: Pending, error: KVCacheError, now: float, *, tell: bool) -> list[Action]:
        """An attempt failed: try again later if that is allowed, else this is the call's end."""
        delay = self._delay(pending, error, now)
        if delay is None or now + delay >= pending.call.deadline:
            return self._give_up(pending, error, tell=tell)
        actions = self._suspend(pending, now, tell=tell)
        pending.not_before = now + delay
        return actions

    def _delay(self, pending: Pending, error: KVCacheError, now: float) -> float | None:
        """Seconds until the next attempt; None if there is to be none."""
        if not pending.call.may_retry(error):
            return None
        if pending.call.progress > pending.progress:
            pending.progress = pending.call.progress
            pending.retries = pending.failures = 0
        if isinstance(error, Overloaded) and pending.call.key in self._uploading:
            self._upload_limit = max(1, self._upload_limit // 2)
        elif not self._is_passing(error, now):
            # A worker that dies fails all its calls at once, and each needs just one more attempt, elsewhere: no storm.
            may_spend = isinstance(error, WorkerLost) or self._budget.spend(now)
            if pending.retries >= self._max_retries or not may_spend:
                return None
            pending.retries += 1
        pending.failures += 1
        return retry_delay(pending.failures - 1, error.retry_after_ms, self._jitter)

    def _is_passing(self, error: KVCacheError, now: float) -> bool:
        """Whether it is being mended, or comes from a broker that stops, or that has just started or did not run for a
        while and so does not know its workers again either: worth waiting for."""
        if isinstance(error, NoWorkers):
            return error.is_coming or now - self._session.renewed_at < RESTART_GRACE_S
        return isinstance(error, Draining | ConnectionLost)

    def _suspend(self, pending: Pending, now: float, *, tell: bool) -> list[Action]:
        pending.is_out = False
        pending.not_before = now
        self._out.discard(pending.call.key)
        self._reading.discard(pending.call.key)
        self._uploading.pop(pending.call.key, None)
        self._by_request.pop(pending.call.req_id, None)
        return self._apply(pending, pending.call.leave(tell=tell), now)

    def _give_up(self, pending: Pending, error: KVCacheError, *, tell: bool) -> list[Action]:
        return [*self._end(pending, tell=tell), self._named(pending.call, error)]

    def _end(self, pending: Pending, *, tell: bool) -> list[Action]:
        self._pending.pop(pending.call.key, None)
        self._out.discard(pending.call.key)
        self._reading.discard(pending.call.key)
        self._uploading.pop(pending.call.key, None)
        self._by_request.pop(pending.call.req_id, None)
        actions = list(pending.call.leave(tell=tell))
        for action in actions:
            if isinstance(action, Unwatch):
                self._by_stream.pop(action.stream_id, None)
        return actions

    def _named(self, call: Call, error: KVCacheError) -> Fail:
        """Errors are told with the request they belong to; each request has its own copy."""
        copy = type(error)(
            error.message, detail=error.detail, retry_after_ms=error.retry_after_ms, request_id=call.key.hex()
        )
        return Fail(call.key, copy)


def corrupt(error: KVCacheError) -> Corrupt:
    """What a payload that does not match its checksum means to whoever waits for it."""
    return Corrupt(f"the answer was damaged on its way: {error.message}")
