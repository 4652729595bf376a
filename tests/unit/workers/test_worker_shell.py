"""The worker's sockets, thread and clock against a broker played by the test over loopback sockets."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bus import sockets, wire
from bus.endpoints import endpoints
from bus.errors import InternalError, ModelNotFound
from bus.messages import (
    Assign,
    AttachBulk,
    BrokerBeat,
    Chunk,
    Forward,
    Generate,
    Goodbye,
    HandedOver,
    KvDone,
    Message,
    PromptKind,
    Put,
    Reply,
    Sampling,
    StreamEnd,
    StreamTokens,
    WorkerBeat,
    WorkerHello,
    WorkerState,
    WorkerStatus,
)
from bus.security import SecurityConfig
from bus.sockets import Dealer, Router, Subscriber
from bus.streams import token_bytes
from bus.tensors import DType, TensorMeta
from bus.topics import topic_of
from bus.traces import Attributes, Span
from bus.wire import Buffer
from kvcache.tracing import OpenSpan, Tracer
from tests.unit.workers.conftest import NEED, roomy
from tests.unit.workers.core_bench import welcome
from tests.unit.workers.no_kv import NoKV
from workers.batch import Batch, Draw, Drawn, Outcome
from workers.failpoints import Failpoint
from workers.kv_event_sockets import KvEventsConfig
from workers.loading import Report
from workers.main import EXIT_USAGE, main
from workers.model import Model, ModelFacts
from workers.model_budget import ModelNeed
from workers.peer_sockets import PeerSockets
from workers.text import TextStream
from workers.worker import Worker

VOCAB = 100
CLIENT = b"c" * 16
REQUEST = b"r" * 16
STREAM = b"s" * 16


class CountingModel(NoKV):
    """Says the number after the last one."""

    facts = ModelFacts(
        kv_dtype="float32",
        name="count",
        fingerprint="f",
        dtype="float32",
        device="cpu",
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        vocab_size=VOCAB,
        max_model_len=512,
        eos_ids=frozenset(),
        num_blocks=64,
        block_size=16,
        block_bytes=16,
        kv_tolerance=0.0,
    )

    def encode(self, kind: PromptKind, prompt: bytes, special: bool = True) -> tuple[int, ...]:
        assert kind is PromptKind.TOKENS
        return tuple(prompt[::4])

    def spell(self, tokens: bytes, each: bool) -> tuple[str, ...]:
        words = tuple(f"{token} " for token in tokens[::4])
        return words if each else ("".join(words),)

    def open_text(self, stops: Sequence[str], min_tokens: int) -> TextStream:
        return TextStream(self, stops, min_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(f"{token} " for token in token_ids)

    def compute(self, batch: Batch, draws: Sequence[Draw | None]) -> list[Outcome]:
        return [Drawn((piece.token_ids[-1] + 1) % VOCAB) if piece.wants_logits else None for piece in batch]

    def close(self) -> None:
        """It has no memory."""


class CountingModels:
    """One model, which loads when the test lets it."""

    def __init__(self, may_load: threading.Event | None = None) -> None:
        self._may_load = may_load

    def names(self) -> list[str]:
        return ["count"]

    def choose(self, name: str) -> str:
        return name or "count"

    def check(self, name: str) -> None:
        raise ModelNotFound(name)

    def measure(self, name: str, report: Report) -> ModelNeed:
        return NEED

    def load(self, name: str, pool_bytes: int, report: Report) -> Model:
        if self._may_load is not None:
            assert self._may_load.wait(30.0)
        return CountingModel()


class FakeBroker:
    """Welcomes the worker, answers its beats, and keeps the rest for the test to look at."""

    def __init__(self, context: sockets.Context, url: str) -> None:
        at = endpoints(url)
        security = SecurityConfig()
        self.url = url
        self.hellos: list[WorkerHello] = []
        self.received: asyncio.Queue[tuple[Message, Sequence[Buffer]]] = asyncio.Queue()
        self.replies: asyncio.Queue[tuple[bool, Any, Sequence[Buffer]]] = asyncio.Queue()
        self.tokens: asyncio.Queue[tuple[bytes, Any]] = asyncio.Queue()
        self.together: list[set[bytes]] = []  # topics of each message with tokens
        self._session = 0
        self._knows_worker = False
        self._link = b""
        self._bulk_link = b""
        self._control = Router(context, sockets.CONTROL, security, self._on_control)
        self._bulk = Router(context, sockets.BULK, security, self._on_bulk)
        self._tokens = Subscriber(context, sockets.TOKENS, security, self._on_tokens)
        self._control.bind(at.worker_control)
        self._bulk.bind(at.worker_bulk)
        self._tokens.bind(at.tokens)
        self._tokens.subscribe(b"")
        for socket in (self._control, self._bulk, self._tokens):
            socket.start()

    def send(self, *frames: Buffer) -> None:
        self._control.send(self._link, frames)

    def send_bulk(self, *frames: Buffer) -> None:
        self._bulk.send(self._bulk_link, frames)

    def forget(self) -> None:
        """Know nothing of the worker any more, as after a restart; beats of strangers are not answered."""
        self._knows_worker = False

    async def next(self, kind: type[Message]) -> Any:
        """The next message of that kind outside calls; others before it are dropped."""
        async with asyncio.timeout(30):
            while True:
                message, _ = await self.received.get()
                if isinstance(message, kind):
                    return message

    async def reply(self) -> tuple[bool, Any, Sequence[Buffer]]:
        async with asyncio.timeout(30):
            return await self.replies.get()

    def _on_control(self, batch: list[sockets.Message]) -> None:
        for link, *frames in batch:
            message = wire.decode_header(frames[0])
            self._take(bytes(link), message, frames)

    def _take(self, link: bytes, message: Message, frames: Sequence[Buffer]) -> None:
        if isinstance(message, Reply):
            decoded = wire.decode(frames[1:])
            self.replies.put_nowait((message.final, decoded.message, decoded.payload))
            return
        if isinstance(message, WorkerHello):
            self.hellos.append(message)
            self._link = link
            self._session += 1
            self._knows_worker = True
            self.send(wire.encode(welcome(self._session.to_bytes(16, "big"))))
        if isinstance(message, WorkerBeat) and self._knows_worker:
            self.send(wire.encode(BrokerBeat(beat=message.beat, lease_ms=2000)))
            if message.state is WorkerState.DRAINING:  # else it would wait for others to copy its sequences
                self.send(wire.encode(HandedOver(num_left=0)))
        self.received.put_nowait((message, frames[1:]))

    def _on_bulk(self, batch: list[sockets.Message]) -> None:
        for link, *frames in batch:
            message = wire.decode_header(frames[0])
            if isinstance(message, AttachBulk):
                self._bulk_link = bytes(link)
            self._take(self._link, message, frames)

    def _on_tokens(self, batch: list[sockets.Message]) -> None:
        for frames in batch:
            topics = [bytes(topic) for topic in frames[::2]]
            self.together.append(set(topics))
            for topic, frame in zip(topics, frames[1::2], strict=True):
                self.tokens.put_nowait((topic, wire.decode_header(frame)))

    def close(self) -> None:
        for socket in (self._control, self._bulk, self._tokens):
            socket.close()


@asynccontextmanager
async def serving(
    url: str,
    *,
    preload: Sequence[str] = (),
    stop: asyncio.Event | None = None,
    may_load: threading.Event | None = None,
    kv_events: KvEventsConfig | None = None,
    tracer: Tracer | None = None,
) -> AsyncIterator[tuple[FakeBroker, Worker]]:
    """A worker and its broker; both are over at the end, and the worker has ended by itself."""
    hello = WorkerHello(worker_id="w", incarnation=1, major=wire.MAJOR, minor=0)
    worker = Worker(
        hello,
        [url],
        CountingModels(may_load),
        roomy(),
        kv_plane_bytes=8 << 20,
        max_tokens_per_step=64,
        preload=preload,
        kv_events=kv_events,
        tracer=tracer,
    )
    stop = stop or asyncio.Event()
    ready = asyncio.Event()
    with sockets.Context() as context:
        broker = FakeBroker(context, url)
        async with asyncio.timeout(50), asyncio.TaskGroup() as group:
            group.create_task(worker.run(stop, ready.set))
            if may_load is None:
                await ready.wait()
            yield broker, worker
            stop.set()
        broker.close()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/b"


def assign(call: int, message: Message, *payload: Buffer) -> list[Buffer]:
    envelope = Assign(call=call, tenant="t", client=CLIENT, deadline_ms=10_000, reason="r")
    return [wire.encode(envelope), wire.encode(message), *payload]


def put(num_tokens: int, *payload: Buffer, req_id: bytes = REQUEST) -> Put:
    meta = TensorMeta(dtype=DType.UINT8, shape=(num_tokens, 1, 64))
    return Put(
        req_id=req_id,
        attempt=0,
        deadline_ms=10_000,
        seq_id="s",
        layer=0,
        k=meta,
        v=meta,
        payload=wire.describe(payload),
    )


async def test_a_worker_joins_attaches_its_bulk_lane_beats_and_reports(url: str) -> None:
    async with serving(url) as (broker, _):
        await broker.next(AttachBulk)
        beats = [await broker.next(WorkerBeat) for _ in range(3)]
        assert [beat.beat for beat in beats] == sorted(beat.beat for beat in beats)
        await broker.next(WorkerStatus)


async def test_the_models_named_at_start_are_loaded_before_it_is_ready(url: str) -> None:
    may_load = threading.Event()
    async with serving(url, preload=["count"], may_load=may_load) as (broker, _):
        beat = await broker.next(WorkerBeat)
        assert (broker.hellos[0].state, beat.state) == (WorkerState.LOADING, WorkerState.LOADING)
        may_load.set()
        while beat.state is not WorkerState.READY:
            beat = await broker.next(WorkerBeat)
        assert beat.models == (("count", "ready"),)


async def test_a_put_is_answered_and_a_large_one_comes_over_the_bulk_lane(url: str) -> None:
    async with serving(url) as (broker, _):
        await broker.next(AttachBulk)
        data = bytes(range(64)) * 10
        broker.send(*assign(1, put(10, data, data), data, data))
        final, message, _ = await broker.reply()
        assert (final, message.length) == (True, 10)

        num_tokens = (1 << 20) // 64
        big = bytes(1 << 20)
        broker.send_bulk(*assign(2, put(num_tokens, req_id=b"q" * 16)))
        for offset in (0, len(big)):
            chunk = Chunk(req_id=b"q" * 16, offset=offset, payload=wire.describe([big]))
            broker.send_bulk(wire.encode(Forward(call=2)), wire.encode(chunk), big)
        final, message, _ = await broker.reply()
        assert (final, type(message), message.length) == (True, KvDone, num_tokens)

        broker.send_bulk(*assign(3, put(10, data, data, req_id=b"r" * 16), data, data))
        final, message, _ = await broker.reply()
        assert (final, type(message), message.length) == (True, KvDone, 10)


def generate(
    prompt: bytes, *, req_id: bytes = REQUEST, stream_id: bytes = STREAM, num_tokens: int = 3, trace: str = ""
) -> Generate:
    return Generate(
        req_id=req_id,
        attempt=0,
        deadline_ms=10_000,
        stream_id=stream_id,
        epoch=0,
        kind=PromptKind.TOKENS,
        sampling=Sampling(max_tokens=num_tokens),
        payload=wire.describe([prompt]),
        trace=trace,
    )


async def test_block_events_of_what_was_computed_can_be_asked_for(url: str) -> None:
    kv_events = KvEventsConfig(url=f"{url}.events", replay_url=f"{url}.replay", topic=b"kv@w@count")
    async with serving(url, kv_events=kv_events) as (broker, _):
        await broker.next(WorkerBeat)  # with the answer to it comes the lease
        prompt = token_bytes(range(20))
        broker.send(*assign(1, generate(prompt), prompt))
        while not (await broker.reply())[0]:
            pass
        answers: asyncio.Queue[list[sockets.Message]] = asyncio.Queue()
        with sockets.Context() as context:
            asker = Dealer(context, sockets.BULK, SecurityConfig(), answers.put_nowait)
            with asker:
                asker.connect(kv_events.replay_url)
                asker.start()
                asker.send([b"", (1).to_bytes(8, "big")])
                async with asyncio.timeout(30):
                    (_, seq, payload), *_ = await answers.get()
        assert bytes(seq) == (1).to_bytes(8, "big")
        _, ((tag, _, parent, tokens, *_),), _ = msgspec.msgpack.decode(payload)
        assert (tag, parent, tokens) == ("BlockStored", None, list(range(16)))


async def test_tokens_are_published_and_the_end_is_answered(url: str) -> None:
    async with serving(url) as (broker, _):
        prompt = token_bytes([7])
        message = generate(prompt)
        await broker.next(WorkerBeat)  # with the answer to it comes the lease
        broker.send(*assign(1, message, prompt))
        tokens: list[int] = []
        async with asyncio.timeout(30):
            while len(tokens) < 3:
                topic, message_ = await broker.tokens.get()
                assert topic == topic_of(STREAM)
                assert isinstance(message_, StreamTokens)
                tokens += message_.tokens
        assert tokens == [8, 9, 10]
        final, end, _ = await broker.reply()
        while not final:
            final, end, _ = await broker.reply()
        assert isinstance(end, StreamEnd)
        assert end.num_tokens == 3


async def test_what_a_step_made_for_all_streams_is_published_in_one_message(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.engine.ENCODE_S", 30.0)  # or a stream may be over before the next is encoded
    may_load = threading.Event()
    streams = [bytes([number]) * 16 for number in range(3)]
    async with serving(url, may_load=may_load) as (broker, _):
        await generate_together(broker, streams, may_load)
    assert {topic_of(stream_id) for stream_id in streams} in broker.together


async def test_a_fault_of_ours_in_what_one_event_leads_to_does_not_lose_the_others_of_its_step(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    may_load = threading.Event()
    streams = [bytes([number]) * 16 for number in range(3)]
    async with serving(url, may_load=may_load, tracer=BrokenTracer()) as (broker, _):
        await generate_together(broker, streams, may_load, trace=f"00-{1:032x}-{1:016x}-01")
    assert caplog.text.count("of the engine could not be handled") == len(streams)


class BrokenTracer:
    """Where spans go, with a bug of ours."""

    def begin(self, name: str, traceparent: str, attributes: Attributes, tracestate: str = "") -> OpenSpan:
        raise ZeroDivisionError("a bug of ours")

    def record(self, span: Span, now: float) -> None:
        raise ZeroDivisionError("a bug of ours")


async def generate_together(
    broker: FakeBroker, streams: Sequence[bytes], may_load: threading.Event, *, trace: str = ""
) -> None:
    """Have all of these generated in the same steps, to their ends."""
    await broker.next(AttachBulk)
    for number, stream_id in enumerate(streams):
        prompt = token_bytes([number])
        message = generate(prompt, req_id=stream_id, stream_id=stream_id, num_tokens=20, trace=trace)
        broker.send(*assign(number, message, prompt))
    while (await broker.next(WorkerBeat)).waiting < len(streams):
        pass
    may_load.set()
    for _ in streams:
        while not (await broker.reply())[0]:
            pass


async def test_stop_drains_says_goodbye_and_leaves_no_thread_behind(url: str) -> None:
    before = {thread.name for thread in threading.enumerate()}
    stop = asyncio.Event()
    async with serving(url, stop=stop) as (broker, _):
        stop.set()
        beat = await broker.next(WorkerBeat)
        while beat.state is not WorkerState.DRAINING:
            beat = await broker.next(WorkerBeat)
        await broker.next(Goodbye)
    assert {thread.name for thread in threading.enumerate()} <= before


async def test_a_broker_that_forgot_us_hears_hello_again(url: str) -> None:
    async with serving(url) as (broker, _):
        await broker.next(AttachBulk)
        broker.forget()
        await broker.next(WorkerHello)
        await broker.next(AttachBulk)  # it was welcomed to a new session


async def test_a_fault_of_ours_in_one_message_does_not_stop_the_next(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(url) as (broker, _):
        await broker.next(AttachBulk)
        data = bytes(64)
        monkeypatch.setattr(wire, "decode_header", _explode_once())
        broker.send(*assign(1, put(1, data, data), data, data))
        broker.send(*assign(2, put(1, data, data), data, data))
        await broker.reply()
    assert "could not be handled" in caplog.text


def _explode_once() -> Callable[[Buffer], Any]:
    real, has_exploded = wire.decode_header, False

    def decode_header(frame: Buffer) -> Any:
        nonlocal has_exploded
        message = real(frame)
        if isinstance(message, Assign) and not has_exploded:
            has_exploded = True
            raise ZeroDivisionError("a bug of ours")
        return message

    return decode_header


async def test_an_engine_that_has_failed_ends_the_worker(url: str, caplog: pytest.LogCaptureFixture) -> None:
    class BrokenModels(CountingModels):
        def load(self, name: str, pool_bytes: int, report: Report) -> Model:
            model = CountingModel()
            model.facts = replace(model.facts, num_blocks=0)
            return model

    hello = WorkerHello(worker_id="w", incarnation=1, major=wire.MAJOR, minor=0)
    worker = Worker(
        hello, [url], BrokenModels(), roomy(), kv_plane_bytes=1 << 20, max_tokens_per_step=64, preload=["count"]
    )
    with sockets.Context() as context:
        broker = FakeBroker(context, url)
        with pytest.raises(InternalError, match="engine has failed"):
            await worker.run(asyncio.Event())
        broker.close()
    assert "at least 1 block" in caplog.text


async def test_a_worker_that_may_have_no_more_sockets_reaches_no_other_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bus.sockets.libzmq.MAX_SOCKETS", 2)
    with sockets.Context() as context, ExitStack() as stack:
        peers = PeerSockets(context, SecurityConfig(), stack, lambda peer, frames: None, lambda url, frames: None)
        assert peers.send("tcp://127.0.0.1:9", [b"hello"])
        assert not peers.send("tcp://127.0.0.1:19", [b"hello"])
        peers.hang_up("tcp://127.0.0.1:9")


def test_a_wrong_flag_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--weight", "none"]) == EXIT_USAGE
    assert capsys.readouterr().err == "worker: --weight must be a whole number, not 'none'\n"


def test_a_failpoint_kills_at_the_nth_time_its_point_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr("os.kill", lambda pid, number: killed.append((pid, number)))
    failpoint = Failpoint("worker.reply:kill9@2")
    failpoint.reach("worker.publish")
    failpoint.reach("worker.reply")
    assert killed == []
    failpoint.reach("worker.reply")
    failpoint.reach("worker.reply")
    assert [number for _, number in killed] == [signal.SIGKILL]


def test_a_failpoint_drops_the_nth_message_and_no_other() -> None:
    failpoint = Failpoint("worker.nodes:drop@2")
    assert [failpoint.reach(name) for name in ["worker.nodes", "worker.reply", "worker.nodes", "worker.nodes"]] == [
        False,
        False,
        True,
        False,
    ]
