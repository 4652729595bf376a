"""One generation under way, whatever becomes of its workers: it keeps the prompt, the parameters and the tokens so
far, and when a worker or the broker is lost it asks for the rest elsewhere. Nothing the reader saw is repeated or
changed: the seed is fixed before the first attempt, and tokens of an earlier attempt are ignored. Core.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from bus import wire
from bus.errors import KVCacheError, MalformedMessage, ReplayExpired, TooLarge, WorkerLost
from bus.messages import (
    Ack,
    Cancel,
    Generate,
    Message,
    OpenStream,
    PromptLogprobs,
    Replay,
    Resume,
    Routed,
    Sampling,
    Started,
    StreamBeat,
    StreamEnd,
    StreamOpened,
    StreamTokens,
    SubAck,
    Welcome,
)
from bus.stats import Explanation, unpack
from bus.streams import Action as StreamAction
from bus.streams import Arrival, Broken, Deliver, Finished, StreamReceiver
from bus.wire import Buffer
from kvcache.client.calls import (
    NO_ACTIONS,
    Action,
    Emit,
    Fail,
    Settle,
    ToControl,
    Unwatch,
    Watch,
    remaining_ms,
    unexpected,
)
from kvcache.client.prompts import Prompt
from kvcache.client.results import Done, PromptTokens, Start, Timings, Token, Usage
from kvcache.client.tokens import PromptReceiver, as_tokens

SUBACK_S = 0.5
SUBACK_TRIES = 3
TAIL_S = 5.0
MAX_UNREAD = 8192


class Phase(enum.Enum):
    """IDLE: not begun, or waiting to begin again. OPENING: the broker was asked for a stream. SUBSCRIBING: our
    subscription is not confirmed yet. RUNNING: the request is out. `begin` goes to OPENING from anywhere, each
    answer leads to the next phase, `leave` to IDLE."""

    IDLE = enum.auto()
    OPENING = enum.auto()
    SUBSCRIBING = enum.auto()
    RUNNING = enum.auto()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to generate. index: which of the outputs that the user asked for together."""

    prompt: Prompt
    sampling: Sampling
    model: str = ""
    seq_id: str = ""
    cache_salt: str = ""
    policy: str = ""
    explain: bool = False
    index: int = 0
    priority: int = 0
    pull_from: str = ""
    label: str = ""
    trace: str = ""


