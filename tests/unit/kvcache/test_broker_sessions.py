"""Who may speak to a broker: joining, coming back, falling silent, talking garbage."""

from __future__ import annotations

import msgspec
import pytest

from bus import messages as m
from bus import wire
from bus.errors import ErrorCode
from kvcache.broker.journal import News
from kvcache.broker.members import GARBAGE_PER_S
from kvcache.broker.sends import Port
from tests.unit.kvcache.broker_driver import (
    PROMPT,
    Driver,
    Heard,
    beat,
    done,
    frames_of,
    generate,
    hello,
    length,
    rid,
    worker_hello,
)


@pytest.fixture
def driver() -> Driver:
    return Driver()


def joined(driver: Driver) -> Driver:
    """One client `c1`, one worker `w` on link `w1`."""
    driver.join_worker(b"w1", "w")
    driver.join_client()
    return driver


def test_a_worker_hears_which_calls_are_of_its_session(driver: Driver) -> None:
    joined(driver).client(b"c1", length())
    driver.reply(b"w1", 1, done())
    (again,) = driver.worker(b"w1", worker_hello("w"))
    assert again.message.first_call == 1
    assert driver.join_worker(b"w2", "w", 2).first_call == 2


# --- clients -------------------------------------------------------------------------------------


def test_a_client_is_welcomed_with_the_limits(driver: Driver) -> None:
    welcome = driver.join_client()
    assert welcome == m.Welcome(
        session=(1).to_bytes(16, "big"),
        incarnation=42,
        major=wire.MAJOR,
        minor=wire.MINOR,
        heartbeat_ms=250,
        lease_ms=1000,
        max_inline_bytes=64 * 1024,
        max_prompt_bytes=1 << 20,
        max_tensor_bytes=4 << 30,
        chunk_bytes=1 << 20,
        window_tokens=1024,
    )


def test_hello_again_changes_nothing(driver: Driver) -> None:
    joined(driver).client(b"c1", length())
    before = driver.stats().clients, driver.core.inflight
    assert driver.join_client().session == driver.client(b"c1", hello())[0].message.session
    assert (driver.stats().clients, driver.core.inflight) == before == (1, 1)


@pytest.mark.parametrize(
    "message", [m.Beat(beat=1), length(), m.OpenStream(req_id=rid(1)), m.Goodbye(reason="x"), m.Cancel(req_id=rid(1))]
)
def test_a_stranger_gets_no_answer(driver: Driver, message: m.Message) -> None:
    driver.join_worker(b"w1", "w")
    assert driver.client(b"nobody", message) == []
    assert driver.client_frames(b"nobody", [b"garbage"]) == []
    assert (driver.stats().unwelcome, driver.stats().malformed) == (1, 1)


def test_a_client_of_another_major_version_hears_so(driver: Driver) -> None:
    (heard,) = driver.client(b"c1", hello(major=1))
    assert heard.message.code == ErrorCode.BAD_VERSION
    assert heard.message.req_id == wire.NO_REQUEST
    assert "version 1 is not supported; this broker speaks 2." in heard.message.message
    assert driver.stats().clients == 0


@pytest.mark.parametrize("port", [Port.CLIENT, Port.WORKER])
def test_a_peer_whose_frames_are_of_another_version_hears_so(driver: Driver, port: Port) -> None:
    frame = bytearray(wire.encode(hello()))
    frame[3] = 9
    receive = driver.core.on_client if port is Port.CLIENT else driver.core.on_worker
    (send,) = receive(b"x", [bytes(frame)], driver.now, "default")
    assert (send.port, send.link) == (port, b"x")
    assert "version 9" in wire.decode(send.frames).message.message


def test_a_client_that_comes_back_on_another_link_starts_afresh(driver: Driver) -> None:
    joined(driver).client(b"c1", length())
    first = driver.open_stream()

    release, welcome = driver.client(b"c2", hello())

    assert release == Heard(Port.WORKER, b"w1", m.Release(call=1))
    assert (welcome.port, welcome.link) == (Port.CLIENT, b"c2")
    assert driver.client(b"c1", m.Beat(beat=1)) == []
    assert not driver.core.allows(b"S|" + first)
    assert (driver.stats().clients, driver.core.inflight) == (1, 0)


