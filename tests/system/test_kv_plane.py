"""The KV plane through the whole system: bit for bit, in every dtype and size, and honest about room."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import numpy as np
import pytest
from numpy.typing import NDArray

from bus.errors import BadArgument, Conflict, NoSpace, NotFound
from bus.tensors import BY_NAME
from kvcache import AsyncClient
from kvcache.client.core import MAX_READS
from tests.harness.placement import owned_by
from tests.tensor_utils import assert_same, joined, random_bits

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

MIB = 1 << 20
PLANE_BYTES = 128 * MIB


def rows(num_tokens: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    draw = np.random.default_rng(seed)
    k, v = (draw.standard_normal((num_tokens, 2, 8), np.float32) for _ in "kv")
    return k, v


@pytest.mark.parametrize("dtype", sorted(BY_NAME))
async def test_every_dtype_comes_back_bit_for_bit(client: AsyncClient, dtype: str) -> None:
    k, v = random_bits(dtype, (17, 3, 5), 1), random_bits(dtype, (17, 3, 7), 2)
    ack = await client.kv.put(f"dtype-{dtype}", 3, k, v)
    assert (ack.length, ack.durability, ack.duplicate) == (17, "mem1", False)
    assert_same(await client.kv.get(f"dtype-{dtype}", 3), k, v)
    more_k, more_v = random_bits(dtype, (4, 3, 5), 3), random_bits(dtype, (4, 3, 7), 4)
    assert (await client.kv.append(f"dtype-{dtype}", 3, more_k, more_v, at=17)).length == 21
    assert_same(
        await client.kv.get(f"dtype-{dtype}", 3, 15, 20),
        joined(k[15:], more_k[:3]),
        joined(v[15:], more_v[:3]),
    )


async def test_sequence_of_no_tokens_is_stored_and_grows(client: AsyncClient) -> None:
    empty = np.zeros((0, 2, 8), np.float32)
    assert (await client.kv.put("empty", 0, empty, empty)).length == 0
    pair = await client.kv.get("empty", 0)
    assert (pair.length, pair.k.shape) == (0, (0, 2, 8))
    k, v = rows(3)
    assert (await client.kv.append("empty", 0, k, v, at=0)).length == 3
    assert (await client.kv.append("empty", 0, empty, empty, at=3)).length == 3
    assert (await client.kv.get("empty", 0)).k.tobytes() == k.tobytes()


async def test_64_mib_in_chunks_comes_back_whole_and_in_ranges(client: AsyncClient) -> None:
    k, v = random_bits("bfloat16", (16_384, 8, 128), 5), random_bits("bfloat16", (16_384, 8, 128), 6)
    assert (await client.kv.put("large", 0, k, v)).length == 16_384
    assert_same(await client.kv.get("large", 0), k, v)
    assert_same(await client.kv.get("large", 0, 5000, 9001), k[5000:9001], v[5000:9001])
    assert await client.kv.delete("large") == 1


async def test_transfers_of_many_sizes_at_once_do_not_mix(client: AsyncClient) -> None:
    sizes = [1, 31, 32, 2047, 2048, 2049, 4096, 9999, 20_000]
    pairs = {f"mixed-{size}": rows(size, seed=size) for size in sizes}
    await asyncio.gather(*(client.kv.put(seq_id, 0, *pair) for seq_id, pair in pairs.items()))
    found = await asyncio.gather(*(client.kv.get(seq_id, 0) for seq_id in pairs))
    for pair, (k, v) in zip(found, pairs.values(), strict=True):
        assert pair.k.tobytes() == k.tobytes()
        assert pair.v.tobytes() == v.tobytes()


async def test_reads_of_several_clients_from_one_worker_wait_for_each_other(client: AsyncClient) -> None:
    """Together they may have three times the chunks under way that a lane keeps. Nobody tries again, or need to."""
    k, v = random_bits("bfloat16", (2048, 8, 128), 7), random_bits("bfloat16", (2048, 8, 128), 8)
    await client.kv.put("wanted", 0, k, v)
    async with AsyncExitStack() as stack:
        readers = [await stack.enter_async_context(AsyncClient(client.url, max_retries=0)) for _ in range(3)]
        found = await asyncio.gather(*(reader.kv.get("wanted", 0) for reader in readers for _ in range(MAX_READS)))
    for pair in found:
        assert_same(pair, k, v)
    assert await client.kv.delete("wanted") == 1


async def test_large_writes_of_several_clients_to_one_worker_wait_for_each_other(client: AsyncClient) -> None:
    """The broker keeps 64 messages for a worker; these are 108, all sent at once."""
    layers = [random_bits("bfloat16", (2048, 8, 128), seed) for seed in range(12)]
    async with AsyncExitStack() as stack:
        writers = [await stack.enter_async_context(AsyncClient(client.url, max_retries=0)) for _ in range(3)]
        acks = await asyncio.gather(
            *(writers[layer % 3].kv.put("layered", layer, k, k) for layer, k in enumerate(layers))
        )
    assert [ack.length for ack in acks] == [2048] * 12
    for layer, k in enumerate(layers):
        assert_same(await client.kv.get("layered", layer), k, k)
    assert await client.kv.delete("layered") == 12


async def test_strided_input_is_stored_as_it_reads(client: AsyncClient) -> None:
    k, v = np.asfortranarray(rows(9)[0]), rows(18)[1][::2]
    await client.kv.put("strided", 0, k, v)
    pair = await client.kv.get("strided", 0)
    np.testing.assert_array_equal(pair.k, k)
    np.testing.assert_array_equal(pair.v, v)


async def test_append_at_its_place_applies_once_and_elsewhere_conflicts(client: AsyncClient) -> None:
    k, v = rows(10)
    await client.kv.put("places", 0, k, v)
    more_k, more_v = rows(5, seed=1)
    assert not (await client.kv.append("places", 0, more_k, more_v, at=10)).duplicate
    again = await client.kv.append("places", 0, more_k, more_v, at=10)
    assert (again.duplicate, again.length) == (True, 15)
    with pytest.raises(Conflict) as hole:
        await client.kv.append("places", 0, more_k, more_v, at=16)
    assert hole.value.current_len == 15
    with pytest.raises(Conflict) as overlap:
        await client.kv.append("places", 0, more_k, more_v, at=12)
    assert overlap.value.current_len == 15
    with pytest.raises(Conflict):
        await client.kv.append("places", 0, more_k + 1, more_v, at=10)
    pair = await client.kv.get("places", 0)
    np.testing.assert_array_equal(pair.k, np.concatenate([k, more_k]))
    np.testing.assert_array_equal(pair.v, np.concatenate([v, more_v]))


async def test_many_appends_in_turn_add_up(client: AsyncClient) -> None:
    k, v = rows(600)
    for start in range(0, 600, 4):
        await client.kv.append("grown", 0, k[start : start + 4], v[start : start + 4], at=start)
    pair = await client.kv.get("grown", 0)
    assert pair.k.tobytes() == k.tobytes()
    assert pair.v.tobytes() == v.tobytes()


async def test_layers_are_apart_and_delete_takes_one_or_all(client: AsyncClient) -> None:
    for layer in range(3):
        await client.kv.put("layers", layer, *rows(4 + layer, seed=layer))
    assert await client.kv.delete("layers", 1) == 1
    with pytest.raises(NotFound):
        await client.kv.get("layers", 1)
    assert await client.kv.length("layers", 2) == 6
    assert await client.kv.delete("layers") == 2
    with pytest.raises(NotFound):
        await client.kv.delete("layers")


async def test_unknown_sequences_and_ranges_are_told_at_once(client: AsyncClient) -> None:
    for missing in (
        client.kv.get("nobody", 0),
        client.kv.length("nobody", 0),
        client.kv.delete("nobody"),
        client.kv.pin("nobody"),
        client.kv.unpin("nobody"),
        client.kv.append("nobody", 0, *rows(1), at=5),
    ):
        with pytest.raises(NotFound):
            await missing
    await client.kv.put("short", 0, *rows(5))
    with pytest.raises(BadArgument):
        await client.kv.get("short", 0, 0, 6)


async def test_list_pages_through_all_workers_in_order(client: AsyncClient) -> None:
    names = [f"listed-{index:02}" for index in range(25)]
    await asyncio.gather(*(client.kv.put(name, 0, *rows(1)) for name in names))
    assert [info.seq_id for info in await client.kv.list("listed-")] == names
    assert [info.seq_id for info in await client.kv.list("listed-", limit=7)] == names[:7]
    assert {(await client.route(name)).worker_id for name in names} == {"worker-1", "worker-2"}


async def test_room_is_made_from_the_least_recently_used_that_is_not_pinned(client: AsyncClient) -> None:
    names = await owned_by(client, "worker-1", 11)
    k, v = np.ones((8 * MIB // 64, 2, 8), np.float32), np.ones((8 * MIB // 64, 2, 8), np.float32)
    for name in names[:7]:
        await client.kv.put(name, 0, k, v)  # 7 x 16 MiB of 128
    await client.kv.pin(names[0])
    await client.kv.get(names[1], 0)
    for name in names[7:10]:
        await client.kv.put(name, 0, k, v)
    kept = [name for name in names[:10] if await is_there(client, name)]
    assert kept == [names[0], names[1], *names[4:10]], "a pinned one and one just read outlive older ones"

    for name in kept:
        await client.kv.pin(name)
    with pytest.raises(NoSpace):
        await client.kv.put(names[10], 0, k, v)
    assert [name for name in names[:11] if await is_there(client, name)] == kept, "a refused put changes nothing"
    await client.kv.unpin(names[5])
    await client.kv.put(names[10], 0, k, v)
    assert not await is_there(client, names[5])
    for name in names:
        if await is_there(client, name):
            await client.kv.delete(name)


async def test_what_can_never_fit_is_refused_and_evicts_nothing(client: AsyncClient) -> None:
    name, large = await owned_by(client, "worker-1", 2)
    await client.kv.put(name, 0, *rows(3))
    huge = np.zeros((PLANE_BYTES // 64, 2, 8), np.float32)
    with pytest.raises(NoSpace):
        await client.kv.put(large, 0, huge, huge)
    assert await is_there(client, name)


async def is_there(client: AsyncClient, name: str) -> bool:
    try:
        await client.kv.length(name, 0)
    except NotFound:
        return False
    return True
