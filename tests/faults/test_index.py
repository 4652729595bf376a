"""What the broker knows of its workers' caches, when reports are lost, and when it or they are killed or frozen."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bus import messages as m
from bus import wire
from bus.stats import WorkerView
from kvcache import AsyncClient
from tests.harness import raw
from tests.harness.cluster import Cluster
from tests.harness.fixtures import TINY_FLAGS
from tests.harness.generations import greedy
from tests.harness.prompts import token_prompt
from tests.harness.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(150)]


async def views(client: AsyncClient) -> dict[str, WorkerView]:
    return {view.worker_id: view for view in await client.workers()}


async def hits(client: AsyncClient, prompt: list[int]) -> dict[str, int]:
    """How many tokens of a prompt each worker is thought to hold."""
    explanation = await client.route(token_ids=prompt)
    return {it.worker_id: it.hit_tokens for it in explanation.candidates if it.hit_tokens}


async def are_exact(client: AsyncClient) -> bool:
    return all(view.index == "exact" for view in (await views(client)).values())


async def test_a_restarted_broker_knows_again_what_its_workers_hold(cluster: Cluster, client: AsyncClient) -> None:
    """How soon is in `tests/unit/test_sequence_world.py`, where time is the test's."""
    prompts = [token_prompt(5000 + number, 200) for number in range(8)]
    for prompt in prompts:
        await greedy(client, prompt, 4)
    for prompt in prompts:
        await until(lambda prompt=prompt: _is_held(client, prompt), "the broker knows who holds it")  # type: ignore[misc]
    before = [await hits(client, prompt) for prompt in prompts]
    nodes = {name: view.indexed_nodes for name, view in (await views(client)).items()}

    cluster.broker.kill9()
    cluster.start_broker()
    async with AsyncClient(cluster.url, timeout=10.0) as fresh:
        await until(lambda: _knows(fresh, nodes), "the index is as it was")
        assert [await hits(fresh, prompt) for prompt in prompts] == before
        _, done = await greedy(fresh, prompts[0], 4)
        assert done.usage.cached_tokens > 0


async def test_a_lost_report_is_repaired(cluster: Cluster, client: AsyncClient, tiny_model: Path) -> None:
    """The second report to be sent is dropped on its way; the first is the empty snapshot."""
    cluster.add_worker("forgetful", "--model", str(tiny_model), *TINY_FLAGS, KVCACHE_FAILPOINT="worker.nodes:drop@2")
    try:
        cluster.wait_ready()
        names = ["worker-1", "worker-2", "forgetful"]
        prompts = [token_prompt(6000 + number, 150) for number in range(40)]
        served = {(await client.route(token_ids=prompt)).worker_id for prompt in prompts}
        assert served == set(names)
        for prompt in prompts:
            if (await client.route(token_ids=prompt)).worker_id == "forgetful":
                await greedy(client, prompt, 2)

        async def is_repaired() -> bool:
            view = (await views(client))["forgetful"]
            return view.index == "exact" and view.index_gaps == 1 and view.indexed_nodes > 0

        await until(is_repaired, "the gap was noticed and made good")
        log = dict(cluster.fresh_logs())
        assert "Traceback" not in log.get("broker-1", "")
    finally:
        cluster.drop_worker("forgetful")


async def test_a_worker_that_restarts_under_its_id_is_known_to_hold_nothing(
    cluster: Cluster, client: AsyncClient
) -> None:
    prompt = token_prompt(7000, 200)
    await greedy(client, prompt, 2)
    await until(lambda: _is_held(client, prompt), "the broker knows who holds it")
    (holder,) = await hits(client, prompt)
    cluster.workers[holder].kill9()
    await until(lambda: _is_gone(client, holder), "the worker is lost")
    assert await hits(client, prompt) == {}
    cluster.workers[holder].start()
    cluster.wait_ready()
    await until(lambda: are_exact(client), "it has told that it holds nothing")
    assert (await views(client))[holder].indexed_nodes == 0
    assert await hits(client, prompt) == {}


async def test_a_worker_that_was_frozen_tells_again_what_it_holds(cluster: Cluster, client: AsyncClient) -> None:
    prompt = token_prompt(8000, 200)
    await greedy(client, prompt, 2)
    await until(lambda: _is_held(client, prompt), "the broker knows who holds it")
    known = await hits(client, prompt)
    (holder,) = known
    cluster.workers[holder].stop()
    await until(lambda: _is_gone(client, holder), "the worker is lost")
    assert await hits(client, prompt) == {}
    cluster.workers[holder].cont()
    await until(lambda: _is_held(client, prompt), "it is back, with what it held")
    assert await hits(client, prompt) == known


async def test_a_snapshot_that_breaks_off_is_asked_for_again_and_lies_harm_only_their_worker(
    cluster: Cluster, client: AsyncClient
) -> None:
    await greedy(client, token_prompt(9000, 100), 2)
    await until(lambda: are_exact(client), "all is known")
    before = {name: view.indexed_nodes for name, view in (await views(client)).items()}
    runs = (m.NodeRun("default", True, 2),)
    nodes = b"12345678abcdefgh"
    async with raw.raw_worker(cluster.url) as liar:
        liar.send(
            m.WorkerHello(
                worker_id="liar", incarnation=1, major=wire.MAJOR, minor=wire.MINOR, state=m.WorkerState.LOADING
            )
        )
        await liar.expect(m.Welcome)
        beating = asyncio.create_task(_beat(liar))
        part = m.NodesHeld(after=9, part=0, is_last=False, runs=runs, payload=wire.describe([nodes]))
        liar.send(part, nodes)
        asked, _ = await liar.expect(m.AskNodes)  # the other parts never came
        assert asked.after == 0
        liar.send(m.NodesHeld(after=2**60, part=0, is_last=True, runs=runs, payload=wire.describe([nodes])), nodes)
        liar.send(m.NodesChanged(first=2**60 + 7, runs=runs, payload=wire.describe([nodes])), nodes)
        asked, _ = await liar.expect(m.AskNodes)
        assert asked.after == 2**60
        liar.send(m.NodesChanged(first=1, runs=runs, payload=wire.describe([b"odd"])), b"odd")
        view = await views(client)
        assert view["liar"].index == "degraded"
        assert {name: view[name].indexed_nodes for name in before} == before
        assert {view[name].index for name in before} == {"exact"}
        beating.cancel()
        liar.send(m.Goodbye(reason="enough"))
        await until(lambda: _is_gone(client, "liar"), "the liar has left")


async def _beat(peer: raw.RawPeer) -> None:
    state = m.WorkerState.LOADING
    while True:
        peer.send(
            m.WorkerBeat(beat=1, state=state, running=0, waiting=0, progress=0, kv_used_bytes=0, kv_total_bytes=0)
        )
        await asyncio.sleep(0.2)


async def _is_held(client: AsyncClient, prompt: list[int]) -> bool:
    return bool(await hits(client, prompt))


async def _is_gone(client: AsyncClient, name: str) -> bool:
    return name not in await views(client)


async def _knows(client: AsyncClient, nodes: dict[str, int]) -> bool:
    now = await views(client)
    return {name: view.indexed_nodes for name, view in now.items() if view.index == "exact"} == nodes
