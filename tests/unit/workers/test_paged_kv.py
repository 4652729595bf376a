from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import BadArgument, BadTensor, NoSpace
from workers.batch import BlockId
from workers.page_plan import PagePlan, block_rows, plan_pages, token_rows
from workers.paged_kv import PagedKV, write_kv

CPU = torch.device("cpu")
LAYERS, HEADS, BLOCK_SIZE, HEAD_DIM, BLOCKS = 2, 3, 4, 5, 12
BLOCK_BYTES = 2 * LAYERS * HEADS * BLOCK_SIZE * HEAD_DIM * 4


def make_plan(memory_bytes: int = BLOCKS * BLOCK_BYTES) -> PagePlan:
    return plan_pages(
        memory_bytes=memory_bytes,
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        block_size=BLOCK_SIZE,
        itemsize=4,
    )


def make_kv(dtype: torch.dtype = torch.float32) -> PagedKV:
    return PagedKV(make_plan(), dtype, CPU)


def states_of(seq_len: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[seq_len, heads, head_dim]`, every element different."""
    keys = torch.arange(1, seq_len * HEADS * HEAD_DIM + 1).reshape(seq_len, HEADS, HEAD_DIM).to(dtype)
    return keys, -keys


def table_of(*blocks: int) -> list[BlockId]:
    return [BlockId(block) for block in blocks]


tables = st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=6, unique=True)


def test_plan_takes_as_many_whole_blocks_as_fit() -> None:
    plan = make_plan(BLOCKS * BLOCK_BYTES + BLOCK_BYTES - 1)
    assert (plan.num_blocks, plan.block_bytes, plan.total_bytes) == (BLOCKS, BLOCK_BYTES, BLOCKS * BLOCK_BYTES)


def test_memory_for_less_than_a_block_is_refused_with_the_size_of_one() -> None:
    with pytest.raises(BadArgument, match=str(BLOCK_BYTES)):
        make_plan(BLOCK_BYTES - 1)


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim", "block_size", "itemsize"])
def test_plan_refuses_a_dimension_below_one(name: str) -> None:
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "block_size": 1, "itemsize": 1, "memory_bytes": 99}
    with pytest.raises(BadArgument, match=name):
        plan_pages(**sizes | {name: 0})


def test_pool_is_one_allocation_of_exactly_the_planned_bytes() -> None:
    kv = make_kv()
    tensors = [*kv.keys, *kv.values]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert tensors[0].untyped_storage().nbytes() == kv.plan.total_bytes
    assert all(tensor.shape == (BLOCKS, HEADS, BLOCK_SIZE, HEAD_DIM) for tensor in tensors)
    assert len({tensor.data_ptr() for tensor in tensors}) == 2 * LAYERS


def test_pool_that_the_machine_cannot_hold_is_a_typed_error() -> None:
    with pytest.raises(NoSpace, match="for the KV pool"):
        PagedKV(make_plan(1 << 55), torch.float32, CPU)


@given(tables, st.data())
def test_what_is_written_is_read_back_and_nothing_else_changes(blocks: list[int], data: st.DataObject) -> None:
    kv, table = make_kv(), table_of(*blocks)
    room = len(blocks) * BLOCK_SIZE
    start = data.draw(st.integers(0, room))
    seq_len = data.draw(st.integers(0, room - start))
    keys, values = states_of(seq_len)
    kv.write(1, table, start, keys, values)
    read_keys, read_values = kv.read(1, table, start, start + seq_len)
    assert torch.equal(read_keys, keys)
    assert torch.equal(read_values, values)
    assert not kv.keys[0].any()
    assert int((kv.keys[1] != 0).sum()) == keys.numel()
    assert int((kv.values[1] != 0).sum()) == values.numel()


@given(tables, st.data())
def test_rows_are_where_block_head_and_offset_say(blocks: list[int], data: st.DataObject) -> None:
    plan, table = make_plan(), table_of(*blocks)
    stop = data.draw(st.integers(1, len(blocks) * BLOCK_SIZE))
    start = data.draw(st.integers(0, stop - 1))
    expected = [
        (table[position // BLOCK_SIZE] * HEADS + head) * BLOCK_SIZE + position % BLOCK_SIZE
        for head in range(HEADS)
        for position in range(start, stop)
    ]
    assert token_rows(plan, table, start, stop, CPU).tolist() == expected
    used = table[: -(-stop // BLOCK_SIZE)]
    expected = [block * HEADS + head for head, block in itertools.product(range(HEADS), used)]
    assert block_rows(plan, table, stop, CPU).tolist() == expected


def test_gather_is_the_plain_walk_over_blocks() -> None:
    kv, table = make_kv(), table_of(7, 2, 11)
    for tensor in (*kv.keys, *kv.values):
        tensor.normal_()
    shape = (HEADS, -1, HEAD_DIM)
    for by_token, rows in (
        (False, block_rows(kv.plan, table, 12, CPU)),
        (True, token_rows(kv.plan, table, 0, 12, CPU)),
    ):
        gathered = kv.gather(1, rows, by_token=by_token)
        for states, cache in zip(gathered, (kv.keys[1], kv.values[1]), strict=True):
            assert torch.equal(states.view(shape), torch.cat([cache[block] for block in table], dim=1))


def test_gathered_rows_that_are_stale_are_zeros_and_the_pool_keeps_what_it_has() -> None:
    kv = make_kv()
    kv.keys[1].fill_(torch.nan)
    keys, _ = kv.gather(1, block_rows(kv.plan, table_of(7), 4, CPU), torch.tensor([2, 5]))
    assert [row for row in range(len(keys)) if not keys[row].any()] == [2, 5]
    assert kv.keys[1].isnan().all()


def test_what_is_borrowed_is_what_is_gathered_whatever_was_borrowed_before() -> None:
    kv = make_kv()
    for cache in (*kv.keys, *kv.values):
        cache.copy_(torch.randn_like(cache))
    for layer, tokens, stale in ((0, 4, None), (1, 12, [2, 5]), (0, 5, [0]), (1, 5, None)):
        rows = block_rows(kv.plan, table_of(7, 0, 3), tokens, CPU)
        stale_rows = None if stale is None else torch.tensor(stale)
        borrowed, gathered = kv.borrow(layer, rows, stale_rows), kv.gather(layer, rows, stale_rows)
        assert all(map(torch.equal, borrowed, gathered))


def test_what_is_borrowed_takes_the_memory_of_what_was_borrowed_before() -> None:
    kv = make_kv()
    rows = block_rows(kv.plan, table_of(7, 0, 3), 12, CPU)
    assert [states.data_ptr() for states in kv.borrow(0, rows)] == [states.data_ptr() for states in kv.borrow(1, rows)]


def test_write_takes_any_strides() -> None:
    cache = torch.zeros(BLOCKS, HEADS, BLOCK_SIZE, HEAD_DIM)
    keys, _ = states_of(6)
    rows = token_rows(make_plan(), table_of(3, 1), 1, 7, CPU)
    write_kv(cache, keys.transpose(0, 1), rows)
    assert torch.equal(cache[3, :, 1:].transpose(0, 1), keys[:3])
    assert torch.equal(cache[1, :, :3].transpose(0, 1), keys[3:])


def test_write_with_too_few_rows_is_an_error() -> None:
    kv = make_kv()
    rows = token_rows(kv.plan, table_of(0), 0, 2, CPU)
    with pytest.raises(IndexError):
        write_kv(kv.keys[0], states_of(3)[0].transpose(0, 1), rows)


def test_blocks_are_copied_in_every_layer_as_one_and_others_stay() -> None:
    kv = make_kv()
    for cache in (*kv.keys, *kv.values):
        cache.copy_(torch.randn_like(cache))
    before = [cache.clone() for cache in (*kv.keys, *kv.values)]
    kv.copy_blocks(table_of(0, 1), table_of(2, 0))
    for cache, was in zip((*kv.keys, *kv.values), before, strict=True):
        assert torch.equal(cache[2], was[0])
        assert torch.equal(cache[0], was[1])
        assert torch.equal(cache[1], was[1])
        assert torch.equal(cache[3:], was[3:])


def test_difference_of_blocks_is_that_of_their_worst_layer() -> None:
    kv = make_kv()
    for cache in (*kv.keys, *kv.values):
        cache[0] = torch.rand_like(cache[0]) - 0.5
        cache[0, 0, 0, 0] = 2.0
        cache[1] = cache[0]
    one, other = table_of(0, 1)
    assert kv.difference(one, other) == 0.0
    assert kv.difference(BlockId(2), BlockId(2)) == 0.0, "a layer of zeros"
    kv.values[-1][1, -1, -1, -1] += 0.5
    assert kv.difference(one, other) == pytest.approx(0.25)
    kv.keys[0][1, 0, 0, 0] = torch.nan
    assert math.isnan(kv.difference(one, other))


def test_import_keeps_every_bit_of_odd_numbers() -> None:
    kv, table = make_kv(torch.bfloat16), table_of(4)
    patterns = torch.tensor([0x7FC1, 0xFF80, 0x8000, 0x0001], dtype=torch.uint16).view(torch.bfloat16)
    keys = patterns.repeat(HEADS * HEAD_DIM).reshape(4, HEADS, HEAD_DIM)
    kv.write(0, table, 0, keys, keys)
    assert torch.equal(kv.read(0, table, 0, 4)[0].view(torch.uint16), keys.view(torch.uint16))


@pytest.mark.parametrize(
    "shape", [(2, HEADS + 1, HEAD_DIM), (2, HEADS, HEAD_DIM - 1), (2, HEADS * HEAD_DIM), (), (3, HEADS, HEAD_DIM)]
)
def test_import_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    good = torch.ones(2, HEADS, HEAD_DIM)
    with pytest.raises(BadTensor, match="the pool takes"):
        make_kv().write(0, table_of(0), 0, good, torch.ones(shape))


def test_import_of_another_dtype_is_refused_and_not_cast() -> None:
    keys, values = states_of(2, torch.float16)
    with pytest.raises(BadTensor, match="float16"):
        make_kv().write(0, table_of(0), 0, keys, values)


@pytest.mark.parametrize(
    ("layer", "start", "stop", "words"),
    [
        (LAYERS, 0, 1, "layer 2 is not in 0..1"),
        (-1, 0, 1, "layer -1"),
        (0, -1, 1, "not a range"),
        (0, 3, 2, "not a range"),
        (0, 0, 9, "2 blocks of 4 tokens do not reach position 9"),
    ],
)
def test_range_that_is_not_there_is_refused(layer: int, start: int, stop: int, words: str) -> None:
    with pytest.raises(BadArgument, match=words):
        make_kv().read(layer, table_of(1, 2), start, stop)


@pytest.mark.gpu
def test_pool_on_a_gpu_gives_back_what_was_written_from_the_host() -> None:
    kv, (keys, values) = PagedKV(make_plan(), torch.float32, torch.device("cuda")), states_of(7)
    kv.write(0, table_of(5, 3), 1, keys, values)
    read_keys, read_values = kv.read(0, table_of(5, 3), 1, 8)
    assert read_keys.device.type == "cuda"
    assert torch.equal(read_keys.cpu(), keys)
    assert torch.equal(read_values.cpu(), values)


@given(tables, st.permutations(range(BLOCKS)))
def test_blocks_that_travel_arrive_bit_for_bit_and_touch_no_others(blocks: list[int], others: list[int]) -> None:
    source, target = make_kv(), make_kv()
    for layer in range(LAYERS):
        source.write(layer, table_of(*range(BLOCKS)), 0, *states_of(BLOCKS * BLOCK_SIZE))
    places = others[: len(blocks)]
    out = source.export_blocks(table_of(*blocks))
    assert out.shape == (len(blocks), BLOCK_BYTES)
    target.import_blocks(table_of(*places), bytearray(out.numpy().tobytes()))
    for layer in range(LAYERS):
        for mine, theirs in ((source.keys[layer], target.keys[layer]), (source.values[layer], target.values[layer])):
            assert torch.equal(theirs[places], mine[blocks])
            rest = [block for block in range(BLOCKS) if block not in places]
            assert not theirs[rest].any()


@pytest.mark.parametrize("nbytes", [0, BLOCK_BYTES - 1, BLOCK_BYTES + 1, 2 * BLOCK_BYTES])
def test_import_of_bytes_that_are_not_the_blocks_is_refused(nbytes: int) -> None:
    kv = make_kv()
    with pytest.raises(BadTensor, match=str(BLOCK_BYTES)):
        kv.import_blocks(table_of(3), bytearray(b"\x01" * nbytes))
    assert not kv.keys[0].any()
