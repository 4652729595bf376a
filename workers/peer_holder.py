"""Copies that other workers take of our blocks: from the ticket they show to the last chunk they gave credit for.

    PARKED   the ticket is not known (`workers.callers`)
    LENDING  the engine looks for the blocks and holds them
    SENDING  slices are read from the engine and sent in chunks, as many as the other has room for

A copy ends with its last chunk, with `Failed`, when its taker cancels, or when that one says nothing for `IDLE_S`;
in every case the loan is returned. Nothing here decides what may be evicted: see `workers.loans`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from bus import wire
from bus.errors import Cancelled, Forbidden, KVCacheError, MalformedMessage, Overloaded
from bus.limits import CHUNK_BYTES
from bus.messages import BlocksFound, Cancel, Chunk, Credit, Grant, PullBlocks
from bus.wire import Frames
from kvcache.hashing import TOKEN_BYTES
from workers.callers import IDLE_S, CopyKey, Parked, refuse, say
from workers.calls import Action, Tell
from workers.copy_api import BlocksRead, CopyBroke, Lend, Lent, ReadBlocks, Return
from workers.loans import LoanId

MAX_COPIES = 8
SLICE_BYTES = 4 << 20
"""Read from the engine at once: about 2 ms of a core."""

MAX_READS = 4
"""Slices that the engine may be asked for at a time: it takes several between two steps if they fit."""


@dataclass(slots=True, eq=False)
class Copy:
    """One copy. num_blocks: where the run ends; 0 until the engine has said so. offset: bytes sent.

    reads: the bytes of each slice that the engine was asked for and has not read yet.
    """

    key: CopyKey
    loan: LoanId
    request: PullBlocks
    moved_at: float
    credit: int
    num_blocks: int = 0
    block_bytes: int = 0
    next_block: int = 0
    reads: deque[int] = field(default_factory=deque)
    pieces: deque[memoryview] = field(default_factory=deque)
    offset: int = 0

    @property
    def wants_slice(self) -> bool:
        """Whether another one is to be read: there is credit beyond what is on its way."""
        coming = len(self.pieces) + sum(-(-nbytes // CHUNK_BYTES) for nbytes in self.reads)
        return self.next_block < self.num_blocks and len(self.reads) < MAX_READS and coming < self.credit


class Holder:
    """All copies that others take."""

    def __init__(self) -> None:
        self.malformed = 0
        self.served_bytes = 0
        self.num_served = 0
        self._parked = Parked[tuple[PullBlocks, bytes]]()  # with the tokens
        self._copies: dict[CopyKey, Copy] = {}
        self._by_loan: dict[LoanId, Copy] = {}
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._copies)

    # --- what the broker says ---

    def granted(self, grant: Grant, now: float) -> list[Action]:
        """A ticket; who has shown it already is served."""
        shown = self._parked.granted(grant, now)
        return [action for key, (request, tokens) in shown for action in self._admit(key, request, tokens, now)]

    # --- what other workers say ---

    def on_message(self, peer: bytes, frames: Frames, now: float) -> list[Action]:
        """A message of anybody who can reach our endpoint, whatever its bytes."""
        try:
            message, payload = wire.decode(frames)
            match message:
                case PullBlocks():
                    return self._ask((peer, message.req_id), message, bytes(payload[0]), now)
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
        return [action for key in list(self._copies) if key[0] == peer for action in self._drop(key)]

    # --- what engine and clock say ---

    def on_engine(self, event: Lent | BlocksRead | CopyBroke, now: float) -> list[Action]:
        loan = LoanId(event.copy) if isinstance(event, CopyBroke) else event.loan
        copy = self._by_loan.get(loan)
        if copy is None:  # its taker gave up meanwhile
            return [Tell(Return(loan))] if isinstance(event, Lent) else []
        copy.moved_at = now
        match event:
            case Lent():
                return self._lent(copy, event)
            case BlocksRead():
                copy.reads.popleft()
                copy.pieces.extend(_cut(event.data))
                return self._go_on(copy)
            case CopyBroke():
                return [refuse(copy.key, event.error), *self._drop(copy.key)]

    def tick(self, now: float) -> list[Action]:
        actions = self._parked.tick(now)
        for key, copy in list(self._copies.items()):
            if now - copy.moved_at > IDLE_S:
                actions += self._drop(key)
        return actions

    # --- inside ---

    def _ask(self, key: CopyKey, request: PullBlocks, tokens: bytes, now: float) -> list[Action]:
        """Raises what is wrong with the request."""
        if not tokens or len(tokens) % (request.block_size * TOKEN_BYTES):
            raise MalformedMessage(f"{len(tokens)} bytes of tokens are no whole blocks of {request.block_size}")
        is_known = self._parked.show(key, request.ticket, (request, tokens), self._copies.keys(), now)
        return self._admit(key, request, tokens, now) if is_known else []

    def _admit(self, key: CopyKey, request: PullBlocks, tokens: bytes, now: float) -> list[Action]:
        """The ticket decides whose blocks these may be, whatever the request says."""
        try:
            grant = self._parked.take(request.ticket, request.worker_id, now)
            if len(tokens) > grant.num_tokens * TOKEN_BYTES:
                raise Forbidden(f"this ticket is for the first {grant.num_tokens} tokens, not for more")
            if len(self._copies) >= MAX_COPIES:
                raise Overloaded(f"{MAX_COPIES} copies are under way from this worker")
        except KVCacheError as error:
            return [refuse(key, error)]
        loan = LoanId(b"lent" + next(self._numbers).to_bytes(8, "big"))
        self._copies[key] = self._by_loan[loan] = Copy(key, loan, request, now, request.credit)
        lend = Lend(
            loan=loan,
            tenant=grant.tenant,
            fingerprint=request.fingerprint,
            dtype=request.dtype,
            layout_version=request.layout_version,
            block_size=request.block_size,
            cache_salt=request.cache_salt,
            tokens=tokens,
            start=request.start,
            digest=request.digest,
        )
        return [Tell(lend)]

    def _lent(self, copy: Copy, lent: Lent) -> list[Action]:
        copy.num_blocks, copy.block_bytes, copy.next_block = lent.num_blocks, lent.block_bytes, copy.request.start
        found = BlocksFound(
            req_id=copy.request.req_id,
            num_blocks=lent.num_blocks,
            digest=lent.digest,
            block_bytes=lent.block_bytes,
        )
        return [say(copy.key, found), *self._go_on(copy)]

    def _grant(self, key: CopyKey, chunks: int, now: float) -> list[Action]:
        copy = self._copies.get(key)
        if copy is None:
            return []
        copy.credit += chunks
        copy.moved_at = now
        return self._go_on(copy) if copy.num_blocks else []

    def _go_on(self, copy: Copy) -> list[Action]:
        """Send what there is credit for, and have the next slices read while that is on its way."""
        actions: list[Action] = []
        while copy.credit and copy.pieces:
            actions.append(self._send_piece(copy))
        if copy.next_block == copy.num_blocks and not copy.reads and not copy.pieces:
            self.num_served += 1
            return [*actions, *self._drop(copy.key)]
        while copy.wants_slice:
            stop = min(copy.num_blocks, copy.next_block + max(1, SLICE_BYTES // copy.block_bytes))
            actions.append(Tell(ReadBlocks(copy.loan, copy.next_block, stop)))
            copy.reads.append((stop - copy.next_block) * copy.block_bytes)
            copy.next_block = stop
        return actions

    def _send_piece(self, copy: Copy) -> Action:
        piece = copy.pieces.popleft()
        chunk = Chunk(req_id=copy.request.req_id, offset=copy.offset, payload=wire.describe([piece]))
        copy.credit -= 1
        copy.offset += piece.nbytes
        self.served_bytes += piece.nbytes
        return say(copy.key, chunk, piece)

    def _cancelled(self, key: CopyKey) -> list[Action]:
        """Answered, also if there is no such copy: whoever gave up before a first word hears that we are there."""
        return [*self._drop(key), refuse(key, Cancelled("the worker that copies has cancelled"))]

    def _drop(self, key: CopyKey) -> list[Action]:
        """It is over, however it went."""
        self._parked.drop(key)
        copy = self._copies.pop(key, None)
        if copy is None:
            return []
        del self._by_loan[copy.loan]
        return [Tell(Return(copy.loan))]


def _cut(data: memoryview) -> Iterator[memoryview]:
    return (data[at : at + CHUNK_BYTES] for at in range(0, data.nbytes, CHUNK_BYTES))
