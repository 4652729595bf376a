"""The broker killed, stopped and started again: workers and clients find it, and requests end right or typed."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from bus import messages as m
from bus.errors import ConnectionLost, DeadlineExceeded, ErrorCode
from kvcache import AsyncClient
from tests.harness import raw
from tests.harness.cluster import Cluster
from tests.harness.generations import Crowd, greedy
from tests.harness.models import Reference
from tests.harness.prompts import token_prompt
from tests.harness.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(150)]

MIB = 1 << 20


async def test_kill_and_restart_under_load_changes_no_token(cluster: Cluster, client: AsyncClient) -> None:
    expected = await Crowd(16, 80).run(client)
    k = np.arange(4 * MIB, dtype=np.float32).reshape(-1, 2, 8)
    crowd = Crowd(16, 80)
    running = await crowd.begun(client)
    hit = [reader for reader in crowd.readers if reader.done is None]
    assert hit
    put = asyncio.create_task(client.kv.put("over-the-restart", 0, k, k))
    await asyncio.sleep(0)  # let it begin
    cluster.broker.kill9()
    cluster.start_broker()
    assert await running == expected, crowd.errors
    assert crowd.num_moved >= len(hit)
    assert (await put).length == len(k)
    assert (await client.kv.get("over-the-restart", 0)).k.tobytes() == k.tobytes()
    assert {view.worker_id for view in await client.workers()} == {"worker-1", "worker-2"}
    await client.kv.delete("over-the-restart")


async def test_what_workers_hold_outlives_the_broker(
    cluster: Cluster, client: AsyncClient, reference: Reference
) -> None:
    k = np.arange(160, dtype=np.float32).reshape(10, 2, 8)
    await client.kv.put("outlives", 0, k, k)
    prompt = token_prompt(40, 100)
    await greedy(client, prompt, 5, seq_id="outlives-too")
    cluster.broker.kill9()
    cluster.start_broker()
    assert (await client.kv.get("outlives", 0)).k.tobytes() == k.tobytes()
    tokens, done = await greedy(client, prompt, 20, seq_id="outlives-too")
    assert done.usage.cached_tokens >= 96
    assert tokens == reference.greedy(prompt, 20)


async def test_while_no_broker_answers_requests_end_typed_and_in_time(cluster: Cluster, client: AsyncClient) -> None:
    assert await client.health()
    running = asyncio.gather(
        client.kv.length("any", 0, deadline=1.5),
        client.generate("hello", max_tokens=5000, ignore_eos=True, deadline=1.5).result(),
        return_exceptions=True,
    )
    cluster.broker.kill9()
    begun = time.monotonic()
    for error in await running:
        assert isinstance(error, ConnectionLost | DeadlineExceeded), error
    async with AsyncClient(cluster.url, timeout=1.5) as late:
        with pytest.raises(ConnectionLost):
            await late.kv.get("any", 0)
    assert time.monotonic() - begun < 20.0
    assert not await client.health()
    cluster.start_broker()
    await until(client.health, "the client is back without being made anew")


async def test_broker_told_to_stop_lets_streams_end_and_its_successor_takes_the_rest(
    cluster: Cluster, client: AsyncClient, reference: Reference
) -> None:
    expected = await Crowd(8, 300).run(client)
    crowd = Crowd(8, 300)
    running = await crowd.begun(client)
    cluster.broker.term()

    async def is_draining() -> bool:
        return (await client.stats()).broker.state == "draining"

    await until(is_draining, "the broker drains")
    late = asyncio.create_task(greedy(client, token_prompt(41, 30), 20))
    assert await running == expected, crowd.errors
    assert crowd.num_moved == 0
    assert await asyncio.to_thread(cluster.broker.wait) == 0
    assert not late.done()
    cluster.start_broker()
    tokens, _ = await late
    assert tokens == reference.greedy(token_prompt(41, 30), 20)


async def test_frozen_and_thawed_broker_changes_no_token(cluster: Cluster, client: AsyncClient) -> None:
    expected = await Crowd(8, 80).run(client)
    crowd = Crowd(8, 80)
    running = await crowd.begun(client)
    cluster.broker.stop()
    with pytest.raises((ConnectionLost, DeadlineExceeded)):
        await client.kv.length("any", 0, deadline=1.5)  # longer than every lease
    cluster.broker.cont()
    assert await running == expected, crowd.errors

    async def are_back() -> bool:
        return [view.status for view in await client.workers()] == ["ready", "ready"]

    await until(are_back, "both workers serve at the broker that was frozen")


async def test_attempt_that_is_not_newer_is_refused_by_the_worker_that_still_runs_it(cluster: Cluster) -> None:
    req_id, instance = raw.new_id(), raw.new_id()
    sampling = m.Sampling(max_tokens=10_000, temperature=0.0, ignore_eos=True)

    async def ask(peer: raw.RawClient, epoch: int) -> None:
        message, payload = raw.generate(
            req_id, await peer.open_stream(), b"hello", sampling, epoch=epoch, seq_id="not-newer"
        )
        peer.send(message, *payload)

    async with raw.raw_client(cluster.url, instance) as peer:
        await ask(peer, 0)
        await peer.expect(m.Started)
    cluster.broker.kill9()
    cluster.start_broker()
    await asyncio.to_thread(cluster.wait_ready)
    async with raw.raw_client(cluster.url, instance) as peer:
        await ask(peer, 0)
        assert (await peer.failure(req_id)).code == ErrorCode.STALE_EPOCH
        await ask(peer, 1)
        assert (await peer.expect(m.Started))[0].epoch == 1
        peer.send(m.Cancel(req_id=req_id))
        assert (await peer.failure(req_id)).code == ErrorCode.CANCELLED
