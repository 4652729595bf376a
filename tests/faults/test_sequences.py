"""Named sequences while workers come and go: what is listed can be deleted, and nothing deleted comes back."""

from __future__ import annotations

import numpy as np
import pytest

from bus.errors import NotFound
from kvcache import AsyncClient
from tests.harness.cluster import Cluster
from tests.harness.placement import owned_by

pytestmark = [pytest.mark.faults, pytest.mark.timeout(150)]

ROW = (2, 8)  # heads and head_dim of what is put here, in float32


def rows(num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_tokens, *ROW), np.float32)


async def names(client: AsyncClient, prefix: str) -> set[str]:
    return {info.seq_id for info in await client.kv.list(prefix)}


async def test_what_was_put_while_its_owner_was_away_is_listed_and_deleted(
    cluster: Cluster, client: AsyncClient
) -> None:
    ids = await owned_by(client, "worker-1", 4)
    cluster.workers["worker-1"].kill9()
    for name in ids:
        await client.kv.put(name, 0, rows(10), rows(10))
    cluster.heal()
    assert {(await client.route(name)).worker_id for name in ids} == {"worker-1"}
    assert await names(client, "worker-1-") == set(ids)
    for name in ids:
        assert await client.kv.delete(name) == 1
        with pytest.raises(NotFound):
            await client.kv.delete(name)
    assert await names(client, "worker-1-") == set()
    cluster.workers["worker-1"].kill9()  # so that the other owns them: nothing is left there either
    for name in ids:
        with pytest.raises(NotFound):
            await client.kv.length(name, 0)
