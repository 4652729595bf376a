"""Sequence ids that belong to one test, and the clean-up of whatever it left under them; with its own tests."""

from __future__ import annotations

import secrets
import sys
from contextlib import suppress
from itertools import count

import pytest

if __name__ == "__main__":  # first, as only pytest makes the imports below work
    raise SystemExit(pytest.main([__file__, "-v", "-s", *sys.argv[1:]]))

import numpy as np

from bus.errors import NotFound
from kvcache import AsyncClient

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
MAX_TRIES = 300


class Sequences:
    """Ids that nobody else uses, however often a test runs against the same services."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._prefix = f"test-{secrets.token_hex(6)}"
        self._numbers = count()

    def new(self, label: str = "sequence") -> str:
        return f"{self._prefix}-{next(self._numbers)}-{label}"

    async def owned_by(self, worker_id: str, num: int) -> list[str]:
        """New ids that this worker owns. Raises AssertionError if it owns next to none, or is not there."""
        tried = (self.new(worker_id) for _ in range(MAX_TRIES * num))
        owned: list[str] = []
        while len(owned) < num:
            seq_id = next(tried, None)
            assert seq_id is not None, f"no ids belong to {worker_id}"
            if (await self._client.route(seq_id)).worker_id == worker_id:
                owned.append(seq_id)
        return owned

    async def delete_all(self) -> int:
        """Delete what is stored or computed under these ids, pinned or not; returns how many sequences there were."""
        found = {info.seq_id for info in await self._client.kv.list(self._prefix)}
        for seq_id in found:
            with suppress(NotFound):  # evicted meanwhile
                await self._client.kv.delete(seq_id)
        return len(found)


async def test_clean_up_deletes_what_a_test_stored_and_computed_and_nothing_else(client: AsyncClient) -> None:
    mine, others = Sequences(client), Sequences(client)
    keys = np.ones((3, 2, 4), np.float32)
    kept = others.new()
    await client.kv.put(kept, 0, keys, keys)
    try:
        stored, computed = mine.new("stored"), mine.new("computed")
        mine.new("never used")
        for layer in (0, 5):
            await client.kv.put(stored, layer, keys, keys)
        await client.kv.pin(stored)
        await client.generate("One, two, three", max_tokens=2, ignore_eos=True, seq_id=computed).result()

        assert await mine.delete_all() == 2
        for seq_id in (stored, computed):
            with pytest.raises(NotFound):
                await client.kv.length(seq_id, 0)
        assert await client.kv.length(kept, 0) == 3
        assert await mine.delete_all() == 0
    finally:
        assert await others.delete_all() == 1


async def test_owned_ids_are_new_and_live_where_they_should(client: AsyncClient) -> None:
    sequences = Sequences(client)
    for worker in await client.workers():
        owned = await sequences.owned_by(worker.worker_id, 3)
        assert len(set(owned)) == 3
        assert {(await client.route(seq_id)).worker_id for seq_id in owned} == {worker.worker_id}
    with pytest.raises(AssertionError, match="no ids belong to nobody"):
        await sequences.owned_by("nobody", 1)
