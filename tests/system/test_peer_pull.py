"""KV copied from one worker to another: the second computes only what the first did not have, with equal output."""

from __future__ import annotations

import pytest

from kvcache import AsyncClient
from tests.harness.generations import greedy
from tests.harness.models import Reference
from tests.harness.peers import peer_stats
from tests.harness.placement import owned_by
from tests.harness.prompts import token_prompt
from tests.harness.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(90)]

BLOCK = 32


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
