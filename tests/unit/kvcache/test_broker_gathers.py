"""Requests that several workers serve: each is asked, their answers are added up, and the client gets one."""

from __future__ import annotations

import pytest

from bus import messages as m
from bus import wire
from bus.errors import Conflict, ErrorCode, NotFound, WorkerLost
from kvcache.broker.answers import Answers
from kvcache.broker.sends import Port
from tests.unit.kvcache.broker_driver import USER, Driver, Heard, beat, frames_of, read, rid

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


def test_a_delete_is_answered_once_with_the_sum_of_what_was_deleted(driver: Driver) -> None:
    calls = asked(driver)
    assert driver.reply(b"a", calls[b"a"], gone(2)) == []
    assert driver.reply(b"b", calls[b"b"], NOT_THERE) == []
    assert the_end(driver.reply(b"c", calls[b"c"], gone(1))) == gone(3)
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
    answers = Answers(rid(1))
    answers.add(gone(1, duplicate=True))
    assert answers.total() == gone(1, duplicate=True)
    answers.add(gone(1))
    assert answers.total() == gone(2)


def test_an_answer_of_another_kind_is_a_refusal() -> None:
    answers = Answers(rid(1))
    answers.add(m.Credit(req_id=rid(1), chunks=1))
    answers.add(gone(1))
    total = answers.total()
    assert isinstance(total, m.Failed)
    assert ErrorCode(total.code) is ErrorCode.INTERNAL


def test_no_answer_at_all_is_a_loss() -> None:
    total = Answers(rid(1)).total()
    assert total == wire.failed(rid(1), WorkerLost("every worker that was asked was lost"))
