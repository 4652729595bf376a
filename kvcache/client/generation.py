"""A generation as its asyncio reader sees it."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from types import TracebackType
from typing import Self

from bus.errors import Cancelled, KVCacheError
from kvcache.client.calls import Call
from kvcache.client.link import Link
from kvcache.client.results import Done, Event, Token


class Inbox:
    """The sink of a generation: what came and was not read yet, and how it ended."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque()
        self.done: Done | None = None
        self.error: KVCacheError | None = None
        self._changed = asyncio.Event()

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self._changed.set()

    def settle(self, value: Done) -> None:
        self.done = value
        self.emit(value)

    def fail(self, error: KVCacheError) -> None:
        self.error = error
        self._changed.set()

    async def wait(self) -> None:
        """Until there is an event, or the end. Raises the error when all before it was read."""
        while not self.events and self.done is None and self.error is None:
            self._changed.clear()
            await self._changed.wait()
        if not self.events and self.error is not None:
            raise self.error


class AsyncGeneration:
    """One generation: iterate over its `Start`, `Token`s and `Done`, or take `text()` or `result()`.

    As a context manager it is cancelled when left before its end, and so it is when nobody holds it any more. A
    reader that falls behind makes the worker pause. One reader at a time.
    """

    def __init__(self, call: Call, link: Link) -> None:
        self.request_id = call.key.hex()
        self._key = call.key
        self._link = link
        self._inbox = Inbox()  # the link holds this, and not us, who may be forgotten
        link.submit(call, self._inbox)
        weakref.finalize(self, link.forget, call.key).atexit = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        await self._inbox.wait()
        if not self._inbox.events:
            raise StopAsyncIteration
        event = self._inbox.events.popleft()
        if isinstance(event, Token):
            self._link.consume(self._key, event.seq + 1)
        return event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cancel()

    async def text(self) -> str:
        """The whole text; reads what is left of the stream."""
        return (await self.result()).text

    async def result(self) -> Done:
        """How it ended; reads what is left of the stream."""
        while self._inbox.done is None or self._inbox.events:
            await self.next_batch()
        return self._inbox.done

    async def cancel(self) -> None:
        """Stop it, unless it has ended; whoever reads on gets `Cancelled`."""
        if self._inbox.done is not None or self._inbox.error is not None:
            return
        self._link.abandon(self._key)
        self._inbox.events.clear()
        self._inbox.fail(Cancelled("the generation was cancelled", request_id=self.request_id))

    async def next_batch(self) -> list[Event]:
        """All events that are there, waiting for at least one; empty after the end."""
        await self._inbox.wait()
        batch = list(self._inbox.events)
        self._inbox.events.clear()
        tokens = [event for event in batch if isinstance(event, Token)]
        if tokens:
            self._link.consume(self._key, tokens[-1].seq + 1)
        return batch
