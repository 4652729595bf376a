"""Versions of what a worker holds, what it tells its brokers of them, and what it does about older ones."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from bus import wire
from bus.errors import ErrorCode
from bus.messages import (
    Append,
    Chunk,
    Delete,
    DropSequences,
    Generate,
    Get,
    KvDone,
    Put,
    ReleaseSequence,
    WorkerHello,
    WorkerSequences,
)
from bus.stats import Holding, Holdings, pack, unpack
from bus.tensors import DType, TensorMeta
from tests.unit.workers.core_bench import CoreBench, answers, commands, messages, sends
from workers.calls import Action
from workers.engine_api import Answered, DropKV, Forgotten, Retained
from workers.holdings import HeldSequences
from workers.keys import SequenceKey

S, T = SequenceKey("t", "s"), SequenceKey("t", "other")
META = TensorMeta(DType.UINT8, (4, 1, 8))
DATA = np.arange(32, dtype=np.uint8).tobytes()


def told(held: HeldSequences, link: int = 0) -> list[tuple[str, int, bool]]:
    page = held.next_page(link)
    return [] if page is None else [(one.seq_id, one.version, one.is_held) for one in page[0].sequences]


def test_a_broker_is_told_all_when_it_joins_and_then_what_changes() -> None:
    held = HeldSequences(2)
    held.wrote(S, 5)
    assert told(held) == []
    held.joined(0)
    assert told(held) == [("s", 5, True)]
    assert told(held) == []
    held.wrote(T, 6)
    held.wrote(T, 7)
    held.dropped(S)
    held.joined(1)
    assert told(held, 0) == [("other", 7, True), ("s", 5, False)]
    assert told(held, 1) == [("s", 5, False), ("other", 7, True)]
    held.left(0)
    held.wrote(S, 9)
    assert told(held, 0) == []
    assert len(held) == 2


def test_versions_never_go_back_on_one_worker() -> None:
    """Writes may take effect in another order than they were numbered, and brokers may disagree about the time."""
    held = HeldSequences(1)
    assert [held.wrote(S, version) for version in (5, 3, 9)] == [5, 5, 9]
    held.dropped(S, 12)
    assert held.version(S) == 0
    assert held.wrote(S, 4) == 12


def test_a_copy_that_a_broker_did_not_know_of_is_older_than_what_it_wrote_elsewhere() -> None:
    """Two copies of one version; the next write is given to one of them only."""
    held = HeldSequences(1)
    assert held.wrote(S, 7, copies=2) == 7
    assert held.wrote(S, 7, copies=2) == 7
    assert held.wrote(S, 5, copies=1) == 8
    assert held.wrote(S, 5, copies=1) == 8
    held.wrote(S, 9, copies=2)
    held.dropped(S)
    assert held.wrote(S, 3) == 9


def test_marks_are_as_many_as_there_is_room_for() -> None:
    held = HeldSequences(1, max_marks=2)
    for number in range(4):
        held.wrote(SequenceKey("t", str(number)), 1)
        held.dropped(SequenceKey("t", str(number)))
    held.joined(0)
    assert told(held) == [("2", 1, False), ("3", 1, False)]


def test_what_was_never_held_leaves_no_mark() -> None:
    held = HeldSequences(1)
    held.joined(0)
    held.dropped(S)
    assert told(held) == []


# --- the worker ----------------------------------------------------------------------------------


@pytest.fixture
def bench() -> CoreBench:
    bench = CoreBench()
    bench.join()
    return bench


def put(bench: CoreBench, version: int, seq_id: str = "s", newest: int = 0, layer: int = 0) -> list[Action]:
    message = Put(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id=seq_id, layer=layer, k=META, v=META)
    return bench.assign(message, DATA, DATA, newest=newest, version=version)[1]


def get(bench: CoreBench, newest: int) -> KvDone | ErrorCode | str:
    message = Get(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id="s", layer=0)
    (said,) = answers(bench.assign(message, newest=newest)[1])
    return ErrorCode(said.message.code) if hasattr(said.message, "code") else "value"


def version_of(actions: list[Action]) -> int:
    """The version in the envelope of an answer."""
    (send,) = [send for send in sends(actions) if send.call is not None]
    return int(wire.decode_header(send.frames[0]).version)


def announced(actions: list[Action]) -> list[tuple[str, int, bool]]:
    pages = [
        unpack(send.frames[1], Holdings)
        for send in sends(actions)
        if send.call is None and isinstance(wire.decode_header(send.frames[0]), WorkerSequences)
    ]
    return [(one.seq_id, one.version, one.is_held) for page in pages for one in page.sequences]


def drop(bench: CoreBench, version: int) -> list[Action]:
    payload = pack(Holdings(sequences=(Holding("t", "s", version),)))
    return bench.control(DropSequences(payload=wire.describe([payload])), payload)


def test_a_write_is_answered_with_its_version_and_told_to_every_broker(bench: CoreBench) -> None:
    assert version_of(put(bench, 5)) == 5
    assert version_of(put(bench, 6, layer=1)) == 6
    assert announced(bench.tick()) == [("s", 6, True)]
    assert announced(bench.tick()) == []


def test_a_copy_that_is_older_than_the_broker_knows_of_is_dropped_and_a_miss(bench: CoreBench) -> None:
    put(bench, 5)
    assert get(bench, newest=5) == "value"
    assert get(bench, newest=6) is ErrorCode.NOT_FOUND
    assert get(bench, newest=5) is ErrorCode.NOT_FOUND
    assert announced(bench.tick()) == [("s", 5, False)]
    bench.store.check()


def test_a_write_begins_anew_where_an_older_copy_is(bench: CoreBench) -> None:
    """None of the layers that are not written now may be read as if they were of this version."""
    put(bench, 5, layer=1)
    put(bench, 9, newest=8)
    assert bench.store.has(S)
    assert [info.layer for info in bench.store.list("t", "", "", 9, bench.now)[0][0].layers] == [0]


def test_an_older_copy_is_dropped_when_the_broker_says_so(bench: CoreBench) -> None:
    put(bench, 5)
    drop(bench, 5)
    assert bench.store.has(S)
    drop(bench, 6)
    assert not bench.store.has(S)


def release(bench: CoreBench, version: int) -> None:
    bench.control(ReleaseSequence(tenant="t", seq_id="s", version=version))


def test_a_copy_that_others_have_too_is_let_go_of_unless_it_is_newer(bench: CoreBench) -> None:
    put(bench, 5)
    release(bench, 4)
    assert bench.store.has(S)
    release(bench, 5)
    assert not bench.store.has(S)
    assert announced(bench.tick()) == [("s", 5, False)]


def test_a_copy_that_is_just_being_written_is_not_let_go_of(bench: CoreBench) -> None:
    """By the client of another broker: what it writes is newer than what others have."""
    put(bench, 5)
    message = Append(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id="s", layer=0, k=META, v=META)
    call, _ = bench.assign(message, version=6)
    release(bench, 5)
    assert bench.store.has(S)
    chunk = Chunk(req_id=bytes(16), offset=0, payload=())
    bench.forward(call, chunk, DATA, bulk=True)
    actions = bench.forward(call, msgspec.structs.replace(chunk, offset=len(DATA)), DATA, bulk=True)
    assert version_of(actions) == 6


def test_an_order_to_drop_that_cannot_be_read_changes_nothing(bench: CoreBench) -> None:
    put(bench, 5)
    bench.control(DropSequences(payload=wire.describe([b"?"])), b"?")
    assert bench.store.has(S)
    assert bench.core.stats(bench.now, rss_bytes=0, lag_s=0.0).malformed == 1


def test_a_deletion_is_a_version_and_one_of_a_layer_leaves_the_rest(bench: CoreBench) -> None:
    put(bench, 5)
    put(bench, 6, layer=1)
    layer = Delete(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id="s", layer=1)
    assert version_of(bench.assign(layer, newest=6, version=7)[1]) == 7
    whole = Delete(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id="s")
    assert version_of(bench.assign(whole, newest=7, version=8)[1]) == 0
    assert announced(bench.tick()) == [("s", 8, False)]


def test_a_write_that_is_sent_again_counts_as_new(bench: CoreBench) -> None:
    """Else the copy of a worker that had applied it before would be older than that of one that had not."""
    message = Append(req_id=bench.req_id(), attempt=0, deadline_ms=9000, seq_id="s", layer=0, k=META, v=META, at=0)
    _, actions = bench.assign(message, DATA, DATA, version=5)
    assert version_of(actions) == 5
    _, actions = bench.assign(message, DATA, DATA, newest=5, version=6)
    assert answers(actions)[0].message.duplicate
    assert version_of(actions) == 6


def test_a_hello_says_how_many_sequences_there_are_to_tell_of(bench: CoreBench) -> None:
    put(bench, 5)
    hellos = messages(bench.pass_time(3.0, answering=False), WorkerHello)
    assert {hello.sequences for hello in hellos} == {1}


def test_what_had_to_make_room_is_told() -> None:
    bench = CoreBench(nbytes=2 * 65536)
    bench.join()
    put(bench, 5)
    put(bench, 6, "other")
    assert announced(bench.tick()) == [("s", 5, False), ("other", 6, True)]


# --- computed sequences --------------------------------------------------------------------------


def generate(bench: CoreBench, version: int) -> Generate:
    message = bench.generate(seq_id="s")
    bench.start(message, version=version)
    return message


def test_a_generation_keeps_its_sequence_under_the_version_it_began_with(bench: CoreBench) -> None:
    generate(bench, 5)
    assert announced(bench.tick()) == []
    bench.engine(Retained(S))
    assert announced(bench.tick()) == [("s", 5, True)]
    bench.engine(Forgotten(S))
    bench.engine(Retained(S))
    assert announced(bench.tick()) == [("s", 5, True)]


def test_an_older_computed_sequence_is_dropped_by_the_engine_and_can_be_stored_anew(bench: CoreBench) -> None:
    bench.engine(Retained(S))
    actions = drop(bench, 9)
    (command,) = commands(actions, DropKV)
    assert command.sequence == S
    put(bench, 10, newest=9)
    bench.engine(Answered(command.ticket, 2), Forgotten(S))
    assert bench.store.has(S)
    assert announced(bench.tick()) == [("s", 10, True)]


def test_a_sequence_that_is_being_generated_by_an_earlier_writer_is_not_read(bench: CoreBench) -> None:
    """Its generation goes on elsewhere; what is left of it here may be deleted, and no more."""
    generate(bench, 5)
    bench.engine(Retained(S))
    assert get(bench, newest=6) is ErrorCode.NOT_FOUND
    assert commands(drop(bench, 6), DropKV) == []
