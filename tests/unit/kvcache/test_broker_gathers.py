"""Requests that several workers serve, deletions and replicated writes: each is asked, the client gets one answer."""

from __future__ import annotations

import msgspec
import pytest

from bus import messages as m
from bus import wire
from bus.errors import Conflict, ErrorCode, NoSpace, NotFound, WorkerLost
from bus.stats import Holding, Holdings, pack
from bus.tensors import DType, TensorMeta
from kvcache.broker.answers import DeleteAnswers
from kvcache.broker.sends import Port
from tests.unit.kvcache.broker_driver import USER, Driver, Heard, beat, frames_of, length, read, rid

LINKS = (b"a", b"b", b"c")


@pytest.fixture
def driver() -> Driver:
    driver = Driver()
    for link in LINKS:
        driver.join_worker(link, link.decode())
    driver.join_client()
    return driver


def delete(number: int = 1, seq_id: str = "s", deadline_ms: int = 5000) -> m.Delete:
    return m.Delete(req_id=rid(number), attempt=0, deadline_ms=deadline_ms, seq_id=seq_id)


def asked(driver: Driver, message: m.Message | None = None) -> dict[bytes, int]:
    """The workers that a delete goes to, and the number it has with each."""
    return {heard.link: heard.message.call for heard in driver.client(b"c1", message or delete())}


def gone(count: int, *, duplicate: bool = False) -> m.KvDone:
    return m.KvDone(req_id=rid(1), count=count, duplicate=duplicate)


NOT_THERE = wire.failed(rid(1), NotFound("not here"))
BEING_WRITTEN = wire.failed(rid(1), Conflict("being generated"))


def the_end(heard: list[Heard]) -> m.KvDone | ErrorCode:
    """The one answer that the client hears."""
    (one,) = [each for each in heard if each.port is Port.CLIENT]
    assert one.message.req_id == rid(1)
    return one.message if isinstance(one.message, m.KvDone) else ErrorCode(one.message.code)


def test_a_delete_goes_to_every_ready_worker_and_its_owner_comes_first(driver: Driver) -> None:
    driver.worker(b"b", beat(state=m.WorkerState.DRAINING))
    heard = driver.client(b"c1", delete())
    assert {each.link for each in heard} == {b"a", b"c"}
    (route,) = driver.client(b"c1", m.Route(req_id=rid(2), seq_id="s"))
    assert heard[0].link.decode() == route.message.worker_id
    assert all(each.inner == (wire.encode(delete()),) for each in heard)


def test_a_delete_is_answered_once_with_the_layers_there_were(driver: Driver) -> None:
    calls = asked(driver)
    assert driver.reply(b"a", calls[b"a"], gone(2)) == []
    assert driver.reply(b"b", calls[b"b"], NOT_THERE) == []
    assert the_end(driver.reply(b"c", calls[b"c"], gone(1))) == gone(2)
    assert driver.core.inflight == 0
    assert driver.reply(b"c", calls[b"c"], gone(1)) == []


def test_a_delete_of_what_nobody_has_finds_nothing(driver: Driver) -> None:
    calls = asked(driver)
    heard = [each for link in LINKS for each in driver.reply(link, calls[link], NOT_THERE)]
    assert the_end(heard) is ErrorCode.NOT_FOUND


def test_a_delete_that_one_worker_refuses_is_refused_when_all_have_answered(driver: Driver) -> None:
    calls = asked(driver)
    assert driver.reply(b"a", calls[b"a"], BEING_WRITTEN) == []
    assert driver.reply(b"b", calls[b"b"], NOT_THERE) == []
    assert the_end(driver.reply(b"c", calls[b"c"], gone(1))) is ErrorCode.CONFLICT


def test_a_worker_that_is_lost_meanwhile_fails_no_delete(driver: Driver) -> None:
    calls = asked(driver)
    driver.reply(b"a", calls[b"a"], gone(1))
    driver.reply(b"b", calls[b"b"], NOT_THERE)
    assert the_end(driver.worker(b"c", m.Goodbye(reason=""))) == gone(1)
    assert driver.core.inflight == 0


def test_a_delete_whose_every_worker_is_lost_may_be_tried_again(driver: Driver) -> None:
    asked(driver)
    heard = [each for link in LINKS for each in driver.worker(link, m.Goodbye(reason=""))]
    assert the_end(heard) is ErrorCode.WORKER_LOST


def test_a_delete_that_takes_too_long_fails_once_and_every_worker_stops(driver: Driver) -> None:
    calls = asked(driver, delete(deadline_ms=400))
    driver.reply(b"a", calls[b"a"], gone(1))
    heard = driver.tick(1.0)
    assert the_end(heard) is ErrorCode.DEADLINE
    assert {each.link for each in heard if isinstance(each.message, m.Release)} == {b"b", b"c"}
    assert driver.core.inflight == 0