def test_a_clients_hello_that_is_read_behind_its_later_one_changes_nothing(driver: Driver) -> None:
    """After a pause of ours the sockets hold what was said over connections that have ended since."""
    driver.client(b"new", msgspec.structs.replace(hello(), number=7))
    assert driver.client(b"old", msgspec.structs.replace(hello(), number=6)) == []
    assert driver.client(b"old", m.Beat(beat=1)) == []
    (answer,) = driver.client(b"new", m.Beat(beat=1))
    assert isinstance(answer.message, m.BrokerBeat)
    (welcome,) = driver.client(b"newer", msgspec.structs.replace(hello(), number=8))
    assert welcome.link == b"newer"


def test_a_workers_hello_that_is_read_behind_its_later_one_changes_nothing(driver: Driver) -> None:
    driver.join_worker(b"new", "w", 5, number=7)
    assert driver.worker(b"old", worker_hello("w", 5, number=6)) == []
    assert isinstance(driver.worker(b"new", beat())[0].message, m.BrokerBeat)
    assert driver.stats().workers_lost == 0
    driver.join_worker(b"newer", "w", 5, number=8)
    assert driver.worker(b"new", beat()) == []
    driver.join_worker(b"restarted", "w", 6, number=1)


def test_an_instance_of_another_user_is_another_client(driver: Driver) -> None:
    joined(driver)
    driver.join_client(b"c2", user="somebody")
    assert driver.stats().clients == 2


def test_another_instance_on_the_same_link_ends_the_one_before(driver: Driver) -> None:
    joined(driver).client(b"c1", length())
    release, welcome = driver.client(b"c1", hello(b"x" * 16))
    assert release.message == m.Release(call=1)
    assert welcome.message.session != (2).to_bytes(16, "big")
    assert driver.stats().clients == 1


def test_a_beat_is_answered_with_its_number(driver: Driver) -> None:
    joined(driver)
    assert driver.client(b"c1", m.Beat(beat=9)) == [Heard(Port.CLIENT, b"c1", m.BrokerBeat(beat=9, lease_ms=1000))]


def test_a_client_that_leaves_stops_its_work(driver: Driver) -> None:
    joined(driver)
    driver.client(b"c1", length(1))
    driver.client(b"c1", generate(driver.open_stream(), 2), PROMPT)
    assert driver.client(b"c1", m.Goodbye(reason="done")) == [
        Heard(Port.WORKER, b"w1", m.Release(call=1)),
        Heard(Port.WORKER, b"w1", m.Release(call=2)),
    ]
    assert (driver.core.inflight, driver.stats().streams, driver.stats().clients) == (0, 0, 0)
    assert driver.reply(b"w1", 1, done()) == []


def test_a_client_that_vanished_stops_its_work_after_three_seconds(driver: Driver) -> None:
    joined(driver).client(b"c1", length(deadline_ms=60_000))
    worker_lives(driver, 2.75)
    assert driver.stats().clients == 1
    assert worker_lives(driver, 0.5) == [Heard(Port.WORKER, b"w1", m.Release(call=1))]
    assert driver.stats().clients == 0


def worker_lives(driver: Driver, seconds: float) -> list[Heard]:
    heard: list[Heard] = []
    for number in range(int(seconds / 0.25)):
        heard += driver.tick(0.25)
        driver.worker(b"w1", beat(number))
    return heard


def test_a_client_that_takes_no_answers_cannot_be_served(driver: Driver) -> None:
    joined(driver).client(b"c1", length())
    (send,) = driver.core.on_client(b"c1", frames_of(m.Beat(beat=1)), driver.now, "default")
    (release,) = driver.core.on_unsent(send, is_gone=False)
    assert wire.decode(release.frames).message == m.Release(call=1)
    assert driver.stats().clients == 0
    assert driver.core.on_unsent(send, is_gone=True) == []


