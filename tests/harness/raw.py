"""Peers that say exactly what a test tells them, right or wrong: no retries, no checks, no heartbeats of their own.

They speak through the bus's sockets and build right messages with its codec; wrong ones are bytes of the test's.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Self, TypeVar

from bus import messages as m
from bus import sockets, wire
from bus.endpoints import endpoints
from bus.security import SecurityConfig
from bus.sockets import Context, Dealer, Subscriber
from bus.tensors import TensorMeta
from bus.topics import topic_of
from bus.wire import Buffer

M = TypeVar("M", bound=m.Message)
S = TypeVar("S", bound=sockets.Socket)
SECURITY = SecurityConfig()
ANSWER_S = 20.0
BEAT_S = 0.5
HELLO_S = 0.25
ANY_BYTES = 1 << 40


class Heard(NamedTuple):
    message: Any
    payload: list[bytes]


class RawPeer:
    """One control connection, and a bulk one for those who ask for it."""

    def __init__(self, context: Context, control: str, bulk: str) -> None:
        self._resources = ExitStack()
        self.heard: asyncio.Queue[Heard] = asyncio.Queue()
        self._control = self._connect(Dealer(context, _unlimited(sockets.CONTROL), SECURITY, self._on_batch), control)
        self._bulk = self._connect(Dealer(context, _unlimited(sockets.BULK), SECURITY, self._on_batch), bulk)

    def close(self) -> None:
        """Disconnect without a word."""
        self._resources.close()

    def send_frames(self, *frames: Buffer) -> None:
        self._control.send(frames)

    def send(self, message: m.Message, *payload: Buffer) -> None:
        self._control.send([wire.encode(message), *payload])

    def send_bulk_frames(self, *frames: Buffer) -> None:
        self._bulk.send(frames)

    def send_bulk(self, message: m.Message, *payload: Buffer) -> None:
        self._bulk.send([wire.encode(message), *payload])

    async def expect(self, kind: type[M], where: Callable[[M], bool] = lambda message: True) -> tuple[M, list[bytes]]:
        """The next message of this kind; whatever comes before it is passed over."""
        async with asyncio.timeout(ANSWER_S):
            while True:
                heard = await self.heard.get()
                if isinstance(heard.message, kind) and where(heard.message):
                    return heard.message, heard.payload

    async def final(self, req_id: bytes) -> Any:
        """The message that ends a request, good or bad."""
        async with asyncio.timeout(ANSWER_S):
            while True:
                message = (await self.heard.get()).message
                ends = isinstance(message, m.KvDone | m.KvListed | m.StreamEnd | m.Failed | m.QueryReply | m.KvValue)
                if ends and message.req_id == req_id:
                    return message

    async def failure(self, req_id: bytes = wire.NO_REQUEST) -> m.Failed:
        """The `Failed` that ends a request, or (no id) that answers what could not be read."""
        failed, _ = await self.expect(m.Failed, lambda message: message.req_id == req_id)
        return failed

    def _connect(self, socket: S, address: str) -> S:
        self._resources.enter_context(socket)
        socket.connect(address)
        socket.start()
        return socket

    def _on_batch(self, batch: list[sockets.Message]) -> None:
        for frames in batch:
            message, payload = wire.decode(frames)
            self.heard.put_nowait(Heard(message, [bytes(frame) for frame in payload]))


class RawClient(RawPeer):
    """A client that has joined. `instance` scopes its request ids; it beats once `keep_alive` was called."""

    def __init__(self, context: Context, url: str, instance: bytes | None = None) -> None:
        at = endpoints(url)
        super().__init__(context, at.control, at.bulk)
        self.instance = instance or secrets.token_bytes(16)
        self.session = b""
        self._published: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self._streams = self._connect(Subscriber(context, sockets.TOKENS, SECURITY, self._on_published), at.streams)

    async def join(self, *, attaches: bool = True) -> Self:
        """Say hello until welcomed, as one that was sent into a connection about to break is lost."""
        hello = asyncio.create_task(self._say_hello())
        welcome, _ = await self.expect(m.Welcome)
        hello.cancel()
        self.session = welcome.session
        if attaches:
            self.send_bulk(m.AttachBulk(session=self.session))
        return self

    def keep_alive(self) -> None:
        """Beat, now and until closed."""
        self.send(m.Beat(beat=0))
        timer = asyncio.get_running_loop().call_later(BEAT_S, self.keep_alive)
        self._resources.callback(timer.cancel)

    def subscribe(self, topic: bytes) -> None:
        self._streams.subscribe(topic)

    async def published(self) -> list[bytes]:
        """The next `[topic, frame]` of what was subscribed to."""
        async with asyncio.timeout(ANSWER_S):
            return await self._published.get()

    def was_published(self) -> list[list[bytes]]:
        """All that came and was not looked at."""
        return [self._published.get_nowait() for _ in range(self._published.qsize())]

    async def open_stream(self) -> bytes:
        """A stream's id, once the subscription to it is confirmed."""
        req_id = new_id()
        self.send(m.OpenStream(req_id=req_id))
        opened, _ = await self.expect(m.StreamOpened, lambda message: message.req_id == req_id)
        self.subscribe(topic_of(opened.stream_id))
        while (await self.published())[0] != topic_of(opened.stream_id):
            pass
        return opened.stream_id

    async def _say_hello(self) -> None:
        while True:
            self.send(m.Hello(instance=self.instance, major=wire.MAJOR, minor=wire.MINOR, software="test"))
            await asyncio.sleep(HELLO_S)

    def _on_published(self, batch: list[sockets.Message]) -> None:
        for frames in batch:
            self._published.put_nowait([bytes(frame) for frame in frames])


