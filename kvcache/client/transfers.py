"""KV on its way: writes that carry K and V, reads that bring them. No sockets, no clock.

Small ones go within the message on the control lane. What is more, but no more than a chunk, goes within the message on
the bulk lane; more than that follows its message there in chunks: the first few at once, the others as the receiver
gives credit. One lane keeps order, so no chunk comes before what it belongs to; nor can one of an earlier attempt be
taken for one of a later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from bus import wire
from bus.errors import MalformedMessage, TooLarge
from bus.limits import UPLOAD_WINDOW
from bus.messages import Append, AttachBulk, Chunk, Credit, Get, KvDone, KvValue, Message, Put, Welcome
from bus.wire import Buffer
from kvcache.client.arrays import Tensor, kv_pair
from kvcache.client.calls import NO_ACTIONS, Action, Call, Settle, ToBulk, ToControl, remaining_ms, unexpected
from kvcache.client.results import KvAck

GET_CREDIT = 8
CREDIT_BATCH = 4

MakeWrite = Callable[..., Put | Append]


class WriteCall(Call):
    """A put or an append, as `make` builds it from `req_id`, `attempt`, `deadline_ms` and `payload`.

    The same bytes are sent at every attempt, under the same id.
    """

    def __init__(self, key: bytes, deadline: float, pair: tuple[Tensor, Tensor], make: MakeWrite) -> None:
        self.key = self.req_id = key
        self.deadline = deadline
        self._pair = pair
        self._num_bytes = sum(tensor.data.nbytes for tensor in pair)
        self._make = make
        self._chunks: Iterator[ToBulk] = iter(())

    def num_messages(self, limits: Welcome) -> int:
        """How many it may have under way on the bulk lane."""
        if self._num_bytes <= limits.max_inline_bytes:
            return 0
        return 1 if self._num_bytes <= limits.chunk_bytes else 1 + UPLOAD_WINDOW

    def begin(self, attempt: int, limits: Welcome, now: float) -> Sequence[Action]:
        num_bytes = self._num_bytes
        if num_bytes > limits.max_tensor_bytes:
            raise TooLarge(
                f"k and v are {num_bytes} bytes, limit {limits.max_tensor_bytes}", detail=limits.max_tensor_bytes
            )
        is_whole = num_bytes <= max(limits.chunk_bytes, limits.max_inline_bytes)
        payload = [tensor.data for tensor in self._pair] if is_whole else []
        left_ms = remaining_ms(self.deadline, now)
        message = self._make(req_id=self.req_id, attempt=attempt, deadline_ms=left_ms, payload=wire.describe(payload))
        if num_bytes <= limits.max_inline_bytes:
            return [ToControl(message, payload)]
        # Whose the lane is goes ahead each time: it may be another connection than the last time.
        begun = [ToBulk(AttachBulk(session=limits.session)), ToBulk(message, payload)]
        self._chunks = iter(()) if is_whole else self._cut(limits.chunk_bytes)
        return [*begun, *islice(self._chunks, UPLOAD_WINDOW)]

    def receive(self, message: Message, payload: Sequence[Buffer], now: float) -> Sequence[Action]:
        match message:
            case Credit():
                return list(islice(self._chunks, message.chunks))
            case KvDone():
                return [Settle(self.key, KvAck(message.length, message.durability, message.duplicate))]
            case _:
                raise unexpected(message)

    def leave(self, *, tell: bool) -> Sequence[Action]:
        self._chunks = iter(())
        return NO_ACTIONS

    def _cut(self, chunk_bytes: int) -> Iterator[ToBulk]:
        """K's bytes, then V's, in chunks of at most this many; none has some of both."""
        base = 0
        for tensor in self._pair:
            for start in range(0, tensor.data.nbytes, chunk_bytes):
                part = tensor.data[start : start + chunk_bytes]
                yield ToBulk(Chunk(req_id=self.req_id, offset=base + start, payload=()), [part])
            base += tensor.data.nbytes


class ReadCall(Call):
    """A get. It has no effect to repeat, so each attempt has an id of its own and no chunk of an earlier one can
    be taken for one of this.

    has_turn: whether chunks may be on their way to it now. Without, a value that is not small is only announced.
    """

    has_turn = True

    def __init__(
        self,
        key: bytes,
        deadline: float,
        new_id: Callable[[], bytes],
        *,
        seq_id: str,
        layer: int,
        start: int,
        stop: int | None,
    ) -> None:
        self.key = self.req_id = key
        self.deadline = deadline
        self._new_id = new_id
        self._where = (seq_id, layer, start, stop)
        self._limit_bytes = 0
        self._reset()

    def begin(self, attempt: int, limits: Welcome, now: float) -> Sequence[Action]:
        self._reset()
        self._limit_bytes = limits.max_tensor_bytes
        if attempt:
            self.req_id = self._new_id()
        seq_id, layer, start, stop = self._where
        get = Get(
            req_id=self.req_id,
            attempt=attempt,
            deadline_ms=remaining_ms(self.deadline, now),
            seq_id=seq_id,
            layer=layer,
            start=start,
            stop=stop,
            credit=GET_CREDIT if self.has_turn else 0,
        )
        return [ToControl(get)]

    @property
    def waits(self) -> bool:
        """Whether its value was announced, and nothing of it comes before `go_on`."""
        return self._value is not None and not self.has_turn

    def go_on(self) -> Sequence[Action]:
        """Its turn has come."""
        self.has_turn = True
        return [ToControl(Credit(req_id=self.req_id, chunks=GET_CREDIT))]

    def receive(self, message: Message, payload: Sequence[Buffer], now: float) -> Sequence[Action]:
        match message:
            case KvValue() if self._value is None:
                return self._announce(message, payload)
            case Chunk() if self._value is None and len(self._early) < GET_CREDIT:
                self._early.append((message, payload[0]))
                return NO_ACTIONS
            case Chunk() if self._value is not None:
                return self._store(self._value, message.offset, payload[0])
            case _:
                raise unexpected(message)

    def leave(self, *, tell: bool) -> Sequence[Action]:
        self._reset()
        return NO_ACTIONS

    def _reset(self) -> None:
        self._value: KvValue | None = None
        self._early: deque[tuple[Chunk, Buffer]] = deque()
        self._data = memoryview(b"")
        self._num_stored = 0
        self._ungranted = 0

    def _announce(self, value: KvValue, payload: Sequence[Buffer]) -> Sequence[Action]:
        if payload:
            if len(payload) != 2:
                raise MalformedMessage(f"a value came with {len(payload)} payload frames, not K's and V's")
            return [Settle(self.key, kv_pair(value.k, value.v, memoryview(payload[0]), memoryview(payload[1])))]
        num_bytes = value.k.nbytes + value.v.nbytes
        if num_bytes > self._limit_bytes:
            raise TooLarge(f"the value is {num_bytes} bytes, limit {self._limit_bytes}", detail=self._limit_bytes)
        self._value = value
        # Memory that is not written is not taken: a size that was only claimed costs address space.
        self._data = np.empty(num_bytes, np.uint8).data
        actions: list[Action] = []
        while self._early:
            chunk, data = self._early.popleft()
            actions += self._store(value, chunk.offset, data)
        return actions or self._finish_if_complete(value)

    def _store(self, value: KvValue, offset: int, data: Buffer) -> Sequence[Action]:
        """Take the next chunk, and give credit for more. The lane keeps order, so any other offset is wrong."""
        num_bytes = memoryview(data).nbytes
        room = (value.k.nbytes if offset < value.k.nbytes else self._data.nbytes) - offset
        if offset != self._num_stored or not 0 < num_bytes <= room:
            raise MalformedMessage(
                f"chunk of {num_bytes} bytes at {offset}, expected the bytes from {self._num_stored}"
            )
        self._data[offset : offset + num_bytes] = data
        self._num_stored += num_bytes
        self._ungranted += 1
        if self._num_stored < self._data.nbytes and self._ungranted >= CREDIT_BATCH:
            granted, self._ungranted = self._ungranted, 0
            return [ToControl(Credit(req_id=self.req_id, chunks=granted))]
        return self._finish_if_complete(value)

    def _finish_if_complete(self, value: KvValue) -> Sequence[Action]:
        if self._num_stored < self._data.nbytes:
            return NO_ACTIONS
        k_bytes = value.k.nbytes
        return [Settle(self.key, kv_pair(value.k, value.v, self._data[:k_bytes], self._data[k_bytes:]))]
