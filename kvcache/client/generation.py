"""A generation as its asyncio reader sees it."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from bus.errors import BadArgument, Cancelled, KVCacheError
from kvcache.client.calls import Call
from kvcache.client.link import Link
from kvcache.client.results import Done, Event, Token


class Inbox:
    """The sink of a generation's calls: what came and was not read yet, and how they ended.

    The first error ends all.
    """

    def __init__(self, num_outputs: int) -> None:
        self.events: deque[Event] = deque()
        self.done: list[Done] = []
        self.error: KVCacheError | None = None
        self._num_outputs = num_outputs
        self._changed = asyncio.Event()

    @property
    def is_done(self) -> bool:
        """Whether all outputs ended well."""
        return len(self.done) == self._num_outputs

    @property
    def is_over(self) -> bool:
        return self.is_done or self.error is not None

    def emit(self, event: Event) -> None:
        if self.error is None:
            self.events.append(event)
            self._changed.set()

    def settle(self, value: Done) -> None:
        self.done.append(value)
        self.emit(value)

    def fail(self, error: KVCacheError) -> None:
        if self.error is None:
            self.error = error
            self._changed.set()

    async def wait(self) -> None:
        """Until there is an event, or the end. Raises the error when all before it was read."""
        while not self.events and not self.is_over:
            self._changed.clear()
            await self._changed.wait()
        if not self.events and self.error is not None:
            raise self.error


class AsyncGeneration:
    """A generation: iterate over its `Start`, `Token`s and `Done`, or take `text()` or `result()`.

    With n > 1 the outputs' events come interleaved, each with its `index`; `results()` gives them in that order.
    As a context manager it is cancelled when left before its end, and so it is when nobody holds it any more. A
    reader that falls behind makes the worker pause. One reader at a time.
    """

    def __init__(self, calls: Sequence[Call], link: Link) -> None:
        self.request_id = calls[0].key.hex()
        self._keys = tuple(call.key for call in calls)
        self._link = link
        self._inbox = Inbox(len(calls))  # the link holds this, and not us, who may be forgotten
        for call in calls:
            link.submit(call, self._inbox)
            weakref.finalize(self, link.forget, call.key).atexit = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        await self._wait()
        if not self._inbox.events:
            raise StopAsyncIteration
        event = self._inbox.events.popleft()
        self._consume([event])
        return event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cancel()

    async def text(self) -> str:
        """The whole text; reads what is left of the stream. Raises BadArgument if there are several outputs."""
        return (await self.result()).text

    async def result(self) -> Done:
        """How it ended; reads what is left of the stream. Raises BadArgument if there are several outputs."""
        if len(self._keys) > 1:
            raise BadArgument(f"{len(self._keys)} outputs were asked for; take results()")
        return (await self.results())[0]

    async def results(self) -> list[Done]:
        """How each output ended, in the order of their `index`; reads what is left of the stream."""
        while not self._inbox.is_done or self._inbox.events:
            await self.next_batch()
        return sorted(self._inbox.done, key=lambda done: done.index)

    async def cancel(self) -> None:
        """Stop it, unless it has ended; whoever reads on gets `Cancelled`."""
        if self._inbox.is_over:
            return
        self._abandon()
        self._inbox.events.clear()
        self._inbox.fail(Cancelled("the generation was cancelled", request_id=self.request_id))

    async def next_batch(self) -> list[Event]:
        """All events that are there, waiting for at least one; empty after the end."""
        await self._wait()
        batch = list(self._inbox.events)
        self._inbox.events.clear()
        self._consume(batch)
        return batch

    async def _wait(self) -> None:
        try:
            await self._inbox.wait()
        except KVCacheError:
            self._abandon()  # the outputs that go on, since nobody will read them
            raise

    def _abandon(self) -> None:
        for key in self._keys:
            self._link.abandon(key)

    def _consume(self, events: Sequence[Event]) -> None:
        """Tell the worker of each output how far it was read."""
        read = {event.index: event.seq + 1 for event in events if isinstance(event, Token)}
        for index, upto in read.items():
            self._link.consume(self._keys[index], upto)
