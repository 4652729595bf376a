"""The client over real sockets, against a broker that the test plays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio

from bus import messages as m
from bus import wire
from bus.errors import (
    BadArgument,
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    MalformedMessage,
    NoSpace,
    StreamGap,
    TooLarge,
    WorkerLost,
)
from bus.limits import UPLOAD_WINDOW
from bus.stats import BrokerStats, ClusterStats, Explanation, SequenceInfo, SequencePage, WorkerView, pack
from bus.stream_log import StreamLog
from bus.tensors import DType, TensorMeta
from kvcache import Alternative, AsyncClient, Done, Event, SamplingParams, Start, Token
from kvcache.client import AsyncGeneration
from tests.unit.kvcache.scripted_broker import (
    ScriptedBroker,
    ended,
    lost,
    replayed,
    scripted_broker,
    some_tokens,
    started,
)


@pytest_asyncio.fixture
async def broker(request: pytest.FixtureRequest) -> AsyncIterator[ScriptedBroker]:
    """Its parameter, if any, is how many bytes a chunk may have; a client may hear so as soon as there is one."""
    async with scripted_broker() as broker:
        broker.chunk_bytes = getattr(request, "param", broker.chunk_bytes)
        yield broker


@pytest_asyncio.fixture
async def client(broker: ScriptedBroker) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(broker.url, timeout=45.0) as client:
        yield client


async def begin(broker: ScriptedBroker, client: AsyncClient, **more: object) -> tuple[AsyncGeneration, m.Generate]:
    """A generation whose request has reached the broker."""
    generation = client.generate("hello", **more)  # type: ignore[arg-type]  # each test knows what it passes
    asked, payload = await broker.expect(m.Generate)
    assert payload == [b"hello"]
    return generation, asked


def cluster(*worker_ids: str) -> ClusterStats:
    workers = tuple(
        WorkerView(
            worker_id=name, status="ready", weight=1, share=0.5, inflight=0, dispatched=0, last_heard_s=0.0, lease_s=1.0
        )
        for name in worker_ids
    )
    figures = BrokerStats(incarnation=1, state="serving", policy="consistent_hash")
    return ClusterStats(healthy=bool(workers), broker=figures, workers=workers)


# --- generation ----------------------------------------------------------------------------------


async def test_a_generation_is_a_start_its_tokens_and_its_end(broker: ScriptedBroker, client: AsyncClient) -> None:
    generation, asked = await begin(broker, client, max_tokens=2, seed=7)
    assert asked.sampling.seed == 7
    assert asked.chain
    broker.publish(asked.stream_id, some_tokens(asked, 0, [10]))  # the lanes race: tokens may come first
    await asyncio.sleep(0.05)
    broker.reply(started(asked))
    broker.publish(asked.stream_id, some_tokens(asked, 1, [11]))
    broker.reply(ended(asked, [10, 11]))
    events = [event async for event in generation]
    assert isinstance(events[0], Start)
    assert (events[0].worker_id, events[0].cached_tokens) == ("w1", 3)
    assert events[1:3] == [Token(0, 10, "10 "), Token(1, 11, "11 ")]
    done = events[3]
    assert isinstance(done, Done)
    assert (done.text, done.finish_reason, done.usage.completion_tokens) == ("10 11 ", "length", 2)
    assert done.request_id == asked.req_id.hex() == generation.request_id
    assert done.timings.resumes == 0
    assert 0 < done.timings.ttft_s <= done.timings.total_s
    assert await generation.result() == done
    ack, _ = await broker.expect(m.Ack)
    assert ack.upto == 2


async def test_a_gap_is_replayed_on_the_reliable_lane(broker: ScriptedBroker, client: AsyncClient) -> None:
    generation, asked = await begin(broker, client)
    broker.reply(started(asked))
    broker.publish(asked.stream_id, some_tokens(asked, 0, [1]))
    broker.publish(asked.stream_id, some_tokens(asked, 3, [4]))
    resume, _ = await broker.expect(m.Resume)
    assert (resume.from_seq, resume.epoch) == (1, 0)
    broker.reply(replayed(asked, 1, [2, 3]))
    broker.reply(ended(asked, [1, 2, 3, 4]))
    assert await generation.text() == "1 2 3 4 "


async def test_a_lost_tail_is_asked_for_after_the_end(broker: ScriptedBroker, client: AsyncClient) -> None:
    generation, asked = await begin(broker, client)
    broker.reply(started(asked))
    broker.reply(ended(asked, [1, 2]))
    resume, _ = await broker.expect(m.Resume)
    assert resume.from_seq == 0
    broker.reply(replayed(asked, 0, [1, 2]))
    assert await generation.text() == "1 2 "


async def test_a_lost_worker_is_replaced_and_the_tokens_so_far_go_along(
    broker: ScriptedBroker, client: AsyncClient
) -> None:
    generation, asked = await begin(broker, client)
    broker.reply(started(asked))
    broker.publish(asked.stream_id, some_tokens(asked, 0, [1, 2]))
    assert isinstance(await anext(generation), Start)
    assert await anext(generation) == Token(0, 1, "1 ")
    broker.reply(lost(asked.req_id))
    again, payload = await broker.expect(m.Generate)
    assert payload == [b"hello", b"\x01\0\0\0\x02\0\0\0"]
    assert (again.req_id, again.epoch, again.attempt) == (asked.req_id, 1, 1)
    assert again.sampling == asked.sampling  # the seed above all
    assert again.stream_id != asked.stream_id
    broker.publish(asked.stream_id, some_tokens(asked, 2, [66]))  # a thawed worker
    broker.reply(started(again, "w2"))
    broker.publish(again.stream_id, some_tokens(asked, 2, [67]))  # of the old epoch, even on the new stream
    broker.publish(again.stream_id, some_tokens(again, 2, [3]))
    broker.reply(ended(again, [1, 2, 3]))
    events = [event async for event in generation]
    assert events[:2] == [Token(1, 2, "2 "), Token(2, 3, "3 ")]
    done = await generation.result()
    assert (done.text, done.worker_id, done.timings.resumes) == ("1 2 3 ", "w2", 1)


async def test_workers_that_keep_dying_without_a_token_end_the_stream(
    broker: ScriptedBroker, client: AsyncClient
) -> None:
    generation, asked = await begin(broker, client)
    for _ in range(2):
        broker.reply(lost(asked.req_id))
        asked, _ = await broker.expect(m.Generate)
    broker.reply(lost(asked.req_id))
    with pytest.raises(WorkerLost) as caught:
        await generation.text()
    assert caught.value.request_id == generation.request_id


async def test_a_wrong_digest_is_never_shown_as_success(broker: ScriptedBroker, client: AsyncClient) -> None:
    generation, asked = await begin(broker, client)
    broker.reply(started(asked))
    broker.publish(asked.stream_id, some_tokens(asked, 0, [1, 2]))
    broker.reply(ended(asked, [1, 3]))
    with pytest.raises(StreamGap):
        await generation.text()


async def test_leaving_a_generation_early_cancels_it(broker: ScriptedBroker, client: AsyncClient) -> None:
    generation, asked = await begin(broker, client)
    broker.reply(started(asked))
    async with generation:
        assert isinstance(await anext(generation), Start)
    cancel, _ = await broker.expect(m.Cancel)
    assert cancel.req_id == asked.req_id
    with pytest.raises(Cancelled):
        await generation.text()
    await generation.cancel()


async def test_a_generation_that_nobody_holds_is_cancelled(broker: ScriptedBroker, client: AsyncClient) -> None:
    async def read_one() -> Event:
        async for event in client.generate("hello"):
            return event
        raise AssertionError("nothing came")

    reading = asyncio.create_task(read_one())
    asked, _ = await broker.expect(m.Generate)
    broker.reply(started(asked))
    assert isinstance(await reading, Start)
    cancel, _ = await broker.expect(m.Cancel)
    assert cancel.req_id == asked.req_id


async def test_a_stream_whose_publishing_never_arrives_is_pulled(broker: ScriptedBroker, client: AsyncClient) -> None:
    tokens = list(range(1000))
    broker.confirms = False
    reading = asyncio.ensure_future(client.generate("hello").text())
    asked, _ = await broker.expect(m.Generate)
    log = StreamLog(asked.req_id, asked.epoch, time.monotonic())
    broker.reply(started(asked))
    while log.next_seq < len(tokens):
        part = tokens[log.next_seq : log.next_seq + 100]
        log.append(part, [f"{token} " for token in part], time.monotonic())  # what it publishes is lost
        question, _ = await broker.expect(m.Resume)
        for replay in log.resume(question, time.monotonic()):
            broker.reply(replay)
    broker.reply(ended(asked, tokens))
    assert log.is_pulled
    assert await reading == "".join(f"{token} " for token in tokens)


async def test_a_reader_that_falls_behind_is_not_acknowledged(broker: ScriptedBroker, client: AsyncClient) -> None:
    generation, asked = await begin(broker, client)
    broker.reply(started(asked))
    for seq in range(0, 192, 64):
        broker.publish(asked.stream_id, some_tokens(asked, seq, list(range(64))))
    assert isinstance(await anext(generation), Start)
    await asyncio.sleep(0.4)
    assert broker.asked.empty()
    for _ in range(64):
        await anext(generation)
    ack, _ = await broker.expect(m.Ack)
    assert ack.upto == 64
    await generation.cancel()


async def test_a_lost_confirmation_is_asked_for_by_subscribing_again(
    broker: ScriptedBroker, client: AsyncClient
) -> None:
    broker.confirms = False
    generation = client.generate("hello")
    first = await asyncio.wait_for(broker.subscribed.get(), 5.0)
    broker.confirms = True
    asked, _ = await broker.expect(m.Generate)
    assert broker.subscribed.get_nowait() == first
    await generation.cancel()
    await broker.expect(m.Cancel, lambda cancel: cancel.req_id == asked.req_id)


async def test_an_explanation_comes_with_the_start(broker: ScriptedBroker, client: AsyncClient) -> None:
    generation, asked = await begin(broker, client, explain=True)
    assert asked.explain
    explanation = Explanation(policy="p", key="k", worker_id="w1", reason="because", ring_epoch="e")
    packed = pack(explanation)
    broker.reply(
        m.Routed(req_id=asked.req_id, worker_id="w1", reason="because", payload=wire.describe([packed])), packed
    )
    broker.reply(started(asked))
    start = await anext(generation)
    assert isinstance(start, Start)
    assert start.explanation == explanation
    await generation.cancel()


# --- the connection ------------------------------------------------------------------------------


async def test_no_broker_is_a_typed_error_and_not_healthy() -> None:
    async with AsyncClient("tcp://127.0.0.1:1", timeout=0.3) as client:
        began = time.monotonic()
        with pytest.raises(ConnectionLost, match=r"tcp://127\.0\.0\.1:1 .*is one running"):
            await client.kv.length("s", 0)
        assert not await client.health()
        assert time.monotonic() - began < 30.0


async def test_a_silent_broker_is_greeted_again_and_an_unchanged_session_goes_on(
    broker: ScriptedBroker, client: AsyncClient
) -> None:
    generation, asked = await begin(broker, client)
    await broker.welcomed.get()
    broker.mute = True
    await asyncio.sleep(0.6)
    broker.mute = False
    await asyncio.wait_for(broker.welcomed.get(), 5.0)
    broker.reply(started(asked))
    broker.publish(asked.stream_id, some_tokens(asked, 0, [1]))
    broker.reply(ended(asked, [1]))
    assert await generation.text() == "1 "
    assert (await generation.result()).timings.resumes == 0


async def test_after_a_broker_restart_everything_under_way_is_sent_again(
    broker: ScriptedBroker, client: AsyncClient
) -> None:
    generation, asked = await begin(broker, client)
    broker.reply(started(asked))
    broker.publish(asked.stream_id, some_tokens(asked, 0, [1]))
    assert isinstance(await anext(generation), Start)
    assert await anext(generation) == Token(0, 1, "1 ")
    length = asyncio.create_task(client.kv.length("s", 0))
    first, _ = await broker.expect(m.Length)
    broker.mute = True
    await asyncio.sleep(0.4)
    broker.forget_clients()
    broker.mute = False
    seen: dict[type, tuple[object, list[bytes]]] = {}
    while len(seen) < 2:
        message, payload = await asyncio.wait_for(broker.asked.get(), 5.0)
        seen[type(message)] = (message, payload)
    again, payload = seen[m.Generate]
    assert isinstance(again, m.Generate)
    assert (again.req_id, again.epoch, payload[1]) == (asked.req_id, 1, b"\x01\0\0\0")
    second, _ = seen[m.Length]
    assert isinstance(second, m.Length)
    assert (second.req_id, second.attempt) == (first.req_id, 1)
    broker.reply(m.KvDone(req_id=second.req_id, length=4))
    assert await length == 4
    await generation.cancel()


async def test_a_request_without_an_answer_ends_soon_after_its_deadline(
    broker: ScriptedBroker, client: AsyncClient
) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        await client.kv.length("s", 0, deadline=0.2)
    assert 0.2 <= time.monotonic() - began < 30.0, "and not when the client's own timeout says"
    assert caught.value.request_id is not None
    generation = client.generate("x", deadline=0.2)
    with pytest.raises(DeadlineExceeded):
        await generation.text()
    await broker.expect(m.Length)
    await broker.expect(m.Generate)
    await broker.expect(m.Cancel)


async def test_a_closed_client_says_so_and_ends_what_was_under_way(broker: ScriptedBroker) -> None:
    client = AsyncClient(broker.url)
    length = asyncio.create_task(client.kv.length("s", 0))
    generation, _ = client.generate("x"), await broker.expect(m.Length)
    await client.aclose()
    await client.aclose()
    with pytest.raises(Cancelled, match="closed"):
        await length
    with pytest.raises(Cancelled, match="closed"):
        await generation.text()
    with pytest.raises(BadArgument, match="closed"):
        await client.health()
    with pytest.raises(BadArgument, match="closed"):
        client.generate("x")


async def test_a_client_is_refused_in_another_loop_where_it_would_wait_for_ever(
    broker: ScriptedBroker, client: AsyncClient
) -> None:
    length = asyncio.create_task(client.kv.length("s", 0))
    await broker.expect(m.Length)

    async def elsewhere() -> None:
        with pytest.raises(BadArgument, match="another event loop"):
            await client.kv.length("s", 0)
        with pytest.raises(BadArgument, match="another event loop"):
            client.generate("x")

    await asyncio.to_thread(asyncio.run, elsewhere())
    assert not length.done(), "what is asked in its own loop is unharmed"
    await client.aclose()
    with pytest.raises(Cancelled):
        await length


async def test_an_answer_that_cannot_be_read_ends_its_request(broker: ScriptedBroker, client: AsyncClient) -> None:
    length = asyncio.create_task(client.kv.length("s", 0))
    asked, _ = await broker.expect(m.Length)
    broker.reply_raw(b"nonsense")
    broker.reply_raw()
    broker.reply_raw(wire.encode(m.KvDone(req_id=b"?" * 16)))
    good = bytearray(wire.encode(m.KvDone(req_id=asked.req_id, length=1)))
    good[-1] ^= 0xFF
    broker.reply_raw(bytes(good))
    with pytest.raises(MalformedMessage, match="checksum"):
        await length
    length = asyncio.create_task(client.kv.length("s", 0))
    asked, _ = await broker.expect(m.Length)
    broker.reply(m.Credit(req_id=asked.req_id, chunks=1))
    with pytest.raises(MalformedMessage, match="Credit is no answer"):
        await length


async def test_a_damaged_answer_is_asked_for_again(broker: ScriptedBroker, client: AsyncClient) -> None:
    stats = asyncio.create_task(client.stats())
    packed = pack(cluster("w1"))
    for damage in (1, 0):
        asked, _ = await broker.expect(m.Query)
        sent = bytes([packed[0] ^ damage]) + packed[1:]
        broker.reply(m.QueryReply(req_id=asked.req_id, payload=wire.describe([packed])), sent)
    assert (await stats).workers[0].worker_id == "w1"


async def test_queries_return_figures(broker: ScriptedBroker, client: AsyncClient) -> None:
    for ask, kind in ((client.workers, m.QueryKind.WORKERS), (client.health, m.QueryKind.HEALTH)):
        waiting = asyncio.ensure_future(ask())
        asked, _ = await broker.expect(m.Query)
        assert asked.kind is kind
        packed = pack(cluster("w1"))
        broker.reply(m.QueryReply(req_id=asked.req_id, payload=wire.describe([packed])), packed)
        assert await waiting


# --- the KV plane --------------------------------------------------------------------------------


async def test_a_small_put_travels_within_its_message(broker: ScriptedBroker, client: AsyncClient) -> None:
    k = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    put = asyncio.create_task(client.kv.put("s", 3, k, k + 1))
    asked, payload = await broker.expect(m.Put)
    assert (asked.seq_id, asked.layer, asked.k, asked.v) == ("s", 3, asked.v, TensorMeta(DType.FLOAT32, (2, 2, 3)))
    assert payload == [k.tobytes(), (k + 1).tobytes()]
    broker.reply(m.KvDone(req_id=asked.req_id, length=2, duplicate=True))
    ack = await put
    assert (ack.length, ack.durability, ack.duplicate) == (2, "mem1", True)


@pytest.mark.parametrize("broker", [4000], indirect=True)
async def test_what_fits_a_chunk_travels_within_its_message_on_the_bulk_lane(
    broker: ScriptedBroker, client: AsyncClient
) -> None:
    k = np.arange(1000, dtype=np.uint16).reshape(500, 1, 2)
    put = asyncio.create_task(client.kv.put("s", 3, k, k + 1))
    asked, payload = await broker.expect(m.Put)
    assert payload == [k.tobytes(), (k + 1).tobytes()]
    assert broker.asked_on_bulk == {asked.req_id}
    broker.reply(m.KvDone(req_id=asked.req_id, length=500))
    assert (await put).length == 500
    small = asyncio.create_task(client.kv.put("s", 3, k[:1], k[:1]))
    asked, payload = await broker.expect(m.Put)
    assert asked.req_id not in broker.asked_on_bulk
    broker.reply(m.KvDone(req_id=asked.req_id, length=1))
    assert (await small).length == 1


@pytest.mark.parametrize("broker", [300], indirect=True)
async def test_a_large_append_is_followed_by_a_window_of_chunks_and_more_under_credit(
    broker: ScriptedBroker, client: AsyncClient
) -> None:
    k = np.random.default_rng(0).integers(0, 255, (250, 2, 5)).astype(np.uint8)
    v = np.random.default_rng(1).integers(0, 255, (250, 2, 3)).astype(np.uint8)
    append = asyncio.create_task(client.kv.append("s", 0, k, v, at=7))
    asked, payload = await broker.expect(m.Append)
    assert (asked.at, payload) == (7, [])
    received = bytearray(4000)
    offsets: list[tuple[int, int]] = []
    for grant in (UPLOAD_WINDOW, 1, 1, 9):
        if offsets:
            assert broker.asked.empty()
            broker.reply(m.Credit(req_id=asked.req_id, chunks=grant))
        for _ in range(min(grant, 14 - len(offsets))):
            chunk, [data] = await broker.expect(m.Chunk)
            received[chunk.offset : chunk.offset + len(data)] = data
            offsets.append((chunk.offset, len(data)))
    of_k = [(start, min(300, 2500 - start)) for start in range(0, 2500, 300)]
    of_v = [(2500 + start, min(300, 1500 - start)) for start in range(0, 1500, 300)]
    assert offsets == of_k + of_v, "never K and V in one"
    assert bytes(received) == k.tobytes() + v.tobytes()
    broker.reply(m.KvDone(req_id=asked.req_id, length=257))
    assert (await append).length == 257


async def test_a_retried_put_begins_its_chunks_again(broker: ScriptedBroker, client: AsyncClient) -> None:
    k = np.ones((300, 1, 8), np.uint8)
    put = asyncio.create_task(client.kv.put("s", 0, k, k))
    asked, _ = await broker.expect(m.Put)
    offsets = (0, 1000, 2000, 2400, 3400, 4400)
    for offset in offsets:
        chunk, _ = await broker.expect(m.Chunk)
        assert chunk.offset == offset
    broker.reply(lost(asked.req_id))
    again, _ = await broker.expect(m.Put)
    assert (again.req_id, again.attempt) == (asked.req_id, 1)
    for offset in offsets:
        chunk, _ = await broker.expect(m.Chunk)
        assert chunk.offset == offset
    broker.reply(wire.failed(again.req_id, NoSpace("all is pinned")))
    with pytest.raises(NoSpace, match="all is pinned"):
        await put


@pytest.mark.parametrize("broker", [1 << 20], indirect=True)
async def test_a_put_that_has_failed_sends_no_more(broker: ScriptedBroker, client: AsyncClient) -> None:
    k = np.zeros((40, 1024, 1024), np.uint8)
    put = asyncio.create_task(client.kv.put("s", 0, k, k[:, :, :1]))
    asked, _ = await broker.expect(m.Put)
    broker.reply(m.Credit(req_id=asked.req_id, chunks=40))
    broker.reply(wire.failed(asked.req_id, NoSpace("too much")))
    with pytest.raises(NoSpace):
        await put
    put = asyncio.create_task(client.kv.put("t", 0, k[:1], k[:1]))
    sent, again = 0, asked.req_id
    while True:  # the lanes race, but what follows on the bulk lane shows how many chunks the first put sent
        message = (await asyncio.wait_for(broker.asked.get(), 5.0)).message
        if isinstance(message, m.Put):
            again = message.req_id
            broker.reply(m.Credit(req_id=again, chunks=1))
        elif message.req_id == asked.req_id:
            sent += 1
        else:
            break
    assert 0 < sent < 40
    broker.reply(m.KvDone(req_id=again, length=1))
    assert (await put).length == 1


async def test_a_large_get_is_received_in_chunks_and_grants_credit(broker: ScriptedBroker, client: AsyncClient) -> None:
    k = np.random.default_rng(2).integers(0, 255, (1500, 2, 4)).astype(np.uint8)
    data = k.tobytes() + (255 - k).tobytes()
    meta = TensorMeta(DType.UINT8, k.shape)
    get = asyncio.create_task(client.kv.get("s", 1, 2, 1502))
    asked, _ = await broker.expect(m.Get)
    assert (asked.start, asked.stop, asked.credit) == (2, 1502, 8)
    credit, sent = asked.credit, 0
    while sent < len(data):
        while credit and sent < len(data):
            part = data[sent : sent + 1000]
            await broker.send_bulk(m.Chunk(req_id=asked.req_id, offset=sent, payload=wire.describe([part])), part)
            sent += len(part)
            credit -= 1
        if sent == 8000:  # the lanes race: the value may be announced after its first chunks
            await asyncio.sleep(0.05)
            broker.reply(m.KvValue(req_id=asked.req_id, k=meta, v=meta, length=2000))
        if sent < len(data):
            credit += (await broker.expect(m.Credit))[0].chunks
    pair = await get
    assert np.array_equal(pair.k, k)
    assert np.array_equal(pair.v, 255 - k)
    assert not pair.k.flags.writeable
    assert pair.length == 1500


async def test_a_chunk_out_of_place_is_refused(broker: ScriptedBroker, client: AsyncClient) -> None:
    meta = TensorMeta(DType.UINT8, (1500, 1, 1))
    for offset, size in ((500, 1000), (0, 1501)):
        get = asyncio.create_task(client.kv.get("s", 1))
        asked, _ = await broker.expect(m.Get)
        broker.reply(m.KvValue(req_id=asked.req_id, k=meta, v=meta, length=1500))
        data = bytes(size)
        await broker.send_bulk(m.Chunk(req_id=asked.req_id, offset=offset, payload=wire.describe([data])), data)
        with pytest.raises(MalformedMessage, match="expected the bytes from 0"):
            await get


async def test_list_asks_every_worker_page_by_page(broker: ScriptedBroker, client: AsyncClient) -> None:
    held = {"w1": ["a", "c", "e"], "w2": ["b", "d"]}
    listing = asyncio.create_task(client.kv.list("", limit=4))
    asked, _ = await broker.expect(m.Query)
    packed = pack(cluster("w1", "w2", "gone"))
    broker.reply(m.QueryReply(req_id=asked.req_id, payload=wire.describe([packed])), packed)
    for _ in range(4):
        page, _ = await broker.expect(m.ListSequences)
        if page.worker_id == "gone":
            broker.reply(wire.failed(page.req_id, BadArgument("no live worker is called 'gone'")))
            break
        names = [name for name in held[page.worker_id] if name > page.after]
        shown = tuple(SequenceInfo(seq_id=n, kind="stored", nbytes=1, pinned=False, layers=()) for n in names[:2])
        packed = pack(SequencePage(worker_id=page.worker_id, sequences=shown, more=len(names) > 2))
        broker.reply(m.KvListed(req_id=page.req_id, payload=wire.describe([packed])), packed)
    assert [info.seq_id for info in await listing] == ["a", "b", "c", "d"]


async def test_flush_asks_every_worker_and_adds_up(broker: ScriptedBroker, client: AsyncClient) -> None:
    flushing = asyncio.create_task(client.flush_prefix_cache(cache_salt="mine"))
    asked, _ = await broker.expect(m.Query)
    packed = pack(cluster("w1", "gone", "w2"))
    broker.reply(m.QueryReply(req_id=asked.req_id, payload=wire.describe([packed])), packed)
    for _ in range(3):
        flush, _ = await broker.expect(m.FlushPrefixCache)
        assert flush.cache_salt == "mine"
        if flush.worker_id == "gone":
            broker.reply(wire.failed(flush.req_id, BadArgument("no live worker is called 'gone'")))
        else:
            broker.reply(m.KvDone(req_id=flush.req_id, count=3))
    assert await flushing == 6


async def test_a_bad_salt_or_priority_is_refused_before_anything_is_sent(client: AsyncClient) -> None:
    with pytest.raises(BadArgument, match="cache_salt"):
        await client.flush_prefix_cache(cache_salt="a\nb")
    for priority in (101, -101, 1.5, "high", True):
        with pytest.raises(BadArgument, match="priority must be an integer from -100 to 100"):
            client.generate("hello", priority=priority)  # type: ignore[arg-type]  # what a caller may pass


async def test_a_label_is_what_logs_call_the_request(broker: ScriptedBroker, client: AsyncClient) -> None:
    generation, asked = await begin(broker, client, label="chat 7")
    assert asked.label == "chat 7"
    await generation.cancel()
    for label in ("two\nlines", "\u00e9", "~" * 129, 7):
        with pytest.raises(BadArgument, match="label must be up to 128 printable ASCII characters"):
            client.generate("hello", label=label)  # type: ignore[arg-type]  # what a caller may pass


async def test_a_traceparent_goes_with_the_request(broker: ScriptedBroker, client: AsyncClient) -> None:
    given = f"00-{'a' * 32}-{'b' * 16}-01"
    generation, asked = await begin(broker, client, traceparent=given)
    assert asked.trace == given
    await generation.cancel()
    for traceparent in ("", "00-a-b-01", f"00-{'0' * 32}-{'b' * 16}-01", f"{given}\n", 7):
        with pytest.raises(BadArgument, match="traceparent must be of the form 00-"):
            client.generate("hello", traceparent=traceparent)  # type: ignore[arg-type]  # as above


# --- sampling parameters and several outputs -----------------------------------------------------


async def test_parameters_may_be_an_object_keywords_or_both(broker: ScriptedBroker, client: AsyncClient) -> None:
    params = SamplingParams(max_tokens=5, top_k=3, seed=1, logit_bias={7: -1})
    for extra, top_k in (({}, 3), ({"top_k": 9}, 9)):
        generation = client.generate("hello", params, **extra)  # type: ignore[arg-type]
        asked, _ = await broker.expect(m.Generate)
        assert (asked.sampling.max_tokens, asked.sampling.top_k, asked.sampling.seed) == (5, top_k, 1)
        assert asked.sampling.logit_bias == ((7, -1.0),)
        await generation.cancel()
        await broker.expect(m.Cancel)


async def test_logprobs_are_in_the_events_and_in_the_result(broker: ScriptedBroker, client: AsyncClient) -> None:
    generation, asked = await begin(broker, client, logprobs=1)
    assert asked.sampling.logprobs == 1
    broker.reply(started(asked))
    entry = m.TokenLogprobs(-0.5, ((9, -0.25),))
    broker.publish(asked.stream_id, m.StreamTokens(epoch=0, seq=0, tokens=(10,), texts=("10 ",), logprobs=(entry,)))
    broker.reply(ended(asked, [10]))
    _, token, done = [event async for event in generation]
    assert token == Token(0, 10, "10 ", 0, -0.5, (Alternative(9, -0.25),))
    assert isinstance(done, Done)
    assert done.tokens == (token,)


async def two_outputs(broker: ScriptedBroker, client: AsyncClient) -> tuple[AsyncGeneration, list[m.Generate]]:
    generation = client.generate("hello", SamplingParams(n=2, seed=7))
    asked = [(await broker.expect(m.Generate))[0] for _ in range(2)]
    return generation, sorted(asked, key=lambda request: request.sampling.seed)


async def test_several_outputs_are_requests_of_their_own_with_seeds_one_apart(
    broker: ScriptedBroker, client: AsyncClient
) -> None:
    generation, (first, second) = await two_outputs(broker, client)
    assert (first.sampling.seed, second.sampling.seed) == (7, 8)
    assert first.chain == second.chain
    for request, tokens in ((second, [3, 4]), (first, [1])):
        broker.reply(started(request))
        broker.publish(request.stream_id, some_tokens(request, 0, tokens))
        broker.reply(ended(request, tokens))
    events = [event async for event in generation]
    assert {(event.index, event.token_id) for event in events if isinstance(event, Token)} == {(0, 1), (1, 3), (1, 4)}
    results = await generation.results()
    assert [(done.index, done.text) for done in results] == [(0, "1 "), (1, "3 4 ")]
    assert [done.request_id for done in results] == [first.req_id.hex(), second.req_id.hex()]
    with pytest.raises(BadArgument, match="results"):
        await generation.result()


async def test_an_output_that_fails_ends_the_others_too(broker: ScriptedBroker, client: AsyncClient) -> None:
    generation, (first, second) = await two_outputs(broker, client)
    broker.reply(started(first))
    broker.reply(wire.failed(second.req_id, TooLarge("no")))
    with pytest.raises(TooLarge):
        await generation.results()
    cancel, _ = await broker.expect(m.Cancel)
    assert cancel.req_id == first.req_id


async def test_a_sequence_has_one_output(client: AsyncClient) -> None:
    with pytest.raises(BadArgument, match="n must be 1"):
        client.generate("hello", n=2, seq_id="s")
