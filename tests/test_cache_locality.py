"""Where KV lies and what it is: on its owner, layer by layer, bit for bit, and what the model really computed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":  # first, as only pytest makes the imports below work
    raise SystemExit(pytest.main([__file__, "-v", "-s", *sys.argv[1:]]))

from kvcache import AsyncClient, NotFound
from kvcache.models import ModelRegistry
from tests.harness.counters import counters, until_counted
from tests.harness.figures import show, show_table
from tests.harness.generations import greedy
from tests.harness.models import Reference
from tests.harness.services import MODEL
from tests.tensor_utils import MAX_ERROR, SHAPES, assert_same, bits, joined, random_pair, relative_error
from tests.test_utils import Sequences

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

NUM_APPENDED = 10_000
APPEND_SIZES = (1, 2, 3, 1, 5, 1, 7, 1, 8, 3)  # 32 in ten appends


@pytest.fixture(scope="module")
def reference() -> Reference:
    """SmolLM2 as transformers runs it, in float32."""
    return Reference(Path(ModelRegistry().find(MODEL).path))


async def test_an_entry_lives_on_its_owner_and_nowhere_else(client: AsyncClient, sequences: Sequences) -> None:
    before = await counters(client)
    k, v = random_pair("smollm2", 100)
    expected = {}
    for number, worker_id in enumerate(sorted(before), 1):  # another number on each, so that no mix-up adds up
        for seq_id in await sequences.owned_by(worker_id, number):
            await client.kv.put(seq_id, 0, k, v)
            assert_same(await client.kv.get(seq_id, 0), k, v)
        expected[worker_id] = {"puts": number, "gets": number, "sequences": number}
    await until_counted(client, before, expected)
    rows = [(name, *counts.values()) for name, counts in expected.items()]
    show_table("what each worker took, served and holds", ("worker", "puts", "gets", "sequences"), rows)
    assert await sequences.delete_all() == sum(counts["sequences"] for counts in expected.values())
    await until_counted(client, before, {name: {"sequences": 0} for name in before})


async def test_a_replica_lives_on_one_more_worker_when_asked_for(client: AsyncClient, sequences: Sequences) -> None:
    before = await counters(client)
    if len(before) != 2:
        pytest.skip(f"which of {len(before)} workers has the replica is the broker's to say; this test needs two")
    k, v = random_pair("smollm2", 100)
    single, double = sequences.new(), sequences.new()
    owner = (await client.route(single)).worker_id
    assert (await client.kv.put(single, 0, k, v)).durability == "mem1"
    await until_counted(client, before, {name: {"sequences": int(name == owner)} for name in before})

    assert (await client.kv.put(double, 0, k[:60], v[:60], rf=2)).durability == "mem2"
    assert (await client.kv.append(double, 0, k[60:], v[60:], at=60, rf=2)).durability == "mem2"
    nbytes = k.nbytes + v.nbytes
    expected = {
        name: {"sequences": 1 + (name == owner), "moved_bytes": nbytes * (1 + (name == owner))} for name in before
    }
    await until_counted(client, before, expected)
    assert_same(await client.kv.get(double, 0), k, v)
    assert await sequences.delete_all() == 2
    await until_counted(client, before, {name: {"sequences": 0} for name in before})


async def test_append_grows_five_tokens_to_eight_one_by_one(client: AsyncClient, sequences: Sequences) -> None:
    seq_id = sequences.new()
    k, v = random_pair("smollm2", 8, "float16")
    assert (await client.kv.put(seq_id, 0, k[:5], v[:5])).length == 5
    for length in (6, 7, 8):
        ack = await client.kv.append(seq_id, 0, k[length - 1 : length], v[length - 1 : length], at=length - 1)
        assert (ack.length, ack.duplicate) == (length, False)
        assert_same(await client.kv.get(seq_id, 0), k[:length], v[:length])
    assert_same(await client.kv.get(seq_id, 0, 4, 7), k[4:7], v[4:7])


async def test_four_layers_are_stored_and_read_independently(client: AsyncClient, sequences: Sequences) -> None:
    seq_id = sequences.new()
    layers = {layer: random_pair("smollm2", 5 + layer, seed=layer) for layer in range(4)}
    await asyncio.gather(*(client.kv.put(seq_id, layer, k, v) for layer, (k, v) in layers.items()))
    (info,) = await client.kv.list(seq_id)
    assert {layer.layer: layer.length for layer in info.layers} == {layer: 5 + layer for layer in range(4)}

    more = random_pair("smollm2", 2, seed=9)
    await client.kv.append(seq_id, 1, *more)
    assert await client.kv.delete(seq_id, 2) == 1
    layers[1] = tuple(joined(old, new) for old, new in zip(layers[1], more, strict=True))
    for layer in (0, 1, 3):
        assert_same(await client.kv.get(seq_id, layer), *layers[layer])
    with pytest.raises(NotFound):
        await client.kv.get(seq_id, 2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("model", SHAPES)
async def test_tensors_of_a_models_shape_come_back_as_they_were(
    client: AsyncClient, sequences: Sequences, model: str, dtype: str
) -> None:
    seq_id = sequences.new(model)
    k, v = random_pair(model, 37, dtype)
    await client.kv.put(seq_id, 11, k, v)
    pair = await client.kv.get(seq_id, 11)
    assert (pair.k.shape, pair.v.shape, pair.dtype) == ((37, *SHAPES[model]), (37, *SHAPES[model]), dtype)
    assert_same(pair, k, v)


async def test_10000_tokens_of_appends_move_each_byte_once(client: AsyncClient, sequences: Sequences) -> None:
    before = await counters(client)
    seq_id = sequences.new()
    owner = (await client.route(seq_id)).worker_id
    k, v = random_pair("smollm2", NUM_APPENDED, "float16")
    length = appends = 0
    while length < NUM_APPENDED:
        stop = min(NUM_APPENDED, length + APPEND_SIZES[appends % len(APPEND_SIZES)])
        assert (await client.kv.append(seq_id, 0, k[length:stop], v[length:stop], at=length)).length == stop
        length, appends = stop, appends + 1
    nbytes = len(bits(k)) + len(bits(v))
    # Amortised O(1): had growing copied what was there, more bytes than were sent would have moved.
    others = {name: {"appends": 0, "moved_bytes": 0, "sequences": 0} for name in before}
    await until_counted(client, before, others | {owner: {"appends": appends, "moved_bytes": nbytes, "sequences": 1}})
    assert_same(await client.kv.get(seq_id, 0), k, v)
    show("appends", {"tokens": NUM_APPENDED, "appends": appends, "bytes sent": nbytes, "bytes moved": nbytes})


async def test_kv_of_a_generation_is_that_of_transformers_in_every_layer(
    client: AsyncClient, sequences: Sequences, reference: Reference
) -> None:
    seq_id = sequences.new()
    prompt = list(range(1000, 1070))
    answer, done = await greedy(client, prompt, 10, seq_id=seq_id)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (70, 10)
    (info,) = await client.kv.list(seq_id)
    length = info.num_tokens
    assert length in {79, 80}, "the last token is drawn, and need not be computed"
    dtype = info.layers[0].dtype
    expected = reference.all_kv([*prompt, *answer][:length])
    assert (info.kind, len(info.layers)) == ("computed", len(expected))
    errors = []
    for layer, (keys, values) in enumerate(expected):
        pair = await client.kv.get(seq_id, layer)
        assert (pair.dtype, pair.k.shape) == (dtype, (length, *SHAPES[MODEL]))
        found = pair.torch()
        errors.append(max(relative_error(found[0], keys), relative_error(found[1], values)))
    part = await client.kv.get(seq_id, 3, 20, 50)
    whole = await client.kv.get(seq_id, 3)
    assert part.k.tobytes() == whole.k[20:50].tobytes()
    show(
        "KV against transformers",
        {"layers": len(errors), "dtype": dtype, "largest relative error": f"{max(errors):.1e}"},
    )
    assert max(errors) < MAX_ERROR[dtype]