class GenerateCall:
    """A generation as a call: emits `Start`, `PromptTokens` if they were asked for, then `Token`s, and settles with
    `Done`."""

    def __init__(self, key: bytes, deadline: float, wanted: Wanted, now: float) -> None:
        self.key = self.req_id = key
        self.deadline = deadline
        self._wanted = wanted
        self._receiver = StreamReceiver(key, now)
        self._phase = Phase.IDLE
        self._limits: Welcome | None = None
        self._stream_id = b""
        self._attempt = 0
        self._suback_due = now
        self._suback_tries = 0
        self._explanation: Explanation | None = None
        self._started: Started | None = None
        self._has_begun = False  # the reader got its Start
        self._early: list[Emit] = []  # tokens that overtook it
        self._prompt = PromptReceiver(wanted.sampling.prompt_logprobs, wanted.index)
        self._texts: list[str] = []
        self._tokens: list[Token] = []  # if they have logprobs, which are part of the result
        self._num_moves = 0
        self._tail_since: float | None = None
        self._began_at = now
        self._first_at = self._last_at = now

    @property
    def progress(self) -> int:
        return self._receiver.next_seq

    def begin(self, attempt: int, limits: Welcome, now: float) -> Sequence[Action]:
        if len(self._wanted.prompt.payload) > limits.max_prompt_bytes:
            raise TooLarge(f"the prompt is {len(self._wanted.prompt.payload)} bytes, limit {limits.max_prompt_bytes}")
        if attempt:
            self._receiver.restart(attempt, now)
        if self._started is not None:
            self._num_moves += 1
            self._started = None
        self._attempt, self._limits, self._tail_since = attempt, limits, None
        self._phase = Phase.OPENING
        return [ToControl(OpenStream(req_id=self.req_id))]

    def receive(self, message: Message, payload: Sequence[Buffer], now: float) -> Sequence[Action]:
        match message:
            case StreamOpened() if self._phase is Phase.OPENING:
                self._stream_id = message.stream_id
                self._phase = Phase.SUBSCRIBING
                self._suback_due, self._suback_tries = now + SUBACK_S, 1
                return [Watch(self._stream_id)]
            case SubAck():
                return self._send(now) if self._phase is Phase.SUBSCRIBING else NO_ACTIONS
            case Routed():
                self._explanation = unpack(memoryview(payload[0]), Explanation)
                return NO_ACTIONS
            case Started():
                return self._start(message)
            case PromptLogprobs():
                return self._take_prompt(message, payload[0])
            case StreamTokens() | StreamBeat() | Replay() | StreamEnd():
                return self._follow(message, now)
            case _:
                raise unexpected(message)

    def tick(self, now: float) -> Sequence[Action]:
        if self._phase is Phase.SUBSCRIBING and now >= self._suback_due:
            return self._subscribe_again(now)
        if self._phase is not Phase.RUNNING:
            return NO_ACTIONS
        if self._tail_since is not None and now - self._tail_since > TAIL_S:
            return [Fail(self.key, WorkerLost("the worker is gone that had the last tokens of the stream"))]
        return self._translate(self._receiver.tick(now), now)

    def consume(self, upto: int, now: float) -> Sequence[Action]:
        """The reader has used all tokens below `upto`."""
        return self._translate(self._receiver.consume(upto, now), now)

    def may_retry(self, error: KVCacheError) -> bool:
        """A stream whose tokens cannot be had again from one worker can be from another, if what goes with the
        request fits into it."""
        limits = self._limits
        if limits is not None and len(self._receiver.received) > limits.max_prompt_bytes:
            return False
        return error.retryable or isinstance(error, ReplayExpired)

    def leave(self, *, tell: bool) -> Sequence[Action]:
        actions: list[Action] = []
        if tell and self._phase is Phase.RUNNING:
            actions.append(ToControl(Cancel(req_id=self.req_id)))
        if self._stream_id:
            actions.append(Unwatch(self._stream_id))
        self._stream_id = b""
        self._phase = Phase.IDLE
        return actions

    def _subscribe_again(self, now: float) -> Sequence[Action]:
        """The confirmation was lost. In the end go on without it: what is lost is replayed on the other lane."""
        if self._suback_tries >= SUBACK_TRIES:
            return self._send(now)
        self._suback_tries += 1
        self._suback_due = now + SUBACK_S
        return [Unwatch(self._stream_id), Watch(self._stream_id)]

    def _send(self, now: float) -> Sequence[Action]:
        wanted, received, sampling = self._wanted, self._receiver.received, self._wanted.sampling
        if self._prompt.tokens and self._prompt.is_complete:  # of an earlier attempt; always so if there are tokens
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        payload = [wanted.prompt.payload, received] if received else [wanted.prompt.payload]
        self._phase = Phase.RUNNING
        message = Generate(
            req_id=self.req_id,
            attempt=self._attempt,
            deadline_ms=remaining_ms(self.deadline, now),
            stream_id=self._stream_id,
            epoch=self._receiver.epoch,
            kind=wanted.prompt.kind,
            sampling=sampling,
            model=wanted.model,
            seq_id=wanted.seq_id,
            cache_salt=wanted.cache_salt,
            policy=wanted.policy,
            chain=wanted.prompt.chain,
            explain=wanted.explain and not self._has_begun,
            pull_from=wanted.pull_from,
            payload=wire.describe(payload),
            priority=wanted.priority,
            label=wanted.label,
            trace=wanted.trace,
        )
        return [ToControl(message, payload)]

    def _start(self, started: Started) -> Sequence[Action]:
        if started.epoch != self._receiver.epoch:
            return NO_ACTIONS
        self._started = started
        if self._has_begun:
            return NO_ACTIONS
        self._has_begun = True
        start = Start(
            worker_id=started.worker_id,
            reason=started.reason,
            model=started.model,
            prompt_tokens=started.prompt_tokens,
            cached_tokens=started.cached_tokens,
            explanation=self._explanation,
            index=self._wanted.index,
        )
        early, self._early = self._early, []
        return [Emit(self.key, start), *early]

    def _take_prompt(self, message: PromptLogprobs, payload: Buffer) -> Sequence[Action]:
        if message.epoch != self._receiver.epoch or self._prompt.is_complete:
            return NO_ACTIONS
        if not self._prompt.take(message, payload):
            return NO_ACTIONS
        return self._tell([Emit(self.key, PromptTokens(tuple(self._prompt.tokens), self._wanted.index))])

    def _follow(self, message: Arrival, now: float) -> Sequence[Action]:
        if self._phase is not Phase.RUNNING:
            return NO_ACTIONS
        if isinstance(message, StreamTokens) and not self._prompt.is_complete:
            return NO_ACTIONS  # they have overtaken the prompt's, and come again on that lane, behind them
        before = self._receiver.next_seq
        actions = self._translate(self._receiver.handle(message, now), now)
        if self._receiver.num_unread > MAX_UNREAD:
            raise MalformedMessage(f"the worker sent {self._receiver.num_unread} tokens beyond what was acknowledged")
        is_end = isinstance(message, StreamEnd) and message.epoch == self._receiver.epoch
        if is_end or (self._tail_since is not None and self._receiver.next_seq > before):
            self._tail_since = now
        return actions

    def _translate(self, stream_actions: Sequence[StreamAction], now: float) -> list[Action]:
        actions: list[Action] = []
        for action in stream_actions:
            match action:
                case Ack() | Resume():
                    actions.append(ToControl(action))
                case Deliver():
                    actions += self._deliver(action, now)
                case Broken():
                    actions.append(Fail(self.key, action.error))
                case Finished():
                    actions += self._finish(action.end, now)
        return actions

    def _deliver(self, delivered: Deliver, now: float) -> Sequence[Action]:
        if delivered.seq == 0:
            self._first_at = now
        self._last_at = now
        self._texts += delivered.texts
        tokens = as_tokens(delivered, self._wanted.sampling.logprobs, self._wanted.index)
        if self._wanted.sampling.logprobs is not None:
            self._tokens += tokens
        return self._tell([Emit(self.key, token) for token in tokens])

    def _tell(self, emits: list[Emit]) -> Sequence[Action]:
        """The reader hears it, but not before its Start."""
        if self._has_begun:
            return emits
        self._early += emits
        return NO_ACTIONS

    def _finish(self, end: StreamEnd, now: float) -> Sequence[Action]:
        """`Started` came on the lane of `end`, and before it."""
        if self._started is None:
            raise MalformedMessage("the stream ended without having started")
        if not self._prompt.is_complete:
            raise MalformedMessage("the stream ended, and not all logprobs of the prompt had come")
        done = Done(
            text="".join(self._texts),
            finish_reason=end.finish_reason.value,
            usage=Usage(end.prompt_tokens, end.cached_tokens, end.num_tokens),
            timings=self._timings(end, now),
            worker_id=self._started.worker_id,
            reason=self._started.reason,
            request_id=self.key.hex(),
            index=self._wanted.index,
            tokens=tuple(self._tokens),
            prompt=tuple(self._prompt.tokens),
        )
        return [Settle(self.key, done)]

    def _timings(self, end: StreamEnd, now: float) -> Timings:
        first_at = self._first_at if end.num_tokens else now
        lasted = self._last_at - first_at
        return Timings(
            ttft_s=first_at - self._began_at,
            total_s=now - self._began_at,
            tokens_per_s=(end.num_tokens - 1) / lasted if lasted > 0 else 0.0,
            queue_ms=end.queue_ms,
            prefill_ms=end.prefill_ms,
            decode_ms=end.decode_ms,
            resumes=self._num_moves,
        )
