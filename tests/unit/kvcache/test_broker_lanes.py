"""Which lane a write takes through the broker, and what is refused of one on the wrong lane."""

from __future__ import annotations

import pytest

from bus import messages as m
from bus import wire
from bus.errors import ErrorCode
from bus.limits import CHUNK_BYTES, MAX_INLINE_BYTES
from bus.tensors import DType, TensorMeta
from kvcache.broker.sends import Port
from tests.unit.kvcache.broker_driver import Driver, Heard, beat, done, frames_of, read, rid

META = TensorMeta(DType.UINT8, (1, 1, 8))
BYTES = [b"k" * 8, b"v" * 8]


@pytest.fixture
def driver() -> Driver:
    """One client and one worker, each with a bulk lane."""
    driver = Driver()
    welcome = driver.join_worker(b"w1", "w1")
    driver.worker_bulk(b"bulk-w1", m.AttachBulk(session=welcome.session))
    driver.client_bulk(b"bulk-c1", m.AttachBulk(session=driver.join_client().session))
    return driver


def put(number: int, *payload: bytes, deadline_ms: int = 5000, meta: TensorMeta = META) -> m.Put:
    return m.Put(
        req_id=rid(number),
        attempt=0,
        deadline_ms=deadline_ms,
        seq_id="s",
        layer=0,
        k=meta,
        v=meta,
        payload=wire.describe(payload),
    )


def refusal(heard: list[Heard]) -> ErrorCode:
    (one,) = heard
    assert (one.port, type(one.message)) == (Port.CLIENT, m.Failed)
    return ErrorCode(one.message.code)


def test_a_write_takes_the_lane_it_came_on_and_is_answered_on_the_control_lane(driver: Driver) -> None:
    (small,) = driver.client(b"c1", put(1, *BYTES), *BYTES)
    (large,) = driver.client_bulk(b"bulk-c1", put(2, *BYTES), *BYTES)
    assert (small.port, small.link) == (Port.WORKER, b"w1")
    assert (large.port, large.link) == (Port.WORKER_BULK, b"bulk-w1")
    assert large.inner == (wire.encode(put(2, *BYTES)), *BYTES)
    for number, assigned in ((1, small), (2, large)):
        (heard,) = driver.reply(b"w1", assigned.message.call, done(number))
        assert (heard.port, heard.message) == (Port.CLIENT, done(number))


def test_nobody_waits_is_told_on_the_control_lane_which_is_never_full_of_chunks(driver: Driver) -> None:
    (assigned,) = driver.client_bulk(b"bulk-c1", put(1, deadline_ms=400))
    driver.worker(b"w1", beat())
    (failed, release) = driver.tick(0.9)
    assert ErrorCode(failed.message.code) is ErrorCode.DEADLINE
    assert (release.port, release.message) == (Port.WORKER, m.Release(call=assigned.message.call))


def test_a_cancel_does_not_overtake_the_write_that_it_ends(driver: Driver) -> None:
    """The worker of one on the bulk lane may hear of it later than of its cancel, which would then be in vain."""
    (large,) = driver.client_bulk(b"bulk-c1", put(1, *BYTES), *BYTES)
    driver.client(b"c1", put(2, *BYTES), *BYTES)
    failed, release = driver.client(b"c1", m.Cancel(req_id=rid(1)))
    assert (failed.link, failed.message.req_id) == (b"c1", rid(1))
    assert ErrorCode(failed.message.code) is ErrorCode.CANCELLED
    assert (release.port, release.message) == (Port.WORKER, m.Release(call=large.message.call))
    assert driver.client(b"c1", m.Cancel(req_id=rid(1))) == []
    assert driver.reply(b"w1", large.message.call, done(1)) == [], "it was answered"
    (forward,) = driver.client(b"c1", m.Cancel(req_id=rid(2)))
    assert (forward.port, type(forward.message)) == (Port.WORKER, m.Forward)
    driver.core.check()
    assert driver.core.inflight == 1