def _unlimited(lane: sockets.Lane) -> sockets.Lane:
    """Our own limits are not what is tested."""
    return replace(lane, max_message_bytes=ANY_BYTES)


def new_id() -> bytes:
    return secrets.token_bytes(16)


def put(req_id: bytes, seq_id: str, k: TensorMeta, v: TensorMeta, payload: Sequence[Buffer] = ()) -> m.Put:
    """A put into layer 0, with a deadline that no test waits for."""
    return m.Put(
        req_id=req_id,
        attempt=0,
        deadline_ms=30_000,
        seq_id=seq_id,
        layer=0,
        k=k,
        v=v,
        payload=wire.describe(payload),
    )


def send_chunk(peer: RawPeer, req_id: bytes, offset: int, data: bytes) -> None:
    """One piece of an upload."""
    peer.send_bulk(m.Chunk(req_id=req_id, offset=offset, payload=wire.describe([data])), data)


def append(
    req_id: bytes, seq_id: str, k: TensorMeta, v: TensorMeta, payload: Sequence[Buffer] = (), at: int | None = None
) -> m.Append:
    return m.Append(
        req_id=req_id,
        attempt=0,
        deadline_ms=30_000,
        seq_id=seq_id,
        layer=0,
        k=k,
        v=v,
        at=at,
        payload=wire.describe(payload),
    )


def generate(
    req_id: bytes,
    stream_id: bytes,
    prompt: bytes,
    sampling: m.Sampling | None = None,
    *,
    epoch: int = 0,
    seq_id: str = "",
    kind: m.PromptKind = m.PromptKind.TEXT,
    resume: bytes = b"",
) -> tuple[m.Generate, list[bytes]]:
    """A request and its payloads."""
    payload = [prompt, resume] if resume else [prompt]
    message = m.Generate(
        req_id=req_id,
        attempt=epoch,
        deadline_ms=60_000,
        stream_id=stream_id,
        epoch=epoch,
        kind=kind,
        sampling=sampling or m.Sampling(max_tokens=8, temperature=0.0, ignore_eos=True),
        seq_id=seq_id,
        payload=wire.describe(payload),
    )
    return message, payload


@asynccontextmanager
async def raw_client(url: str, instance: bytes | None = None) -> AsyncIterator[RawClient]:
    """A raw client that has joined and stays alive."""
    with Context() as context:
        client = RawClient(context, url, instance)
        try:
            await client.join()
            client.keep_alive()
            yield client
        finally:
            client.close()


@asynccontextmanager
async def raw_worker(url: str) -> AsyncIterator[RawPeer]:
    """A peer on the workers' ports that has not said anything yet."""
    at = endpoints(url)
    with Context() as context:
        peer = RawPeer(context, at.worker_control, at.worker_bulk)
        try:
            yield peer
        finally:
            peer.close()
