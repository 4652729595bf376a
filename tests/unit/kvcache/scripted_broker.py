"""A broker that a test plays by hand: it welcomes and opens streams by itself, and leaves the rest to the script."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bus import messages as m
from bus import sockets, wire
from bus.endpoints import endpoints
from bus.security import SecurityConfig
from bus.streams import stream_digest, token_bytes
from bus.topics import topic_of
from bus.wire import Buffer

M = TypeVar("M", bound=m.Message)


class Asked(NamedTuple):
    """A message of the client and what came with it."""

    message: Any
    payload: list[bytes]


class ScriptedBroker:
    """`mute`: say nothing at all. `confirms`: whether subscriptions are confirmed. Queues: what happened so far."""

    def __init__(self, url: str, context: sockets.Context) -> None:
        at, security = endpoints(url), SecurityConfig()
        self.url = url
        self.mute = False
        self.confirms = True
        self.welcomed: asyncio.Queue[bytes] = asyncio.Queue()
        self.subscribed: asyncio.Queue[bytes] = asyncio.Queue()
        self.max_inline_bytes = 1024
        self.chunk_bytes = 1000
        self.incarnation = 1
        self.sessions: dict[bytes, bytes] = {}
        self.asked: asyncio.Queue[Asked] = asyncio.Queue()
        self.asked_on_bulk: set[bytes] = set()  # the requests among them that came there
        self._link = self._bulk_link = b""
        self._attached = asyncio.Event()
        self._control = sockets.Router(context, sockets.CONTROL, security, self._on_control)
        self._bulk = sockets.Router(context, sockets.BULK, security, self._on_bulk)
        self._streams = sockets.StreamHub(context, security, allow=self._allow, on_allowed=self._confirm)
        for socket, address in ((self._control, at.control), (self._bulk, at.bulk), (self._streams, at.streams)):
            socket.bind(address)
            socket.start()

    async def expect(self, kind: type[M], where: Callable[[M], bool] = lambda message: True) -> tuple[M, list[bytes]]:
        """The next message of this kind; acknowledgements before it are passed over, anything else is a failure."""
        while True:
            asked = await asyncio.wait_for(self.asked.get(), 5.0)
            if isinstance(asked.message, kind) and where(asked.message):
                return asked.message, asked.payload
            assert isinstance(asked.message, m.Ack), f"expected {kind.__name__}, got {asked.message}"

    def reply(self, message: m.Message, *payload: Buffer) -> None:
        self._control.send(self._link, [wire.encode(message), *payload])

    def reply_raw(self, *frames: Buffer) -> None:
        self._control.send(self._link, frames)

    async def send_bulk(self, message: m.Message, *payload: Buffer) -> None:
        await asyncio.wait_for(self._attached.wait(), 5.0)  # its lane races the control lane
        self._bulk.send(self._bulk_link, [wire.encode(message), *payload])

    def publish(self, stream_id: bytes, message: m.Message) -> None:
        self._streams.send([topic_of(stream_id), wire.encode(message)])

    def forget_clients(self, *, is_restart: bool = True) -> None:
        """As after a restart, with the connection kept: sessions mean nothing any more."""
        self.sessions.clear()
        self.incarnation += is_restart

    def _on_control(self, batch: list[sockets.Message]) -> None:
        for link, *frames in batch:
            message, payload = wire.decode(frames)
            if self.mute:
                continue
            self._link = bytes(link)
            match message:
                case m.Hello():
                    self._welcome()
                case _ if self._link not in self.sessions:
                    pass
                case m.Beat():
                    self.reply(m.BrokerBeat(beat=message.beat, lease_ms=2000))
                case m.OpenStream():
                    self.reply(m.StreamOpened(req_id=message.req_id, stream_id=secrets.token_bytes(16)))
                case _:
                    self.asked.put_nowait(Asked(message, [bytes(frame) for frame in payload]))

    def _on_bulk(self, batch: list[sockets.Message]) -> None:
        for link, *frames in batch:
            message, payload = wire.decode(frames)
            if isinstance(message, m.AttachBulk):
                self._bulk_link = bytes(link)
                self._attached.set()
                continue
            if isinstance(message, m.Put | m.Append):
                self.asked_on_bulk.add(message.req_id)
            self.asked.put_nowait(Asked(message, [bytes(frame) for frame in payload]))

    def _welcome(self) -> None:
        self.welcomed.put_nowait(self._link)
        session = self.sessions.setdefault(self._link, secrets.token_bytes(16))
        self.reply(
            m.Welcome(
                session=session,
                incarnation=self.incarnation,
                major=wire.MAJOR,
                minor=wire.MINOR,
                heartbeat_ms=100,
                lease_ms=2000,
                max_inline_bytes=self.max_inline_bytes,
                max_prompt_bytes=1 << 20,
                max_tensor_bytes=1 << 30,
                chunk_bytes=self.chunk_bytes,
                window_tokens=1024,
            )
        )

    def _allow(self, topic: bytes) -> bool:
        self.subscribed.put_nowait(topic)
        return True

    def _confirm(self, topic: bytes) -> None:
        if self.confirms:
            self._streams.send([topic, wire.encode(m.SubAck())])


@asynccontextmanager
async def scripted_broker() -> AsyncIterator[ScriptedBroker]:
    """A scripted broker on sockets of its own."""
    with tempfile.TemporaryDirectory(prefix="kvc") as folder, sockets.Context() as context:
        yield ScriptedBroker(f"ipc://{Path(folder) / 'bus'}", context)


def started(asked: m.Generate, worker_id: str = "w1", cached_tokens: int = 3) -> m.Started:
    """The answer of a worker that admits this request."""
    return m.Started(
        req_id=asked.req_id,
        epoch=asked.epoch,
        worker_id=worker_id,
        reason="consistent_hash: test",
        model="tiny",
        prompt_tokens=5,
        cached_tokens=cached_tokens,
    )


def some_tokens(asked: m.Generate, seq: int, tokens: list[int]) -> m.StreamTokens:
    """Tokens of this attempt, each with its number as text."""
    return m.StreamTokens(epoch=asked.epoch, seq=seq, tokens=tuple(tokens), texts=tuple(f"{t} " for t in tokens))


def replayed(asked: m.Generate, seq: int, tokens: list[int]) -> m.Replay:
    """The same on the reliable lane."""
    texts = tuple(f"{t} " for t in tokens)
    return m.Replay(req_id=asked.req_id, epoch=asked.epoch, seq=seq, tokens=tuple(tokens), texts=texts)


def ended(asked: m.Generate, tokens: list[int]) -> m.StreamEnd:
    """The good end of this attempt, after all these tokens."""
    return m.StreamEnd(
        req_id=asked.req_id,
        epoch=asked.epoch,
        num_tokens=len(tokens),
        digest=stream_digest(token_bytes(tokens)),
        finish_reason=m.FinishReason.LENGTH,
        prompt_tokens=5,
        cached_tokens=3,
        queue_ms=1.0,
        prefill_ms=2.0,
        decode_ms=3.0,
    )


def lost(req_id: bytes) -> m.Failed:
    """The broker's word that the worker is gone."""
    return m.Failed(req_id=req_id, code=16, message="worker w1 was lost", retryable=True)
