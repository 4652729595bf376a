"""The KV plane as its clients see it: requests in, answers out, and the transfers in between.

A sequence's name means one of two things on this worker. *Stored* ones were put here and lie in the store;
*computed* ones were left by a generation and lie in the engine's blocks. Reading, listing, pinning and
deleting work on both, the latter by way of the engine, with a ticket that its answer comes back with.
Writing to a computed one is refused: its KV belongs to the tokens that made it.

Tensors that do not fit one message go in chunks over the bulk lane (`workers.bulk`). What is read shares that lane with
all that others read through the same broker, so it goes out in turns, a few chunks each, as far as there is room.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, assert_never

import msgspec

from bus import wire
from bus.errors import BadArgument, BadTensor, Conflict, KVCacheError, NotFound
from bus.limits import CHUNK_BYTES, MAX_INLINE_BYTES
from bus.messages import (
    Append,
    Chunk,
    Credit,
    Delete,
    Detokenize,
    FlushPrefixCache,
    Generate,
    Get,
    KvDone,
    KvListed,
    KvValue,
    Length,
    ListSequences,
    Pin,
    Put,
    Tokenize,
    Unpin,
)
from bus.stats import SequenceInfo, SequencePage, Spelling, StoreStats, pack
from bus.wire import Buffer
from workers.bulk import Download, Upload, cut
from workers.calls import Action, Call, CallId, Calls, Channel, Tell
from workers.engine_api import (
    Answered,
    DropKV,
    Encoding,
    FlushKV,
    Forgotten,
    ListKV,
    MeasureKV,
    PinKV,
    Question,
    ReadKV,
    ReadResult,
    Retained,
    Ticket,
    UnpinKV,
)
from workers.holdings import HeldSequences
from workers.keys import SequenceKey
from workers.replies import Replies
from workers.store import Committed, KVStore
from workers.transfers import Transfer


@dataclass(slots=True)
class _Question:
    """A call that waits for the engine."""

    ticket: Ticket
    stored: tuple[SequenceInfo, ...] = ()
    has_more: bool = False


Work: TypeAlias = Upload | Download | _Question

TURN_CHUNKS = 8
"""Chunks of one value that go out before it is another's turn."""


