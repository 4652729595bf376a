"""Generations as their clients see them: requests, epochs, token streams, windows, and streams left alone.

    RUNNING   a call waits for it; its tokens are logged, and published while the link's lease is held
    ORPHANED  the session of its call is gone; the engine holds it, with its KV, for 10 s

A client goes on with a stream by asking again, with the same request id, a higher epoch and the tokens it
has; that replaces what still runs under a lower epoch, whoever's link it was on. The last tokens are sent
once more on the reliable lane just before the end, so that nothing is missing when the end arrives.

How tokens come about is the engine's business; here they are numbers with texts.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from bus import messages as m
from bus import wire
from bus.errors import BadArgument, Conflict, KVCacheError, StaleEpoch, TooLarge
from bus.limits import MAX_INLINE_BYTES, MAX_PROMPT_BYTES
from bus.messages import Ack, Generate, PromptLogprobs, Resume, Started, StreamBeat, StreamEnd, StreamTokens
from bus.stats import PromptPart, pack
from bus.stream_log import StreamLog, num_bytes
from bus.topics import topic_of
from bus.wire import Buffer
from kvcache.hashing import TOKEN_BYTES
from kvcache.sampling_checks import check_sampling
from workers.calls import Action, Call, CallId, Calls, Channel, Publish, RequestKey, Send, Tell
from workers.engine_api import (
    Admitted,
    Broke,
    Ended,
    Hold,
    Prefilled,
    Proceed,
    Produced,
    PromptScored,
    RunEvent,
    RunId,
    Start,
    Stop,
)
from workers.keys import SequenceKey

ORPHAN_S = 10.0


@dataclass(slots=True, eq=False)
class Run:
    """One attempt of one request. `call` is None while it is orphaned, and `orphaned_at` then says since when."""

    id: RunId
    request: RequestKey
    stream_id: bytes
    log: StreamLog
    sequence: SequenceKey | None
    call: Call | None
    orphaned_at: float = 0.0
    is_held: bool = False


@dataclass(slots=True)
class StreamCounts:
    """Totals since the start."""

    gaps_replayed: int = 0
    pulled_streams: int = 0


@dataclass(slots=True)
class _Runs:
    """Every run under the names it is looked up by; a run is in all of them or in none."""

    by_id: dict[RunId, Run] = field(default_factory=dict)
    by_request: dict[RequestKey, Run] = field(default_factory=dict)
    by_call: dict[CallId, Run] = field(default_factory=dict)
    by_sequence: dict[SequenceKey, Run] = field(default_factory=dict)

    def add(self, run: Run) -> None:
        self.by_id[run.id] = run
        self.by_request[run.request] = run
        if run.call is not None:
            self.by_call[run.call.id] = run
        if run.sequence is not None:
            self.by_sequence[run.sequence] = run

    def remove(self, run: Run) -> None:
        del self.by_id[run.id]
        del self.by_request[run.request]
        if run.call is not None:
            del self.by_call[run.call.id]
        if run.sequence is not None:
            del self.by_sequence[run.sequence]

    def leave_call(self, run: Run) -> None:
        if run.call is not None:
            del self.by_call[run.call.id]
            run.call = None


class Generations:
    """`may_publish(link, now)`: whether this worker holds that broker's lease."""

    def __init__(self, worker_id: str, calls: Calls, may_publish: Callable[[int, float], bool]) -> None:
        self.counts = StreamCounts()
        self._worker_id = worker_id
        self._calls = calls
        self._may_publish = may_publish
        self._runs = _Runs()
        self._run_ids = itertools.count(1)

    def is_writing(self, sequence: SequenceKey) -> bool:
        """Whether a generation is going on under this name."""
        return sequence in self._runs.by_sequence

    # --- what clients say ---

    def start(self, call: Call, message: Generate, payload: Sequence[Buffer], now: float) -> list[Action]:
        """Begin, or go on under a higher epoch. Raises what is wrong with the request; nothing has begun then."""
        check_sampling(message.sampling)
        prompt = bytes(payload[0])
        if len(prompt) > MAX_PROMPT_BYTES:
            raise TooLarge(f"the prompt is {len(prompt)} bytes, limit {MAX_PROMPT_BYTES}", detail=MAX_PROMPT_BYTES)
        resume = _resume_tokens(payload[1] if len(payload) > 1 else b"", message.sampling.max_tokens)
        if resume and message.sampling.prompt_logprobs is not None:
            raise BadArgument("prompt_logprobs come before the first token; a stream that goes on has them already")
        sequence = SequenceKey(call.request.tenant, message.seq_id) if message.seq_id else None
        writer = None if sequence is None else self._runs.by_sequence.get(sequence)
        if writer is not None and writer.request != call.request:
            raise Conflict(f"sequence {message.seq_id!r} is being generated by another request")
        actions = self._supersede(call.request, message.epoch)
        run = Run(
            id=RunId(next(self._run_ids).to_bytes(8, "big")),
            request=call.request,
            stream_id=message.stream_id,
            log=StreamLog(message.req_id, message.epoch, now, resume_tokens=resume),
            sequence=sequence,
            call=call,
        )
        self._runs.add(run)
        start = Start(
            run=run.id,
            tenant=call.request.tenant,
            model=message.model,
            kind=message.kind,
            prompt=prompt,
            resume=resume,
            sampling=message.sampling,
            seq_id=message.seq_id,
            cache_salt=message.cache_salt,
            deadline=call.deadline,
            priority=message.priority,
            chain=message.chain,
            pull=call.pull,
        )
        return [*actions, Tell(start)]

    def follow_up(self, call: Call, message: Ack | Resume, now: float) -> list[Action]:
        """An acknowledgement or a question about missing tokens; of another epoch it means nothing."""
        run = self._runs.by_call.get(call.id)
        if run is None:
            return []
        if isinstance(message, Ack):
            run.log.ack(message)
            return self._let_go(run)
        return self._replay(run, call, message, now)

    def stop(self, call: Call) -> list[Action]:
        """Give up the work of a call, which is answered by whoever stops it."""
        run = self._runs.by_call.get(call.id)
        return [] if run is None else self._drop(run)

    def orphan(self, call: Call, now: float) -> list[Action]:
        """The session of its call is gone. The engine keeps it a while, for the client that asks again."""
        run = self._runs.by_call[call.id]
        self._runs.leave_call(run)
        run.orphaned_at = now
        return [Tell(Hold(run.id))]

    # --- what the engine says ---

    def on_event(self, event: RunEvent, now: float) -> list[Action]:
        run = self._runs.by_id.get(event.run)
        if run is None:
            return []  # stopped, and the engine had not heard of it yet
        match event:
            case Admitted():
                return self._started(run, event)
            case Prefilled():
                return [] if run.call is None else [_report(run.call, event)]
            case PromptScored():
                return self._prompt_scored(run, event)
            case Produced():
                return self._produced(run, event, now)
            case Ended():
                return self._ended(run, event)
            case Broke():
                return self._broke(run, event.error)
            case _:
                assert_never(event)

    # --- what time brings ---

    def tick(self, now: float) -> list[Action]:
        """Beats on quiet streams; orphans nobody came back for."""
        actions: list[Action] = []
        for run in list(self._runs.by_id.values()):
            if run.call is None:
                if now - run.orphaned_at >= ORPHAN_S:
                    actions += self._drop(run)
            elif self._may_publish(run.call.id.link, now) and (beat := run.log.beat(now)) is not None:
                actions.append(_publish(run, run.call, beat))
        return actions

    # --- inside ---

    def _supersede(self, request: RequestKey, epoch: int) -> list[Action]:
        """Make way for a new attempt. Raises StaleEpoch if it is not newer than the one that runs."""
        run = self._runs.by_request.get(request)
        if run is None:
            return []
        if epoch <= run.log.epoch:
            raise StaleEpoch(f"this request runs under epoch {run.log.epoch} already", detail=run.log.epoch)
        old, actions = run.call, self._drop(run)
        if old is not None:
            actions += self._calls.fail(old, StaleEpoch(f"replaced by epoch {epoch}", detail=epoch))
        return actions

    def _drop(self, run: Run) -> list[Action]:
        self._runs.remove(run)
        return [Tell(Stop(run.id))]

    def _started(self, run: Run, event: Admitted) -> list[Action]:
        if run.call is None:
            return []
        started = Started(
            req_id=run.request.req_id,
            epoch=run.log.epoch,
            worker_id=self._worker_id,
            reason=run.call.reason,
            model=event.model,
            prompt_tokens=event.prompt_tokens,
            cached_tokens=event.cached_tokens,
        )
        return self._calls.say(run.call, started)

    def _prompt_scored(self, run: Run, event: PromptScored) -> list[Action]:
        """On the reliable lane, in parts of which as many may wait there as of any inline payload."""
        if run.call is None:  # whoever asks again has the prompt computed again
            return []
        most = max(num_bytes("", entry) for entry in event.logprobs)
        step = MAX_INLINE_BYTES // most
        actions: list[Action] = []
        for at in range(0, len(event.tokens), step):
            payload = pack(PromptPart(token_ids=event.tokens[at : at + step], logprobs=event.logprobs[at : at + step]))
            part = PromptLogprobs(
                req_id=run.request.req_id,
                epoch=run.log.epoch,
                num_tokens=event.num_tokens,
                start=event.start + at,
                payload=wire.describe([payload]),
            )
            actions += self._calls.say(run.call, part, payload)
        return actions

    def _produced(self, run: Run, event: Produced, now: float) -> list[Action]:
        try:
            messages = run.log.append(event.tokens, event.texts, now, event.logprobs)
        except KVCacheError as error:
            return [Tell(Stop(run.id)), *self._broke(run, error)]
        actions: list[Action] = []
        if run.call is not None and self._may_publish(run.call.id.link, now):
            actions += [_publish(run, run.call, message) for message in messages]
        if run.call is None or run.log.is_paused:
            # Said with each token: a sequence that was computing its prompt anew could not be held then.
            run.is_held = True
            actions.append(Tell(Hold(run.id)))
        return actions

    def _ended(self, run: Run, event: Ended) -> list[Action]:
        self._runs.remove(run)
        if run.call is None:
            return []
        end = StreamEnd(
            req_id=run.request.req_id,
            epoch=run.log.epoch,
            num_tokens=run.log.next_seq,
            digest=run.log.digest,
            finish_reason=event.finish_reason,
            prompt_tokens=event.prompt_tokens,
            cached_tokens=event.cached_tokens,
            queue_ms=event.queue_ms,
            prefill_ms=event.prefill_ms,
            decode_ms=event.decode_ms,
        )
        tail = [action for part in run.log.tail() for action in self._calls.say(run.call, part)]
        return [*tail, *self._calls.finish(run.call, end)]

    def _broke(self, run: Run, error: KVCacheError) -> list[Action]:
        self._runs.remove(run)
        return [] if run.call is None else self._calls.fail(run.call, error)

    def _replay(self, run: Run, call: Call, message: Resume, now: float) -> list[Action]:
        was_pulled = run.log.is_pulled
        try:
            replays = run.log.resume(message, now)
        except KVCacheError as error:
            return [*self._drop(run), *self._calls.fail(call, error)]
        self.counts.gaps_replayed += bool(replays)
        self.counts.pulled_streams += run.log.is_pulled and not was_pulled
        return [action for part in replays for action in self._calls.say(call, part)]

    def _let_go(self, run: Run) -> list[Action]:
        """Let a held sequence go on once its client has caught up."""
        if not run.is_held or run.log.is_paused:
            return []
        run.is_held = False
        return [Tell(Proceed(run.id))]


def _report(call: Call, event: Prefilled) -> Send:
    """For the broker, which learns from it how quick we are and that the wait for us is over."""
    report = m.Prefilled(
        call=call.id.number, num_tokens=event.num_tokens, num_cached=event.num_cached, compute_ms=event.compute_ms
    )
    return Send(call.id.link, Channel.CONTROL, [wire.encode(report)])


def _publish(run: Run, call: Call, message: StreamTokens | StreamBeat) -> Publish:
    return Publish(call.id.link, topic_of(run.stream_id), wire.encode(message))


def _resume_tokens(data: Buffer, max_tokens: int) -> tuple[int, ...]:
    """The tokens a resumed stream already has. Raises BadArgument."""
    count, rest = divmod(len(data), TOKEN_BYTES)
    if rest:
        raise BadArgument(f"the resume payload is {len(data)} bytes, not a whole number of u32 token ids")
    if count > max_tokens:
        raise BadArgument(f"{count} tokens to resume from are more than max_tokens ({max_tokens})")
    return struct.unpack(f"<{count}I", data)
