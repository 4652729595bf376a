"""KV copied from one worker to another: the second computes only what the first did not have, with equal output."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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
ROUNDS = 3


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
            # A pull has no more time than it saves: on a machine that stalls, computing may win a round.
            for round_ in range(ROUNDS):
                if await copies_from_a_busy_holder(client, reference, round_):
                    break
            else:
                pytest.fail(f"nothing was copied in {ROUNDS} rounds")

            async def is_learned() -> bool:
                return any(view.pull_tokens_per_s > 0 for view in await client.workers())

            await until(is_learned, "the broker knows what a link is worth")


async def copies_from_a_busy_holder(client: AsyncClient, reference: Reference, round_: int) -> bool:
    """Whether another worker served a prompt with the KV that a busy one holds; its tokens are right in any case."""
    prefix = token_prompt(720 + round_, 100 * BLOCK)
    prompt = prefix + token_prompt(73, 40)
    _, done = await greedy(client, prefix, 1)
    holder = done.worker_id
    await until(partial(is_known_to_hold, client, prefix, holder), "the broker knows who has computed it")

    async with asyncio.TaskGroup() as busy:
        for number, name in enumerate(await owned_by(client, holder, 8)):
            busy.create_task(greedy(client, token_prompt(740 + 10 * round_ + number, 9000), 1, seq_id=name))
        await until(partial(is_behind, client, holder), "the holder has much to do")
        tokens, done = await greedy(client, prompt, 8)
    assert tokens == reference.greedy(prompt, 8)
    return done.worker_id != holder and done.usage.cached_tokens == len(prefix)


async def is_known_to_hold(client: AsyncClient, prompt: Sequence[int], worker_id: str) -> bool:
    explanation = await client.route(token_ids=prompt)
    return any(it.worker_id == worker_id and it.hit_tokens >= len(prompt) - BLOCK for it in explanation.candidates)


async def is_behind(client: AsyncClient, worker_id: str) -> bool:
    """By more than any difference that a policy overlooks, on a machine that needs some 0.1 s for the prompt."""
    return any(view.worker_id == worker_id and view.queue_s > 0.3 for view in await client.workers())
