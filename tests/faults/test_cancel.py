"""Work that nobody wants any more stops, its blocks are freed, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from bus import messages as m
from bus.errors import Cancelled, ErrorCode
from kvcache import AsyncClient, Token
from tests.harness import raw
from tests.harness.cluster import ROOT, Cluster
from tests.harness.generations import Crowd, greedy
from tests.harness.models import Reference
from tests.harness.prompts import PROMPT, token_prompt
from tests.harness.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

LONG = m.Sampling(max_tokens=12_000, temperature=0.0, ignore_eos=True)
SHORT = m.Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest_asyncio.fixture(autouse=True)
async def no_names(client: AsyncClient) -> None:
    """Sequences that earlier tests have named keep their blocks; here none does."""
    for info in await client.kv.list():
        await client.kv.delete(info.seq_id)


async def is_idle(client: AsyncClient) -> bool:
    """Whether no worker runs anything, by its beats, or holds a block, by its figures."""
    views = (await client.stats()).workers
    held = [model.pool.held_blocks for view in views if view.stats for model in view.stats.models]
    return len(held) == len(views) and not any(held) and not any(view.running or view.waiting for view in views)


async def busy(client: AsyncClient) -> bool:
    return any(view.running for view in await client.workers())


async def test_cancel_stops_the_work_and_frees_its_blocks(cluster: Cluster, client: AsyncClient) -> None:
    generation = client.generate(PROMPT, max_tokens=12_000, ignore_eos=True)
    async for event in generation:
        if isinstance(event, Token):
            break
    await generation.cancel()
    with pytest.raises(Cancelled):
        await generation.result()
    await until(lambda: is_idle(client), "nothing runs and no block is held")


async def test_a_thousand_cancels_at_every_stage_leak_nothing(
    cluster: Cluster, client: AsyncClient, reference: Reference
) -> None:
    for batch in range(25):
        generations = [
            client.generate(token_ids=token_prompt(index, 40), max_tokens=500, ignore_eos=True) for index in range(40)
        ]
        for index, generation in enumerate(generations):
            await asyncio.sleep(0.0005 * (batch % 3) if index % 8 == 0 else 0)
            await generation.cancel()
    await until(lambda: is_idle(client), "nothing runs and no block is held")
    tokens, _ = await greedy(client, token_prompt(60, 40), 20)
    assert tokens == reference.greedy(token_prompt(60, 40), 20)


async def test_cancel_of_what_never_was_or_has_ended_does_nothing(cluster: Cluster) -> None:
    async with raw.raw_client(cluster.url) as peer:
        req_id = raw.new_id()
        peer.send(m.Cancel(req_id=req_id))  # before it begins
        message, payload = raw.generate(req_id, await peer.open_stream(), b"hello", SHORT)
        peer.send(message, *payload)
        end = await peer.final(req_id)
        assert isinstance(end, m.StreamEnd)
        assert end.num_tokens == 4
        peer.send(m.Cancel(req_id=req_id))  # after it has ended
        peer.send(m.Cancel(req_id=req_id))
        assert await answers_before(peer, raw.new_id()) == []


async def test_cancel_twice_ends_the_request_once(cluster: Cluster) -> None:
    async with raw.raw_client(cluster.url) as peer:
        req_id = raw.new_id()
        message, payload = raw.generate(req_id, await peer.open_stream(), b"hello", LONG)
        peer.send(message, *payload)
        peer.send(m.Cancel(req_id=req_id))  # perhaps before the worker has begun
        peer.send(m.Cancel(req_id=req_id))
        assert (await peer.failure(req_id)).code == ErrorCode.CANCELLED
        assert await answers_before(peer, raw.new_id()) == []


async def test_nobody_can_use_or_cancel_the_stream_of_another(cluster: Cluster) -> None:
    async with raw.raw_client(cluster.url) as owner, raw.raw_client(cluster.url) as other:
        req_id, stream_id = raw.new_id(), await owner.open_stream()
        stolen, payload = raw.generate(raw.new_id(), stream_id, b"hello", SHORT)
        other.send(stolen, *payload)
        assert (await other.failure(stolen.req_id)).code == ErrorCode.BAD_ARG
        message, payload = raw.generate(req_id, stream_id, b"hello", m.Sampling(max_tokens=300, ignore_eos=True))
        owner.send(message, *payload)
        await owner.expect(m.Started)
        other.send(m.Cancel(req_id=req_id))
        other.send(m.Ack(req_id=req_id, epoch=0, upto=300))
        other.send(m.Resume(req_id=req_id, epoch=0, from_seq=0))
        end = await owner.final(req_id)
        assert isinstance(end, m.StreamEnd)
        assert end.num_tokens == 300


async def test_request_ids_of_two_clients_do_not_meet(cluster: Cluster, reference: Reference) -> None:
    async with raw.raw_client(cluster.url) as one, raw.raw_client(cluster.url) as two:
        req_id = raw.new_id()
        for peer, prompt in ((one, b"hello"), (two, b"something else")):
            message, payload = raw.generate(req_id, await peer.open_stream(), prompt, SHORT)
            peer.send(message, *payload)
        for peer in (one, two):
            assert isinstance(await peer.final(req_id), m.StreamEnd)


async def test_newer_link_of_a_client_takes_its_stream_over(cluster: Cluster, client: AsyncClient) -> None:
    async with raw.raw_client(cluster.url) as old:
        req_id = raw.new_id()
        message, payload = raw.generate(req_id, await old.open_stream(), b"hello", LONG)
        old.send(message, *payload)
        await old.expect(m.Started)
        async with raw.raw_client(cluster.url, old.instance) as new:
            message, payload = raw.generate(req_id, await new.open_stream(), b"hello", LONG, epoch=1)
            new.send(message, *payload)
            assert (await new.expect(m.Started))[0].epoch == 1
            old.send(m.Cancel(req_id=req_id))  # the old link has no say in it any more
            new.send(m.Cancel(req_id=req_id))
            assert (await new.failure(req_id)).code == ErrorCode.CANCELLED
    await until(lambda: is_idle(client), "nothing runs and no block is held")


async def test_client_that_is_killed_leaves_nothing_running(cluster: Cluster, client: AsyncClient) -> None:
    async with reader(cluster, 12_000, seed=61) as process:
        assert process.stdout is not None
        await process.stdout.readline()
        await until(lambda: busy(client), "its stream runs")
        process.kill()
        await process.wait()
        await until(lambda: is_idle(client), "its work has stopped and no block is held", 15.0)


async def test_frozen_client_harms_nobody_and_reads_on_when_thawed(
    cluster: Cluster, client: AsyncClient, reference: Reference
) -> None:
    expected = await Crowd(8, 80).run(client)
    async with reader(cluster, 600, seed=62) as process:
        assert process.stdout is not None
        await process.stdout.readline()
        before = (await client.stats()).broker.rss_bytes
        process.send_signal(signal.SIGSTOP)
        crowd = Crowd(8, 80)
        assert await crowd.run(client) == expected, crowd.errors
        assert crowd.num_moved == 0

        async def is_given_up() -> bool:
            return (await client.stats()).broker.clients == 1

        await until(is_given_up, "the broker gives the silent client up")
        assert (await client.stats()).broker.rss_bytes - before < 16 << 20
        process.send_signal(signal.SIGCONT)
        async with asyncio.timeout(60):
            lines = [json.loads(line) async for line in process.stdout]
        assert lines[-1] == reference.greedy(token_prompt(62, 40), 600)


async def answers_before(peer: raw.RawClient, marker: bytes) -> list[m.Message]:
    """What comes ahead of the answer to a question that is asked now, other than beats and tokens."""
    peer.send(m.Query(req_id=marker, kind=m.QueryKind.HEALTH))
    said: list[m.Message] = []
    async with asyncio.timeout(raw.ANSWER_S):
        while True:
            message = (await peer.heard.get()).message
            if isinstance(message, m.QueryReply):
                return said
            if not isinstance(message, m.BrokerBeat | m.Started | m.Replay):
                said.append(message)


@asynccontextmanager
async def reader(cluster: Cluster, num_tokens: int, *, seed: int) -> AsyncIterator[Process]:
    """A client in a process of its own that reads one generation; killed with the block if it still runs."""
    command = [sys.executable, "-m", "tests.harness.reader", cluster.url, str(num_tokens), str(seed)]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=PIPE, limit=1 << 20)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
