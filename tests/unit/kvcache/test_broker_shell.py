"""The broker with its sockets, over ipc, between peers played by hand."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bus import messages as m
from bus import sockets, wire
from bus.endpoints import Endpoints, endpoints
from bus.errors import ConnectionLost, ErrorCode
from bus.security import SecurityConfig
from bus.sockets import Dealer, Publisher, Subscriber
from bus.stats import ClusterStats, unpack
from bus.topics import topic_of
from bus.wire import Buffer
from kvcache.broker.main import EXIT_FAILED, EXIT_USAGE, main
from kvcache.broker.shell import Broker
from kvcache.config import BrokerConfig
from kvcache.simulate.traces import read_trace
from tests.harness.waiting import until
from tests.unit.kvcache.broker_driver import PROMPT, done, generate, hello, length, rid, stream_end, worker_hello

SECURITY = SecurityConfig()
WAIT_S = 30.0


class Peer:
    """One socket of a client or a worker, and what it has received."""

    def __init__(self, world: World, kind: type[Dealer | Subscriber], lane: sockets.Lane, address: str) -> None:
        self.received: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self.socket = world.stack.enter_context(kind(world.context, lane, SECURITY, self._keep))
        self.socket.connect(address)
        self.socket.start()

    def _keep(self, batch: list[sockets.Message]) -> None:
        for message in batch:
            self.received.put_nowait([bytes(frame) for frame in message])

    def say(self, message: m.Message, *rest: Buffer) -> None:
        assert isinstance(self.socket, Dealer)
        self.socket.send([wire.encode(message), *rest])

    async def frames(self) -> list[bytes]:
        async with asyncio.timeout(WAIT_S):
            return await self.received.get()

    async def hear(self, kind: type[m.Message]) -> Any:
        message = wire.decode_envelope(await self.frames())
        assert isinstance(message, kind), message
        return message


class World:
    """A running broker and a context for those who talk to it."""

    def __init__(self, broker: Broker, at: Endpoints, stack: AsyncExitStack) -> None:
        self.broker, self.at, self.stack = broker, at, stack
        self.context = stack.enter_context(sockets.Context())
        self.stop = asyncio.Event()

    async def client(self) -> Peer:
        peer = Peer(self, Dealer, sockets.CONTROL, self.at.control)
        peer.say(hello())
        await peer.hear(m.Welcome)
        return peer

    async def worker(self) -> Peer:
        peer = Peer(self, Dealer, sockets.CONTROL, self.at.worker_control)
        peer.say(worker_hello("w"))
        await peer.hear(m.Welcome)
        return peer


@asynccontextmanager
async def world(**config: int | str) -> AsyncIterator[World]:
    """A broker that ends with the test, cleanly."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"ipc://{Path(folder) / 'b'}"
        broker = Broker(BrokerConfig(bind=url, **({"settle_ms": 0} | config)))  # type: ignore[arg-type]
        async with AsyncExitStack() as stack, asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks:
            world = World(broker, endpoints(url), stack)
            ready = asyncio.Event()
            tasks.create_task(broker.run(world.stop, ready.set))
            await ready.wait()
            yield world
            world.stop.set()


async def test_a_request_goes_to_the_worker_and_its_answer_comes_back() -> None:
    async with world() as w:
        worker, client = await w.worker(), await w.client()
        client.say(length())
        assigned, request = await worker.frames()
        assert request == wire.encode(length())
        worker.say(m.Reply(call=wire.decode_envelope([assigned]).call, final=True), wire.encode(done()))
        assert await client.frames() == [wire.encode(done())]


async def test_tokens_reach_who_subscribed_after_the_broker_said_so() -> None:
    async with world() as w:
        client = await w.client()
        client.say(m.OpenStream(req_id=rid(1)))
        topic = topic_of((await client.hear(m.StreamOpened)).stream_id)
        streams = Peer(w, Subscriber, sockets.TOKENS, w.at.streams)
        assert isinstance(streams.socket, Subscriber)
        streams.socket.subscribe(topic)
        assert await streams.frames() == [topic, wire.encode(m.SubAck())]

        publisher = w.stack.enter_context(Publisher(w.context, sockets.TOKENS, SECURITY, lambda batch: None))
        publisher.connect(w.at.tokens)
        publisher.start()
        async with asyncio.timeout(WAIT_S):
            while streams.received.empty():
                publisher.send([topic, b"not parsed on the way"])
                await asyncio.sleep(0.005)
        assert await streams.frames() == [topic, b"not parsed on the way"]


