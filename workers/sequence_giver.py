"""Copies that other workers take of whole named sequences: from the ticket they show to the last chunk.

    PARKED   the ticket is not known (`workers.callers`)
    SENDING  all layers are held as they were at one moment, and sent in chunks, as many as the other has room for

What is sent is a snapshot under the version that was held at that moment: writes go on meanwhile, and make a newer
one. A copy ends with its last chunk, with `Failed`, when its taker cancels, or when that one says nothing for `IDLE_S`;
in every case the store's reads are closed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from bus import wire
from bus.errors import Cancelled, KVCacheError, MalformedMessage, NotFound, Overloaded
from bus.limits import CHUNK_BYTES
from bus.messages import MAX_MILLIS, Cancel, Chunk, Credit, Grant, PullSequence, SequenceFound
from bus.stats import Receipt, Snapshot, pack
from bus.wire import Frames
from workers.callers import IDLE_S, CopyKey, Parked, refuse, say
from workers.calls import Action
from workers.holdings import HeldSequences
from workers.keys import SequenceKey
from workers.store import KVStore, Read

MAX_GIVEN = 8
MAX_CREDIT = 64
"""Chunks that a taker can have on their way, whatever it asks for."""


@dataclass(slots=True, eq=False)
class Gift:
    """One copy. pieces: what is still to be sent. num_bytes: of all of it; sent: of it so far."""

    reads: list[Read]
    pieces: Iterator[bytes]
    num_bytes: int
    credit: int
    moved_at: float
    sent: int = 0


class Giver:
    """All copies that others take of what lies in `store`; `held` knows the versions, `receipts` the latest changes."""

    def __init__(
        self, store: KVStore, held: HeldSequences, receipts: Callable[[SequenceKey], tuple[Receipt, ...]]
    ) -> None:
        self.malformed = 0
        self.num_given = 0
        self._store = store
        self._held = held
        self._receipts = receipts
        self._parked = Parked[PullSequence]()
        self._gifts: dict[CopyKey, Gift] = {}

    def __len__(self) -> int:
        return len(self._gifts)

    def granted(self, grant: Grant, now: float) -> list[Action]:
        """A ticket; who has shown it already is served."""
        shown = self._parked.granted(grant, now)
        return [action for key, request in shown for action in self._admit(key, request, now)]

    def on_message(self, peer: bytes, frames: Frames, now: float) -> list[Action]:
        """A message of anybody who can reach our endpoint, whatever its bytes."""
        try:
            message, _ = wire.decode(frames)
            match message:
                case PullSequence():
                    return self._ask((peer, message.req_id), message, now)
                case Credit():
                    return self._grant((peer, message.req_id), message.chunks, now)
                case Cancel():
                    return self._cancelled((peer, message.req_id))
                case _:
                    raise MalformedMessage(f"{type(message).__name__} is not for a worker that is copied from")
        except KVCacheError as error:
            self.malformed += isinstance(error, MalformedMessage)
            return [refuse((peer, wire.request_id_of(frames[0]) if frames else wire.NO_REQUEST), error)]

    def lose(self, peer: bytes) -> list[Action]:
        """Nothing can be sent to this link any more."""
        return [action for key in list(self._gifts) if key[0] == peer for action in self._drop(key)]

    def tick(self, now: float) -> list[Action]:
        actions = self._parked.tick(now)
        for key, gift in list(self._gifts.items()):
            if now - gift.moved_at > IDLE_S:
                actions += self._drop(key)
        return actions

    # --- inside ---

    def _ask(self, key: CopyKey, request: PullSequence, now: float) -> list[Action]:
        """Raises what is wrong with the request."""
        is_known = self._parked.show(key, request.ticket, request, self._gifts.keys(), now)
        return self._admit(key, request, now) if is_known else []

    def _admit(self, key: CopyKey, request: PullSequence, now: float) -> list[Action]:
        """The ticket decides whose sequence this is, and which."""
        try:
            grant = self._parked.take(request.ticket, request.worker_id, now)
            if len(self._gifts) >= MAX_GIVEN:
                raise Overloaded(f"{MAX_GIVEN} sequences are being copied from this worker")
            return self._give(key, request, SequenceKey(grant.tenant, grant.seq_id), now)
        except KVCacheError as error:
            return [refuse(key, error)]

    def _give(self, key: CopyKey, request: PullSequence, sequence: SequenceKey, now: float) -> list[Action]:
        """Raises NotFound for what is not stored here: what a generation left is not copied, but computed anew."""
        if not self._store.has(sequence):
            raise NotFound(f"sequence {sequence.seq_id!r} is not stored here")
        version = self._held.version(sequence)
        info = msgspec.structs.replace(self._store.describe(sequence, now), version=version)
        pinned_s = self._store.pinned_s(sequence, now)
        pin_ms = 0 if pinned_s is None or math.isinf(pinned_s) else max(1, int(pinned_s * 1000))
        reads = [self._store.open_read(sequence, layer.layer) for layer in info.layers]
        self._gifts[key] = Gift(reads, self._pieces(reads), info.nbytes, min(request.credit, MAX_CREDIT), now)
        payload = pack(Snapshot(info=info, receipts=self._receipts(sequence)))
        found = SequenceFound(
            req_id=key[1],
            version=version,
            rf=self._held.rf(sequence),
            copies=self._held.copied(sequence),
            pin_ms=min(pin_ms, MAX_MILLIS),
            payload=wire.describe([payload]),
        )
        return [say(key, found, payload), *self._go_on(key)]

    def _pieces(self, reads: list[Read]) -> Iterator[bytes]:
        """Copies: what a window shows may change once its read is closed."""
        return (bytes(piece) for read in reads for _, piece in self._store.chunks(read, CHUNK_BYTES))

    def _grant(self, key: CopyKey, chunks: int, now: float) -> list[Action]:
        gift = self._gifts.get(key)
        if gift is None:
            return []
        gift.credit = min(gift.credit + chunks, MAX_CREDIT)
        gift.moved_at = now
        return self._go_on(key)

    def _go_on(self, key: CopyKey) -> list[Action]:
        """Send what there is credit for."""
        gift, actions = self._gifts[key], list[Action]()
        while gift.credit and gift.sent < gift.num_bytes:
            piece = next(gift.pieces)
            actions.append(say(key, Chunk(req_id=key[1], offset=gift.sent, payload=wire.describe([piece])), piece))
            gift.credit -= 1
            gift.sent += len(piece)
        if gift.sent == gift.num_bytes:
            self.num_given += 1
            actions += self._drop(key)
        return actions

    def _cancelled(self, key: CopyKey) -> list[Action]:
        """Answered, also if there is no such copy: whoever gave up before a first word hears that we are there."""
        return [*self._drop(key), refuse(key, Cancelled("the worker that copies has cancelled"))]

    def _drop(self, key: CopyKey) -> list[Action]:
        """It is over, however it went."""
        self._parked.drop(key)
        gift = self._gifts.pop(key, None)
        if gift is not None:
            for read in gift.reads:
                self._store.close_read(read)
        return []