# --- garbage -------------------------------------------------------------------------------------


def test_garbage_is_answered_with_its_request_id_where_that_can_be_read(driver: Driver) -> None:
    joined(driver)
    frame = bytearray(wire.encode(length(7)))
    frame[-1] ^= 1
    for frames, req_id in (([bytes(frame)], rid(7)), ([b"x"], wire.NO_REQUEST), ([], wire.NO_REQUEST)):
        (heard,) = driver.client_frames(b"c1", frames)
        assert (heard.message.code, heard.message.req_id) == (ErrorCode.BAD_FRAME, req_id)
        assert not heard.message.retryable
    assert driver.stats().malformed == 3
    assert driver.stats().clients == 1


@pytest.mark.parametrize(
    "message", [m.AttachBulk(session=bytes(16)), m.SubAck(), m.Release(call=1), m.Reply(call=1, final=True), done()]
)
def test_a_message_on_the_wrong_lane_is_garbage(driver: Driver, message: m.Message) -> None:
    joined(driver)
    (heard,) = driver.client(b"c1", message)
    assert heard.message.code == ErrorCode.BAD_FRAME
    assert type(message).__name__ in heard.message.message


def test_a_hundred_unreadable_messages_in_a_second_end_the_session(driver: Driver) -> None:
    joined(driver).client(b"c1", length())
    for _ in range(GARBAGE_PER_S - 1):
        (heard,) = driver.client_frames(b"c1", [b"x"])
        assert isinstance(heard.message, m.Failed)

    goodbye, release = driver.client_frames(b"c1", [b"x"])

    assert isinstance(goodbye.message, m.Goodbye)
    assert release.message == m.Release(call=1)
    assert driver.client_frames(b"c1", [b"x"]) == []
    assert [news.is_bad for news in driver.core.take_news()] == [False, True]
    assert driver.core.take_news() == []


def test_garbage_now_and_then_ends_nothing(driver: Driver) -> None:
    joined(driver)
    for _ in range(4):
        for _ in range(GARBAGE_PER_S - 1):
            driver.client_frames(b"c1", [b"x"])
        driver.client(b"c1", m.Beat(beat=1))
        driver.tick(1.1)
    assert driver.stats().clients == 1


def test_a_worker_that_talks_garbage_is_told_of_once_and_then_dropped(driver: Driver) -> None:
    joined(driver).client(b"c1", length())
    driver.core.take_news()
    for _ in range(GARBAGE_PER_S - 1):
        assert driver.core.on_worker(b"w1", [b"x"], driver.now, "default") == []
    assert [news.is_bad for news in driver.core.take_news()] == [True]

    sends = driver.core.on_worker(b"w1", [], driver.now, "default")

    assert [type(wire.decode(send.frames).message) for send in sends] == [m.Goodbye, m.Failed]
    assert driver.stats().workers_lost == 1
    assert driver.core.on_worker(b"w1", [b"x"], driver.now, "default") == []


def test_garbage_on_the_bulk_lanes_is_counted_and_dropped(driver: Driver) -> None:
    joined(driver)
    for receive in (driver.core.on_client_bulk, driver.core.on_worker_bulk):
        for frames in ([], [b"x"], frames_of(m.Chunk(req_id=rid(1), offset=0, payload=())), frames_of(done())):
            assert receive(b"b", frames, driver.now, "default") == []
    assert (driver.stats().malformed, driver.stats().unwelcome) == (4, 4)


# --- workers -------------------------------------------------------------------------------------


def test_a_worker_joins_and_is_routed_to(driver: Driver) -> None:
    driver.join_worker(b"w1", "w")
    driver.join_client()
    assert driver.core.take_news() == [News("worker w joined, 1 on the ring")]
    (assigned,) = driver.client(b"c1", length())
    assert (assigned.port, assigned.link) == (Port.WORKER, b"w1")