async def test_a_message_of_many_streams_is_cut_up_for_their_readers() -> None:
    async with world() as w:
        client = await w.client()
        streams = Peer(w, Subscriber, sockets.TOKENS, w.at.streams)
        assert isinstance(streams.socket, Subscriber)
        topics = []
        for number in (1, 2):
            client.say(m.OpenStream(req_id=rid(number)))
            topics.append(topic_of((await client.hear(m.StreamOpened)).stream_id))
            streams.socket.subscribe(topics[-1])
            assert await streams.frames() == [topics[-1], wire.encode(m.SubAck())]
        publisher = w.stack.enter_context(Publisher(w.context, sockets.TOKENS, SECURITY, lambda batch: None))
        publisher.connect(w.at.tokens)
        publisher.start()
        async with asyncio.timeout(WAIT_S):
            while streams.received.empty():
                publisher.send([topics[0], b"one", b"S|of nobody", b"lost", topics[1], b"other", topics[0]])
                await asyncio.sleep(0.005)
        assert [await streams.frames() for _ in range(2)] == [[topics[0], b"one"], [topics[1], b"other"]]


async def test_a_generation_that_ends_well_is_recorded_if_so_asked(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    async with world(record=str(path)) as w:
        worker, client = await w.worker(), await w.client()
        client.say(m.OpenStream(req_id=rid(1)))
        stream_id = (await client.hear(m.StreamOpened)).stream_id
        client.say(generate(stream_id, chain=(b"chain001",)), PROMPT)
        call = wire.decode_envelope(await worker.frames()).call
        worker.say(m.Reply(call=call, final=True), wire.encode(stream_end()))
        await client.hear(m.StreamEnd)
    (arrival,) = read_trace(path)
    assert (arrival.num_tokens, arrival.output_tokens, len(arrival.chain)) == (1, 0, 1)


async def test_a_stream_that_is_not_open_is_refused_and_counted() -> None:
    async with world() as w:
        client, streams = await w.client(), Peer(w, Subscriber, sockets.TOKENS, w.at.streams)
        assert isinstance(streams.socket, Subscriber)
        streams.socket.subscribe(b"")
        await until(lambda: w.broker.core.gauges.refused_subscriptions == 1, "it was refused")
        client.say(m.Query(req_id=rid(1), kind=m.QueryKind.STATS))
        stats = unpack((await client.frames())[1], ClusterStats).broker
        assert stats.refused_subscriptions == 1
        assert stats.rss_bytes > 1 << 20
        assert stats.pid > 0


async def test_a_silent_worker_is_noticed_by_the_clock() -> None:
    async with world(heartbeat_ms=20, lease_ms=100, worker_lost_ms=100) as w:
        await w.worker()
        client = await w.client()
        client.say(length(deadline_ms=60_000))
        assert (await client.hear(m.Failed)).code == ErrorCode.WORKER_LOST


async def test_a_bug_that_one_message_brings_out_fails_that_request_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with world() as w:
        worker, client = await w.worker(), await w.client()

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("bug")

        with monkeypatch.context() as patch:
            patch.setattr("kvcache.broker.placement.Placement.place", broken)
            client.say(length(1))
            failed = await client.hear(m.Failed)
        client.say(length(2))
        worker.say(m.Reply(call=(await worker.hear(m.Assign)).call, final=True), wire.encode(done(2)))
        await client.hear(m.KvDone)
    assert (failed.code, failed.req_id) == (ErrorCode.INTERNAL, rid(1))
    assert "RuntimeError: bug" in caplog.text


async def test_a_stopped_broker_finishes_what_it_has_and_says_goodbye(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with world() as w:
        worker, client = await w.worker(), await w.client()
        client.say(length(1))
        call = (await worker.hear(m.Assign)).call
        w.stop.set()
        await until(lambda: w.broker.core._requests.is_draining, "the broker drains")
        client.say(length(2))
        assert (await client.hear(m.Failed)).code == ErrorCode.DRAINING
        worker.say(m.Reply(call=call, final=True), wire.encode(done(1)))
        await client.hear(m.KvDone)
        await client.hear(m.Goodbye)
        await worker.hear(m.Goodbye)
    assert "draining: 1 requests in flight" in caplog.text
    assert "worker w joined, 1 on the ring" in caplog.text


async def test_a_drain_that_takes_too_long_fails_what_is_left() -> None:
    async with world(drain_ms=50) as w:
        worker, client = await w.worker(), await w.client()
        client.say(length(1))
        await worker.hear(m.Assign)
        w.stop.set()
        failed = await client.hear(m.Failed)
        assert (failed.code, failed.retryable) == (ErrorCode.DRAINING, True)
        await client.hear(m.Goodbye)
        await worker.hear(m.Release)


async def test_two_brokers_do_not_share_an_address() -> None:
    async with world() as w:
        with pytest.raises(ConnectionLost, match="another process serves it"):
            await Broker(BrokerConfig(bind=w.at.url)).run(asyncio.Event())


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--lease-ms", "1"], EXIT_USAGE, "broker: lease_ms must be from three heartbeats"),
        (["--log-level", "loud"], EXIT_USAGE, "broker: log level 'loud' does not exist"),
        (["--bind", "tcp://0.0.0.0:5555"], EXIT_FAILED, "refusing to bind tcp://0.0.0.0:5555"),
    ],
)
def test_what_cannot_run_ends_with_a_line_that_says_why(
    argv: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        assert main(argv) == code
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    assert words in capsys.readouterr().err
