from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import BadArgument, BadTensor, NoSpace
from workers.batch import BlockId, Slice
from workers.kv_precision import is_scaled
from workers.page_plan import PagePlan, batch_rows, block_rows, of_both, plan_pages, token_rows
from workers.paged_kv import PagedKV

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
    for layer, tokens in ((0, 4), (1, 12), (0, 5), (1, 5)):
        rows = block_rows(kv.plan, table_of(7, 0, 3), tokens, CPU)
        borrowed, gathered = kv.borrow(layer, of_both(rows, kv.plan.num_block_rows)), kv.gather(layer, rows)
        assert all(map(torch.equal, borrowed, gathered))


def test_what_is_borrowed_takes_the_memory_of_what_was_borrowed_before() -> None:
    kv = make_kv()
    rows = of_both(block_rows(kv.plan, table_of(7, 0, 3), 12, CPU), kv.plan.num_block_rows)
    assert [states.data_ptr() for states in kv.borrow(0, rows)] == [states.data_ptr() for states in kv.borrow(1, rows)]


def slice_of(start: int, num_tokens: int, *blocks: int) -> Slice:
    return Slice(token_ids=[0] * num_tokens, start=start, block_table=table_of(*blocks), wants_logits=False)


def test_states_of_any_strides_are_stored_where_the_batch_has_its_tokens() -> None:
    kv, (keys, values) = make_kv(), states_of(6)
    kv.store(1, keys.transpose(0, 1), values.transpose(0, 1), batch_rows(kv.plan, [slice_of(1, 6, 3, 5)], CPU))
    for cache, states in ((kv.keys[1], keys), (kv.values[1], values)):
        assert torch.equal(cache[3, :, 1:].transpose(0, 1), states[:3])
        assert torch.equal(cache[5, :, :3].transpose(0, 1), states[3:])
        assert int((cache != 0).sum()) == states.numel()
    assert not kv.keys[0].any()


def test_states_for_which_there_are_too_few_rows_are_an_error() -> None:
    kv, (keys, values) = make_kv(), states_of(3)
    with pytest.raises(IndexError):
        kv.store(0, keys.transpose(0, 1), values.transpose(0, 1), batch_rows(kv.plan, [slice_of(0, 2, 0)], CPU))


class Filled:
    """A pool all of whose numbers are one, or none if `number` is NaN, and which knows it."""

    def __init__(self, number: float, kv_dtype: torch.dtype = torch.float32) -> None:
        plan = plan_pages(
            memory_bytes=BLOCKS * BLOCK_BYTES,
            num_layers=LAYERS,
            num_kv_heads=HEADS,
            head_dim=HEAD_DIM,
            block_size=BLOCK_SIZE,
            itemsize=kv_dtype.itemsize,
            scale_bytes=4 if is_scaled(kv_dtype) else 0,
        )
        self.kv = PagedKV(plan, kv_dtype, CPU, torch.float32)
        self.blocks = list(range(plan.num_blocks))
        shape = (len(self.blocks) * BLOCK_SIZE, HEADS, HEAD_DIM)
        for layer in range(LAYERS):
            self.kv.write(layer, table_of(*self.blocks), 0, torch.full(shape, number), torch.full(shape, number))

    def zeros(self, block: int) -> set[int]:
        """Tokens of a block that are zeros in every layer, head, keys and values, as they are read."""
        rows = block_rows(self.kv.plan, table_of(block), BLOCK_SIZE, CPU)
        states = [part.view(HEADS, BLOCK_SIZE, -1) for layer in range(LAYERS) for part in self.kv.gather(layer, rows)]
        return {token for token in range(BLOCK_SIZE) if not any(part[:, token].any() for part in states)}


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_only_the_ends_of_the_blocks_that_slices_end_in_are_cleared(kv_dtype: torch.dtype) -> None:
    number = math.nan if kv_dtype is not torch.int8 else math.inf
    pool = Filled(number, kv_dtype)
    pool.kv.clear_ends([slice_of(3, 1, 7), slice_of(2, 4, 1, 4), slice_of(0, 3, 2), slice_of(5, 1, 9, 8)])
    cleared = {4: {2, 3}, 2: {3}, 8: {2, 3}}
    assert {block: pool.zeros(block) for block in pool.blocks if pool.zeros(block)} == cleared


def test_end_of_a_block_is_cleared_again_once_something_else_was_written_there() -> None:
    ones = torch.ones(BLOCK_SIZE, HEADS, HEAD_DIM)
    pool = Filled(1.0)
    kv = pool.kv
    kv.clear_ends([slice_of(0, 1, 2), slice_of(0, 1, 3), slice_of(0, 1, 4), slice_of(0, 1, 5)])
    kv.write(0, table_of(9, 2), 4, ones, ones)
    kv.import_blocks(table_of(3), bytearray(kv.export_blocks(table_of(0)).numpy().tobytes()))
    kv.copy_blocks(table_of(0), table_of(4))
    for offset in range(1, BLOCK_SIZE):  # a sequence that fills its block, which is another's afterwards
        kv.clear_ends([slice_of(offset, 1, 5)])
        kv.keys[0][5, :, offset] = 1.0
    kv.clear_ends([slice_of(0, 1, 2), slice_of(0, 1, 3), slice_of(0, 1, 4), slice_of(0, 1, 5)])
    assert {block: pool.zeros(block) for block in (2, 3, 4, 5)} == {block: {1, 2, 3} for block in (2, 3, 4, 5)}


def test_end_that_is_zeros_already_is_not_touched_again() -> None:
    kv = Filled(1.0).kv
    kv.clear_ends([slice_of(0, 1, 2)])
    kv.keys[0][2] = 2.0  # behind the pool's back, so that it would be seen
    kv.clear_ends([slice_of(1, 1, 2)])
    assert (kv.keys[0][2] == 2.0).all()


def test_end_of_a_block_is_known_to_be_that_of_the_block_it_was_copied_from() -> None:
    pool = Filled(1.0)
    pool.kv.clear_ends([slice_of(0, 3, 2)])
    pool.kv.copy_blocks(table_of(2, 2), table_of(3, 2))
    assert (pool.zeros(2), pool.zeros(3)) == ({3}, {3})
    pool.kv.clear_ends([slice_of(0, 1, 3)])
    assert pool.zeros(3) == {1, 2, 3}


def test_a_whole_block_that_a_slice_passes_through_is_cleared_when_another_begins_it() -> None:
    pool = Filled(1.0)
    pool.kv.clear_ends([slice_of(0, 1, 2)])
    pool.kv.clear_ends([slice_of(1, 5, 2, 3)])
    for cache in (*pool.kv.keys, *pool.kv.values):
        cache[2] = 1.0
    pool.kv.clear_ends([slice_of(0, 2, 2)])
    assert pool.zeros(2) == {2, 3}


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