def test_a_worker_that_is_not_ready_is_not_routed_to(driver: Driver) -> None:
    driver.join_worker(b"w1", "w", state=m.WorkerState.LOADING)
    driver.join_client()
    assert driver.client(b"c1", length())[0].message.code == ErrorCode.NO_WORKERS

    driver.worker(b"w1", beat(state=m.WorkerState.READY))
    assert isinstance(driver.client(b"c1", length())[0].message, m.Assign)

    driver.worker(b"w1", beat(state=m.WorkerState.DRAINING))
    assert driver.client(b"c1", length(2))[0].message.code == ErrorCode.NO_WORKERS
    assert isinstance(driver.reply(b"w1", 1, done())[0].message, m.KvDone)


def test_a_workers_beat_renews_its_lease(driver: Driver) -> None:
    driver.join_worker(b"w1", "w")
    driver.tick(0.5)
    (heard,) = driver.worker(b"w1", beat(7, running=3))
    assert heard == Heard(Port.WORKER, b"w1", m.BrokerBeat(beat=7, lease_ms=1000))
    (view,) = driver.core.cluster_stats(driver.now, m.QueryKind.WORKERS).workers
    assert (view.running, view.lease_s, view.last_heard_s) == (3, 1.0, 0.0)


def test_a_worker_id_that_another_user_has_is_refused(driver: Driver) -> None:
    driver.join_worker(b"w1", "w")
    (heard,) = driver.worker(b"w2", worker_hello("w", 9), user="somebody")
    assert (heard.link, heard.message.code) == (b"w2", ErrorCode.FORBIDDEN)
    assert driver.worker(b"w2", beat()) == []


def test_of_two_workers_with_one_id_the_higher_incarnation_wins(driver: Driver) -> None:
    driver.join_worker(b"w1", "w", 5)
    driver.join_client()
    driver.client(b"c1", length())

    (older,) = driver.worker(b"w2", worker_hello("w", 4))
    failed, welcome = driver.worker(b"w3", worker_hello("w", 6))

    assert older.message.code == ErrorCode.FORBIDDEN
    assert (failed.link, failed.message.code, failed.message.retryable) == (b"c1", ErrorCode.WORKER_LOST, True)
    assert (welcome.link, type(welcome.message)) == (b"w3", m.Welcome)
    assert driver.worker(b"w1", beat()) == []
    (assigned,) = driver.client(b"c1", length(2))
    assert assigned.link == b"w3"


def test_of_two_workers_with_one_id_the_one_that_was_replaced_serves_once_the_other_has_left(driver: Driver) -> None:
    driver.join_worker(b"w1", "w", 5)
    driver.join_worker(b"w2", "w", 6)
    (refused,) = driver.worker(b"w1", worker_hello("w", 5))
    assert (refused.link, refused.message.code) == (b"w1", ErrorCode.FORBIDDEN)
    driver.worker(b"w2", m.Goodbye(reason="drained"))
    driver.join_worker(b"w1", "w", 5)


def test_a_worker_whose_clock_went_back_joins_once_its_former_self_is_lost(driver: Driver) -> None:
    hour_ns = 3600 * 10**9
    driver.join_worker(b"w1", "w", 2 * hour_ns)
    (refused,) = driver.worker(b"w2", worker_hello("w", hour_ns))
    assert refused.message.code == ErrorCode.FORBIDDEN
    driver.tick(1.25)
    driver.join_worker(b"w2", "w", hour_ns)
    assert driver.stats().workers_lost == 1


def test_a_worker_that_reconnects_takes_its_own_place(driver: Driver) -> None:
    session = driver.join_worker(b"w1", "w", 5).session
    assert driver.join_worker(b"w1", "w", 5).session == session
    assert driver.join_worker(b"w2", "w", 5).session != session
    assert driver.stats().workers_lost == 1
    assert len(driver.core.cluster_stats(driver.now, m.QueryKind.WORKERS).workers) == 1


def test_a_link_that_speaks_for_another_worker_ends_the_one_before(driver: Driver) -> None:
    driver.join_worker(b"w1", "v")
    driver.worker(b"w1", worker_hello("w"))
    (view,) = driver.core.cluster_stats(driver.now, m.QueryKind.WORKERS).workers
    assert view.worker_id == "w"


