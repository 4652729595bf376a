"""KV copied from one worker to another: the second computes only what the first did not have, with equal output."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from kvcache import AsyncClient
from tests.harness.cluster import running_cluster
from tests.harness.fixtures import TINY_FLAGS
from tests.harness.generations import greedy
from tests.harness.models import Reference
from tests.harness.peers import peer_stats
from tests.harness.placement import owned_by
from tests.harness.prompts import token_prompt
from tests.harness.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(90)]

BLOCK = 32
TRIES = 4


async def test_second_worker_uses_what_the_first_has_computed(client: AsyncClient, reference: Reference) -> None:
    prompt = token_prompt(71, 10 * BLOCK + 5)
    expected = reference.greedy(prompt, 8)
    (there,) = await owned_by(client, "worker-1", 1)
    (here,) = await owned_by(client, "worker-2", 1)
    before = await peer_stats(client, "worker-2")

    tokens, done = await greedy(client, prompt, 8, seq_id=there)
    assert (tokens, done.usage.cached_tokens) == (expected, 0)
    tokens, done = await greedy(client, prompt, 8, seq_id=here, pull_from="worker-1")
    assert (tokens, done.usage.cached_tokens) == (expected, 10 * BLOCK)

    async def is_counted() -> bool:
        now = await peer_stats(client, "worker-2")
        return now.pulled_tokens - before.pulled_tokens == 10 * BLOCK and now.pulls == before.pulls + 1

    await until(is_counted, "the pull is in the worker's figures")
    after = await peer_stats(client, "worker-2")
    assert after.failures == before.failures
    assert after.bytes_per_s > 0
    assert after.links["worker-1"] > 0


@pytest.mark.timeout(180)
async def test_default_policy_has_an_idle_worker_copy_what_a_busy_one_holds(
    tmp_path: Path, tiny_model: Path, reference: Reference
) -> None:
    """Nobody names a worker or a source: prefills that were timed, work that was counted and blocks that were told
    of are all there is to go by. A cluster of its own, of whose links nothing is known."""
    with running_cluster(tmp_path) as cluster:
        cluster.add_broker()
        for name in ("worker-1", "worker-2"):
            cluster.add_worker(name, "--model", str(tiny_model), *TINY_FLAGS)
        cluster.wait_ready()
        async with AsyncClient(cluster.url, timeout=60.0) as client:
            prefixes = [token_prompt(720 + number, 100 * BLOCK) for number in range(TRIES)]
            for prefix, name in zip(prefixes, await owned_by(client, "worker-1", TRIES), strict=True):
                await greedy(client, prefix, 1, seq_id=name)
            async with kept_busy(client, "worker-1"):
                assert await one_is_copied(client, reference, prefixes), f"no copy came whole of {TRIES}"

            async def is_learned() -> bool:
                return any(view.pull_tokens_per_s > 0 for view in await client.workers())

            await until(is_learned, "the broker knows what a link is worth")


async def one_is_copied(client: AsyncClient, reference: Reference, prefixes: Sequence[Sequence[int]]) -> bool:
    """Whether worker-2 answered one of the prompts with what it copied; its tokens are right in any case.

    A copy has no more time than it saves, so on a machine that stalls it may be given up for computing. The link then
    rests for some seconds, and the next prompt waits for the policy to want a copy again.
    """
    for prefix in prefixes:
        prompt = [*prefix, *token_prompt(73, 40)]
        await until(partial(wants_a_copy, client, prompt), "the policy has what worker-1 holds copied", 60.0)
        tokens, done = await greedy(client, prompt, 8)
        assert tokens == reference.greedy(prompt, 8)
        if (done.worker_id, done.usage.cached_tokens) == ("worker-2", len(prefix)):
            assert done.reason == f"prefix: pulls {len(prefix)} tokens from worker-1"
            return True
    return False


async def wants_a_copy(client: AsyncClient, prompt: Sequence[int]) -> bool:
    routed = await client.route(token_ids=prompt)
    return routed.worker_id == "worker-2" and "from worker-1" in routed.reason


@asynccontextmanager
async def kept_busy(client: AsyncClient, worker_id: str) -> AsyncIterator[None]:
    """While inside, this worker always has long prompts before it: whenever one is answered another comes."""
    seeds = itertools.count(10_000)

    async def keep_asking(name: str) -> None:
        while True:
            await greedy(client, token_prompt(next(seeds), 9000), 1, seq_id=name)

    tasks = [asyncio.create_task(keep_asking(name)) for name in await owned_by(client, worker_id, 6)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
