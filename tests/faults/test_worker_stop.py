"""Workers that are frozen and thawed, or told to leave: no client sees an error, no stale token is accepted."""

from __future__ import annotations

import asyncio

import pytest

from kvcache import AsyncClient
from tests.harness.cluster import Cluster
from tests.harness.generations import Crowd
from tests.harness.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(150)]

FROZEN_S = 3.0


async def test_frozen_and_thawed_worker_adds_no_stale_token(cluster: Cluster, client: AsyncClient) -> None:
    expected = await Crowd(16, 80).run(client)
    crowd = Crowd(16, 80)
    running = await crowd.begun(client)
    victim = max(cluster.workers, key=lambda name: len(crowd.on(name)))
    hit = [reader for reader in crowd.on(victim) if reader.done is None]
    assert hit, "the worker to be frozen has streams"
    cluster.workers[victim].stop()
    await asyncio.sleep(FROZEN_S)  # the fault itself: longer than its lease
    cluster.workers[victim].cont()
    assert await running == expected, crowd.errors
    assert crowd.num_moved >= len(hit)

    async def is_back() -> bool:
        return [view.status for view in await client.workers()] == ["ready", "ready"]

    await until(is_back, "the thawed worker serves again")


async def test_drain_of_a_worker_under_load_shows_no_client_an_error(cluster: Cluster, client: AsyncClient) -> None:
    expected = await Crowd(16, 80).run(client)
    crowd = Crowd(16, 80)
    running = await crowd.begun(client)
    victim = max(cluster.workers, key=lambda name: len(crowd.on(name)))
    cluster.workers[victim].term()
    late = Crowd(4, 40)
    await late.run(client)  # asked for while it drains
    assert await running == expected, crowd.errors
    assert not late.errors
    assert crowd.num_moved == 0, "what it had begun it also ended"
    exit_code = await asyncio.to_thread(cluster.workers[victim].wait)
    assert exit_code == 0
    assert [view.worker_id for view in await client.workers()] == [name for name in cluster.workers if name != victim]
