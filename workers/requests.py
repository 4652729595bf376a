"""Requests from brokers, from the envelope to the one final answer, whatever happens on the way.

Here they are read, refused, begun, continued and ended; what serving one means is the business of
`generations`, `spelling` and `kv_plane`. A fault, theirs or ours, ends the request it concerns and no other.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence

from bus import wire
from bus.errors import (
    Cancelled,
    Conflict,
    DeadlineExceeded,
    Draining,
    InternalError,
    KVCacheError,
    MalformedMessage,
    Overloaded,
    WorkerLost,
)
from bus.messages import (
    Ack,
    Append,
    Assign,
    Cancel,
    Chunk,
    Credit,
    Delete,
    Detokenize,
    Dispatched,
    FlushPrefixCache,
    Forward,
    Generate,
    ListSequences,
    Pin,
    Put,
    ReleaseSequence,
    Reply,
    Resume,
    Tokenize,
    Unpin,
)
from bus.stats import Holdings, Receipt, StoreStats
from bus.wire import Buffer, Frames
from kvcache.logs import about
from workers.calls import Action, Call, CallId, Calls
from workers.engine_api import Answered, Forgotten, KVEvent, Retained, RunEvent, Ticket
from workers.generations import Generations, StreamCounts
from workers.holdings import HeldSequences
from workers.keys import SequenceKey
from workers.kv_plane import KVPlane
from workers.replies import Replies
from workers.spelling import Spelling
from workers.store import KVStore

log = logging.getLogger(__name__)

RETRY_AFTER_MS = 200

_CHANGES = (Put, Append, Delete, Pin, Unpin)


class Requests:
    """All requests of one worker. may_act(link, now): whether it holds that broker's lease. bulk_room: of `KVPlane`."""

    def __init__(
        self,
        worker_id: str,
        store: KVStore,
        held: HeldSequences,
        may_act: Callable[[int, float], bool],
        bulk_room: Callable[[int], int],
    ) -> None:
        self.is_closed = False
        self.malformed = 0
        self._held = held
        self._may_act = may_act
        self._calls = Calls()
        self._replies = Replies()
        self._generations = Generations(worker_id, self._calls, may_act)
        tickets = map(Ticket, itertools.count(1))
        self._spelling = Spelling(self._calls, tickets.__next__)
        is_writing = self._generations.is_writing
        self._kv = KVPlane(worker_id, self._calls, store, self._replies, held, is_writing, tickets.__next__, bulk_room)

    def __len__(self) -> int:
        """How many have no final answer yet."""
        return len(self._calls)

    @property
    def stream_counts(self) -> StreamCounts:
        return self._generations.counts

    def store_stats(self, now: float) -> StoreStats:
        return self._kv.stats(now)

    def close(self) -> None:
        """Take nothing new from now on."""
        self.is_closed = True

    # --- what brokers say ---

    def assigned(self, link: int, assign: Assign, frames: Frames, now: float) -> list[Action]:
        """A request begins. If it cannot even be read it still gets its one answer."""
        if self._calls.is_released(CallId(link, assign.call)):
            return []
        try:
            message, payload = wire.decode_intact(frames)
            if not isinstance(message, Dispatched):
                raise MalformedMessage(f"{type(message).__name__} is not a request for a worker")
        except KVCacheError as error:
            self.malformed += 1
            req_id = wire.request_id_of(frames[0]) if frames else wire.NO_REQUEST
            return self._calls.refuse(CallId(link, assign.call), req_id, error)
        call = self._calls.open(link, assign, message, now)
        actions = self._outdate(call)
        try:
            return actions + self._begin(call, payload, now)
        except KVCacheError as error:
            return actions + self._end(call, error)
        except Exception:  # noqa: BLE001  # the outermost edge of one request: logged, and answered
            return self._fault(call)

    def forwarded(self, link: int, forward: Forward, frames: Frames, now: float) -> list[Action]:
        """More of a request; of one that has ended meanwhile, nothing but what `_unknown` says."""
        call = self._calls.find(CallId(link, forward.call))
        if call is None:
            return self._unknown(CallId(link, forward.call), frames)
        try:
            message, payload = wire.decode_intact(frames)
            return self._continue(call, message, payload, now)
        except KVCacheError as error:
            return self._end(call, error)
        except Exception:  # noqa: BLE001  # as above
            return self._fault(call)

    def drop_sequences(self, holdings: Holdings) -> list[Action]:
        """Newer versions than these of ours exist."""
        return [
            action
            for newer in holdings.sequences
            for action in self._kv.outdate(SequenceKey(newer.tenant, newer.seq_id), newer.version)
        ]

    def release_sequence(self, release: ReleaseSequence) -> list[Action]:
        """Others have it too. Another broker's client may write to it just now, and then ours is the newer one."""
        key = SequenceKey(release.tenant, release.seq_id)
        return [] if self._kv.is_written(key) else self._kv.outdate(key, release.version + 1)

    def receipts(self, key: SequenceKey) -> tuple[Receipt, ...]:
        """The changes that made this sequence what it is, the latest ones, for who takes a copy of it."""
        return self._replies.receipts(key)

    def adopt(self, key: SequenceKey, receipts: Sequence[Receipt], now: float) -> None:
        """This sequence was copied to here, and with it what had been changed: it is not changed so again."""
        self._replies.adopt(key, receipts, now)

    def is_written(self, key: SequenceKey) -> bool:
        """Whether a client or a generation writes under this name just now."""
        return self._kv.is_written(key)

    def outdate(self, key: SequenceKey, newest: int) -> list[Action]:
        """Drop what is here of a sequence if it is older than this version."""
        return self._kv.outdate(key, newest)

    def released(self, call_id: CallId) -> list[Action]:
        """Nobody waits for it any more."""
        call = self._calls.find(call_id)
        if call is None:
            self._calls.settle(call_id)
            self._calls.release(call_id)
            return []
        return [*self._stop(call), *self._calls.forget(call)]

    def lose_session(self, link: int, now: float) -> list[Action]:
        """The broker seems to be gone, with its calls: streams wait for their clients, all else stops."""
        actions: list[Action] = []
        for call in self._calls.of_link(link):
            if isinstance(call.message, Generate):
                actions += self._generations.orphan(call, now)
            else:
                actions += self._stop(call)
            actions += self._calls.disown(call)
        return actions

    def replace_session(self, link: int, now: float) -> list[Action]:
        """The broker knows us under a new session, and nothing of the calls of any other."""
        actions = self.lose_session(link, now)
        self._calls.take_disowned(link)
        self._calls.forget_released(link)
        return actions

    def regain_session(self, link: int) -> list[Action]:
        """The broker has kept the session that we had given up: it waits for answers to what was dropped with it."""
        error = WorkerLost("this worker had given up its session with the broker, and this request with it")
        dropped = self._calls.take_disowned(link)
        return [action for call_id, req_id in dropped for action in self._calls.refuse(call_id, req_id, error)]

    def unsent(self, call_id: CallId, frames: Frames) -> list[Action]:
        """Bulk data of this call was refused by a full lane. If it was its last answer, the call has ended here, and
        only here: its broker is still to hear of an end."""
        error = Overloaded("the worker has too much bulk data on its way", retry_after_ms=RETRY_AFTER_MS)
        call = self._calls.find(call_id)
        if call is not None:
            return self._end(call, error)
        envelope = wire.decode_header(frames[0])
        if not (isinstance(envelope, Reply) and envelope.final):
            return []
        return self._calls.refuse(call_id, wire.request_id_of(frames[1]), error)

    # --- what engine and clock say ---

    def on_engine(self, event: RunEvent | KVEvent, now: float) -> list[Action]:
        match event:
            case Answered() if event.ticket in self._spelling:
                return self._spelling.answered(event)
            case Answered() | Retained() | Forgotten():
                return self._kv.on_event(event)
            case _:
                return self._generations.on_event(event, now)

    def tick(self, now: float) -> list[Action]:
        """Deadlines, quiet streams, orphans, reads that wait for room."""
        error = DeadlineExceeded("the deadline passed before the worker was done")
        overdue = [action for call in self._calls.overdue(now) for action in self._end(call, error)]
        return overdue + self._generations.tick(now) + self._kv.tick()

    def fail_all(self, error: KVCacheError) -> list[Action]:
        return [action for call in self._calls.everything() for action in self._end(call, error)]

    # --- inside ---

    def _unknown(self, call_id: CallId, frames: Frames) -> list[Action]:
        """Who asks for tokens of a call that is not here would wait for them until the deadline.

        If it ended here, its end is on the same lane before this answer, which then means nothing. That is not so of
        what else follows a request: a `Credit` may arrive while the last chunks are on the bulk lane.
        """
        try:
            message = wire.decode_header(frames[0]) if frames else None
        except KVCacheError:
            return []
        if not isinstance(message, Resume):
            return []
        self._calls.settle(call_id)
        return self._calls.refuse(call_id, message.req_id, WorkerLost("this worker does not know the request"))

    def _begin(self, call: Call, payload: Sequence[Buffer], now: float) -> list[Action]:
        """Raises what is wrong with the request, or with us for it."""
        message = call.message
        if self.is_closed:
            raise Draining("this worker is draining and takes nothing new", retry_after_ms=RETRY_AFTER_MS)
        if call.deadline <= now:
            raise DeadlineExceeded("the deadline had passed when the request reached the worker")
        if isinstance(message, _CHANGES) and not self._may_act(call.id.link, now):
            raise WorkerLost("this worker holds no lease and may not acknowledge writes")
        if isinstance(message, (*_CHANGES, Generate)):
            reply = self._replies.claim(call.request, message, now)
            if reply is not None:
                return self._kv.repeat(call, reply)
        if isinstance(message, Tokenize | Detokenize):
            return self._spelling.start(call, message, payload)
        if not isinstance(message, Generate):
            return self._kv.start(call, payload, now)
        if not message.seq_id:
            return self._generations.start(call, message, payload, now)
        key = SequenceKey(call.request.tenant, message.seq_id)
        if self._kv.is_stored(key):
            raise Conflict(
                f"sequence {message.seq_id!r} was stored by a client; delete it or generate under another seq_id"
            )
        actions = self._generations.start(call, message, payload, now)
        self._held.mark(key, call.version)
        return actions

    def _outdate(self, call: Call) -> list[Action]:
        """A copy that is older than the broker knows of must not serve."""
        if isinstance(call.message, ListSequences | FlushPrefixCache | Tokenize | Detokenize) or not call.newest:
            return []
        return self._kv.outdate(SequenceKey(call.request.tenant, call.message.seq_id), call.newest)

    def _continue(self, call: Call, message: object, payload: Sequence[Buffer], now: float) -> list[Action]:
        match message:
            case Cancel():
                return self._end(call, Cancelled("cancelled by the client"))
            case Ack() | Resume():
                return self._generations.follow_up(call, message, now)
            case Chunk() if not self._may_act(call.id.link, now):
                raise WorkerLost("this worker's lease ran out during the transfer")
            case Chunk() | Credit():
                return self._kv.follow_up(call, message, payload)
            case _:
                raise MalformedMessage(f"{type(message).__name__} does not belong within a request")

    def _end(self, call: Call, error: KVCacheError) -> list[Action]:
        return [*self._stop(call), *self._calls.fail(call, error)]

    def _stop(self, call: Call) -> list[Action]:
        match call.message:
            case Generate():
                return self._generations.stop(call)
            case Tokenize() | Detokenize():
                return self._spelling.stop(call)
            case _:
                return self._kv.stop(call)

    def _fault(self, call: Call) -> list[Action]:
        """Our own bug in one request harms that request alone."""
        log.exception("a request failed", extra=about(call.label))
        return self._end(call, InternalError("a fault of the worker; its log has the traceback"))