def test_a_delete_for_which_a_worker_has_no_room_fails_once() -> None:
    driver = Driver(max_inflight=1)
    driver.join_worker(b"a", "a")
    driver.join_worker(b"b", "b")
    driver.join_client()
    sends = driver.core.on_client(b"c1", frames_of(delete()), driver.now, USER)
    (refused,) = driver.client(b"c1", delete(2, "other"))
    assert ErrorCode(refused.message.code) is ErrorCode.OVERLOADED
    heard = read(driver.core.on_unsent(sends[1], is_gone=False))
    assert the_end(heard) is ErrorCode.OVERLOADED
    assert {each.link for each in heard if isinstance(each.message, m.Release)} == {b"a", b"b"}
    assert driver.core.on_unsent(sends[0], is_gone=False) == []
    driver.core.check()
    assert driver.core.inflight == 0


def test_an_answer_that_cannot_be_read_fails_the_delete(driver: Driver) -> None:
    calls = asked(driver)
    heard = driver.worker(b"a", m.Reply(call=calls[b"a"], final=True), b"nonsense")
    for link in (b"b", b"c"):
        heard += driver.reply(link, calls[link], gone(1))
    assert the_end(heard) is ErrorCode.INTERNAL


def test_a_delete_is_cancelled_with_every_worker(driver: Driver) -> None:
    asked(driver)
    cancels = driver.client(b"c1", m.Cancel(req_id=rid(1)))
    assert {each.link for each in cancels} == set(LINKS)


def test_what_a_client_that_leaves_had_deleted_nobody_hears(driver: Driver) -> None:
    calls = asked(driver)
    assert {each.link for each in driver.client(b"c1", m.Goodbye(reason=""))} == set(LINKS)
    assert driver.reply(b"a", calls[b"a"], gone(1)) == []
    driver.core.check()
    assert driver.core.inflight == 0


def test_a_delete_must_name_its_sequence_and_needs_a_worker(driver: Driver) -> None:
    assert the_end(driver.client(b"c1", delete(seq_id=""))) is ErrorCode.BAD_ARG
    for link in LINKS:
        driver.worker(link, m.Goodbye(reason=""))
    assert the_end(driver.client(b"c1", delete())) is ErrorCode.NO_WORKERS


def test_an_answer_counts_as_repeated_only_if_all_were() -> None:
    answers = DeleteAnswers(rid(1))
    answers.add(gone(1, duplicate=True))
    assert answers.total() == gone(1, duplicate=True)
    answers.add(gone(1))
    assert answers.total() == gone(1)


def test_an_answer_of_another_kind_is_a_refusal() -> None:
    answers = DeleteAnswers(rid(1))
    answers.add(m.Credit(req_id=rid(1), chunks=1))
    answers.add(gone(1))
    total = answers.total()
    assert isinstance(total, m.Failed)
    assert ErrorCode(total.code) is ErrorCode.INTERNAL


def test_no_answer_at_all_is_a_loss() -> None:
    total = DeleteAnswers(rid(1)).total()
    assert total == wire.failed(rid(1), WorkerLost("every worker that was asked was lost"))


# --- replicated writes ---------------------------------------------------------------------------

NO_TOKENS = TensorMeta(DType.UINT8, (0, 1, 8))
META = TensorMeta(DType.UINT8, (1, 1, 8))


def put(
    number: int = 1,
    seq_id: str = "s",
    rf: int = 2,
    layer: int = 0,
    deadline_ms: int = 5000,
    meta: TensorMeta = NO_TOKENS,
) -> m.Put:
    """Its bytes, if there are any, follow in chunks."""
    return m.Put(
        req_id=rid(number), attempt=0, deadline_ms=deadline_ms, seq_id=seq_id, layer=layer, k=meta, v=meta, rf=rf
    )


def attach(driver: Driver) -> None:
    """Everybody has a bulk lane, and the client is `c2`."""
    session = driver.join_client(b"c2", b"x" * 16).session
    driver.client_bulk(b"bulk", m.AttachBulk(session=session))
    for link, welcome in {link: driver.join_worker(link, link.decode(), 2).session for link in LINKS}.items():
        driver.worker_bulk(b"bulk-" + link, m.AttachBulk(session=welcome))


def start_upload(driver: Driver) -> list[Heard]:
    """What both workers hear of a put that is announced on the bulk lane."""
    assigned = driver.client_bulk(b"bulk", put(meta=META))
    assert [(each.port, len(each.inner)) for each in assigned] == [(Port.WORKER_BULK, 1)] * 2
    return assigned


