"""Bytes that are no messages, sent to every port: each is answered or dropped as written, and nobody else notices."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio
from crc32c import crc32c

from bus import messages as m
from bus import wire
from bus.errors import ErrorCode
from bus.sockets import Context
from kvcache import AsyncClient
from tests.harness import raw
from tests.harness.cluster import Cluster
from tests.harness.generations import greedy
from tests.harness.models import Reference
from tests.harness.prompts import token_prompt
from tests.harness.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

MIB = 1 << 20
HEADER_BYTES = 8000
QUERY = m.Query(req_id=bytes(range(16)), kind=m.QueryKind.HEALTH)


def framed(header: bytes, opcode: int = m.Query.opcode, major: int = wire.MAJOR, magic: bytes = wire.MAGIC) -> bytes:
    """A first frame whose prefix and checksum are right, whatever the header is."""
    return struct.pack("<3sBBBHI", magic, major, wire.MINOR, opcode, 0, crc32c(header)) + header


def query_with(kind: bytes) -> bytes:
    """A query whose second field is these msgpack bytes."""
    return framed(b"\x92\xc4\x10" + QUERY.req_id + kind)


FRAMES: dict[str, list[bytes]] = {
    "one empty frame": [b""],
    "two empty frames": [b"", b""],
    "two hundred empty frames": [b""] * 200,
    "a message and two hundred frames": [wire.encode(QUERY)] + [b"x"] * 200,
    "a message and one frame too many": [wire.encode(QUERY), b"x"],
    "a payload that is missing": [wire.encode(m.QueryReply(req_id=bytes(16), payload=(m.Part(nbytes=1, crc=0),)))],
    "eleven bytes": [wire.encode(QUERY)[:11]],
    "noise": [os.urandom(100)],
    "an http request": [b"GET / HTTP/1.1\r\nHost: kv\r\n\r\n"],
    "another magic": [framed(wire.encode(QUERY)[12:], magic=b"KV\x02")],
    "an opcode that is not defined": [framed(b"\x90", opcode=255)],
    "flags that are not defined": [wire.encode(QUERY)[:6] + b"\x01\x00" + wire.encode(QUERY)[8:]],
    "a header that changed on its way": [wire.encode(QUERY)[:20] + b"\xaa" + wire.encode(QUERY)[21:]],
    "a header over the limit": [framed(b"\xc4" * 9000)],
    "no header": [framed(b"")],
    "an array of 2^32 - 1": [framed(b"\xdd\xff\xff\xff\xff")],
    "a map of 2^32 - 1": [framed(b"\xdf\xff\xff\xff\xff")],
    "bytes of 2^32 - 1": [query_with(b"\xc6\xff\xff\xff\xff")],
    "text of 2^32 - 1": [query_with(b"\xdb\xff\xff\xff\xff")],
    "nested arrays": [framed(b"\x91" * HEADER_BYTES)],
    "nested arrays in a field": [query_with(b"\x91" * HEADER_BYTES)],
    "nested maps in a field": [query_with(b"\x81" * HEADER_BYTES)],
    "an extension type": [query_with(b"\xd4\x01\x00")],
    "bytes behind the end": [framed(wire.encode(QUERY)[12:] + b"\xc0")],
    "a map for a message": [framed(msgspec.msgpack.encode({"req_id": b"x", "kind": "stats"}))],
    "text that is not utf-8": [query_with(b"\xa2\xff\xfe")],
    "a field too many": [framed(msgspec.msgpack.encode([QUERY.req_id, "health", 1]))],
    "a field of another type": [query_with(b"\x01")],
    "a short request id": [framed(msgspec.msgpack.encode([b"short", "health"]))],
    "a message of the broker": [wire.encode(m.BrokerBeat(beat=1, lease_ms=2))],
    "an envelope": [wire.encode(m.Reply(call=1, final=True)), wire.encode(QUERY)],
    "a worker's hello": [
        wire.encode(m.WorkerHello(worker_id="w", incarnation=1, major=wire.MAJOR, minor=wire.MINOR)),
    ],
    "a message of the bulk lane": [
        wire.encode(m.Chunk(req_id=bytes(16), offset=0, payload=wire.describe([b"x"]))),
        b"x",
    ],
}


@pytest_asyncio.fixture(autouse=True)
async def bystander(client: AsyncClient, reference: Reference) -> AsyncIterator[None]:
    """A stream and its client that go on all the while, and get what they would have got alone."""
    prompt = token_prompt(70, 40)
    running = asyncio.create_task(greedy(client, prompt, 300))
    yield
    tokens, done = await running
    assert tokens == reference.greedy(prompt, 300)
    assert done.timings.resumes == 0


async def is_alive(peer: raw.RawClient) -> bool:
    """Whether the session is kept: a question is answered."""
    req_id = raw.new_id()
    peer.send(m.Query(req_id=req_id, kind=m.QueryKind.HEALTH))
    return isinstance(await peer.final(req_id), m.QueryReply)


async def test_each_is_answered_as_malformed_and_the_session_is_kept(cluster: Cluster, client: AsyncClient) -> None:
    async with raw.raw_client(cluster.url) as peer:
        for name, frames in FRAMES.items():
            before = (await client.stats()).broker.malformed
            peer.send_frames(*frames)
            async with asyncio.timeout(raw.ANSWER_S):
                failed, _ = await peer.expect(m.Failed)
            assert (failed.code, failed.retryable) == (ErrorCode.BAD_FRAME, False), name
            assert (await client.stats()).broker.malformed == before + 1, name
            assert await is_alive(peer), name


async def test_other_major_version_is_refused_with_what_is_supported(cluster: Cluster) -> None:
    async with raw.raw_client(cluster.url) as peer:
        peer.send_frames(framed(wire.encode(QUERY)[12:], major=1))
        failed, _ = await peer.expect(m.Failed)
        assert failed.code == ErrorCode.BAD_VERSION
        assert "2.0" in failed.message
        peer.send(m.Hello(instance=peer.instance, major=wire.MAJOR + 1, minor=0, software="from the future"))
        failed = await peer.failure()
        assert failed.code == ErrorCode.BAD_VERSION
        assert "2.0" in failed.message
        assert await is_alive(peer)


async def test_other_minor_version_is_welcome(cluster: Cluster) -> None:
    async with raw.raw_client(cluster.url) as peer:
        newer = bytearray(wire.encode(QUERY))
        newer[4] = 99
        peer.send_frames(bytes(newer))
        assert isinstance(await peer.final(QUERY.req_id), m.QueryReply)


async def test_bombs_cost_the_broker_no_memory(cluster: Cluster, client: AsyncClient) -> None:
    before = (await client.stats()).broker.rss_bytes
    for _ in range(10):
        async with raw.raw_client(cluster.url) as peer:
            for frames in list(FRAMES.values()) * 2:  # not enough to be cut off for
                peer.send_frames(*frames)
            assert await is_alive(peer)
    assert (await client.stats()).broker.rss_bytes - before < 32 * MIB


async def test_hundred_unreadable_messages_in_a_second_end_the_session(cluster: Cluster) -> None:
    async with raw.raw_client(cluster.url) as peer:
        first = peer.session
        for _ in range(100):
            peer.send_frames(b"garbage")
        goodbye, _ = await peer.expect(m.Goodbye)
        assert "unreadable" in goodbye.reason
        peer.send(QUERY)  # nobody's, now
        await peer.join()  # and whoever says hello again begins anew
        assert peer.session != first
        assert await is_alive(peer)
        assert all(heard.message.req_id != QUERY.req_id for heard in drained(peer) if hasattr(heard.message, "req_id"))


async def test_nothing_before_hello_gets_an_answer(cluster: Cluster, client: AsyncClient) -> None:
    with Context() as context:
        peer = raw.RawClient(context, cluster.url)
        try:
            before = (await client.stats()).broker
            for frames in FRAMES.values():
                peer.send_frames(*frames)
            peer.send(QUERY)
            peer.send(m.Beat(beat=1))

            async def are_counted() -> bool:
                now = (await client.stats()).broker
                return now.malformed + now.unwelcome - before.malformed - before.unwelcome >= len(FRAMES) + 2

            await until(are_counted, "each was read, counted and dropped")
            peer.send(m.Hello(instance=peer.instance, major=wire.MAJOR, minor=wire.MINOR, software="test"))
            async with asyncio.timeout(raw.ANSWER_S):
                first = await peer.heard.get()
            assert isinstance(first.message, m.Welcome)
        finally:
            peer.close()


@pytest.mark.parametrize("lane", ["control", "bulk"])
async def test_oversized_frame_disconnects_its_sender(cluster: Cluster, client: AsyncClient, lane: str) -> None:
    before = (await client.stats()).broker.rss_bytes
    async with raw.raw_client(cluster.url) as peer:
        send = peer.send_frames if lane == "control" else peer.send_bulk_frames
        send(bytes(64 * MIB))
        if lane == "control":
            # The connection is a new one, whose link nobody knows: what is said on it waits for a hello.
            first = peer.session
            await peer.join()
            assert peer.session != first
        assert await is_alive(peer)
    assert (await client.stats()).broker.rss_bytes - before < 32 * MIB


async def test_noise_on_the_bulk_lane_is_dropped(cluster: Cluster, client: AsyncClient) -> None:
    async with raw.raw_client(cluster.url) as peer:
        before = (await client.stats()).broker
        for frames in FRAMES.values():
            peer.send_bulk_frames(*frames)
        peer.send_bulk(m.AttachBulk(session=os.urandom(16)))  # a session that is not ours
        peer.send_bulk(m.AttachBulk(session=peer.session))

        async def are_counted() -> bool:
            now = (await client.stats()).broker
            return now.malformed + now.unwelcome > before.malformed + before.unwelcome

        await until(are_counted, "they were counted")
        assert await is_alive(peer)


async def test_noise_on_the_workers_ports_is_dropped(cluster: Cluster, client: AsyncClient) -> None:
    async with raw.raw_worker(cluster.url) as peer:
        hello = m.WorkerHello(
            worker_id="stranger", incarnation=1, major=wire.MAJOR, minor=wire.MINOR, state=m.WorkerState.LOADING
        )
        noise = [frames for name, frames in FRAMES.items() if name != "a worker's hello"]  # which is none here
        for frames in noise:
            peer.send_frames(*frames)
            peer.send_bulk_frames(*frames)
        peer.send(hello)
        await peer.expect(m.Welcome)
        before = (await client.stats()).broker.malformed
        for frames in noise:
            peer.send_frames(*frames)
        for call in range(50):  # answers to what it was never asked
            peer.send_frames(wire.encode(m.Reply(call=call, final=True)), wire.encode(m.KvDone(req_id=bytes(16))))
        peer.send(hello)
        await peer.expect(m.Welcome)
        assert (await client.stats()).broker.malformed > before
        peer.send(m.Goodbye(reason="enough"))
        await until(lambda: are_alone(client), "the stranger has left")


async def test_worker_id_in_use_is_not_given_away(cluster: Cluster, client: AsyncClient) -> None:
    async with raw.raw_worker(cluster.url) as thief:
        thief.send(m.WorkerHello(worker_id="worker-1", incarnation=1, major=wire.MAJOR, minor=wire.MINOR))
        assert (await thief.failure()).code == ErrorCode.FORBIDDEN
    assert await are_alone(client)


async def are_alone(client: AsyncClient) -> bool:
    return {view.worker_id for view in await client.workers()} == {"worker-1", "worker-2"}


def drained(peer: raw.RawClient) -> list[raw.Heard]:
    return [peer.heard.get_nowait() for _ in range(peer.heard.qsize())]