class KVPlane:
    """held: the versions of what is here. is_writing(sequence): whether a generation is going on under that name.

    bulk_room(link): how many messages more that broker's bulk lane takes now.
    """

    def __init__(
        self,
        worker_id: str,
        calls: Calls,
        store: KVStore,
        replies: Replies,
        held: HeldSequences,
        is_writing: Callable[[SequenceKey], bool],
        next_ticket: Callable[[], Ticket],
        bulk_room: Callable[[int], int],
    ) -> None:
        self._worker_id = worker_id
        self._calls = calls
        self._store = store
        self._replies = replies
        self._held = held
        self._is_writing = is_writing
        self._computed: set[SequenceKey] = set()
        self._work: dict[CallId, Work] = {}
        self._asking: dict[Ticket, Call] = {}
        self._next_ticket = next_ticket
        self._bulk_room = bulk_room
        self._line: dict[CallId, Call] = {}  # downloads with credit, which wait for room

    # --- what clients say ---

    def start(self, call: Call, payload: Sequence[Buffer], now: float) -> list[Action]:
        """Serve a request, or begin to. Raises what is wrong with it; nothing has changed then."""
        message = call.message
        assert not isinstance(message, Generate | Tokenize | Detokenize), "those are not served here"
        if isinstance(message, ListSequences):
            return self._list(call, message, now)
        if isinstance(message, FlushPrefixCache):
            question = FlushKV(self._next_ticket(), call.request.tenant, message.cache_salt)
            return self._ask_engine(call, question)
        key = SequenceKey(call.request.tenant, message.seq_id)
        if isinstance(message, Put | Append):
            return self._write(call, message, key, payload, now)
        if self._is_computed(key):
            if self._held.version(key) < call.newest and not isinstance(message, Delete):
                raise NotFound(f"sequence {key.seq_id!r} is being generated, and its name has been used anew since")
            return self._ask(call, message, key, now)
        match message:
            case Get():
                return self._get(call, message, key)
            case Length():
                return self._calls.finish(
                    call, self._done(call, length=self._store.length(key, message.layer), count=1)
                )
            case Delete():
                return self._delete(call, message, key)
            case Pin():
                self._store.pin(key, message.ttl_ms / 1000 if message.ttl_ms else None, now)
            case Unpin():
                self._store.unpin(key)
            case _:
                assert_never(message)
        # A change like any other: a copy that was taken before it is stale.
        version = self._held.wrote(key, call.version, call.copies)
        return self._finish(call, self._done(call, count=1), version=version)

    def follow_up(self, call: Call, message: Chunk | Credit, payload: Sequence[Buffer]) -> list[Action]:
        """More of a transfer. Raises what is wrong with it; the call is then to be stopped."""
        work = self._work.get(call.id)
        match message, work:
            case Chunk(), Upload():
                return self._take_chunk(call, work, message.offset, payload[0])
            case Credit(), Download():
                work.grant(message.chunks)
                return self._send_chunks(call)
            case _:
                raise BadArgument(f"this request expects no {type(message).__name__.lower()}")

    def repeat(self, call: Call, reply: KvDone) -> list[Action]:
        """Answer a request again that took effect before; a change is not made again, but counts as new."""
        version = 0
        if isinstance(call.message, Put | Append | Pin | Unpin):
            key = SequenceKey(call.request.tenant, call.message.seq_id)
            version = self._held.wrote(key, call.version, call.copies) if self._held.version(key) else 0
        return self._calls.finish(call, reply, version=version)

    def outdate(self, key: SequenceKey, newest: int) -> list[Action]:
        """Drop what is here of a sequence if it is older than `newest`, which exists or existed elsewhere.

        What is being generated just now stays, and is not read.
        """
        if not 0 < self._held.version(key) < newest or self._is_writing(key):
            return []
        self._held.dropped(key)
        if key in self._computed:
            self._computed.remove(key)
            return [Tell(DropKV(self._next_ticket(), key))]
        if self._store.has(key):
            self._store.delete(key)
        return []

    def stop(self, call: Call) -> list[Action]:
        """Give up the work of a call: an upload has no effect, a download holds nothing any more."""
        match self._work.pop(call.id, None):
            case Upload() | Download() as transfer:
                self._line.pop(call.id, None)
                transfer.close()
            case _Question(ticket=ticket):
                del self._asking[ticket]
            case _:
                pass
        return []

    def tick(self) -> list[Action]:
        """Time has passed, in which lanes may have got room."""
        return [action for link in {call_id.link for call_id in self._line} for action in self._take_turns(link)]

    def is_stored(self, key: SequenceKey) -> bool:
        """Whether a client has put this sequence here, or is about to."""
        return self._store.has(key) or any(isinstance(work, Upload) and work.key == key for work in self._work.values())

    def is_written(self, key: SequenceKey) -> bool:
        """Whether a generation or an upload goes on under this name."""
        uploads = (work for work in self._work.values() if isinstance(work, Upload))
        return self._is_writing(key) or any(upload.key == key for upload in uploads)

    # --- what the engine says ---

    def on_event(self, event: Answered | Retained | Forgotten) -> list[Action]:
        match event:
            case Retained() if self.is_stored(event.sequence):  # its generation was given up, and the name used anew
                return [Tell(DropKV(self._next_ticket(), event.sequence))]
            case Retained():
                self._computed.add(event.sequence)
                self._held.kept(event.sequence)
            case Forgotten() if event.sequence in self._computed:
                self._computed.remove(event.sequence)
                self._held.dropped(event.sequence)
            case Forgotten():  # dropped by us, and it may have been stored anew since
                pass
            case Answered():
                return self._answered(event)
            case _:
                assert_never(event)
        return []

    def note_evicted(self) -> None:
        """Brokers are to hear of what had to make room."""
        for key in self._store.take_evicted():
            if not self._store.has(key):
                self._held.dropped(key)

    def stats(self, now: float) -> StoreStats:
        return self._store.stats(now)

    # --- writes ---

    def _write(
        self, call: Call, message: Put | Append, key: SequenceKey, payload: Sequence[Buffer], now: float
    ) -> list[Action]:
        if self._is_computed(key):
            raise Conflict(
                f"sequence {key.seq_id!r} was computed by a generation; delete it first or use another seq_id"
            )
        if len(payload) == 1:
            raise BadTensor("K and V travel together: two payloads, or none and then chunks")
        upload = Upload(self._store, self._begin(message, key, now))
        self.note_evicted()
        if payload:
            return self._commit(call, upload.take_whole(payload))
        if upload.is_complete:
            return self._commit(call, upload.commit())
        self._work[call.id] = upload  # as many chunks as may be under way follow by themselves
        return []

    def _begin(self, message: Put | Append, key: SequenceKey, now: float) -> Transfer:
        if isinstance(message, Put):
            return self._store.begin_put(key, message.layer, message.k, message.v, now=now)
        return self._store.begin_append(key, message.layer, message.k, message.v, message.at, now=now)

    def _take_chunk(self, call: Call, upload: Upload, offset: int, data: Buffer) -> list[Action]:
        granted = upload.take(offset, data)
        if upload.is_complete:
            del self._work[call.id]
            return self._commit(call, upload.commit())
        return self._calls.say(call, Credit(req_id=call.request.req_id, chunks=granted)) if granted else []

    def _commit(self, call: Call, done: Committed) -> list[Action]:
        assert isinstance(call.message, Put | Append)
        key = SequenceKey(call.request.tenant, call.message.seq_id)
        version = self._held.wrote(key, call.version, call.copies, call.message.rf)
        return self._finish(
            call, self._done(call, length=done.length, count=1, duplicate=done.duplicate), version=version
        )

    def _delete(self, call: Call, message: Delete, key: SequenceKey) -> list[Action]:
        """A sequence that is gone leaves a mark; one that has layers left is another version of itself."""
        count, version = self._store.delete(key, message.layer), 0
        if self._store.has(key):
            version = self._held.wrote(key, call.version, call.copies)
        else:
            self._held.dropped(key, call.version)
        return self._finish(call, self._done(call, count=count), version=version)

    def _finish(self, call: Call, done: KvDone, *, version: int = 0) -> list[Action]:
        """Answer a change, and remember the answer: a retry must not change anything again."""
        assert isinstance(call.message, Put | Append | Delete | Pin | Unpin | FlushPrefixCache)
        if not isinstance(call.message, FlushPrefixCache):
            key = SequenceKey(call.request.tenant, call.message.seq_id)
            self._replies.keep(call.request, key, msgspec.structs.replace(done, duplicate=True))
        return self._calls.finish(call, done, version=version)

    # --- reads ---

    def _get(self, call: Call, message: Get, key: SequenceKey) -> list[Action]:
        read = self._store.open_read(key, message.layer, message.start, message.stop)
        value = KvValue(req_id=call.request.req_id, k=read.k, v=read.v, length=read.length)
        pieces = self._store.chunks(read, CHUNK_BYTES)
        return self._send_value(call, message, value, Download(pieces, value, lambda: self._store.close_read(read)))

    def _send_value(self, call: Call, message: Get, value: KvValue, download: Download) -> list[Action]:
        """Answer with K and V in one message if they fit a chunk, else announce them and send what is credited.

        Without credit what is not small is only announced. Nor does anything go out before those that wait for room.
        """
        has_room = message.credit > 0 and not self._is_full(call.id.link)
        if download.num_bytes <= (CHUNK_BYTES if has_room else MAX_INLINE_BYTES):
            payload = download.take_whole()
            value = msgspec.structs.replace(value, payload=wire.describe(payload))
            channel = Channel.CONTROL if download.num_bytes <= MAX_INLINE_BYTES else Channel.BULK
            return self._calls.finish(call, value, *payload, channel=channel)
        self._work[call.id] = download
        if not message.credit:
            download.is_announced = True
            return self._calls.say(call, value)
        download.grant(message.credit)
        return self._send_chunks(call)

    def _send_chunks(self, call: Call) -> list[Action]:
        """As many chunks as there is credit for, when it is its turn; it keeps its place in line if it has one."""
        self._line[call.id] = call
        return self._take_turns(call.id.link)

    def _is_full(self, link: int) -> bool:
        return self._bulk_room(link) <= 0 or any(call_id.link == link for call_id in self._line)

    def _take_turns(self, link: int) -> list[Action]:
        """Chunks of all that wait, a few of each in turn, as many as the lane takes."""
        actions: list[Action] = []
        room = self._bulk_room(link)
        line = deque(call for call_id, call in self._line.items() if call_id.link == link)
        while line and room > 0:
            call = line.popleft()
            del self._line[call.id]
            download = self._work[call.id]
            assert isinstance(download, Download)
            sent = self._turn(call, download, min(room, TURN_CHUNKS))
            room -= len(sent)
            actions += sent
            if download.may_go_on:
                self._line[call.id] = call
                line.append(call)
        return actions

    def _turn(self, call: Call, download: Download, limit: int) -> list[Action]:
        """At most so many messages; the last chunk is the answer's end."""
        actions: list[Action] = []
        if not download.is_announced:
            # On the lane of the chunks: the last of those could overtake it, and end the call at the broker before it.
            download.is_announced = True
            actions += self._calls.say(call, download.value, channel=Channel.BULK)
        for offset, data in download.take(limit - len(actions)):
            chunk = Chunk(req_id=call.request.req_id, offset=offset, payload=wire.describe([data]))
            if download.is_complete:
                self.stop(call)
                actions += self._calls.finish(call, chunk, data, channel=Channel.BULK)
            else:
                actions += self._calls.say(call, chunk, data, channel=Channel.BULK)
        return actions

    # --- lists ---

    def _list(self, call: Call, message: ListSequences, now: float) -> list[Action]:
        """Stored ones are known here; computed ones are asked for, and the two lists joined."""
        tenant = call.request.tenant
        stored, has_more = self._store.list(tenant, message.prefix, message.after, message.limit, now)
        # One more than the limit shows whether there are more.
        question = ListKV(self._next_ticket(), tenant, message.prefix, message.after, message.limit + 1)
        self._work[call.id] = _Question(question.ticket, stored, has_more)
        self._asking[question.ticket] = call
        return [Tell(question)]

    def _listed(self, call: Call, question: _Question, computed: tuple[SequenceInfo, ...]) -> list[Action]:
        message = call.message
        assert isinstance(message, ListSequences)
        found = sorted([*question.stored, *computed], key=lambda info: info.seq_id)
        tenant = call.request.tenant
        page = SequencePage(
            worker_id=self._worker_id,
            sequences=tuple(
                msgspec.structs.replace(info, version=self._held.version(SequenceKey(tenant, info.seq_id)))
                for info in found[: message.limit]
            ),
            more=question.has_more or len(found) > message.limit,
        )
        payload = pack(page)
        listed = KvListed(req_id=call.request.req_id, payload=wire.describe([payload]))
        return self._calls.finish(call, listed, payload)

    # --- computed sequences ---

    def _is_computed(self, key: SequenceKey) -> bool:
        return key in self._computed or self._is_writing(key)

    def _ask(
        self, call: Call, message: Get | Length | Delete | Pin | Unpin, key: SequenceKey, now: float
    ) -> list[Action]:
        ticket = self._next_ticket()
        question: ReadKV | MeasureKV | DropKV | PinKV | UnpinKV
        match message:
            case Get():
                question = ReadKV(ticket, key, message.layer, message.start, message.stop)
            case Length():
                question = MeasureKV(ticket, key, message.layer)
            case Delete():
                if message.layer is not None:
                    raise BadArgument("a computed sequence is deleted whole; leave the layer out")
                question = DropKV(ticket, key)
            case Pin():
                question = PinKV(ticket, key, now + message.ttl_ms / 1000 if message.ttl_ms else math.inf)
            case Unpin():
                question = UnpinKV(ticket, key)
            case _:
                assert_never(message)
        return self._ask_engine(call, question)

    def _ask_engine(self, call: Call, question: Question) -> list[Action]:
        self._work[call.id] = _Question(question.ticket)
        self._asking[question.ticket] = call
        return [Tell(question)]

    def _answered(self, event: Answered) -> list[Action]:
        call = self._asking.pop(event.ticket, None)
        if call is None:  # nobody waits for it any more
            return []
        question = self._work.pop(call.id)
        assert isinstance(question, _Question)
        assert not isinstance(event.answer, Encoding | Spelling), "an answer to what was not asked"
        answer = event.answer
        if isinstance(answer, KVCacheError):
            return self._calls.fail(call, answer)
        if isinstance(answer, tuple):
            return self._listed(call, question, answer)
        message = call.message
        if isinstance(answer, ReadResult):
            assert isinstance(message, Get)
            value = KvValue(req_id=call.request.req_id, k=answer.k, v=answer.v, length=answer.length)
            return self._send_value(call, message, value, Download(cut(answer.k_data, answer.v_data), value))
        if isinstance(message, Length):
            return self._calls.finish(call, self._done(call, length=answer, count=1))
        if isinstance(message, Delete):
            self._held.dropped(SequenceKey(call.request.tenant, message.seq_id), call.version)
        return self._finish(call, self._done(call, count=answer))

    def _done(self, call: Call, *, length: int = 0, count: int = 0, duplicate: bool = False) -> KvDone:
        return KvDone(req_id=call.request.req_id, length=length, count=count, duplicate=duplicate)