def written(number: int = 1, length: int = 1, *, duplicate: bool = False) -> m.KvDone:
    return m.KvDone(req_id=rid(number), length=length, count=1, duplicate=duplicate)


def answer(driver: Driver, assigned: Heard, done: m.Message, version: int | None = None) -> list[Heard]:
    """A worker's answer to what it was assigned; a write's with its version."""
    envelope = m.Reply(
        call=assigned.message.call,
        final=not isinstance(done, m.Credit),
        version=assigned.message.version if version is None else version,
    )
    return driver.worker(assigned.link, envelope, wire.encode(done))


def write(driver: Driver, seq_id: str = "s", rf: int = 2) -> set[bytes]:
    """A put that is done; the workers that have it."""
    assigned = driver.client(b"c1", put(9, seq_id, rf))
    assert {each.message.copies for each in assigned} == {rf}
    heard = [each for one in assigned for each in answer(driver, one, written(9))]
    assert [each.message.durability for each in heard] == [f"mem{rf}"]
    return {one.link for one in assigned}


def orders_to_drop(heard: list[Heard]) -> set[bytes]:
    return {each.link for each in heard if isinstance(each.message, m.DropSequences)}


def test_a_replicated_write_goes_to_the_owner_and_the_next_and_is_answered_after_both(driver: Driver) -> None:
    assigned = driver.client(b"c1", put())
    (route,) = driver.client(b"c1", m.Route(req_id=rid(2), seq_id="s"))
    assert len(assigned) == 2
    assert assigned[0].link.decode() == route.message.worker_id
    assert len({each.message.version for each in assigned}) == 1
    assert answer(driver, assigned[0], written()) == []
    (heard,) = answer(driver, assigned[1], written())
    assert heard.message == m.KvDone(req_id=rid(1), length=1, count=1, durability="mem2")


def test_later_writes_go_to_all_who_have_the_sequence_whatever_they_ask_for(driver: Driver) -> None:
    holders = write(driver)
    assert {each.link for each in driver.client(b"c1", put(2, rf=1, layer=1))} == holders
    pin = m.Pin(req_id=rid(3), attempt=0, deadline_ms=5000, seq_id="s")
    assert {each.link for each in driver.client(b"c1", pin)} == holders


def test_a_write_while_the_first_is_in_flight_goes_where_that_went(driver: Driver) -> None:
    """Nobody is known to have the sequence yet."""
    first = driver.client(b"c1", put())
    second = driver.client(b"c1", put(2, rf=1, layer=1))
    assert [each.link for each in second] == [each.link for each in first]
    other = driver.client(b"c1", put(3, "other", rf=1))
    assert len(other) == 1
    assert ErrorCode(driver.client(b"c1", put(4, "other", layer=1))[0].message.code) is ErrorCode.CONFLICT


def test_a_write_does_not_follow_an_earlier_one_to_a_worker_that_is_gone(driver: Driver) -> None:
    """A deletion that other workers have not answered yet keeps the sequence in flux after the write has ended."""
    asked(driver)
    (first,) = driver.client(b"c1", put(2, rf=1))
    driver.worker(first.link, m.Goodbye(reason=""))
    (second,) = driver.client(b"c1", put(3, rf=1))
    assert isinstance(second.message, m.Assign)
    assert second.link != first.link
    driver.core.check()


def test_reads_take_turns_between_those_who_have_the_sequence(driver: Driver) -> None:
    holders = write(driver)
    readers = [driver.client(b"c1", length(number))[0].link for number in range(20, 26)]
    assert [readers.count(holder) for holder in sorted(holders)] == [3, 3]
    driver.now += 0.9  # one of them is silent, and does not yet count as lost
    silent, other = sorted(holders)
    for link in LINKS:
        if link != silent:
            driver.worker(link, beat())
    assert {driver.client(b"c1", length(number))[0].link for number in range(30, 34)} == {other}


def test_a_replicated_write_without_enough_workers_is_refused(driver: Driver) -> None:
    for link in (b"a", b"b"):
        driver.worker(link, m.Goodbye(reason=""))
    assert the_end(driver.client(b"c1", put())) is ErrorCode.NO_WORKERS


def test_a_sequence_of_one_copy_cannot_be_made_two_by_writing_to_it(driver: Driver) -> None:
    write(driver, rf=1)
    assert the_end(driver.client(b"c1", put())) is ErrorCode.CONFLICT
    write(driver, "other")
    (reader,) = driver.client(b"c1", length(3, "other"))
    driver.worker(reader.link, m.Goodbye(reason=""))
    assert the_end(driver.client(b"c1", put(1, "other"))) is ErrorCode.NO_WORKERS, "another copy may be made"
    driver.tick()  # it cannot: these workers do not listen for each other
    assert the_end(driver.client(b"c1", put(1, "other"))) is ErrorCode.CONFLICT
    assert len(driver.client(b"c1", put(4, "other", rf=1))) == 1