def test_a_silent_worker_is_suspect_after_three_beats_and_lost_after_a_second() -> None:
    driver = Driver(policy="consistent_hash")
    driver.join_worker(b"w1", "w")
    driver.join_client()
    driver.client(b"c1", length())

    assert driver.tick(0.80) == []
    driver.client(b"c1", m.Beat(beat=1))
    (view,) = driver.core.cluster_stats(driver.now, m.QueryKind.WORKERS).workers
    assert view.status == "suspect"
    assert not driver.core.cluster_stats(driver.now, m.QueryKind.HEALTH).healthy
    (failed,) = driver.tick(0.25)

    assert (failed.message.code, failed.message.retryable) == (ErrorCode.WORKER_LOST, True)
    assert "silent for 1.05 s" in failed.message.message
    assert driver.core.cluster_stats(driver.now, m.QueryKind.WORKERS).workers == ()


def test_a_worker_that_says_goodbye_is_not_counted_as_lost(driver: Driver) -> None:
    joined(driver).client(b"c1", length())
    (failed,) = driver.worker(b"w1", m.Goodbye(reason="drained"))
    assert failed.message.code == ErrorCode.WORKER_LOST
    assert "drained" in failed.message.message
    assert driver.stats().workers_lost == 0
    assert driver.core.take_news()[-1] == News("worker w left (drained), 1 calls fail over")


def test_time_in_which_the_broker_itself_did_not_run_is_nobodys_silence(driver: Driver) -> None:
    """SIGSTOP and SIGCONT: what the peers said meanwhile lies in the sockets still."""
    joined(driver)
    assert driver.tick(0.25) == []
    assert driver.tick(30.0, step=30.0) == []
    assert driver.stats().clients == 1
    assert driver.tick(1.5) == []  # in steps again, and now their silence counts
    assert driver.stats().workers_lost == 1


def test_an_unsent_message_to_a_worker_that_is_gone_loses_it(driver: Driver) -> None:
    joined(driver)
    (send,) = driver.core.on_client(b"c1", frames_of(length()), driver.now, "default")
    (failed,) = driver.core.on_unsent(send, is_gone=True)
    assert wire.decode(failed.frames).message.code == ErrorCode.WORKER_LOST
    assert driver.core.on_unsent(send, is_gone=True) == []
    assert driver.stats().workers_lost == 1


# --- bulk connections ----------------------------------------------------------------------------


def chunk(number: int = 1, data: bytes = b"data") -> m.Chunk:
    return m.Chunk(req_id=rid(number), offset=0, payload=wire.describe([data]))


def test_a_bulk_connection_is_the_sessions_whose_secret_it_knows(driver: Driver) -> None:
    worker, client = driver.join_worker(b"w1", "w"), driver.join_client()
    driver.client_bulk(b"cb", m.AttachBulk(session=client.session))
    driver.worker_bulk(b"wb", m.AttachBulk(session=worker.session))
    driver.client(b"c1", length())

    (to_worker,) = driver.client_bulk(b"cb", chunk(), b"data")
    (to_client,) = driver.worker_bulk(b"wb", m.Reply(call=1, final=False), wire.encode(chunk()), b"data")

    inner = (wire.encode(chunk()), b"data")
    assert to_worker == Heard(Port.WORKER_BULK, b"wb", m.Forward(call=1), inner)
    assert to_client == Heard(Port.CLIENT_BULK, b"cb", chunk())
    assert driver.stats().unwelcome == 0


@pytest.mark.parametrize("whose", ["nobody", "worker", "another user"])
def test_a_secret_of_somebody_else_attaches_nothing(driver: Driver, whose: str) -> None:
    worker, client = driver.join_worker(b"w1", "w"), driver.join_client()
    secret = {"nobody": bytes(16), "worker": worker.session, "another user": client.session}[whose]
    driver.client_bulk(b"cb", m.AttachBulk(session=secret), user="somebody" if whose == "another user" else "default")
    driver.client(b"c1", length())
    assert driver.client_bulk(b"cb", chunk(), b"data") == []
    assert driver.stats().unwelcome == 2


