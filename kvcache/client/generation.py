"""A generation as its asyncio reader sees it."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Self

from bus.errors import Cancelled, KVCacheError
from kvcache.client.link import Link
from kvcache.client.results import Done, Event, Token


class AsyncGeneration:
    """One generation: iterate over its `Start`, `Token`s and `Done`, or take `text()` or `result()`.

    As a context manager it is cancelled when left before its end. A reader that falls behind makes the worker
    pause, so read it or cancel it. One reader at a time.
    """

    def __init__(self, key: bytes, link: Link) -> None:
        self.request_id = key.hex()
        self._key = key
        self._link = link
        self._events: deque[Event] = deque()
        self._changed = asyncio.Event()
        self._done: Done | None = None
        self._error: KVCacheError | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        await self._wait()
        if not self._events:
            raise StopAsyncIteration
        event = self._events.popleft()
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
        while self._done is None or self._events:
            await self.next_batch()
        return self._done

    async def cancel(self) -> None:
        """Stop it, unless it has ended; whoever reads on gets `Cancelled`."""
        if self._done is not None or self._error is not None:
            return
        self._link.abandon(self._key)
        self._events.clear()
        self.fail(Cancelled("the generation was cancelled", request_id=self.request_id))

    async def next_batch(self) -> list[Event]:
        """All events that are there, waiting for at least one; empty after the end."""
        await self._wait()
        batch, self._events = list(self._events), deque()
        tokens = [event for event in batch if isinstance(event, Token)]
        if tokens:
            self._link.consume(self._key, tokens[-1].seq + 1)
        return batch

    def emit(self, event: Event) -> None:
        self._events.append(event)
        self._changed.set()

    def settle(self, value: Done) -> None:
        self._done = value
        self.emit(value)

    def fail(self, error: KVCacheError) -> None:
        self._error = error
        self._changed.set()

    async def _wait(self) -> None:
        """Until there is an event, or the end. Raises the error when all before it was read."""
        while not self._events and self._done is None and self._error is None:
            self._changed.clear()
            await self._changed.wait()
        if not self._events and self._error is not None:
            raise self._error
