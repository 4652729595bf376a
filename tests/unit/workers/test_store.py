"""The KV store: bit-exact values, two-phase writes, compare-and-append, eviction, and a model to agree with."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bus.errors import BadArgument, BadTensor, Conflict, KVCacheError, NoSpace, NotFound
from bus.tensors import ITEMSIZE, DType, TensorMeta
from workers.keys import SequenceKey
from workers.memory import HostMemory
from workers.store import Committed, KVStore, Read
from workers.transfers import Kind, Transfer

PAGE = 64
S, T, U = (SequenceKey("acme", name) for name in "stu")


def meta(num_tokens: int, dim: int = 4, dtype: DType = DType.FLOAT16, heads: int = 2) -> TensorMeta:
    """16 bytes per token, so 4 tokens fill a page."""
    return TensorMeta(dtype, (num_tokens, heads, dim))


def noise(num_tokens: int, seed: int = 0, row: int = 16) -> tuple[bytes, bytes]:
    """The bytes of K and V."""
    draw = random.Random(seed)
    return draw.randbytes(num_tokens * row), draw.randbytes(num_tokens * row)


def make(num_pages: int = 16) -> KVStore:
    return KVStore(HostMemory(num_pages * PAGE), PAGE)


def fill(store: KVStore, transfer: Transfer, data: tuple[bytes | memoryview, bytes | memoryview]) -> Committed:
    """Write K and V whole, and commit."""
    for offset, part in zip((0, transfer.k_bytes), data, strict=True):
        if part:
            store.write(transfer, offset, part)
    return store.commit(transfer)


def stores(store: KVStore, key: SequenceKey, layer: int) -> bool:
    try:
        return store.length(key, layer) >= 0
    except NotFound:
        return False


def put(store: KVStore, key: SequenceKey, num_tokens: int, layer: int = 0, seed: int = 0, now: float = 0.0) -> None:
    transfer = store.begin_put(key, layer, meta(num_tokens), meta(num_tokens), now=now)
    assert fill(store, transfer, noise(num_tokens, seed)) == Committed(num_tokens)
    store.check()


def read(store: KVStore, key: SequenceKey, layer: int = 0, start: int = 0, stop: int | None = None) -> bytes:
    """K's bytes, then V's."""
    held = store.open_read(key, layer, start, stop)
    pieces = list(store.chunks(held, 50))
    data = b"".join(bytes(piece) for _, piece in pieces)
    assert [offset for offset, _ in pieces] == [sum(len(p) for _, p in pieces[:i]) for i in range(len(pieces))]
    assert len(data) == held.k.nbytes + held.v.nbytes
    store.close_read(held)
    store.check()
    return data


def used(store: KVStore) -> int:
    return store.stats(0.0).used_bytes // PAGE


def test_what_was_put_is_read_back_bit_for_bit() -> None:
    store = make()
    put(store, S, 11, seed=3)
    k, v = noise(11, 3)
    assert read(store, S) == k + v
    assert read(store, S, start=2, stop=9) == k[32:144] + v[32:144]
    assert read(store, S, start=4, stop=4) == b""
    assert store.length(S, 0) == 11


@pytest.mark.parametrize("dtype", list(DType))
def test_every_dtype_is_kept_bit_for_bit(dtype: DType) -> None:
    store = make()
    shape = TensorMeta(dtype, (5, 2, 3))
    data = noise(5, dtype, row=6 * ITEMSIZE[dtype])
    fill(store, store.begin_put(S, 7, shape, shape, now=0.0), data)
    assert read(store, S, 7) == b"".join(data)
    held = store.open_read(S, 7)
    assert (held.k, held.v, held.length) == (shape, shape, 5)
    store.close_read(held)


def test_nan_and_denormals_survive() -> None:
    bits = np.array([[[0x7FC00001, 0xFFFFFFFF, 0x7F800001, 0x00000001]]], dtype="<u4")
    store = make()
    shape = TensorMeta(DType.FLOAT32, (1, 1, 4))
    fill(store, store.begin_put(S, 0, shape, shape, now=0.0), (bits.tobytes(), bits.view("<f4").data.cast("B")))
    assert read(store, S) == bits.tobytes() * 2


def test_k_and_v_may_differ_in_head_dim() -> None:
    store = make()
    k, v = noise(5, 1, row=2 * 4 * 2)[0], noise(5, 2, row=2 * 7 * 2)[0]
    fill(store, store.begin_put(S, 0, meta(5), meta(5, dim=7), now=0.0), (k, v))
    assert read(store, S, start=1) == k[16:] + v[28:]


def test_empty_value_is_a_value_of_no_tokens() -> None:
    store = make()
    put(store, S, 0)
    assert store.length(S, 0) == 0
    assert read(store, S) == b""
    assert used(store) == 0
    assert store.has(S)


def test_windows_are_read_only_and_not_copies() -> None:
    store = KVStore(HostMemory(16 * PAGE), PAGE)
    put(store, S, 16)
    held = store.open_read(S, 0)
    windows = [window for _, window in store.chunks(held, 1 << 20)]
    assert [(len(window), window.readonly) for window in windows] == [(256, True), (256, True)]
    store.close_read(held)


def test_range_that_the_layer_does_not_have_is_refused() -> None:
    store = make()
    put(store, S, 5)
    for start, stop in ((-1, 2), (3, 2), (0, 6), (6, None)):
        with pytest.raises(BadArgument, match="layer 0 has 0 to 5"):
            store.open_read(S, 0, start, stop)
    store.check()


def test_what_is_not_there_is_not_found_and_counted() -> None:
    store = make()
    put(store, S, 5)
    for key, layer in ((T, 0), (S, 1), (SequenceKey("other", "s"), 0)):
        with pytest.raises(NotFound):
            store.open_read(key, layer)
        with pytest.raises(NotFound):
            store.length(key, layer)
        with pytest.raises(NotFound):
            store.delete(key, layer)
    for missing in (lambda: store.delete(T), lambda: store.pin(T, None, 0.0), lambda: store.unpin(T)):
        with pytest.raises(NotFound, match="'t' is not stored"):
            missing()
    assert (store.stats(0.0).gets, store.stats(0.0).misses) == (3, 3)


# --- puts in pieces ---


def begin(store: KVStore, num_tokens: int, key: SequenceKey = S) -> Transfer:
    return store.begin_put(key, 0, meta(num_tokens), meta(num_tokens), now=0.0)


def test_pieces_may_come_in_any_order() -> None:
    store = make()
    data = b"".join(noise(9, 4))
    transfer = begin(store, 9)
    cuts = [0, 1, 70, 140, 144, 145, 250, 288]
    pieces = list(pairwise(cuts))
    random.Random(5).shuffle(pieces)
    for start, stop in pieces:
        store.write(transfer, start, data[start:stop])
    assert store.commit(transfer) == Committed(9)
    assert read(store, S) == data


def test_put_is_invisible_until_its_commit_and_then_replaces_the_old_value_whole() -> None:
    store = make()
    put(store, S, 5, seed=1)
    transfer = begin(store, 9)
    data = b"".join(noise(9, 4))
    store.write(transfer, 0, data[:144])
    assert read(store, S) == b"".join(noise(5, 1))
    store.write(transfer, 144, data[144:])
    assert read(store, S) == b"".join(noise(5, 1))
    store.commit(transfer)
    assert read(store, S) == data
    assert used(store) == 6


def test_first_put_is_invisible_to_every_question() -> None:
    store = make()
    transfer = begin(store, 4)
    assert not store.has(S)
    assert store.list("acme", "", "", 10, 0.0) == ((), False)
    assert (store.stats(0.0).sequences, used(store)) == (0, 2)
    with pytest.raises(NotFound):
        store.open_read(S, 0)
    store.abort(transfer)
    assert used(store) == 0
    store.check()
    for again in (
        lambda: store.write(transfer, 0, b"x"),
        lambda: store.commit(transfer),
        lambda: store.abort(transfer),
    ):
        with pytest.raises(AssertionError, match="has ended"):
            again()


def test_aborted_put_leaves_the_old_value() -> None:
    store = make()
    put(store, S, 5, seed=1)
    transfer = begin(store, 9)
    store.write(transfer, 0, b"x" * 144)
    store.abort(transfer)
    assert read(store, S) == b"".join(noise(5, 1))
    assert used(store) == 4


def test_incomplete_put_is_refused_and_freed() -> None:
    store = make()
    transfer = begin(store, 4)
    store.write(transfer, 0, b"x" * 64)
    store.write(transfer, 65, b"x" * 63)
    with pytest.raises(BadTensor, match="1 of 128 bytes were not sent"):
        store.commit(transfer)
    assert used(store) == 0
    store.check()


@pytest.mark.parametrize(("start", "stop"), [(10, 20), (0, 11), (19, 30), (5, 25), (12, 13)])
def test_bytes_that_were_sent_before_are_refused(start: int, stop: int) -> None:
    store = make()
    transfer = begin(store, 4)
    store.write(transfer, 10, b"x" * 10)
    store.write(transfer, 40, b"x" * 10)
    with pytest.raises(BadTensor, match="overlap bytes that were sent before"):
        store.write(transfer, start, b"x" * (stop - start))
    store.abort(transfer)


@pytest.mark.parametrize(
    ("offset", "nbytes", "message"),
    [
        (-1, 2, "no piece of a transfer of 128"),
        (0, 129, "no piece"),
        (128, 1, "no piece"),
        (5, 0, "no piece"),
        (63, 2, "end of k"),
    ],
)
def test_pieces_outside_or_of_both_tensors_are_refused(offset: int, nbytes: int, message: str) -> None:
    store = make()
    transfer = begin(store, 4)
    with pytest.raises(BadTensor, match=message):
        store.write(transfer, offset, b"x" * nbytes)
    store.abort(transfer)


@pytest.mark.parametrize(
    ("key", "layer", "k", "error"),
    [
        (SequenceKey("acme", ""), 0, meta(1), BadArgument),
        (S, -1, meta(1), BadArgument),
        (S, 2**32, meta(1), BadArgument),
        (S, 0, TensorMeta(DType.FLOAT16, (1, 4)), BadTensor),
        (S, 0, meta(2), BadTensor),
        (S, 0, meta(1, dtype=DType.BFLOAT16), BadTensor),
        (S, 0, meta(1, heads=3), BadTensor),
    ],
)
def test_wrong_target_or_shape_is_refused(
    key: SequenceKey, layer: int, k: TensorMeta, error: type[KVCacheError]
) -> None:
    store = make()
    with pytest.raises(error):
        store.begin_put(key, layer, k, meta(1), now=0.0)
    with pytest.raises(error):
        store.begin_append(key, layer, k, meta(1), None, now=0.0)
    store.check()


# --- appends ---


def append(store: KVStore, num_tokens: int, at: int | None, seed: int = 0, key: SequenceKey = S) -> Committed:
    transfer = store.begin_append(key, 0, meta(num_tokens), meta(num_tokens), at, now=0.0)
    done = fill(store, transfer, noise(num_tokens, seed))
    store.check()
    return done


def begin_append(store: KVStore, num_tokens: int, at: int | None) -> Transfer:
    return store.begin_append(S, 0, meta(num_tokens), meta(num_tokens), at, now=0.0)


def test_appends_add_up_to_one_value() -> None:
    store = make()
    k = v = b""
    for seed, num in enumerate((1, 2, 5, 1, 7)):
        length = len(k) // 16
        assert append(store, num, at=length if seed % 2 else None, seed=seed) == Committed(length + num)
        more = noise(num, seed)
        k, v = k + more[0], v + more[1]
    assert read(store, S) == k + v
    assert read(store, S, start=3, stop=12) == k[48:192] + v[48:192]


def test_append_moves_each_byte_once_whatever_is_there_before() -> None:
    store = make(200)
    for position in range(300):
        append(store, 1, at=position)
    assert store.stats(0.0).moved_bytes == 300 * 32
    assert used(store) == 150


def test_append_sent_again_is_told_apart_from_another_one() -> None:
    store = make()
    append(store, 3, at=0, seed=1)
    append(store, 2, at=3, seed=2)
    before = store.stats(0.0)
    assert append(store, 3, at=0, seed=1) == Committed(5, duplicate=True)
    assert append(store, 2, at=3, seed=2) == Committed(5, duplicate=True)
    assert append(store, 0, at=4) == Committed(5, duplicate=True)
    assert store.stats(0.0) == before, "a repetition writes and counts nothing"
    with pytest.raises(Conflict, match="are there with other bytes") as caught:
        append(store, 2, at=3, seed=9)
    assert caught.value.current_len == 5
    store.check()


@pytest.mark.parametrize("position", [0, 47, 48, 95])
def test_one_other_byte_anywhere_makes_a_repetition_a_conflict(position: int) -> None:
    store = make()
    append(store, 3, at=0, seed=1)
    append(store, 1, at=3)
    data = bytearray(b"".join(noise(3, 1)))
    data[position] ^= 1
    with pytest.raises(Conflict, match="tokens 0 to 3 are there with other bytes"):
        fill(store, begin_append(store, 3, at=0), (bytes(data[:48]), bytes(data[48:])))
    store.check()


@pytest.mark.parametrize(("at", "num"), [(6, 1), (4, 2), (0, 6)])
def test_append_with_a_hole_or_half_behind_the_end_is_a_conflict(at: int, num: int) -> None:
    store = make()
    append(store, 5, at=0)
    with pytest.raises(Conflict, match="the layer has 5 tokens") as caught:
        append(store, num, at=at)
    assert caught.value.current_len == 5


def test_append_behind_the_end_of_nothing_is_not_found() -> None:
    store = make()
    with pytest.raises(NotFound):
        append(store, 1, at=3)
    append(store, 1, at=None)
    with pytest.raises(BadArgument, match="at must be at least 0, not -1"):
        append(store, 1, at=-1)
    store.check()


@pytest.mark.parametrize("other", [meta(1, dim=8), meta(1, heads=4), meta(1, dtype=DType.BFLOAT16)])
def test_append_of_another_kind_of_token_is_refused(other: TensorMeta) -> None:
    store = make()
    append(store, 2, at=0)
    with pytest.raises(BadTensor, match=r"the layer holds float16 \[seq_len, 2, 4\]"):
        store.begin_append(S, 0, other, other, 2, now=0.0)
    store.check()


def test_big_append_is_invisible_until_its_commit_and_frees_its_pages_when_aborted() -> None:
    store = make()
    append(store, 5, at=0, seed=1)
    before = used(store)
    transfer = begin_append(store, 9, at=5)
    store.write(transfer, 0, b"x" * 144)
    assert store.length(S, 0) == 5
    assert read(store, S) == b"".join(noise(5, 1))
    store.abort(transfer)
    assert used(store) == before
    k, v = noise(9, 2)
    transfer = begin_append(store, 9, at=None)
    store.write(transfer, 144, v)
    store.write(transfer, 0, k)
    assert store.commit(transfer) == Committed(14)
    old = noise(5, 1)
    assert read(store, S) == old[0] + k + old[1] + v


def test_second_append_at_once_is_a_conflict_and_the_first_goes_on() -> None:
    store = make()
    append(store, 4, at=0)
    first = begin_append(store, 1, at=4)
    with pytest.raises(Conflict, match="another append") as caught:
        begin_append(store, 1, at=4)
    assert caught.value.current_len == 4
    for offset in (0, 16):
        store.write(first, offset, b"y" * 16)
    assert store.commit(first) == Committed(5)
    assert append(store, 1, at=5) == Committed(6)


def test_repetition_is_checked_while_another_append_is_under_way() -> None:
    store = make()
    append(store, 4, at=0, seed=1)
    first = begin_append(store, 8, at=4)
    assert append(store, 4, at=0, seed=1) == Committed(4, duplicate=True)
    store.write(first, 0, b"y" * 128)
    store.write(first, 128, b"y" * 128)
    assert store.commit(first) == Committed(12)
    store.check()


@pytest.mark.parametrize("how", ["delete", "put", "delete and put"])
def test_append_to_a_layer_that_is_gone_at_its_commit_is_a_conflict(how: str) -> None:
    store = make()
    append(store, 4, at=0)
    transfer = begin_append(store, 4, at=4)
    repetition = begin_append(store, 4, at=0) if how == "put" else None
    if "delete" in how:
        store.delete(S)
    if "put" in how:
        put(store, S, 3, seed=7)
    for each in (transfer, repetition):
        if each is not None:
            k, v = noise(4)
            store.write(each, 0, k)
            store.write(each, 64, v)
            with pytest.raises(Conflict, match="replaced or deleted") as caught:
                store.commit(each)
            assert caught.value.current_len == (3 if "put" in how else 0)
    assert used(store) == (2 if "put" in how else 0)
    store.check()


def test_of_two_first_appends_the_one_that_commits_first_wins() -> None:
    store = make()
    one, two = begin_append(store, 1, at=0), begin_append(store, 1, at=None)
    for transfer in (one, two):
        store.write(transfer, 0, b"x" * 16)
        store.write(transfer, 16, b"x" * 16)
    assert store.commit(two) == Committed(1)
    with pytest.raises(Conflict):
        store.commit(one)
    store.check()


# --- room ---


def test_value_that_can_never_fit_is_refused_before_anything_is_evicted() -> None:
    store = make(4)
    put(store, S, 4)
    for num in (12, 2**31 - 1):
        with pytest.raises(NoSpace, match="can never fit"):
            begin(store, num, key=T)
    assert store.has(S)
    store.check()


def test_shape_that_overflows_is_refused_before_anything_is_taken() -> None:
    store = make(4)
    huge = TensorMeta(DType.FLOAT64, (2**31 - 1, 2**31 - 1, 2**31 - 1))
    with pytest.raises(NoSpace):
        store.begin_put(S, 0, huge, huge, now=0.0)
    store.check()


def test_whole_sequences_are_evicted_least_recently_used_first() -> None:
    store = make(8)
    put(store, S, 4)
    put(store, S, 4, layer=1)
    put(store, T, 4)
    read(store, S)
    put(store, U, 4, seed=8)
    put(store, SequenceKey("acme", "w"), 4)
    assert [store.has(key) for key in (S, T, U)] == [True, False, True]
    put(store, SequenceKey("acme", "x"), 4)
    assert not store.has(S)
    assert store.has(U)
    assert store.stats(0.0).evictions == 2


def test_pinned_sequences_are_never_evicted_and_pins_expire() -> None:
    store = make(4)
    put(store, S, 4)
    put(store, T, 4)
    store.pin(S, None, now=0.0)
    store.pin(T, 10.0, now=0.0)
    assert store.stats(0.0).pinned_bytes == 4 * PAGE
    with pytest.raises(NoSpace, match="pinned or in use") as caught:
        put(store, U, 4, now=9.9)
    assert caught.value.detail == 0
    put(store, U, 4, now=10.0)
    assert [store.has(key) for key in (S, T, U)] == [True, False, True]
    store.unpin(S)
    put(store, T, 8)
    assert not store.has(S)
    for ttl_s in (0.0, -1.0, math.nan):
        with pytest.raises(BadArgument, match="more than 0 seconds"):
            store.pin(T, ttl_s, 0.0)


def test_refusal_for_want_of_room_evicts_nothing() -> None:
    store = make(6)
    for key in (S, T, U):
        put(store, key, 4)
    store.pin(S, None, 0.0)
    with pytest.raises(NoSpace):
        put(store, SequenceKey("acme", "w"), 12)
    assert all(store.has(key) for key in (S, T, U))


def test_sequences_being_read_or_written_are_not_evicted() -> None:
    store = make(6)
    put(store, S, 4, seed=1)
    put(store, T, 4)
    held = store.open_read(S, 0)
    transfer = store.begin_put(T, 1, meta(4), meta(4), now=0.0)
    with pytest.raises(NoSpace):
        put(store, U, 4)
    assert b"".join(bytes(window) for _, window in store.chunks(held, 100)) == b"".join(noise(4, 1))
    store.close_read(held)
    put(store, U, 4)
    assert [store.has(key) for key in (S, T)] == [False, True]
    store.abort(transfer)
    store.check()


def test_value_that_is_replaced_or_deleted_while_read_stays_readable() -> None:
    store = make(8)
    put(store, S, 4, seed=1)
    first, second = store.open_read(S, 0), store.open_read(S, 0, 1, 3)
    put(store, S, 4, seed=2)
    store.delete(S)
    store.check()
    put(store, T, 8, seed=3)
    assert used(store) == 2 + 4
    assert b"".join(bytes(window) for _, window in store.chunks(first, 100)) == b"".join(noise(4, 1))
    store.close_read(first)
    assert used(store) == 6
    store.close_read(second)
    assert used(store) == 4
    store.check()


def test_append_leaves_a_read_of_the_shorter_value_alone() -> None:
    store = make()
    put(store, S, 3, seed=1)
    held = store.open_read(S, 0)
    append(store, 5, at=3, seed=2)
    assert (held.k.shape[0], held.length) == (3, 3)
    assert b"".join(bytes(window) for _, window in store.chunks(held, 100)) == b"".join(noise(3, 1))
    store.close_read(held)


def test_deleting_a_layer_leaves_the_others_and_the_last_one_takes_the_pin_along() -> None:
    store = make()
    put(store, S, 4)
    put(store, S, 4, layer=5)
    store.pin(S, None, 0.0)
    assert store.delete(S, 5) == 1
    assert stores(store, S, 0)
    assert not stores(store, S, 5)
    put(store, S, 4, layer=5)
    assert store.delete(S) == 2
    assert used(store) == 0
    put(store, S, 4)
    assert store.stats(0.0).pinned_bytes == 0


def test_pin_goes_with_the_last_layer_even_while_it_is_read() -> None:
    store = make()
    put(store, S, 4)
    store.pin(S, None, 0.0)
    held = store.open_read(S, 0)
    store.delete(S)
    put(store, S, 4)
    store.close_read(held)
    assert store.stats(0.0).pinned_bytes == 0
    store.check()


def test_list_is_by_id_within_a_tenant_and_in_pages() -> None:
    store = make(32)
    for name in ("b2", "a1", "b1", "b3"):
        put(store, SequenceKey("acme", name), 2)
    put(store, SequenceKey("other", "b0"), 2)
    put(store, SequenceKey("acme", "b2"), 3, layer=4)
    store.pin(SequenceKey("acme", "b2"), 5.0, now=0.0)
    page, more = store.list("acme", "b", "", 2, now=4.0)
    assert ([info.seq_id for info in page], more) == (["b1", "b2"], True)
    assert (page[0].pinned, page[1].pinned) == (False, True)
    assert [(layer.layer, layer.length) for layer in page[1].layers] == [(0, 2), (4, 3)]
    assert (page[1].nbytes, page[1].num_tokens, page[1].layers[0].k_shape) == (160, 3, (2, 2, 4))
    page, more = store.list("acme", "b", "b2", 2, now=5.0)
    assert ([info.seq_id for info in page], more) == (["b3"], False)


def test_page_that_the_region_cannot_hold_is_refused() -> None:
    for page_bytes in (0, 65):
        with pytest.raises(ValueError, match="cannot be cut from 64 bytes"):
            KVStore(HostMemory(64), page_bytes)


def test_more_memory_than_there_is_is_refused() -> None:
    with pytest.raises(NoSpace, match="no 1125899906842624 bytes for the KV plane"):
        HostMemory(1 << 50)


class StoreMachine(RuleBasedStateMachine):
    """Puts, appends, reads, pins and deletes in a small region, each in pieces and at any time, against a dict."""

    KEYS = (S, T, SequenceKey("other", "s"))
    PAGES = 24

    def __init__(self) -> None:
        super().__init__()
        self.store = make(self.PAGES)
        self.now = 0.0
        self.values: dict[tuple[SequenceKey, int], tuple[bytes, bytes]] = {}
        self.pinned_until: dict[SequenceKey, float] = {}
        self.open: list[tuple[Transfer, tuple[bytes, bytes]]] = []
        self.reads: list[tuple[Read, bytes]] = []
        self.seed = 0

    places = st.tuples(st.sampled_from(KEYS), st.integers(0, 1))

    def fresh(self, num_tokens: int) -> tuple[bytes, bytes]:
        self.seed += 1
        return noise(num_tokens, self.seed)

    def forget_evicted(self) -> None:
        """What may have been evicted: whole sequences, unpinned, without transfers and reads; and only for room."""
        busy = {transfer.key for transfer, _ in self.open} | {held.key for held, _ in self.reads}
        gone = {key for key, layer in self.values if not stores(self.store, key, layer)}
        for key in gone:
            assert not any(stores(self.store, key, layer) for layer in (0, 1)), "a sequence was evicted in part"
            assert self.pinned_until.pop(key, 0.0) <= self.now, "a pinned sequence was evicted"
            assert key not in busy, "a sequence was evicted while it was read or written"
            for target in [target for target in self.values if target[0] == key]:
                del self.values[target]

    def room_is_short(self) -> bool:
        return self.store.stats(self.now).used_bytes > 0

    @rule(place=places, num=st.integers(0, 14))
    def begin_put(self, place: tuple[SequenceKey, int], num: int) -> None:
        try:
            transfer = self.store.begin_put(*place, meta(num), meta(num), now=self.now)
        except NoSpace:
            assert self.room_is_short()
        else:
            self.open.append((transfer, self.fresh(num)))
        self.forget_evicted()

    @rule(place=places, num=st.integers(0, 9), back=st.integers(-1, 3), same=st.booleans())
    def begin_append(self, place: tuple[SequenceKey, int], num: int, back: int, same: bool) -> None:
        k, v = self.values.get(place, (b"", b""))
        at = max(0, len(k) // 16 - back)
        data = self.fresh(num)
        if same:
            data = (k[at * 16 : (at + num) * 16].ljust(num * 16), v[at * 16 : (at + num) * 16].ljust(num * 16))
        try:
            transfer = self.store.begin_append(*place, meta(num), meta(num), at, now=self.now)
        except (Conflict, NotFound, NoSpace) as refusal:
            self.check_refusal(refusal, place, at, num)
        else:
            self.open.append((transfer, data))
        self.forget_evicted()

    def check_refusal(self, refusal: KVCacheError, place: tuple[SequenceKey, int], at: int, num: int) -> None:
        length = len(self.values.get(place, (b"", b""))[0]) // 16
        if isinstance(refusal, NotFound):
            assert place not in self.values
            assert at > 0
        elif isinstance(refusal, Conflict):
            assert refusal.current_len == length
            appending = any((each.key, each.layer_number) == place for each, _ in self.open)
            assert appending or (at != length and at + num > length)
        else:
            assert self.room_is_short()

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def write_all_and_commit(self, data: st.DataObject) -> None:
        transfer, (k, v) = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        pieces = [(i, k[i : i + 37]) for i in range(0, len(k), 37)]
        pieces += [(len(k) + i, v[i : i + 37]) for i in range(0, len(v), 37)]
        for offset, piece in data.draw(st.permutations(pieces)):
            self.store.write(transfer, offset, piece)
        target = (transfer.key, transfer.layer_number)
        before = self.values.get(target, (b"", b""))
        try:
            done = self.store.commit(transfer)
        except Conflict as conflict:
            self.check_conflict(conflict, transfer, before, (k, v))
            return
        start = transfer.start * 16
        if transfer.kind is Kind.PUT:
            self.values[target] = (k, v)
        elif done.duplicate:
            assert (before[0][start : start + len(k)], before[1][start : start + len(v)]) == (k, v)
        else:
            assert len(before[0]) == start
            self.values[target] = (before[0] + k, before[1] + v)
        assert done.length == len(self.values[target][0]) // 16

    def check_conflict(
        self, conflict: Conflict, transfer: Transfer, before: tuple[bytes, bytes], sent: tuple[bytes, bytes]
    ) -> None:
        assert conflict.current_len == len(before[0]) // 16
        start, stop = transfer.start * 16, transfer.start * 16 + len(sent[0])
        differs = (before[0][start:stop], before[1][start:stop]) != sent
        assert transfer.kind is Kind.APPEND or differs or transfer.layer.retired

    @precondition(lambda self: self.open)
    @rule(data=st.data(), partly=st.booleans())
    def abort(self, data: st.DataObject, partly: bool) -> None:
        transfer, (k, _) = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        if partly and k:
            self.store.write(transfer, 0, k[: len(k) // 2 + 1])
            if transfer.nbytes > len(k) // 2 + 1:
                with pytest.raises(BadTensor, match="were not sent"):
                    self.store.commit(transfer)
                return
        self.store.abort(transfer)

    @precondition(lambda self: self.values)
    @rule(data=st.data())
    def open_read(self, data: st.DataObject) -> None:
        key, layer = data.draw(st.sampled_from(sorted(self.values)))
        k, v = self.values[key, layer]
        start = data.draw(st.integers(0, len(k) // 16))
        stop = data.draw(st.integers(start, len(k) // 16))
        held = self.store.open_read(key, layer, start, stop)
        self.reads.append((held, k[start * 16 : stop * 16] + v[start * 16 : stop * 16]))

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def close_read(self, data: st.DataObject) -> None:
        held, _ = self.reads.pop(data.draw(st.integers(0, len(self.reads) - 1)))
        self.store.close_read(held)

    @precondition(lambda self: self.values)
    @rule(data=st.data(), whole=st.booleans())
    def delete(self, data: st.DataObject, whole: bool) -> None:
        key, layer = data.draw(st.sampled_from(sorted(self.values)))
        gone = [target for target in self.values if target[0] == key and (whole or target[1] == layer)]
        assert self.store.delete(key, None if whole else layer) == len(gone)
        for target in gone:
            del self.values[target]
        if not self.store.has(key):
            self.pinned_until.pop(key, None)

    @precondition(lambda self: self.values)
    @rule(data=st.data(), ttl_s=st.sampled_from([None, 1.5, "off"]))
    def pin(self, data: st.DataObject, ttl_s: float | str | None) -> None:
        key, _ = data.draw(st.sampled_from(sorted(self.values)))
        if isinstance(ttl_s, str):
            self.store.unpin(key)
            self.pinned_until.pop(key, None)
        else:
            self.store.pin(key, ttl_s, self.now)
            self.pinned_until[key] = math.inf if ttl_s is None else self.now + ttl_s

    @rule()
    def time_passes(self) -> None:
        self.now += 1.0

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.store.check()
        for (key, layer), (k, _) in self.values.items():
            assert self.store.length(key, layer) == len(k) // 16
        listed = {
            (SequenceKey(tenant, info.seq_id), layer.layer)
            for tenant in ("acme", "other")
            for info in self.store.list(tenant, "", "", 100, self.now)[0]
            for layer in info.layers
        }
        assert listed == set(self.values)

    @invariant()
    def held_reads_yield_what_was_there_when_they_were_opened(self) -> None:
        for held, expected in self.reads:
            windows = self.store.chunks(held, 50)
            assert b"".join(bytes(window) for _, window in windows) == expected

    def teardown(self) -> None:
        for (key, layer), (k, v) in self.values.items():
            assert read(self.store, key, layer) == k + v
        for transfer, _ in self.open:
            self.store.abort(transfer)
        for held, _ in self.reads:
            self.store.close_read(held)
        for key in {key for key, _ in self.values}:
            self.store.delete(key)
        self.store.check()
        assert used(self.store) == 0


StoreMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestStoreAgainstModel = StoreMachine.TestCase
