"""What the faces of the client share: one connection, and who waits for which call on it."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from bus.errors import BadArgument, Cancelled, KVCacheError
from bus.security import SecurityConfig
from kvcache.client.calls import Call, Emit, Fail, Settle
from kvcache.client.config import ClientConfig
from kvcache.client.connection import Connection
from kvcache.client.core import ClientCore
from kvcache.client.prompts import check_seconds
from kvcache.client.results import Event

T = TypeVar("T")

SOFTWARE = "kvcache-python"


class Sink(Protocol):
    """Whoever waits for a call."""

    def emit(self, event: Event) -> None: ...

    def settle(self, value: Any) -> None: ...  # noqa: ANN401  # each call has its own kind of value

    def fail(self, error: KVCacheError) -> None: ...


class Answer:
    """The sink of a call with one value."""

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self.future = future

    def emit(self, event: Event) -> None:
        raise AssertionError(f"{type(event).__name__} for a call with one value")

    def settle(self, value: Any) -> None:  # noqa: ANN401  # see Sink
        if not self.future.done():
            self.future.set_result(value)

    def fail(self, error: KVCacheError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Link:
    """Connects at first use, within the running loop, and stays until closed."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        self._connection: Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self._sinks: dict[bytes, Sink] = {}

    def connected(self) -> Connection:
        """The connection, made if there is none yet.

        Raises BadArgument after `close`, and in another loop than at first: nothing would ever come there, not even a
        deadline."""
        if self._is_closed:
            raise BadArgument("this client is closed; make a new one")
        if self._connection is not None and self._loop is not asyncio.get_running_loop():
            raise BadArgument("this client belongs to another event loop; make one for each loop, or use Client")
        if self._connection is None:
            core = ClientCore(
                new_id(),
                url=self.config.url,
                software=SOFTWARE,
                max_retries=self.config.max_retries,
                jitter=random.random,
                now=time.monotonic(),
            )
            self._loop = asyncio.get_running_loop()
            self._connection = Connection(core, self.config.endpoints, SecurityConfig(), self._deliver)
        return self._connection

    def deadline(self, seconds: float | None) -> float:
        """When a request ends that may take this long, or (None) as long as the client's timeout."""
        allowed = self.config.timeout_s if seconds is None else check_seconds("deadline", seconds)
        return time.monotonic() + allowed

    def submit(self, call: Call, sink: Sink) -> None:
        """Begin a call; what it has to say goes to `sink`."""
        connection = self.connected()
        self._sinks[call.key] = sink
        connection.submit(call)

    async def ask(self, call: Call, kind: type[T]) -> T:
        """Begin a call and wait for its value, of this kind. Whoever stops waiting abandons it."""
        answer = Answer(asyncio.get_running_loop().create_future())
        self.submit(call, answer)
        try:
            value = await answer.future
        finally:
            self.abandon(call.key)
        assert isinstance(value, kind)
        return value

    def abandon(self, key: bytes) -> None:
        """Nobody waits for this call any more; nothing happens if it has ended."""
        if self._sinks.pop(key, None) is not None and self._connection is not None:
            self._connection.abandon(key)

    def forget(self, key: bytes) -> None:
        """As `abandon`, from any thread and at any time: the garbage collector calls it."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            with suppress(RuntimeError):  # it was closed in between
                loop.call_soon_threadsafe(self.abandon, key)

    def consume(self, key: bytes, upto: int) -> None:
        """The reader of a generation has used its tokens below `upto`."""
        if self._connection is not None:
            self._connection.consume(key, upto)

    def close(self) -> None:
        """End what is under way as `Cancelled`, and disconnect. Safe to call twice."""
        self._is_closed = True
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        sinks, self._sinks = self._sinks, {}
        for key, sink in sinks.items():
            sink.fail(Cancelled("the client was closed", request_id=key.hex()))

    def _deliver(self, action: Emit | Settle | Fail) -> None:
        sink = self._sinks.get(action.key)
        if sink is None:
            return
        match action:
            case Emit():
                sink.emit(action.event)
            case Settle():
                del self._sinks[action.key]
                sink.settle(action.value)
            case Fail():
                del self._sinks[action.key]
                sink.fail(action.error)


def new_id() -> bytes:
    """A request id, or the id of a client."""
    return secrets.token_bytes(16)
