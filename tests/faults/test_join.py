"""A worker that joins: what it owns from now on comes to it, sequences and prompts that are wanted, and goes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvcache import AsyncClient
from tests.harness.cluster import Cluster
from tests.harness.fixtures import TINY_FLAGS
from tests.harness.generations import greedy
from tests.harness.peers import peer_stats, stored
from tests.harness.prompts import token_prompt
from tests.harness.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(150)]

ROW = (2, 8)  # heads and head_dim of what is put here, in float32
PROMPT_TOKENS = 3 * 32 + 5


def rows(num_tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_tokens, *ROW), np.float32)


async def test_a_worker_that_joins_gets_what_it_owns_and_gives_it_back_when_it_leaves(
    cluster: Cluster, client: AsyncClient, tiny_model: Path
) -> None:
    ids = [f"join-{number}" for number in range(12)]
    for number, name in enumerate(ids):
        await client.kv.put(name, 0, rows(10, number), rows(10, 0))
        await client.kv.put(name, 1, rows(10_000, number), rows(10_000, 0))  # in chunks
    for number in range(8):
        for _ in range(5):  # often enough to be wanted still when a slow machine has started a worker
            await greedy(client, token_prompt(9000 + number, PROMPT_TOKENS), 1)
    before = (await client.stats()).broker
    cluster.add_worker("newcomer", "--model", str(tiny_model), *TINY_FLAGS)

    async def has_all() -> bool:
        broker = (await client.stats()).broker
        is_done = broker.sequences_to_move == broker.waiting_copies == broker.prompts_to_warm == 0
        has_moved = broker.moved_sequences > before.moved_sequences and broker.warmed_prompts > before.warmed_prompts
        return is_done and has_moved

    try:
        await until(has_all, "what the newcomer owns is there", 90.0)
        for number, name in enumerate(ids):
            assert (await client.kv.get(name, 1)).k.tobytes() == rows(10_000, number).tobytes()
            assert (await client.route(name)).reason.startswith("consistent_hash: owner")

        async def is_told() -> bool:
            return bool(await stored(client, "newcomer")) and (await peer_stats(client, "newcomer")).pulls > 0

        await until(is_told, "it is in the newcomer's figures")
    finally:
        cluster.drop_worker("newcomer")
    for number, name in enumerate(ids):
        assert (await client.kv.get(name, 0)).k.tobytes() == rows(10, number).tobytes()
        await client.kv.delete(name)