def test_more_bytes_than_a_lane_carries_in_one_message_are_refused(driver: Driver) -> None:
    over_control = bytes(MAX_INLINE_BYTES // 2 + 1)
    assert refusal(driver.client(b"c1", put(1, *[over_control] * 2), *[over_control] * 2)) is ErrorCode.TOO_LARGE
    over_bulk = bytes(CHUNK_BYTES // 2 + 1)
    heard = driver.client_bulk(b"bulk-c1", put(2, *[over_bulk] * 2), *[over_bulk] * 2)
    assert refusal(heard) is ErrorCode.TOO_LARGE
    most = bytes(CHUNK_BYTES // 2)
    (assigned,) = driver.client_bulk(b"bulk-c1", put(3, *[most] * 2), *[most] * 2)
    assert assigned.port is Port.WORKER_BULK


def test_bytes_that_are_to_follow_are_announced_on_their_lane(driver: Driver) -> None:
    assert refusal(driver.client(b"c1", put(1))) is ErrorCode.BAD_ARG
    no_tokens = TensorMeta(DType.UINT8, (0, 1, 8))
    (assigned,) = driver.client(b"c1", put(2, meta=no_tokens))
    assert assigned.port is Port.WORKER


def test_a_worker_without_a_bulk_lane_gets_what_is_whole_and_no_chunks(driver: Driver) -> None:
    driver.join_worker(b"w2", "w1", incarnation=2)
    (assigned,) = driver.client_bulk(b"bulk-c1", put(1, *BYTES), *BYTES)
    assert (assigned.port, assigned.link) == (Port.WORKER, b"w2")
    assert refusal(driver.client_bulk(b"bulk-c1", put(2))) is ErrorCode.WORKER_LOST


def test_a_write_that_cannot_be_read_is_answered_also_on_the_bulk_lane(driver: Driver) -> None:
    assert refusal(driver.client_bulk(b"bulk-c1", put(1, *BYTES), BYTES[0])) is ErrorCode.BAD_FRAME
    header = wire.encode(put(2)) + b"!"
    heard = read(driver.core.on_client_bulk(b"bulk-c1", [header], driver.now, "default"))
    assert refusal(heard) is ErrorCode.BAD_FRAME


@pytest.mark.parametrize("on_bulk", [True, False])
def test_a_write_ends_with_what_follows_it_and_cannot_be_read(driver: Driver, on_bulk: bool) -> None:
    """Its client was told that it has failed, and may try again under the same id."""
    (assigned,) = driver.client_bulk(b"bulk-c1", put(1))
    send = driver.client_bulk if on_bulk else driver.client
    failed, release = send(
        b"bulk-c1" if on_bulk else b"c1", m.Chunk(req_id=rid(1), offset=-1, payload=wire.describe([b"k"])), b"k"
    )
    assert refusal([failed]) is ErrorCode.BAD_FRAME
    assert failed.message.req_id == rid(1)
    assert release.message == m.Release(call=assigned.message.call)
    driver.core.check()
    (again,) = driver.client_bulk(b"bulk-c1", put(1))
    assert isinstance(again.message, m.Assign)


def test_a_write_of_a_stranger_to_the_bulk_lane_is_not_heard(driver: Driver) -> None:
    assert driver.client_bulk(b"stranger", put(1, *BYTES), *BYTES) == []
    assert driver.client_bulk(b"stranger", put(1, *BYTES), BYTES[0]) == []
    assert driver.client_bulk(b"bulk-c1", m.Length(req_id=rid(1), attempt=0, deadline_ms=1, seq_id="s", layer=0)) == []
    assert (driver.stats().unwelcome, driver.stats().malformed) == (2, 1)


def test_a_bug_of_ours_fails_the_write_on_the_bulk_lane_that_brought_it_out(driver: Driver) -> None:
    (send,) = driver.core.on_fault(Port.CLIENT_BULK, b"bulk-c1", frames_of(put(1)))
    assert wire.decode(send.frames).message.code == ErrorCode.INTERNAL


def test_a_bulk_lane_that_is_full_fails_the_write_that_found_it_so(driver: Driver) -> None:
    frames = frames_of(put(1, *BYTES), *BYTES)
    (send,) = driver.core.on_client_bulk(b"bulk-c1", frames, driver.now, "default")
    failed, release = read(driver.core.on_unsent(send, is_gone=False))
    assert (ErrorCode(failed.message.code), release.port) == (ErrorCode.OVERLOADED, Port.WORKER)
    driver.core.check()
    assert driver.core.inflight == 0
