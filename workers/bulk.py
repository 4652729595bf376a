"""Tensors on their way in or out of a worker, in chunks, as many as the receiver has given credit for.

An upload begins with a window of chunks and grants credit for more as they are written, so that what the client may
have under way is bounded; a download spends what the client grants, as far as there is room on the lane that it shares
with others. Bytes count from the start of K through the end of V, and a chunk
never holds some of both. Whoever makes one of these sees to it that it is completed or closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from bus.errors import KVCacheError
from bus.limits import CHUNK_BYTES, UPLOAD_WINDOW
from bus.messages import KvValue
from bus.wire import Buffer
from workers.keys import SequenceKey
from workers.store import Committed, KVStore
from workers.transfers import Transfer

GRANT_CHUNKS = UPLOAD_WINDOW // 2  # credit is granted anew when this many were taken


class Upload:
    """A write that was begun in the store, whose bytes are coming."""

    def __init__(self, store: KVStore, transfer: Transfer) -> None:
        self._store = store
        self._transfer = transfer
        self._taken = 0

    @property
    def key(self) -> SequenceKey:
        return self._transfer.key

    @property
    def is_complete(self) -> bool:
        """Whether all bytes have come; it can be committed then."""
        return not self._transfer.coverage.missing

    def take(self, offset: int, data: Buffer) -> int:
        """Write one chunk; returns for how many more chunks credit is due. Raises BadTensor."""
        self._store.write(self._transfer, offset, data)
        self._taken += 1
        if self._taken < GRANT_CHUNKS:
            return 0
        self._taken = 0
        return GRANT_CHUNKS

    def take_whole(self, parts: Sequence[Buffer]) -> Committed:
        """Write K and V at once and commit. Raises BadTensor if their lengths are not right, and as `commit` does."""
        try:
            for part, offset in zip(parts, (0, self._transfer.k_bytes), strict=True):
                if len(part):
                    self._store.write(self._transfer, offset, part)
        except KVCacheError:
            self.close()
            raise
        return self.commit()

    def commit(self) -> Committed:
        """Make it visible; it is over then, whatever comes of it. Raises Conflict."""
        return self._store.commit(self._transfer)

    def close(self) -> None:
        """Give it up: it has no effect, and its room is free."""
        self._store.abort(self._transfer)


class Download:
    """A value on its way out. `pieces`: (offset, bytes) in order; `on_close` lets go of what they look into.

    is_announced: whether its reader has been told what comes.
    """

    def __init__(
        self, pieces: Iterable[tuple[int, memoryview]], value: KvValue, on_close: Callable[[], None] = lambda: None
    ) -> None:
        self.value = value
        self.is_announced = False
        self.num_bytes = value.k.nbytes + value.v.nbytes
        self._k_bytes = value.k.nbytes
        self._pieces = iter(pieces)
        self._on_close = on_close
        self._credit = 0
        self._sent_bytes = 0

    @property
    def is_complete(self) -> bool:
        return self._sent_bytes == self.num_bytes

    def grant(self, chunks: int) -> None:
        """The client can take so many more."""
        self._credit += chunks

    @property
    def may_go_on(self) -> bool:
        """Whether there is credit for what is left."""
        return self._credit > 0 and not self.is_complete

    def take(self, limit: int) -> Iterator[tuple[int, bytes]]:
        """At most so many chunks, as far as credit goes. They are copies: what they show may change once this is
        closed."""
        for _ in range(limit):
            if not self.may_go_on:
                return
            offset, piece = next(self._pieces)
            self._credit -= 1
            self._sent_bytes += len(piece)
            yield offset, bytes(piece)

    def take_whole(self) -> tuple[bytes, bytes]:
        """K and V at once; it is closed then."""
        k: list[memoryview] = []
        v: list[memoryview] = []
        for offset, piece in self._pieces:
            (k if offset < self._k_bytes else v).append(piece)
        whole = b"".join(k), b"".join(v)
        self.close()
        return whole

    def close(self) -> None:
        self._on_close()


def cut(k: memoryview, v: memoryview) -> Iterator[tuple[int, memoryview]]:
    """K's bytes, then V's, in chunks."""
    for base, data in ((0, k), (k.nbytes, v)):
        for begin in range(0, data.nbytes, CHUNK_BYTES):
            yield base + begin, data[begin : begin + CHUNK_BYTES]