def test_a_replicated_write_that_one_refuses_fails_at_once_and_the_other_stops(driver: Driver) -> None:
    first, second = driver.client(b"c1", put())
    heard = answer(driver, first, wire.failed(rid(1), NoSpace("full")))
    assert the_end(heard) is ErrorCode.NO_SPACE
    assert [each.link for each in heard if isinstance(each.message, m.Release)] == [second.link]
    assert answer(driver, second, written()) == []
    assert driver.core.inflight == 0


def test_a_replicated_write_fails_when_one_of_its_workers_is_lost(driver: Driver) -> None:
    first, second = driver.client(b"c1", put())
    assert answer(driver, first, written()) == []
    assert the_end(driver.worker(second.link, m.Goodbye(reason=""))) is ErrorCode.WORKER_LOST
    driver.core.check()


def test_copies_that_turn_out_to_differ_are_no_acknowledged_write(driver: Driver) -> None:
    first, second = driver.client(b"c1", put())
    answer(driver, first, written(length=1))
    assert the_end(answer(driver, second, written(length=2))) is ErrorCode.INTERNAL


def test_a_client_may_send_what_both_workers_can_take(driver: Driver) -> None:
    attach(driver)
    first, second = (each._replace(link=each.link.removeprefix(b"bulk-")) for each in start_upload(driver))
    assert answer(driver, first, m.Credit(req_id=rid(1), chunks=8), 0) == []
    (credit,) = answer(driver, second, m.Credit(req_id=rid(1), chunks=3), 0)
    assert credit.message == m.Credit(req_id=rid(1), chunks=3)
    (credit,) = answer(driver, second, m.Credit(req_id=rid(1), chunks=9), 0)
    assert credit.message.chunks == 5
    assert answer(driver, first, m.Credit(req_id=rid(1), chunks=1), 0)[0].message.chunks == 1


def test_chunks_go_to_both_workers(driver: Driver) -> None:
    attach(driver)
    assigned = start_upload(driver)
    chunk = m.Chunk(req_id=rid(1), offset=0, payload=wire.describe([b"x" * 8]))
    forwarded = driver.client_bulk(b"bulk", chunk, b"x" * 8)
    assert [(each.port, each.link) for each in forwarded] == [(each.port, each.link) for each in assigned]


def test_all_that_changes_a_sequence_with_copies_takes_one_lane_to_them(driver: Driver) -> None:
    """Two lanes race: one worker could have a small append before, the other behind a large one."""
    attach(driver)
    holders = {each.link for each in start_upload(driver)}
    small = msgspec.structs.replace(put(2, meta=META), payload=wire.describe([b"k" * 8, b"v" * 8]))
    assert {each.link for each in driver.client(b"c2", small, b"k" * 8, b"v" * 8)} == holders
    assert holders < {each.link for each in driver.client(b"c2", delete(3))} == {b"bulk-" + link for link in LINKS}
    assert {each.link for each in driver.client(b"c2", delete(4, "other"))} == set(LINKS)
    pin = m.Pin(req_id=rid(5), attempt=0, deadline_ms=5000, seq_id="s")
    assert {each.port for each in driver.client(b"c2", pin)} == {Port.WORKER}


def test_nobody_is_told_to_drop_a_copy_while_writes_to_it_are_in_flight(driver: Driver) -> None:
    """One worker has the write and tells of it before the other has it."""
    write(driver)
    first, second = driver.client(b"c1", put(1, layer=1))
    ahead = Holdings(sequences=(Holding(USER, "s", first.message.version),))
    page = m.WorkerSequences(is_complete=True, payload=wire.describe([pack(ahead)]))
    assert orders_to_drop(driver.worker(first.link, page, pack(ahead))) == set()
    other_first, other_second = driver.client(b"c1", put(2, layer=2))
    heard = answer(driver, first, written()) + answer(driver, second, written())
    heard += answer(driver, other_first, written(2)) + answer(driver, other_second, written(2))
    assert orders_to_drop(heard + driver.tick(0.25)) == set()
    assert {each.link for each in driver.client(b"c1", put(3, layer=3))} == {first.link, second.link}


def test_a_copy_that_missed_a_write_is_dropped_when_the_writes_are_over(driver: Driver) -> None:
    write(driver)
    first, second = driver.client(b"c1", put(deadline_ms=300))
    answer(driver, first, written())
    heard = driver.tick(0.75)
    assert the_end(heard) is ErrorCode.DEADLINE
    assert orders_to_drop(heard) == {second.link}
