"""Workers killed at the worst moments: streams go on elsewhere with the same tokens, and nothing hangs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from bus import messages as m
from bus.errors import ErrorCode, NotFound
from bus.tensors import DType, TensorMeta
from kvcache import AsyncClient, Start
from tests.harness import raw
from tests.harness.cluster import Cluster
from tests.harness.fixtures import TINY_FLAGS
from tests.harness.generations import Crowd, greedy
from tests.harness.models import Reference
from tests.harness.placement import owned_by
from tests.harness.prompts import token_prompt
from tests.harness.waiting import until, until_serving

pytestmark = [pytest.mark.faults, pytest.mark.timeout(150)]

MIB = 1 << 20
ROW = (2, 8)  # heads and head_dim of what is put here, in float32


async def test_kill_of_an_idle_worker_loses_no_request(
    cluster: Cluster, client: AsyncClient, reference: Reference
) -> None:
    names = await owned_by(client, "worker-1", 4)
    cluster.workers["worker-1"].kill9()
    # At once, so that the broker still believes in the dead one and sends them there.
    results = await asyncio.gather(
        *(greedy(client, token_prompt(20 + index, 30), 20, seq_id=name) for index, name in enumerate(names))
    )
    for index, (tokens, done) in enumerate(results):
        assert tokens == reference.greedy(token_prompt(20 + index, 30), 20)
        assert done.worker_id == "worker-2"
    assert [view.worker_id for view in await client.workers()] == ["worker-2"]


async def test_kill_in_the_middle_of_a_prefill(cluster: Cluster, client: AsyncClient, reference: Reference) -> None:
    (name,) = await owned_by(client, "worker-1", 1)
    prompt = token_prompt(30, 9000)
    generation = client.generate(token_ids=prompt, max_tokens=10, temperature=0.0, ignore_eos=True, seq_id=name)
    start = await anext(generation)  # admitted, and a prompt of so many steps is far from done
    assert isinstance(start, Start)
    assert start.worker_id == "worker-1"
    cluster.workers["worker-1"].kill9()
    tokens = [event.token_id async for event in generation if hasattr(event, "token_id")]
    done = await generation.result()
    assert (done.worker_id, done.timings.resumes) == ("worker-2", 1)
    assert tokens == reference.greedy(prompt, 10)


async def test_kill_under_sixteen_streams_changes_no_token(cluster: Cluster, client: AsyncClient) -> None:
    expected = await Crowd(16, 80).run(client)
    assert all(len(tokens) == 80 for tokens in expected)
    crowd = Crowd(16, 80)
    running = await crowd.begun(client)
    victim = max(cluster.workers, key=lambda name: len(crowd.on(name)))
    hit = [reader for reader in crowd.on(victim) if reader.done is None]
    assert hit, "the worker to be killed has streams"
    cluster.workers[victim].kill9()
    assert await running == expected, crowd.errors
    assert crowd.num_moved == len(hit)


async def test_kill_just_before_a_token_is_published(
    cluster: Cluster, client: AsyncClient, tiny_model: Path, reference: Reference
) -> None:
    flags = ("--model", str(tiny_model), *TINY_FLAGS)
    cluster.add_worker("doomed", *flags, KVCACHE_FAILPOINT="worker.publish:kill9@10")
    try:
        await until_serving(client, "doomed")
        (name,) = await owned_by(client, "doomed", 1)
        tokens, done = await greedy(client, token_prompt(31, 40), 60, seq_id=name)
        assert tokens == reference.greedy(token_prompt(31, 40), 60)
        assert done.timings.resumes == 1
        assert done.worker_id in {"worker-1", "worker-2"}
    finally:
        cluster.drop_worker("doomed")


async def test_kill_between_a_write_and_its_answer(cluster: Cluster, client: AsyncClient) -> None:
    k, v = rows(100)
    cluster.add_worker("doomed", "--no-preload", *TINY_FLAGS, KVCACHE_FAILPOINT="worker.reply:kill9@2")
    try:
        await until_serving(client, "doomed")
        first, second = await owned_by(client, "doomed", 2)
        await client.kv.put(first, 0, k, v)
        # The second is written, and its worker dies before it can say so: the retry writes it where it belongs now.
        ack = await client.kv.put(second, 0, k, v)
        assert (ack.length, ack.duplicate) == (100, False)
        assert (await client.kv.get(second, 0)).k.tobytes() == k.tobytes()
        # What only the dead one had is a miss, at once, and never acknowledged as if it were there.
        with pytest.raises(NotFound):
            await client.kv.append(first, 0, k, v, at=100)
        with pytest.raises(NotFound):
            await client.kv.get(first, 0)
    finally:
        cluster.drop_worker("doomed")


async def test_kill_in_the_middle_of_an_upload(cluster: Cluster, client: AsyncClient) -> None:
    (name,) = await owned_by(client, "worker-1", 1)
    meta = TensorMeta(DType.FLOAT32, (4 * MIB // 64, *ROW))
    async with raw.raw_client(cluster.url) as peer:
        req_id = raw.new_id()
        peer.send_bulk(raw.put(req_id, name, meta, meta))
        for offset in range(0, 4 * MIB, MIB):
            raw.send_chunk(peer, req_id, offset, bytes(MIB))
        await peer.expect(m.Credit)  # half of it is there
        with pytest.raises(NotFound):  # a write is seen whole or not at all
            await client.kv.get(name, 0)
        cluster.workers["worker-1"].kill9()
        failed = await peer.failure(req_id)
        assert (failed.code, failed.retryable) == (ErrorCode.WORKER_LOST, True)
    with pytest.raises(NotFound):
        await client.kv.get(name, 0)


async def test_uploads_survive_the_kill_of_their_worker(cluster: Cluster, client: AsyncClient) -> None:
    names = await owned_by(client, "worker-1", 4)
    k, v = rows(8 * MIB // 64)
    puts = [asyncio.create_task(client.kv.put(name, 0, k, v)) for name in names]
    await until(lambda: puts[0].done(), "the first is written")
    cluster.workers["worker-1"].kill9()
    acks = await asyncio.gather(*puts)
    assert {ack.length for ack in acks} == {len(k)}
    for name, task in zip(names, puts, strict=True):
        try:
            pair = await client.kv.get(name, 0)
        except NotFound:
            continue  # acknowledged by the one that died: one memory, and it is gone
        assert pair.k.tobytes() == k.tobytes(), task
        assert pair.v.tobytes() == v.tobytes()


def rows(num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(num_tokens)
    k, v = (draw.standard_normal((num_tokens, *ROW), np.float32) for _ in "kv")
    return k, v
