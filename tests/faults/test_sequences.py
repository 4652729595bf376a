"""Named sequences while workers come and go: what is listed can be deleted, and nothing deleted comes back."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from bus.errors import Conflict, DeadlineExceeded, NotFound, NoWorkers
from kvcache import AsyncClient
from tests.harness.cluster import Cluster
from tests.harness.fixtures import TINY_FLAGS
from tests.harness.generations import greedy
from tests.harness.peers import has
from tests.harness.placement import owned_by
from tests.harness.prompts import token_prompt
from tests.harness.waiting import until, until_serving

pytestmark = [pytest.mark.faults, pytest.mark.timeout(150)]

ROW = (2, 8)  # heads and head_dim of what is put here, in float32


def rows(num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_tokens, *ROW), np.float32)


async def listed(client: AsyncClient, names: list[str]) -> set[str]:
    """Those of the names that are listed; other tests have left others."""
    return {info.seq_id for info in await client.kv.list()} & set(names)


async def test_what_was_put_while_its_owner_was_away_is_listed_and_deleted(
    cluster: Cluster, client: AsyncClient
) -> None:
    ids = await owned_by(client, "worker-1", 4)
    cluster.workers["worker-1"].kill9()
    for name in ids:
        await client.kv.put(name, 0, rows(10), rows(10))
    cluster.heal()
    assert await listed(client, ids) == set(ids)
    for name in ids:
        assert await client.kv.delete(name) == 1
        with pytest.raises(NotFound):
            await client.kv.delete(name)
    assert await listed(client, ids) == set()
    cluster.workers["worker-1"].kill9()  # so that the other owns them: nothing is left there either
    for name in ids:
        with pytest.raises(NotFound):
            await client.kv.length(name, 0)


async def test_a_frozen_owner_never_answers_what_was_rewritten_elsewhere(cluster: Cluster, client: AsyncClient) -> None:
    """As in a partition: it is given up, its sequences are written anew on another worker, and it comes back."""
    old, new = rows(10), rows(20, seed=1)
    rewritten, deleted, kept = await owned_by(client, "worker-1", 3)
    for name in (rewritten, deleted, kept):
        await client.kv.put(name, 0, old, old)
    cluster.workers["worker-1"].stop()
    await client.kv.put(rewritten, 0, new, new)  # waits until the broker has given the owner up
    with pytest.raises(NotFound):
        await client.kv.delete(deleted)
    cluster.workers["worker-1"].cont()
    for _ in range(40):
        assert (await client.kv.get(rewritten, 0)).k.tobytes() == new.tobytes()
        with pytest.raises(NotFound):
            await client.kv.get(deleted, 0)
        await asyncio.sleep(0.05)
    assert (await client.kv.get(kept, 0)).k.tobytes() == old.tobytes()

    async def is_home() -> bool:
        at_home = [await has(client, "worker-1", name) for name in (rewritten, kept)]
        elsewhere = [await has(client, "worker-2", name) for name in (rewritten, deleted, kept)]
        return all(at_home) and not any(elsewhere) and not await has(client, "worker-1", deleted)

    await until(is_home, "the stale copies are dropped, the current ones are with their owner, and only there")
    assert (await client.kv.get(rewritten, 0)).k.tobytes() == new.tobytes()
    assert [info.num_tokens for info in await client.kv.list(rewritten)] == [20]
    for name in (rewritten, kept):
        await client.kv.delete(name)


async def test_sequences_away_from_their_owner_are_found_by_a_new_broker(cluster: Cluster, client: AsyncClient) -> None:
    (name,) = await owned_by(client, "worker-1", 1)
    cluster.workers["worker-1"].kill9()
    await client.kv.put(name, 0, rows(10), rows(10))
    cluster.heal()
    cluster.broker.kill9()
    cluster.heal()
    assert (await client.kv.get(name, 0)).k.tobytes() == rows(10).tobytes()
    await client.kv.delete(name)


@pytest.mark.parametrize("num_tokens", [10, 60_000], ids=["in one message", "in chunks"])
async def test_what_two_workers_acknowledged_survives_the_kill_of_its_owner(
    cluster: Cluster, client: AsyncClient, num_tokens: int
) -> None:
    (name,) = await owned_by(client, "worker-1", 1)
    for layer in range(3):
        ack = await client.kv.put(name, layer, rows(num_tokens, layer), rows(num_tokens, 9), rf=2)
        assert (ack.length, ack.durability) == (num_tokens, "mem2")
    ack = await client.kv.append(name, 0, rows(5, 7), rows(5, 8), at=num_tokens, rf=2)
    assert (ack.length, ack.durability) == (num_tokens + 5, "mem2")
    cluster.workers["worker-1"].kill9()
    pair = await client.kv.get(name, 0)
    assert pair.k.tobytes() == rows(num_tokens).tobytes() + rows(5, 7).tobytes()
    assert pair.v.tobytes() == rows(num_tokens, 9).tobytes() + rows(5, 8).tobytes()
    for layer in (1, 2):
        assert (await client.kv.get(name, layer)).k.tobytes() == rows(num_tokens, layer).tobytes()
    with pytest.raises(Conflict, match="worker-2 only"):
        await client.kv.append(name, 0, rows(5), rows(5), rf=2)
    with pytest.raises((NoWorkers, DeadlineExceeded)):  # it is tried again for as long as it may
        await client.kv.put(f"{name}-new", 0, rows(5), rows(5), rf=2, deadline=0.5)
    assert (await client.kv.append(name, 0, rows(5), rows(5), at=num_tokens + 5)).durability == "mem1"
    await client.kv.delete(name)


async def test_a_kill_between_the_two_writes_loses_nothing_that_was_acknowledged(
    cluster: Cluster, client: AsyncClient
) -> None:
    cluster.add_worker("doomed", "--no-preload", *TINY_FLAGS, KVCACHE_FAILPOINT="worker.reply:kill9@3")
    try:
        await until_serving(client, "doomed")
        (name,) = await owned_by(client, "doomed", 1)
        await client.kv.put(name, 0, rows(10), rows(10), rf=2)
        await client.kv.append(name, 0, rows(10, 1), rows(10, 1), at=10, rf=2)
        # The third is written by both, and one of them dies before it can say so. Tried again, it waits for another
        # copy of what is left, and is the same write whether or not it had taken effect there.
        ack = await client.kv.append(name, 0, rows(10, 2), rows(10, 2), at=20, rf=2)
        assert (ack.length, ack.durability) == (30, "mem2")
        assert not cluster.workers["doomed"].is_running
        everything = rows(10).tobytes() + rows(10, 1).tobytes() + rows(10, 2).tobytes()
        assert (await client.kv.get(name, 0)).k.tobytes() == everything
        await client.kv.delete(name)
    finally:
        cluster.drop_worker("doomed")


async def test_a_worker_that_drains_hands_its_sequences_over_before_it_leaves(
    cluster: Cluster, client: AsyncClient
) -> None:
    """All but what a generation left under a name: that is computed anew for its next turn."""
    small, large, turns = await owned_by(client, "worker-1", 3)
    prompt = token_prompt(7100, 50)
    answer, done = await greedy(client, prompt, 20, seq_id=turns)
    assert done.worker_id == "worker-1"
    await client.kv.put(small, 0, rows(10), rows(10, 1))
    for layer in range(2):
        await client.kv.put(large, layer, rows(100_000, layer), rows(100_000, 9))  # 6.4 MB each of K and V: in chunks
    await client.kv.append(large, 1, rows(5, 7), rows(5, 8), at=100_000)
    cluster.workers["worker-1"].term()
    assert (await client.kv.get(small, 0)).v.tobytes() == rows(10, 1).tobytes()
    assert await asyncio.to_thread(cluster.workers["worker-1"].wait) == 0
    for layer in range(2):
        assert (await client.kv.get(large, layer, 0, 100_000)).k.tobytes() == rows(100_000, layer).tobytes()
    assert (await client.kv.get(large, 1)).v.tobytes() == rows(100_000, 9).tobytes() + rows(5, 8).tobytes()
    with pytest.raises(NotFound):
        await client.kv.length(turns, 0)
    second = [*prompt, *answer, 5]
    tokens, done = await greedy(client, second, 10, seq_id=turns)
    assert done.worker_id == "worker-2"
    assert tokens == (await greedy(client, second, 10, cache_salt="another"))[0]
    for name in (small, large, turns):
        await client.kv.delete(name)
