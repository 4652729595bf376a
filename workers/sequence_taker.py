"""Named sequences that this worker copies whole from others, because a broker told it to.

    ASKED      the holder was asked for its sequence as it is
    RECEIVING  room for all of it is taken; chunks come, in order and as many as credit was given for

A copy takes effect at once and whole, when its last byte has come, and only if nothing newer has been heard of here
by then. It takes free room and evicts nothing: the broker finds another worker. Whatever goes wrong ends it without
effect. Whoever ordered it is told what became of it, once; if that session was given up, when it is regained.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from bus import wire
from bus.errors import (
    Conflict,
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    ErrorCode,
    KVCacheError,
    MalformedMessage,
    Overloaded,
    error_from_wire,
)
from bus.messages import Cancel, Chunk, CopySequence, Credit, Failed, Message, PullSequence, SequenceCopied
from bus.messages import SequenceFound as Found
from bus.stats import LayerInfo, Receipt, Snapshot, unpack
from bus.tensors import TensorMeta, dtype_by_name
from bus.wire import Buffer, Frames
from workers.calls import Action, Channel, Send, ToPeer
from workers.holdings import HeldSequences
from workers.keys import SequenceKey
from workers.store import KVStore
from workers.transfers import Transfer

MAX_TAKEN = 16
WINDOW = 8  # chunks of one copy that may be under way
GRANT_CHUNKS = 4
SILENCE_S = 1.0
ID = b"sequence"
"""What the ids of these copies begin with, by which the answers to them are known."""


@dataclass(slots=True, eq=False)
class Taking:
    """One copy. transfers: one for each layer, in the order in which their bytes come. came: bytes."""

    link: int
    order: CopySequence
    req_id: bytes
    until: float
    moved_at: float
    found: Found | None = None
    receipts: tuple[Receipt, ...] = ()
    is_pinned: bool = False
    transfers: list[Transfer] = field(default_factory=list)
    num_bytes: int = 0
    came: int = 0
    current: int = 0
    begun_at: int = 0  # where the current layer begins
    granted: int = WINDOW
    num_chunks: int = 0

    @property
    def key(self) -> SequenceKey:
        return SequenceKey(self.order.tenant, self.order.seq_id)


class Taker:
    """All copies under way to this worker.

    is_written(sequence): whether a client or a generation writes to it just now. outdate(sequence, version): drop what
    is here of it if it is older. adopt(sequence, receipts, now): these changes are in what is here now.
    """

    def __init__(
        self,
        worker_id: str,
        store: KVStore,
        held: HeldSequences,
        is_written: Callable[[SequenceKey], bool],
        outdate: Callable[[SequenceKey, int], list[Action]],
        adopt: Callable[[SequenceKey, Sequence[Receipt], float], None],
    ) -> None:
        self.num_taken = 0
        self._worker_id = worker_id
        self._store = store
        self._held = held
        self._is_written = is_written
        self._outdate = outdate
        self._adopt = adopt
        self._takings: dict[bytes, Taking] = {}
        self._dropped: dict[int, list[Taking]] = {}  # with their session, by its link
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._takings)

    def uses(self, url: str) -> bool:
        """Whether anything is on its way from this address."""
        return any(taking.order.url == url for taking in self._takings.values())

    # --- what brokers say ---

    def ordered(self, link: int, order: CopySequence, now: float, *, is_closed: bool) -> list[Action]:
        """Have that sequence too. What cannot be begun is answered at once."""
        taking = Taking(link, order, ID + next(self._numbers).to_bytes(8, "big"), now + order.budget_ms / 1000, now)
        try:
            if is_closed:
                raise Draining("this worker is draining")
            if self._held.version(taking.key) >= order.version:
                return [_report(taking, version=self._held.version(taking.key))]
            if len(self._takings) >= MAX_TAKEN or any(other.key == taking.key for other in self._takings.values()):
                raise Overloaded(f"{len(self._takings)} sequences are being copied to this worker, or this one is")
        except KVCacheError as error:
            return [_report(taking, code=error.code)]
        self._takings[taking.req_id] = taking
        request = PullSequence(req_id=taking.req_id, ticket=order.ticket, worker_id=self._worker_id, credit=WINDOW)
        return [_say(taking, request)]

    def lose_session(self, link: int) -> list[Action]:
        """The session with the broker that ordered these is given up: they end."""
        takings = [taking for taking in self._takings.values() if taking.link == link]
        for taking in takings:
            self._drop(taking)
        self._dropped[link] = [*self._dropped.get(link, []), *takings]
        return [_say(taking, Cancel(req_id=taking.req_id)) for taking in takings]

    def replace_session(self, link: int) -> list[Action]:
        """The broker knows us under another session, and nothing of what it ordered in any earlier one."""
        actions = self.lose_session(link)
        del self._dropped[link]
        return actions

    def regain_session(self, link: int) -> list[Action]:
        """The broker has kept the session that we had given up: it waits to hear of what was dropped with it."""
        code = ErrorCode.CONNECTION_LOST
        return [_report(taking, code=code) for taking in self._dropped.pop(link, [])]

    # --- what holders say ---

    def on_message(self, url: str, frames: Frames, now: float) -> list[Action]:
        """A message of the worker at this address, whatever its bytes."""
        taking = self._takings.get(wire.request_id_of(frames[0])) if frames else None
        if taking is None or taking.order.url != url:  # of one that has ended
            return []
        taking.moved_at = now
        try:
            message, payload = wire.decode_intact(frames)
            match message:
                case Found():
                    self._found(taking, message, unpack(payload[0], Snapshot), now)
                case Chunk():
                    self._take(taking, message.offset, payload[0])
                case Failed():
                    return self._fail(taking, error_from_wire(message.code, message.message), tells=False)
                case _:
                    raise MalformedMessage(f"{type(message).__name__} is not for a worker that copies")
            return self._commit(taking, now) if taking.came == taking.num_bytes else self._give_credit(taking)
        except KVCacheError as error:
            return self._fail(taking, error)

    def lose(self, url: str) -> list[Action]:
        """Nothing more can be sent to this address."""
        error = ConnectionLost(f"no connection to the worker at {url}")
        takings = [taking for taking in self._takings.values() if taking.order.url == url]
        return [action for taking in takings for action in self._fail(taking, error, tells=False)]

    def tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for taking in list(self._takings.values()):
            if now >= taking.until:
                actions += self._fail(taking, DeadlineExceeded("the copy has used up its budget"))
            elif now - taking.moved_at > SILENCE_S:
                actions += self._fail(taking, ConnectionLost("the worker that was copied from fell silent"))
        return actions

    # --- inside ---

    def _found(self, taking: Taking, found: Found, snapshot: Snapshot, now: float) -> None:
        """Take room for all of it. Raises what speaks against that; what was taken is given back with the copy."""
        info = snapshot.info
        if taking.found is not None or not info.layers:
            raise MalformedMessage("a sequence is found once, and has layers")
        if found.version < taking.order.version:
            raise Conflict(f"version {found.version} is there, and {taking.order.version} exists")
        taking.found, taking.receipts, taking.is_pinned = found, snapshot.receipts, info.pinned
        for layer in info.layers:
            k, v = _meta(layer, layer.k_shape), _meta(layer, layer.v_shape)
            transfer = self._store.begin_put(taking.key, layer.layer, k, v, now=now, may_evict=False)
            taking.transfers.append(transfer)
            taking.num_bytes += transfer.nbytes

    def _take(self, taking: Taking, offset: int, data: Buffer) -> None:
        """Raises what is wrong with the chunk."""
        taking.num_chunks += 1
        if taking.num_chunks > taking.granted:
            raise MalformedMessage(f"{taking.num_chunks} chunks came on credit for {taking.granted}")
        nbytes = memoryview(data).nbytes
        if offset != taking.came or not 0 < nbytes <= taking.num_bytes - taking.came:
            raise MalformedMessage(f"{nbytes} bytes at {offset} do not follow the {taking.came} before")
        while taking.came - taking.begun_at == taking.transfers[taking.current].nbytes:
            taking.begun_at += taking.transfers[taking.current].nbytes
            taking.current += 1
        self._store.write(taking.transfers[taking.current], taking.came - taking.begun_at, data)
        taking.came += nbytes

    def _give_credit(self, taking: Taking) -> list[Action]:
        chunks = WINDOW - (taking.granted - taking.num_chunks)
        if chunks < GRANT_CHUNKS:
            return []
        taking.granted += chunks
        return [_say(taking, Credit(req_id=taking.req_id, chunks=chunks))]

    def _commit(self, taking: Taking, now: float) -> list[Action]:
        """All bytes are there. Raises Conflict if the name has been used meanwhile."""
        key, found = taking.key, taking.found
        assert found is not None, "bytes came of what was not found"
        if self._held.version(key) >= found.version:
            return self._end(taking, version=self._held.version(key))
        if self._held.newest(key) > found.version or self._is_written(key):
            raise Conflict(f"sequence {key.seq_id!r} was deleted or is being written here")
        actions = self._outdate(key, found.version)
        for transfer in taking.transfers:
            self._store.commit(transfer)
        taking.transfers.clear()
        self._adopt(key, taking.receipts, now)
        self._held.took(key, found.version, found.copies, found.rf)
        if taking.is_pinned:
            self._store.pin(key, found.pin_ms / 1000 if found.pin_ms else None, now)
        self.num_taken += 1
        return [*actions, *self._end(taking, version=found.version)]

    def _fail(self, taking: Taking, error: KVCacheError, *, tells: bool = True) -> list[Action]:
        cancel = [_say(taking, Cancel(req_id=taking.req_id))] if tells else []
        return [*cancel, *self._end(taking, code=error.code)]

    def _end(self, taking: Taking, *, version: int = 0, code: int = 0) -> list[Action]:
        self._drop(taking)
        return [_report(taking, version=version, code=code)]

    def _drop(self, taking: Taking) -> None:
        del self._takings[taking.req_id]
        for transfer in taking.transfers:
            self._store.abort(transfer)


def _meta(layer: LayerInfo, shape: Sequence[int]) -> TensorMeta:
    """Raises MalformedMessage or BadTensor for what no tensor is."""
    try:
        return msgspec.convert((int(dtype_by_name(layer.dtype)), tuple(shape)), TensorMeta)
    except msgspec.ValidationError as error:
        raise MalformedMessage(f"layer {layer.layer} of the sequence: {error}") from error


def _report(taking: Taking, *, version: int = 0, code: int = 0) -> Action:
    message = SequenceCopied(ticket=taking.order.ticket, version=version, code=int(code))
    return Send(taking.link, Channel.CONTROL, [wire.encode(message)])


def _say(taking: Taking, message: Message) -> ToPeer:
    return ToPeer(taking.order.url, [wire.encode(message)])
