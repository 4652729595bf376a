"""Connections that stall, break and lie, through a proxy: half-open links, resets, lost and damaged bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from kvcache import AsyncClient
from tests.harness.cluster import Cluster
from tests.harness.fault_proxy import FaultProxy, fault_proxy
from tests.harness.fixtures import TINY_FLAGS
from tests.harness.generations import Crowd, greedy
from tests.harness.models import Reference
from tests.harness.placement import owned_by
from tests.harness.prompts import token_prompt
from tests.harness.waiting import until, until_serving

pytestmark = [pytest.mark.faults, pytest.mark.timeout(150)]

MIB = 1 << 20
NUM_TOKENS = 400


@pytest_asyncio.fixture
async def proxy(cluster: Cluster) -> AsyncIterator[FaultProxy]:
    async with fault_proxy(cluster.url) as proxy:
        yield proxy


@pytest_asyncio.fixture
async def remote(proxy: FaultProxy) -> AsyncIterator[AsyncClient]:
    """A client on the far side of the proxy."""
    async with AsyncClient(proxy.url, timeout=30.0) as client:
        assert await client.health()
        yield client


async def begun(client: AsyncClient, num: int = 4) -> tuple[Crowd, asyncio.Task[list[list[int]]]]:
    crowd = Crowd(num, NUM_TOKENS)
    running = await crowd.begun(client)
    assert not any(reader.done for reader in crowd.readers)
    return crowd, running


async def replayed(client: AsyncClient) -> int:
    """How many gaps the workers have filled, as far as they have reported."""
    views = (await client.stats()).workers
    return sum(view.stats.engine.gaps_replayed for view in views if view.stats is not None)


async def test_reset_of_the_token_lane_loses_messages_and_no_token(
    client: AsyncClient, remote: AsyncClient, proxy: FaultProxy
) -> None:
    expected = await Crowd(4, NUM_TOKENS).run(client)
    before = await replayed(client)
    crowd, running = await begun(remote)
    proxy["streams"].reset()  # what is published until it is back is lost
    assert await running == expected, crowd.errors
    assert crowd.num_moved == 0, "a gap is filled by its own worker"

    async def has_replayed() -> bool:
        return await replayed(client) > before

    await until(has_replayed, "a gap was filled by replay")


async def test_dead_token_lane_is_made_up_for_by_the_reliable_one(
    client: AsyncClient, remote: AsyncClient, proxy: FaultProxy
) -> None:
    expected = await Crowd(4, NUM_TOKENS).run(client)
    crowd, running = await begun(remote)
    proxy["streams"].blackhole()
    assert await running == expected, crowd.errors


async def test_damaged_token_message_is_asked_for_again(
    client: AsyncClient, remote: AsyncClient, proxy: FaultProxy
) -> None:
    expected = await Crowd(4, NUM_TOKENS).run(client)
    crowd, running = await begun(remote)
    for offset in (40, 200, 500):
        proxy["streams"].flip_bit("down", offset)
        await until(lambda: proxy["streams"].has_flipped("down") or running.done(), "a bit was flipped")
    assert await running == expected, crowd.errors


@pytest.mark.parametrize("lane", ["control", "bulk"])
async def test_reset_of_a_client_lane_mid_stream_changes_no_token(
    client: AsyncClient, remote: AsyncClient, proxy: FaultProxy, lane: str
) -> None:
    expected = await Crowd(4, NUM_TOKENS).run(client)
    crowd, running = await begun(remote)
    proxy[lane].reset()
    assert await running == expected, crowd.errors


async def test_half_closed_control_lane_is_opened_again(
    client: AsyncClient, remote: AsyncClient, proxy: FaultProxy
) -> None:
    expected = await Crowd(4, NUM_TOKENS).run(client)
    crowd, running = await begun(remote)
    proxy["control"].half_close()
    assert await running == expected, crowd.errors


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_one_way_partition_of_a_client_heals(
    client: AsyncClient, remote: AsyncClient, proxy: FaultProxy, direction: str
) -> None:
    expected = await Crowd(4, NUM_TOKENS).run(client)
    crowd, running = await begun(remote)
    proxy.blackhole(direction)  # type: ignore[arg-type]

    async def is_forgotten() -> bool:
        return (await client.stats()).broker.clients == 1

    if direction == "up":
        await until(is_forgotten, "the broker gives the silent client up")
    else:
        await asyncio.sleep(1.5)  # the fault itself: longer than the client waits for a beat
    proxy.heal()
    assert await running == expected, crowd.errors


async def test_half_open_worker_link_moves_its_streams_and_comes_back(
    cluster: Cluster, client: AsyncClient, proxy: FaultProxy, tiny_model: Path, reference: Reference
) -> None:
    cluster.add_worker("far", "--model", str(tiny_model), *TINY_FLAGS, brokers=[proxy.url])
    try:
        await until_serving(client, "far")
        (name,) = await owned_by(client, "far", 1)
        prompt = token_prompt(50, 40)
        running = asyncio.create_task(greedy(client, prompt, NUM_TOKENS, seq_id=name))

        async def far_runs() -> bool:
            return any(view.worker_id == "far" and view.running for view in await client.workers())

        await until(far_runs, "the stream runs there")
        proxy.blackhole()  # the sockets stay open, and nobody is told anything
        tokens, done = await running
        assert tokens == reference.greedy(prompt, NUM_TOKENS)
        assert (done.worker_id in {"worker-1", "worker-2"}, done.timings.resumes) == (True, 1)
        proxy.heal()
        await until_serving(client, "far")
        # The name itself lives on where its stream ended; what is new and far's goes there again.
        (another,) = await owned_by(client, "far", 1)
        tokens, done = await greedy(client, prompt, 20, seq_id=another)
        assert (tokens, done.worker_id) == (reference.greedy(prompt, 20), "far")

        async def far_is_gone() -> bool:
            return all(view.worker_id != "far" for view in await client.workers())

        proxy.blackhole()  # while it is idle, so that nothing fails that could tell
        await until(far_is_gone, "its silence alone ends its membership")
        proxy.heal()
    finally:
        cluster.drop_worker("far")


async def test_bit_flip_in_an_upload_is_found_and_the_upload_repeated(remote: AsyncClient, proxy: FaultProxy) -> None:
    k = np.arange(MIB, dtype=np.float32).reshape(-1, 2, 8)
    proxy["bulk"].flip_bit("up", 2_500_000)
    assert (await remote.kv.put("flipped-up", 0, k, k)).length == len(k)
    assert proxy["bulk"].has_flipped("up")
    pair = await remote.kv.get("flipped-up", 0)
    assert (pair.k.tobytes(), pair.v.tobytes()) == (k.tobytes(), k.tobytes())


async def test_bit_flip_in_a_download_is_found_and_the_download_repeated(
    remote: AsyncClient, proxy: FaultProxy
) -> None:
    k = np.arange(MIB, dtype=np.float32).reshape(-1, 2, 8)
    await remote.kv.put("flipped-down", 0, k, k)
    proxy["bulk"].flip_bit("down", 2_500_000)
    pair = await remote.kv.get("flipped-down", 0)
    assert proxy["bulk"].has_flipped("down")
    assert (pair.k.tobytes(), pair.v.tobytes()) == (k.tobytes(), k.tobytes())


async def test_slow_link_only_takes_longer(remote: AsyncClient, proxy: FaultProxy, reference: Reference) -> None:
    for lane in ("control", "bulk", "streams"):
        proxy[lane].delay_s = 0.1
    tokens, _ = await greedy(remote, token_prompt(51, 40), 20)
    assert tokens == reference.greedy(token_prompt(51, 40), 20)
    k = np.arange(MIB // 4, dtype=np.float32).reshape(-1, 2, 8)
    await remote.kv.put("slow", 0, k, k)
    assert (await remote.kv.get("slow", 0)).k.tobytes() == k.tobytes()


async def test_chunk_that_takes_seconds_on_a_slow_link_arrives(remote: AsyncClient, proxy: FaultProxy) -> None:
    proxy["bulk"].bytes_per_s = 450_000
    k = np.arange(MIB // 4, dtype=np.float32).reshape(-1, 2, 8)
    await remote.kv.put("crawling", 0, k, k)
    assert (await remote.kv.get("crawling", 0)).k.tobytes() == k.tobytes()
