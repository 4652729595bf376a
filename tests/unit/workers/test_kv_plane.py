"""The KV plane as clients see it: inline and in chunks, stored here or computed by the engine."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus import wire
from bus.errors import ErrorCode, NotFound
from bus.limits import CHUNK_BYTES, MAX_INLINE_BYTES
from bus.messages import (
    Ack,
    Append,
    Chunk,
    Credit,
    Delete,
    FlushPrefixCache,
    Get,
    KvDone,
    KvListed,
    KvValue,
    Length,
    ListSequences,
    Pin,
    Put,
    Release,
    Reply,
    Unpin,
)
from bus.stats import SequenceInfo, SequencePage, unpack
from bus.tensors import DType, TensorMeta
from tests.unit.workers.core_bench import CoreBench, Said, answers, commands, sends
from workers.bulk import GRANT_CHUNKS
from workers.calls import Action, Channel
from workers.engine_api import (
    Answered,
    DropKV,
    Ended,
    FlushKV,
    Forgotten,
    ListKV,
    MeasureKV,
    PinKV,
    ReadKV,
    ReadResult,
    Retained,
    Start,
    Ticket,
    UnpinKV,
)
from workers.keys import SequenceKey
from workers.store import PAGE_BYTES

KEY = SequenceKey("t", "s")


@pytest.fixture
def bench() -> CoreBench:
    bench = CoreBench(nbytes=64 << 20)
    bench.join()
    return bench


def meta(num_tokens: int, head_dim: int = 64) -> TensorMeta:
    return TensorMeta(dtype=DType.UINT8, shape=(num_tokens, 1, head_dim))


def data(num_bytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8).tobytes()


def put(bench: CoreBench, num_tokens: int, *, seq_id: str = "s", layer: int = 0) -> Put:
    tensor = meta(num_tokens)
    return Put(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id=seq_id, layer=layer, k=tensor, v=tensor)


def append(bench: CoreBench, num_tokens: int, at: int | None) -> Append:
    tensor = meta(num_tokens)
    return Append(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id="s", layer=0, k=tensor, v=tensor, at=at)


def get(bench: CoreBench, start: int = 0, stop: int | None = None, credit: int = 8) -> Get:
    return Get(
        req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id="s", layer=0, start=start, stop=stop, credit=credit
    )


def delete(bench: CoreBench, layer: int | None = None) -> Delete:
    return Delete(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id="s", layer=layer)


def measure(bench: CoreBench, seq_id: str = "s") -> Length:
    return Length(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id=seq_id, layer=0)


def only(said: list[Said]) -> Said:
    assert len(said) == 1, said
    return said[0]


def stored(bench: CoreBench, num_tokens: int) -> tuple[bytes, bytes]:
    """Put K and V of so many tokens, by whichever way they take."""
    k, v = data(num_tokens * 64, 1), data(num_tokens * 64, 2)
    if len(k) + len(v) <= CHUNK_BYTES:
        bench.assign(put(bench, num_tokens), k, v, bulk=len(k) + len(v) > MAX_INLINE_BYTES)
    else:
        call, _ = bench.assign(put(bench, num_tokens), bulk=True)
        upload(bench, call, k, v)
    return k, v


def upload(bench: CoreBench, call: int, k: bytes, v: bytes) -> list[Said]:
    said: list[Said] = []
    for base, part in ((0, k), (len(k), v)):
        for begin in range(0, len(part), CHUNK_BYTES):
            chunk = Chunk(req_id=bytes(16), offset=base + begin, payload=())
            said += answers(bench.forward(call, chunk, part[begin : begin + CHUNK_BYTES], bulk=True))
    return said


# --- stored, inline ---


def test_what_is_put_is_got_back_bit_for_bit_and_in_ranges(bench: CoreBench) -> None:
    k, v = data(10 * 64, 1), data(10 * 64, 2)
    _, actions = bench.assign(put(bench, 10), k, v)
    assert only(answers(actions)).message == KvDone(
        req_id=only(answers(actions)).message.req_id, length=10, count=1, durability="mem1"
    )
    _, actions = bench.assign(get(bench, 3, 5))
    said = only(answers(actions))
    assert (said.final, said.message.k, said.message.length) == (True, meta(2), 10)
    assert [bytes(part) for part in said.payload] == [k[3 * 64 : 5 * 64], v[3 * 64 : 5 * 64]]


def test_an_empty_range_is_an_answer(bench: CoreBench) -> None:
    stored(bench, 10)
    _, actions = bench.assign(get(bench, 4, 4))
    said = only(answers(actions))
    assert (said.final, said.message.k.shape, [len(part) for part in said.payload]) == (True, (0, 1, 64), [0, 0])


def test_append_goes_behind_the_end_once(bench: CoreBench) -> None:
    k, v = stored(bench, 10)
    message = append(bench, 2, at=10)
    _, actions = bench.assign(message, k[:128], v[:128])
    assert only(answers(actions)).message.length == 12
    _, actions = bench.assign(append(bench, 2, at=10), k[:128], v[:128])
    assert only(answers(actions)).message.duplicate
    _, actions = bench.assign(append(bench, 2, at=5), v[:128], k[:128])
    failed = bench.has_failed(actions)
    assert (failed.code, failed.detail) == (ErrorCode.CONFLICT, 12)


def test_length_pin_unpin_and_delete_say_what_they_did(bench: CoreBench) -> None:
    stored(bench, 10)
    _, actions = bench.assign(measure(bench))
    assert only(answers(actions)).message.length == 10
    bench.assign(Pin(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id="s", ttl_ms=500))
    assert bench.store.stats(bench.now).pinned_bytes > 0
    assert bench.store.stats(bench.now + 0.5).pinned_bytes == 0
    bench.assign(Pin(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id="s"))
    assert bench.store.stats(bench.now + 1e9).pinned_bytes > 0
    bench.assign(Unpin(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id="s"))
    assert bench.store.stats(bench.now).pinned_bytes == 0
    _, actions = bench.assign(delete(bench, layer=0))
    assert only(answers(actions)).message.count == 1
    _, actions = bench.assign(measure(bench))
    assert bench.has_failed(actions).code == ErrorCode.NOT_FOUND


@pytest.mark.parametrize("kind", [Pin, Unpin])
def test_a_pin_is_a_change_and_its_retry_counts_as_a_new_one(bench: CoreBench, kind: type[Pin | Unpin]) -> None:
    bench.assign(put(bench, 10), data(640), data(640), version=5)
    message = kind(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id="s")
    _, actions = bench.assign(message, version=6)
    assert told_version(actions) == 6
    _, actions = bench.assign(message, version=7)
    assert only(answers(actions)).message.duplicate
    assert told_version(actions) == 7


def told_version(actions: list[Action]) -> int:
    """Which version the broker is told that the sequence has now."""
    (send,) = sends(actions)
    envelope = wire.decode_header(send.frames[0])
    assert isinstance(envelope, Reply)
    return envelope.version


def test_another_tenants_sequence_is_not_there(bench: CoreBench) -> None:
    stored(bench, 10)
    _, actions = bench.assign(get(bench), tenant="other")
    assert bench.has_failed(actions).code == ErrorCode.NOT_FOUND


@pytest.mark.parametrize("payload", [(b"x" * 640,), (b"x" * 640, b"x" * 639), (b"x" * 641, b"x" * 640)])
def test_payloads_that_are_not_what_the_header_says_are_refused_and_leave_nothing(
    bench: CoreBench, payload: tuple[bytes, ...]
) -> None:
    _, actions = bench.assign(put(bench, 10), *payload)
    assert bench.has_failed(actions).code == ErrorCode.BAD_TENSOR
    stats = bench.store.stats(bench.now)
    assert (stats.sequences, stats.used_bytes) == (0, 0)


def test_what_can_never_fit_is_refused_for_want_of_space(bench: CoreBench) -> None:
    _, actions = bench.assign(put(bench, 1 << 20))
    assert bench.has_failed(actions).code == ErrorCode.NO_SPACE


# --- stored, in chunks ---


def test_a_large_put_takes_chunks_gives_credit_for_more_and_is_acknowledged(bench: CoreBench) -> None:
    num_tokens = 6 * CHUNK_BYTES // 64
    k, v = data(num_tokens * 64, 1), data(num_tokens * 64, 2)
    call, actions = bench.assign(put(bench, num_tokens), bulk=True)
    assert answers(actions) == [], "so many chunks as may be under way are on their way"
    said = upload(bench, call, k, v)
    assert [one.message.chunks for one in said[:-1]] == [GRANT_CHUNKS, GRANT_CHUNKS]
    assert (said[-1].final, said[-1].message.length) == (True, num_tokens)
    _, actions = bench.assign(get(bench, credit=100))
    received = answers(actions)
    assert (received[0].final, received[0].message.payload) == (False, ())
    chunks = received[1:]
    assert {one.channel for one in received} == {Channel.BULK}, "the announcement must not be overtaken"
    assert [one.final for one in chunks] == [False] * (len(chunks) - 1) + [True]
    assert b"".join(bytes(one.payload[0]) for one in chunks) == k + v


@pytest.mark.parametrize(
    "num_bytes", [64 * 100, MAX_INLINE_BYTES, MAX_INLINE_BYTES + 128, CHUNK_BYTES, CHUNK_BYTES + 128]
)
def test_a_value_comes_whole_if_it_fits_a_chunk_and_on_the_bulk_lane_unless_it_is_small(
    bench: CoreBench, num_bytes: int
) -> None:
    k, v = stored(bench, num_bytes // 128)
    _, actions = bench.assign(get(bench, credit=100))
    said = answers(actions)
    assert (len(said) == 1) == (num_bytes <= CHUNK_BYTES)
    assert {one.channel for one in said} == {Channel.CONTROL if num_bytes <= MAX_INLINE_BYTES else Channel.BULK}
    assert b"".join(bytes(part) for one in said for part in one.payload) == k + v


def test_a_write_that_nobody_waits_for_any_more_has_no_effect_when_it_comes(bench: CoreBench) -> None:
    """Its lane may be behind the other one, by which we hear that."""
    k, v = stored(bench, 10)
    call, _ = bench.assign(measure(bench))
    bench.control(Release(call=call + 1))
    assert bench.assign(put(bench, CHUNK_BYTES // 64), bulk=True) == (call + 1, [])
    assert bench.store.stats(bench.now).used_bytes == 2 * PAGE_BYTES
    bench.control(Release(call=call + 2))
    bench.join(session=b"T" * 16)
    _, actions = bench.assign(put(bench, 10), v, k, bulk=True)
    assert only(answers(actions)).final, "calls of another session have nothing to do with it"


def test_what_an_earlier_session_left_on_the_bulk_lane_has_no_effect(bench: CoreBench) -> None:
    k, v = stored(bench, 10)
    call, _ = bench.assign(measure(bench))
    bench.join(session=b"T" * 16, first_call=call + 3)
    assert bench.assign(put(bench, 10), v, k, bulk=True) == (call + 1, [])
    _, actions = bench.assign(get(bench))
    assert [bytes(part) for part in only(answers(actions)).payload] == [k, v]
    _, actions = bench.assign(put(bench, 10), v, k, bulk=True)
    assert only(answers(actions)).final


def test_a_partial_put_is_invisible_and_the_old_value_stays_readable(bench: CoreBench) -> None:
    k, v = stored(bench, 10)
    call, _ = bench.assign(put(bench, CHUNK_BYTES // 64))
    bench.forward(call, Chunk(req_id=bytes(16), offset=0, payload=()), data(1000), bulk=True)
    _, actions = bench.assign(get(bench))
    assert [bytes(part) for part in only(answers(actions)).payload] == [k, v]


@pytest.mark.parametrize("how", ["release", "deadline", "session", "chunk"])
def test_an_upload_that_is_given_up_frees_its_room(bench: CoreBench, how: str) -> None:
    call, _ = bench.assign(put(bench, CHUNK_BYTES // 64), deadline_ms=500)
    bench.forward(call, Chunk(req_id=bytes(16), offset=0, payload=()), data(1000), bulk=True)
    assert bench.store.stats(bench.now).used_bytes > 0
    match how:
        case "release":
            bench.control(Release(call=call))
        case "deadline":
            bench.pass_time(0.625)
        case "session":
            bench.join(session=b"T" * 16)
        case _:
            actions = bench.forward(call, Chunk(req_id=bytes(16), offset=500, payload=()), data(1000), bulk=True)
            assert bench.has_failed(actions).code == ErrorCode.BAD_TENSOR
    assert bench.store.stats(bench.now).used_bytes == 0
    bench.store.check()


def test_a_chunk_over_the_border_of_k_and_v_is_refused(bench: CoreBench) -> None:
    call, _ = bench.assign(put(bench, CHUNK_BYTES // 64))
    chunk = Chunk(req_id=bytes(16), offset=CHUNK_BYTES - 10, payload=())
    assert bench.has_failed(bench.forward(call, chunk, data(20), bulk=True)).code == ErrorCode.BAD_TENSOR


def test_without_a_lease_an_upload_ends_before_it_is_acknowledged(bench: CoreBench) -> None:
    call, _ = bench.assign(put(bench, CHUNK_BYTES // 64), deadline_ms=60_000)
    bench.now += 0.6
    chunk = Chunk(req_id=bytes(16), offset=0, payload=())
    assert bench.has_failed(bench.forward(call, chunk, data(10), bulk=True)).code == ErrorCode.WORKER_LOST
    assert bench.store.stats(bench.now).used_bytes == 0


def test_a_download_sends_only_what_the_client_gave_credit_for(bench: CoreBench) -> None:
    k, v = stored(bench, 4 * CHUNK_BYTES // 64)
    call, actions = bench.assign(get(bench, credit=2))
    said = answers(actions)
    assert [type(one.message) for one in said] == [KvValue, Chunk, Chunk]
    while not said[-1].final:
        said += answers(bench.forward(call, Credit(req_id=bytes(16), chunks=1)))
    chunks = [one for one in said if isinstance(one.message, Chunk)]
    assert all(len(one.payload[0]) <= CHUNK_BYTES for one in chunks)
    assert b"".join(bytes(one.payload[0]) for one in chunks) == k + v


def test_a_download_whose_last_chunk_finds_the_lane_full_is_answered_all_the_same(bench: CoreBench) -> None:
    """All of it is on credit, so its call ends here before anything is sent: who else would tell the broker?"""
    stored(bench, CHUNK_BYTES // 64)
    call, actions = bench.assign(get(bench))
    assert [said.final for said in answers(actions)] == [False, False, True]
    refused = [answer for send in sends(actions) for answer in bench.core.on_unsent(send, bench.now)]
    failed = bench.has_failed(refused)
    assert (failed.code, failed.req_id) == (ErrorCode.OVERLOADED, answers(actions)[0].message.req_id)
    assert [send.call.number for send in sends(refused) if send.call is not None] == [call]


def test_without_credit_a_value_that_is_not_small_is_only_announced(bench: CoreBench) -> None:
    """On the lane of requests: no chunk can overtake it, as none is sent before the client asks for some."""
    k, v = stored(bench, CHUNK_BYTES // 128)  # K and V fit one message together
    call, actions = bench.assign(get(bench, credit=0))
    said = only(answers(actions))
    assert (said.final, said.channel, said.payload) == (False, Channel.CONTROL, [])
    chunks = answers(bench.forward(call, Credit(req_id=bytes(16), chunks=8)))
    assert [(one.channel, one.final) for one in chunks] == [(Channel.BULK, False), (Channel.BULK, True)]
    assert b"".join(bytes(one.payload[0]) for one in chunks) == k + v
    bench.assign(put(bench, 1), data(64), data(64))
    _, actions = bench.assign(get(bench, credit=0))
    assert only(answers(actions)).final, "what is small comes at once"


def told_by(actions: list[Action], calls: list[int]) -> list[str]:
    """Who says what, in order: "0v" is the announcement of the first of these calls, "0c" a chunk, "0C" its last."""
    words = [(one, "v" if isinstance(one.message, KvValue) else "c") for one in answers(actions)]
    return [f"{calls.index(one.call)}{kind.upper() if one.final else kind}" for one, kind in words]


def test_reads_that_find_no_room_on_their_lane_wait_and_take_turns(bench: CoreBench) -> None:
    k, v = stored(bench, 5 * CHUNK_BYTES // 64)
    bench.bulk_room[0] = 5
    begun = [bench.assign(get(bench, credit=100))]
    bench.bulk_room[0] = 0
    begun += [bench.assign(get(bench, credit=credit)) for credit in (100, 2)]
    calls = [call for call, _ in begun]
    assert [told_by(actions, calls) for _, actions in begun] == [["0v", *["0c"] * 4], [], []]
    assert answers(bench.tick()) == []

    bench.bulk_room[0] = 18
    actions = bench.tick()
    # What is left of the first, a turn of the second, the third as far as its credit goes, and the second again.
    assert told_by(actions, calls) == [*["0c"] * 5, "0C", "1v", *["1c"] * 7, "2v", *["2c"] * 2, "1c"]
    rest = bench.tick()
    assert told_by(rest, calls) == ["1c", "1C"]
    assert told_by(bench.tick(), calls) == [], "the third waits for credit"
    rest += bench.forward(calls[2], Credit(req_id=bytes(16), chunks=100))
    said = answers([*begun[0][1], *actions, *rest])
    for call in calls:
        chunks = [one for one in said if one.call == call and isinstance(one.message, Chunk)]
        assert b"".join(bytes(one.payload[0]) for one in chunks) == k + v


def test_credit_while_a_read_waits_for_room_brings_it_no_second_turn(bench: CoreBench) -> None:
    stored(bench, 5 * CHUNK_BYTES // 64)
    bench.bulk_room[0] = 0
    calls = [bench.assign(get(bench, credit=1))[0] for _ in range(2)]
    assert bench.forward(calls[0], Credit(req_id=bytes(16), chunks=1)) == []
    bench.bulk_room[0] = 64
    assert told_by(bench.tick(), calls) == ["0v", "0c", "0c", "1v", "1c"]


def test_a_value_that_would_fit_one_message_waits_for_room_behind_the_others(bench: CoreBench) -> None:
    k, v = stored(bench, CHUNK_BYTES // 128)
    bench.bulk_room[0] = 0
    calls = [bench.assign(get(bench))[0]]
    bench.bulk_room[0] = 1
    later, actions = bench.assign(get(bench))
    calls.append(later)
    assert told_by(actions, calls) == ["0v"]
    bench.bulk_room[0] = 6
    said = answers(bench.tick())
    assert b"".join(bytes(one.payload[0]) for one in said if one.call == later and one.payload) == k + v
    _, actions = bench.assign(get(bench))
    assert [bytes(part) for part in only(answers(actions)).payload] == [k, v], "nobody waits any more"


def test_a_full_lane_holds_up_no_reads_through_another_broker() -> None:
    bench = CoreBench(num_links=2, nbytes=64 << 20)
    for link in (0, 1):
        bench.join(link)
    stored(bench, CHUNK_BYTES // 64)
    bench.bulk_room = {0: 0}
    waiting, actions = bench.assign(get(bench))
    assert answers(actions) == []
    assert answers(bench.assign(get(bench), link=1)[1])[-1].final
    bench.bulk_room = {}
    assert answers(bench.tick())[-1].call == waiting


def test_a_read_that_waits_for_room_may_be_given_up_and_ends_in_time(bench: CoreBench) -> None:
    stored(bench, CHUNK_BYTES // 64)
    bench.bulk_room[0] = 0
    given_up, _ = bench.assign(get(bench))
    bench.control(Release(call=given_up))
    bench.assign(get(bench), deadline_ms=9000)
    assert bench.has_failed(bench.pass_time(9.5)).code == ErrorCode.DEADLINE
    bench.bulk_room[0] = 64
    assert answers(bench.pass_time(0.5)) == []
    bench.assign(delete(bench))
    assert bench.store.stats(bench.now).used_bytes == 0, "nobody holds what was read"


def test_a_download_reads_what_was_there_when_it_began(bench: CoreBench) -> None:
    k, v = stored(bench, 4 * CHUNK_BYTES // 64)
    call, actions = bench.assign(get(bench, credit=1))
    said = answers(actions)
    bench.assign(delete(bench))
    bench.assign(put(bench, 10), data(640, 3), data(640, 4))
    said += answers(bench.forward(call, Credit(req_id=bytes(16), chunks=100)))
    assert b"".join(bytes(one.payload[0]) for one in said[1:]) == k + v
    assert bench.store.stats(bench.now).used_bytes < CHUNK_BYTES


def test_chunks_still_to_be_sent_are_not_changed_by_what_is_stored_after_them() -> None:
    num_bytes = 2 * CHUNK_BYTES
    bench = CoreBench(nbytes=2 * num_bytes)  # no room for two, so the second value takes the pages of the first
    bench.join()
    k, v = stored(bench, num_bytes // 64)
    _, actions = bench.assign(get(bench, credit=100))
    bench.assign(delete(bench))
    call, _ = bench.assign(put(bench, num_bytes // 64))
    upload(bench, call, data(num_bytes, 3), data(num_bytes, 4))
    chunks = [one.payload[0] for one in answers(actions) if isinstance(one.message, Chunk)]
    assert b"".join(bytes(chunk) for chunk in chunks) == k + v


def test_a_download_that_is_given_up_holds_nothing(bench: CoreBench) -> None:
    stored(bench, 4 * CHUNK_BYTES // 64)
    call, _ = bench.assign(get(bench, credit=1))
    bench.assign(delete(bench))
    assert bench.store.stats(bench.now).used_bytes > 0
    bench.control(Release(call=call))
    assert bench.store.stats(bench.now).used_bytes == 0


def test_an_empty_put_needs_no_chunks(bench: CoreBench) -> None:
    _, actions = bench.assign(put(bench, 0))
    said = only(answers(actions))
    assert (said.final, said.message.length) == (True, 0)


def test_an_acknowledgement_means_nothing_to_a_transfer(bench: CoreBench) -> None:
    call, _ = bench.assign(put(bench, CHUNK_BYTES // 64))
    assert bench.forward(call, Ack(req_id=bytes(16), epoch=0, upto=1)) == []
    assert len(upload(bench, call, data(CHUNK_BYTES), data(CHUNK_BYTES))) == 1


def test_chunks_and_credit_have_no_place_in_the_other_direction(bench: CoreBench) -> None:
    stored(bench, 4 * CHUNK_BYTES // 64)
    call, _ = bench.assign(get(bench, credit=1))
    chunk = Chunk(req_id=bytes(16), offset=0, payload=())
    assert bench.has_failed(bench.forward(call, chunk, b"x", bulk=True)).code == ErrorCode.BAD_ARG
    call, _ = bench.assign(put(bench, CHUNK_BYTES // 64, seq_id="other"))
    assert bench.has_failed(bench.forward(call, Credit(req_id=bytes(16), chunks=1))).code == ErrorCode.BAD_ARG


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40_000), st.randoms(use_true_random=False))
def test_chunks_may_come_in_any_order_and_sizes(num_tokens: int, random: Random) -> None:
    bench = CoreBench(nbytes=16 << 20)
    bench.join()
    k, v = data(num_tokens * 64, 1), data(num_tokens * 64, 2)
    call, _ = bench.assign(put(bench, num_tokens))
    pieces = []
    for base, part in ((0, k), (len(k), v)):
        at = 0
        while at < len(part):
            size = random.randint(len(part) // 9 + 1, len(part))
            pieces.append((base + at, part[at : at + size]))
            at += size
    random.shuffle(pieces)
    said: list[Said] = []
    for offset, piece in pieces:
        said += answers(bench.forward(call, Chunk(req_id=bytes(16), offset=offset, payload=()), piece, bulk=True))
    assert (said[-1].final, said[-1].message.length) == (True, num_tokens)
    _, actions = bench.assign(get(bench, credit=1000))
    got = answers(actions)
    parts = got[0].payload if got[0].final else [one.payload[0] for one in got[1:]]
    assert b"".join(bytes(part) for part in parts) == k + v


# --- computed by the engine ---


def test_reading_a_computed_sequence_goes_to_the_engine_and_comes_back_as_an_answer(bench: CoreBench) -> None:
    bench.engine(Retained(KEY))
    call, actions = bench.assign(get(bench, 2, 4))
    (question,) = commands(actions, ReadKV)
    assert (question.sequence, question.layer, question.start, question.stop) == (KEY, 0, 2, 4)
    k, v = data(128, 1), data(128, 2)
    result = ReadResult(meta(2), meta(2), memoryview(k), memoryview(v), 15)
    said = only(answers(bench.engine(Answered(question.ticket, result))))
    assert (said.call, said.final, said.message.length) == (call, True, 15)
    assert [bytes(part) for part in said.payload] == [k, v]


def test_a_large_computed_read_goes_in_chunks(bench: CoreBench) -> None:
    bench.engine(Retained(KEY))
    _, actions = bench.assign(get(bench, credit=100))
    (question,) = commands(actions, ReadKV)
    num_tokens = (CHUNK_BYTES + 640) // 64
    k, v = data(num_tokens * 64, 1), data(num_tokens * 64, 2)
    result = ReadResult(meta(num_tokens), meta(num_tokens), memoryview(k), memoryview(v), num_tokens)
    said = answers(bench.engine(Answered(question.ticket, result)))
    assert [len(one.payload[0]) for one in said[1:]] == [CHUNK_BYTES, 640, CHUNK_BYTES, 640]
    assert b"".join(bytes(one.payload[0]) for one in said[1:]) == k + v


def test_length_pin_unpin_and_delete_of_a_computed_sequence_are_the_engines(bench: CoreBench) -> None:
    bench.engine(Retained(KEY))
    _, actions = bench.assign(measure(bench))
    (length,) = commands(actions, MeasureKV)
    assert only(answers(bench.engine(Answered(length.ticket, 15)))).message.length == 15
    _, actions = bench.assign(Pin(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id="s", ttl_ms=2000))
    (pin,) = commands(actions, PinKV)
    assert pin.expires_at == bench.now + 2.0
    assert only(answers(bench.engine(Answered(pin.ticket, 1)))).message.count == 1
    _, actions = bench.assign(Pin(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id="s"))
    assert commands(actions, PinKV)[0].expires_at == math.inf
    _, actions = bench.assign(Unpin(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id="s"))
    assert commands(actions, UnpinKV)[0].sequence == KEY
    message = delete(bench)
    _, actions = bench.assign(message)
    (drop,) = commands(actions, DropKV)
    bench.engine(Forgotten(KEY))
    assert only(answers(bench.engine(Answered(drop.ticket, 30)))).message.count == 30
    _, actions = bench.assign(message)  # the answer was lost: the retry is not asked of the engine
    assert only(answers(actions)).message.duplicate
    _, actions = bench.assign(measure(bench))
    assert bench.has_failed(actions).code == ErrorCode.NOT_FOUND


def test_one_layer_of_a_computed_sequence_cannot_be_deleted(bench: CoreBench) -> None:
    bench.engine(Retained(KEY))
    _, actions = bench.assign(delete(bench, layer=3))
    assert bench.has_failed(actions).code == ErrorCode.BAD_ARG


def test_writing_to_a_computed_sequence_is_a_conflict_until_it_is_forgotten(bench: CoreBench) -> None:
    bench.engine(Retained(KEY))
    for message in (put(bench, 1), append(bench, 1, None)):
        _, actions = bench.assign(message, data(64), data(64))
        failed = bench.has_failed(actions)
        assert failed.code == ErrorCode.CONFLICT
        assert "delete it first or use another seq_id" in failed.message
    bench.engine(Forgotten(KEY))
    _, actions = bench.assign(put(bench, 1), data(64), data(64))
    assert isinstance(only(answers(actions)).message, KvDone)


def test_a_name_is_computed_from_the_moment_its_generation_begins(bench: CoreBench) -> None:
    _, start = bench.start(bench.generate(seq_id="s"))
    _, actions = bench.assign(put(bench, 1), data(64), data(64))
    assert bench.has_failed(actions).code == ErrorCode.CONFLICT
    bench.engine(_ended(start))
    _, actions = bench.assign(put(bench, 1), data(64), data(64))
    assert isinstance(only(answers(actions)).message, KvDone)


@pytest.mark.parametrize("is_committed", [True, False])
def test_what_is_put_under_a_name_whose_generation_was_given_up_is_what_is_read(
    bench: CoreBench, is_committed: bool
) -> None:
    """The engine hears of the end after its step, and says only then that it has kept what it computed."""
    call, _ = bench.start(bench.generate(seq_id="s"))
    bench.control(Release(call=call))
    upload_call: int | None = None
    if is_committed:
        stored(bench, 10)
    upload_call = None if is_committed else bench.assign(put(bench, CHUNK_BYTES // 64))[0]
    dropped = commands(bench.engine(Retained(KEY)), DropKV)
    assert [command.sequence for command in dropped] == [KEY]
    if upload_call is not None:
        upload(bench, upload_call, data(CHUNK_BYTES, 1), data(CHUNK_BYTES, 2))
    assert bench.engine(Answered(dropped[0].ticket, 1), Forgotten(KEY)) == []
    _, actions = bench.assign(get(bench, 0, 1))
    assert commands(actions, ReadKV) == []
    assert bytes(only(answers(actions)).payload[0]) == data(64, 1)


def _ended(start: Start) -> Ended:
    return Ended(
        run=start.run,
        finish_reason="stop",  # type: ignore[arg-type]  # a FinishReason is its text
        prompt_tokens=1,
        cached_tokens=0,
        queue_ms=0.0,
        prefill_ms=0.0,
        decode_ms=0.0,
    )


@pytest.mark.parametrize("is_committed", [True, False])
def test_generating_on_a_stored_sequence_is_a_conflict_even_while_it_is_uploaded(
    bench: CoreBench, is_committed: bool
) -> None:
    if is_committed:
        stored(bench, 10)
    else:
        bench.assign(put(bench, CHUNK_BYTES // 64))
    _, actions = bench.assign(bench.generate(seq_id="s"), b"\x01\0\0\0")
    failed = bench.has_failed(actions)
    assert failed.code == ErrorCode.CONFLICT
    assert "another seq_id" in failed.message
    assert commands(actions, Start) == []


def test_what_the_engine_refuses_is_the_answer(bench: CoreBench) -> None:
    bench.engine(Retained(KEY))
    call, actions = bench.assign(get(bench))
    (question,) = commands(actions, ReadKV)
    said = only(answers(bench.engine(Answered(question.ticket, NotFound("gone")))))
    assert (said.call, said.message.code) == (call, ErrorCode.NOT_FOUND)


def test_an_answer_nobody_waits_for_any_more_is_dropped(bench: CoreBench) -> None:
    bench.engine(Retained(KEY))
    call, actions = bench.assign(get(bench))
    (question,) = commands(actions, ReadKV)
    bench.control(Release(call=call))
    assert bench.engine(Answered(question.ticket, 1), Answered(Ticket(999), 1)) == []


@pytest.mark.parametrize("salt", [None, "", "mine"])
def test_a_flush_is_of_the_senders_tenant_and_answered_with_the_number_of_blocks(
    bench: CoreBench, salt: str | None
) -> None:
    message = FlushPrefixCache(req_id=bench.req_id(), attempt=0, deadline_ms=9000, worker_id="w", cache_salt=salt)
    _, actions = bench.assign(message, tenant="me")
    (question,) = commands(actions, FlushKV)
    assert (question.tenant, question.cache_salt) == ("me", salt)
    said = only(answers(bench.engine(Answered(question.ticket, 12))))
    assert (said.final, said.message.count) == (True, 12)


def test_a_list_joins_stored_and_computed_sequences_in_the_order_of_their_ids(bench: CoreBench) -> None:
    for seq_id in ("a", "c", "e"):
        bench.assign(put(bench, 1, seq_id=seq_id), data(64), data(64))
    message = ListSequences(req_id=bench.req_id(), attempt=0, deadline_ms=9000, worker_id="w", limit=3)
    _, actions = bench.assign(message)
    (question,) = commands(actions, ListKV)
    assert (question.tenant, question.limit) == ("t", 4)
    computed = tuple(
        SequenceInfo(seq_id=name, kind="computed", nbytes=1, pinned=False, layers=()) for name in ("b", "d")
    )
    said = only(answers(bench.engine(Answered(question.ticket, computed))))
    assert isinstance(said.message, KvListed)
    page = unpack(bytes(said.payload[0]), SequencePage)
    assert ([info.seq_id for info in page.sequences], page.more) == (["a", "b", "c"], True)
    assert {info.seq_id: info.kind for info in page.sequences}["b"] == "computed"

    rest = ListSequences(req_id=bench.req_id(), attempt=0, deadline_ms=9000, worker_id="w", after="c", limit=3)
    _, actions = bench.assign(rest)
    (question,) = commands(actions, ListKV)
    assert question.after == "c"
    said = only(answers(bench.engine(Answered(question.ticket, computed[1:]))))
    page = unpack(bytes(said.payload[0]), SequencePage)
    assert ([info.seq_id for info in page.sequences], page.more) == (["d", "e"], False)