def test_a_bulk_connection_can_be_replaced_and_given_to_another_session(driver: Driver) -> None:
    worker = driver.join_worker(b"w1", "w")
    first, second = driver.join_client(b"c1"), driver.join_client(b"c2", b"x" * 16)
    driver.worker_bulk(b"wb", m.AttachBulk(session=worker.session))
    driver.client_bulk(b"old", m.AttachBulk(session=first.session))
    driver.client_bulk(b"new", m.AttachBulk(session=first.session))
    driver.client(b"c1", length(1))
    driver.client(b"c2", length(2))
    assert driver.client_bulk(b"old", chunk(1), b"data") == []
    assert len(driver.client_bulk(b"new", chunk(1), b"data")) == 1

    driver.client_bulk(b"new", m.AttachBulk(session=second.session))

    assert len(driver.client_bulk(b"new", chunk(2), b"data")) == 1
    driver.client(b"c1", m.Goodbye(reason="must not detach what is no longer its own"))
    assert len(driver.client_bulk(b"new", chunk(2), b"data")) == 1


def test_a_chunk_for_a_worker_without_a_bulk_connection_fails_the_request(driver: Driver) -> None:
    client = joined(driver).join_client(b"c1")
    driver.client_bulk(b"cb", m.AttachBulk(session=client.session))
    driver.client(b"c1", length())
    failed, release = driver.client_bulk(b"cb", chunk(), b"data")
    assert (failed.message.code, failed.message.retryable) == (ErrorCode.WORKER_LOST, True)
    assert release.message == m.Release(call=1)


def test_a_chunk_for_a_client_without_a_bulk_connection_fails_the_request(driver: Driver) -> None:
    worker = driver.join_worker(b"w1", "w")
    driver.join_client()
    driver.worker_bulk(b"wb", m.AttachBulk(session=worker.session))
    driver.client(b"c1", length())
    failed, release = driver.worker_bulk(b"wb", m.Reply(call=1, final=True), wire.encode(chunk()), b"data")
    assert (failed.port, failed.message.code) == (Port.CLIENT, ErrorCode.CONNECTION_LOST)
    assert release.message == m.Release(call=1)


@pytest.mark.parametrize("is_final", [False, True])
def test_no_room_for_bulk_data_fails_one_request_and_not_the_client(driver: Driver, is_final: bool) -> None:
    worker, client = driver.join_worker(b"w1", "w"), driver.join_client()
    driver.worker_bulk(b"wb", m.AttachBulk(session=worker.session))
    driver.client_bulk(b"cb", m.AttachBulk(session=client.session))
    driver.client(b"c1", length(1))
    driver.client(b"c1", length(2))
    frames = [wire.encode(m.Reply(call=1, final=is_final)), wire.encode(chunk()), b"data"]
    (send,) = driver.core.on_worker_bulk(b"wb", frames, driver.now, "default")

    failed, *release = driver.core.on_unsent(send, is_gone=False)

    answer = wire.decode(failed.frames).message
    assert (answer.code, answer.req_id, answer.retryable) == (ErrorCode.OVERLOADED, rid(1), True)
    assert len(release) == (0 if is_final else 1)
    assert driver.core.inflight == 1
    assert driver.stats().clients == 1


def test_a_client_whose_bulk_connection_is_gone_starts_afresh(driver: Driver) -> None:
    worker, client = driver.join_worker(b"w1", "w"), driver.join_client()
    driver.worker_bulk(b"wb", m.AttachBulk(session=worker.session))
    driver.client_bulk(b"cb", m.AttachBulk(session=client.session))
    driver.client(b"c1", length())
    frames = [wire.encode(m.Reply(call=1, final=False)), wire.encode(chunk()), b"data"]
    (send,) = driver.core.on_worker_bulk(b"wb", frames, driver.now, "default")
    (release,) = driver.core.on_unsent(send, is_gone=True)
    assert wire.decode(release.frames).message == m.Release(call=1)
    assert driver.client(b"c1", m.Beat(beat=1)) == []
