"""The whole way, once: client, broker, worker and a real (tiny) model as processes of their own."""

from __future__ import annotations

import numpy as np
import pytest

from bus.errors import Conflict, NotFound
from kvcache import AsyncClient
from tests.harness.models import HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, Reference

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

PROMPT = [5, 9, 2, 7, 11, 3, 8, 1, 4, 6] * 8


async def test_a_real_model_answers_over_the_bus_and_its_kv_is_reused_and_read(
    client: AsyncClient, reference: Reference
) -> None:
    first = await client.generate(
        token_ids=PROMPT, max_tokens=12, temperature=0.0, ignore_eos=True, seq_id="smoke"
    ).result()
    expected = reference.greedy(PROMPT, 12)
    assert first.usage.completion_tokens == 12
    tokens = [*PROMPT, *expected]

    second = client.generate(token_ids=[*tokens, 17], max_tokens=4, temperature=0.0, ignore_eos=True, seq_id="smoke")
    got = [event.token_id async for event in second if hasattr(event, "token_id")]
    assert got == reference.greedy([*tokens, 17], 4)
    assert (await second.result()).usage.cached_tokens == len(tokens) - 1

    pair = await client.kv.get("smoke", NUM_LAYERS - 1, 0, len(PROMPT))
    keys, values = reference.kv(PROMPT, NUM_LAYERS - 1)
    assert pair.k.shape == (len(PROMPT), NUM_KV_HEADS, HEAD_DIM)
    np.testing.assert_allclose(pair.k, keys.numpy(), atol=1e-4)
    np.testing.assert_allclose(pair.v, values.numpy(), atol=1e-4)
    assert await client.kv.delete("smoke") == NUM_LAYERS


async def test_flushed_prefixes_are_computed_again(client: AsyncClient) -> None:
    async def cached(salt: str) -> int:
        done = await client.generate(token_ids=PROMPT, max_tokens=1, cache_salt=salt, priority=-1).result()
        return done.usage.cached_tokens

    assert [await cached(salt) for salt in ("x", "y", "x", "y")] == [0, 0, 64, 64]
    assert await client.flush_prefix_cache(cache_salt="x") > 0
    assert [await cached(salt) for salt in ("x", "y")] == [0, 64]
    assert await client.flush_prefix_cache() > 0
    assert [await cached(salt) for salt in ("x", "y")] == [0, 0]


async def test_tensors_of_any_size_come_back_bit_for_bit(client: AsyncClient) -> None:
    for num_tokens in (1, 1000, 40_000):
        k = np.random.default_rng(num_tokens).standard_normal((num_tokens, 2, 16)).astype(np.float32)
        await client.kv.put("big", 3, k, -k)
        ack = await client.kv.append("big", 3, k[:1], k[:1], at=num_tokens)
        assert ack.length == num_tokens + 1
        pair = await client.kv.get("big", 3, 0, num_tokens)
        assert pair.k.tobytes() == k.tobytes()
        assert pair.v.tobytes() == (-k).tobytes()
    await client.kv.delete("big")


async def test_a_name_is_either_stored_or_computed(client: AsyncClient) -> None:
    k = np.zeros((2, 2, 16), np.float32)
    await client.kv.put("mine", 0, k, k)
    with pytest.raises(Conflict, match="another seq_id"):
        await client.generate(token_ids=PROMPT, max_tokens=2, seq_id="mine").result()
    await client.generate(token_ids=PROMPT, max_tokens=2, seq_id="theirs").result()
    with pytest.raises(Conflict, match="another seq_id"):
        await client.kv.put("theirs", 0, k, k)
    kinds = {info.seq_id: info.kind for info in await client.kv.list()}
    assert (kinds["mine"], kinds["theirs"]) == ("stored", "computed")
    await client.kv.delete("mine")
    await client.kv.delete("theirs")
    with pytest.raises(NotFound):
        await client.kv.length("mine", 0)
