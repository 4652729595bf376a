"""A request's way through the broker: dispatched, relayed byte for byte, ended exactly once."""

from __future__ import annotations

import msgspec
import pytest

from bus import messages as m
from bus import wire
from bus.errors import ErrorCode
from bus.stats import ClusterStats, Explanation, WorkerStats, pack, unpack
from bus.tensors import DType, TensorMeta
from bus.topics import topic_of
from kvcache.broker import requests, streams
from kvcache.broker.sends import Port
from tests.unit.kvcache.broker_driver import (
    PROMPT,
    USER,
    Driver,
    Heard,
    beat,
    done,
    frames_of,
    generate,
    length,
    rid,
    stream_end,
)


@pytest.fixture
def driver() -> Driver:
    driver = Driver()
    driver.join_worker(b"w1", "w")
    driver.join_client()
    return driver


def code_of(heard: list[Heard]) -> tuple[bytes, ErrorCode]:
    """The request and the error in the one `Failed` that was heard."""
    (one,) = heard
    assert one.port is Port.CLIENT
    return one.message.req_id, ErrorCode(one.message.code)


# --- there and back ------------------------------------------------------------------------------


def test_a_request_goes_to_its_worker_in_an_envelope_and_otherwise_untouched(driver: Driver) -> None:
    put = m.Put(
        req_id=rid(1),
        attempt=2,
        deadline_ms=700,
        seq_id="s",
        layer=0,
        k=TensorMeta(DType.FLOAT32, (1, 1, 1)),
        v=TensorMeta(DType.FLOAT32, (1, 1, 1)),
        payload=wire.describe([b"kkkk", b"vvvv"]),
    )
    (heard,) = driver.client(b"c1", put, b"kkkk", b"vvvv")
    reason = "consistent_hash: owner of sequence 's'"
    envelope = m.Assign(call=1, tenant=USER, client=bytes(16), deadline_ms=700, reason=reason, version=1)
    assert heard == Heard(Port.WORKER, b"w1", envelope, (wire.encode(put), b"kkkk", b"vvvv"))


def test_payloads_that_do_not_match_their_checksum_are_the_workers_to_find(driver: Driver) -> None:
    message = generate(driver.open_stream())
    (heard,) = driver.client(b"c1", message, b"olleh")
    assert heard.inner == (wire.encode(message), b"olleh")


def test_an_answer_goes_back_without_its_envelope_and_otherwise_untouched(driver: Driver) -> None:
    driver.client(b"c1", length())
    frames = [wire.encode(m.Reply(call=1, final=True)), b"not even a message", b"and more"]
    (send,) = driver.core.on_worker(b"w1", frames, driver.now, USER)
    assert (send.port, send.link, list(send.frames)) == (Port.CLIENT, b"c1", frames[1:])
    assert driver.core.inflight == 0


def test_answers_before_the_last_leave_the_request_in_flight(driver: Driver) -> None:
    driver.client(b"c1", length())
    for _ in range(3):
        (heard,) = driver.reply(b"w1", 1, m.Credit(req_id=rid(1), chunks=2), final=False)
        assert heard == Heard(Port.CLIENT, b"c1", m.Credit(req_id=rid(1), chunks=2))
    assert driver.core.inflight == 1
    assert len(driver.reply(b"w1", 1, done())) == 1
    assert driver.reply(b"w1", 1, done()) == []


def test_a_worker_can_only_answer_calls_of_its_own() -> None:
    driver = Driver()
    driver.join_worker(b"w1", "v")
    driver.join_worker(b"w2", "w")
    driver.join_client()
    (assigned,) = driver.client(b"c1", length())
    other = {b"w1": b"w2", b"w2": b"w1"}[assigned.link]
    assert driver.reply(other, 1, done()) == []
    assert len(driver.reply(assigned.link, 1, done())) == 1


def test_follow_ups_go_to_the_worker_that_has_the_request(driver: Driver) -> None:
    driver.client(b"c1", generate(driver.open_stream()), PROMPT)
    follow_ups: list[m.Message] = [
        m.Ack(req_id=rid(1), epoch=0, upto=5),
        m.Resume(req_id=rid(1), epoch=0, from_seq=3),
        m.Credit(req_id=rid(1), chunks=1),
        m.Cancel(req_id=rid(1)),
    ]
    for message in follow_ups:
        assert driver.client(b"c1", message) == [Heard(Port.WORKER, b"w1", m.Forward(call=1), (wire.encode(message),))]
    assert driver.core.inflight == 1


def test_one_clients_ids_mean_nothing_to_another(driver: Driver) -> None:
    driver.join_client(b"c2", b"x" * 16)
    driver.client(b"c1", length(1))
    assert driver.client(b"c2", m.Cancel(req_id=rid(1))) == []
    (assigned,) = driver.client(b"c2", length(1))
    assert assigned.message.call == 2
    assert driver.reply(b"w1", 2, done())[0].link == b"c2"
    assert driver.reply(b"w1", 1, done())[0].link == b"c1"


def test_nothing_can_be_said_within_a_request_after_its_end(driver: Driver) -> None:
    """What the client had not acknowledged its worker sent before the end, so nothing is left to ask for."""
    driver.client(b"c1", generate(driver.open_stream()), PROMPT)
    assert len(driver.reply(b"w1", 1, stream_end())) == 1
    assert driver.reply(b"w1", 1, stream_end()) == []
    assert driver.client(b"c1", m.Resume(req_id=rid(1), epoch=0, from_seq=0)) == []


def live(driver: Driver, seconds: float) -> None:
    """Time passes in which everybody beats."""
    for _ in range(int(seconds / 0.5)):
        assert driver.tick(0.5) == []
        driver.client(b"c1", m.Beat(beat=1))
        driver.worker(b"w1", beat())


# --- ends that the broker gives ------------------------------------------------------------------


def test_an_overdue_request_fails_and_its_worker_is_released(driver: Driver) -> None:
    driver.client(b"c1", length(deadline_ms=300))
    assert driver.tick(0.25) == []
    failed, release = driver.tick(0.5)
    assert code_of([failed]) == (rid(1), ErrorCode.DEADLINE)
    assert release == Heard(Port.WORKER, b"w1", m.Release(call=1))
    assert driver.reply(b"w1", 1, done()) == []


def test_a_deadline_that_has_passed_is_refused_at_once(driver: Driver) -> None:
    assert code_of(driver.client(b"c1", length(deadline_ms=0))) == (rid(1), ErrorCode.DEADLINE)


def test_a_request_id_in_flight_cannot_be_used_again(driver: Driver) -> None:
    driver.client(b"c1", length(1))
    assert code_of(driver.client(b"c1", length(1, attempt=1))) == (rid(1), ErrorCode.CONFLICT)
    assert len(driver.reply(b"w1", 1, done())) == 1
    assert isinstance(driver.client(b"c1", length(1, attempt=1))[0].message, m.Assign)


def test_a_request_for_which_there_is_no_room_is_refused_at_once() -> None:
    driver = Driver(max_inflight=2)
    driver.join_worker(b"w1", "w")
    driver.join_client()
    for number in (1, 2):
        driver.client(b"c1", length(number))
    for message in (length(3), generate(driver.open_stream(), 3)):
        (heard,) = driver.client(b"c1", message, *([PROMPT] if isinstance(message, m.Generate) else []))
        assert (heard.message.code, heard.message.retryable) == (ErrorCode.OVERLOADED, True)
        assert heard.message.retry_after_ms > 0
    driver.reply(b"w1", 1, done())
    assert isinstance(driver.client(b"c1", length(3))[0].message, m.Assign)


def test_one_client_cannot_have_everything_in_flight(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_CALLS_PER_CLIENT", 2)
    for number in (1, 2):
        driver.client(b"c1", length(number))
    assert code_of(driver.client(b"c1", length(3))) == (rid(3), ErrorCode.OVERLOADED)
    driver.join_client(b"c2", b"x" * 16)
    assert isinstance(driver.client(b"c2", length(3))[0].message, m.Assign)


def test_a_lost_worker_fails_what_it_had_and_nothing_else() -> None:
    driver = Driver()
    driver.join_worker(b"w1", "v")
    driver.join_worker(b"w2", "w")
    driver.join_client()
    assigned = [driver.client(b"c1", generate(driver.open_stream(), number), PROMPT)[0] for number in range(4)]
    assert {heard.link for heard in assigned} == {b"w1", b"w2"}

    failed = driver.worker(b"w1", m.Goodbye(reason="x"))

    lost = [rid(number) for number, heard in enumerate(assigned) if heard.link == b"w1"]
    assert [heard.message.req_id for heard in failed] == lost
    assert {heard.message.code for heard in failed} == {ErrorCode.WORKER_LOST}
    assert all(heard.message.retryable for heard in failed)
    assert driver.core.inflight == 4 - len(lost)


def test_a_message_for_which_the_worker_has_no_room_fails_its_request(driver: Driver) -> None:
    (send,) = driver.core.on_client(b"c1", frames_of(length()), driver.now, USER)
    failed, release = driver.core.on_unsent(send, is_gone=False)
    answer = wire.decode(failed.frames).message
    assert (answer.code, answer.req_id, answer.retryable) == (ErrorCode.OVERLOADED, rid(1), True)
    assert release.port is Port.WORKER
    assert driver.core.on_unsent(send, is_gone=False) == []
    assert driver.core.on_unsent(release, is_gone=False) == []
    assert driver.core.inflight == 0


def test_a_bug_of_ours_fails_the_request_that_brought_it_out(driver: Driver) -> None:
    driver.client(b"c1", length(1))
    sends = driver.core.on_fault(Port.CLIENT, b"c1", frames_of(length(1)))
    assert [type(wire.decode(send.frames).message) for send in sends] == [m.Failed, m.Release]
    (send,) = driver.core.on_fault(Port.CLIENT, b"c1", frames_of(length(2)))
    assert wire.decode(send.frames).message.code == ErrorCode.INTERNAL
    assert driver.core.on_fault(Port.CLIENT, b"nobody", frames_of(length(2))) == []
    assert driver.core.on_fault(Port.CLIENT, b"c1", []) == []
    assert driver.core.inflight == 0


# --- a broker that starts or stops ---------------------------------------------------------------


def test_a_broker_that_has_just_started_waits_for_its_workers() -> None:
    driver = Driver(settle_ms=1000)
    driver.join_worker(b"w1", "w")
    driver.join_client()
    for message in (length(), m.OpenStream(req_id=rid(1))):
        (heard,) = driver.client(b"c1", message)
        assert (heard.message.code, heard.message.retry_after_ms) == (ErrorCode.NO_WORKERS, 1001)
    driver.tick(0.999)
    assert driver.client(b"c1", length())[0].message.retry_after_ms in {1, 2}
    driver.worker(b"w1", beat())
    driver.tick(0.001)
    assert isinstance(driver.client(b"c1", length())[0].message, m.Assign)


def test_no_workers_is_said_at_once() -> None:
    driver = Driver()
    driver.join_client()
    assert code_of(driver.client(b"c1", length())) == (rid(1), ErrorCode.NO_WORKERS)
    assert not driver.core.cluster_stats(driver.now, m.QueryKind.HEALTH).healthy


def test_a_draining_broker_takes_nothing_new_and_finishes_what_it_has(driver: Driver) -> None:
    driver.client(b"c1", length(1))
    driver.core.drain()
    assert code_of(driver.client(b"c1", length(2))) == (rid(2), ErrorCode.DRAINING)
    assert code_of(driver.client(b"c1", m.OpenStream(req_id=rid(3)))) == (rid(3), ErrorCode.DRAINING)
    assert not driver.core.cluster_stats(driver.now, m.QueryKind.HEALTH).healthy
    assert driver.stats().state == "draining"
    assert len(driver.reply(b"w1", 1, done())) == 1
    assert driver.core.inflight == 0


def test_the_last_words_fail_what_is_left_and_reach_everybody(driver: Driver) -> None:
    driver.client(b"c1", length(1))
    sends = driver.core.farewell()
    said = [(send.port, send.link, wire.decode(send.frames).message) for send in sends]
    assert (said[0][2].code, said[0][2].retryable) == (ErrorCode.DRAINING, True)
    assert said[1] == (Port.WORKER, b"w1", m.Release(call=1))
    assert [(port, link, type(message)) for port, link, message in said[2:]] == [
        (Port.CLIENT, b"c1", m.Goodbye),
        (Port.WORKER, b"w1", m.Goodbye),
    ]


# --- streams -------------------------------------------------------------------------------------


def test_only_an_open_stream_may_be_subscribed_to_and_only_exactly(driver: Driver) -> None:
    topic = topic_of(driver.open_stream())
    assert driver.core.allows(topic)
    for other in (b"", b"S", b"S|", topic[:-1], topic + b"x", topic_of(bytes(16))):
        assert not driver.core.allows(other)


def test_a_stream_lives_as_long_as_its_generation(driver: Driver) -> None:
    stream_id = driver.open_stream()
    driver.client(b"c1", generate(stream_id, deadline_ms=200_000), PROMPT)
    live(driver, 2 * streams.IDLE_S)
    assert driver.core.allows(topic_of(stream_id))
    driver.reply(b"w1", 1, stream_end())
    assert not driver.core.allows(topic_of(stream_id))
    assert driver.stats().streams == 0


def test_a_stream_that_nobody_uses_is_closed_after_a_minute(driver: Driver) -> None:
    stream_id = driver.open_stream()
    live(driver, streams.IDLE_S - 1)
    assert driver.core.allows(topic_of(stream_id))
    live(driver, 2.0)
    assert not driver.core.allows(topic_of(stream_id))
    assert code_of(driver.client(b"c1", generate(stream_id), PROMPT)) == (rid(1), ErrorCode.BAD_ARG)


def test_a_refused_generation_leaves_no_stream_behind() -> None:
    """A client opens a stream for each attempt: thousands of refusals must not use up what it may have."""
    driver = Driver(max_inflight=1)
    driver.join_worker(b"w1", "w")
    driver.join_client()
    driver.client(b"c1", generate(driver.open_stream()), PROMPT)
    for attempt in range(3):
        refused = driver.client(b"c1", generate(driver.open_stream(), 2, attempt=attempt), PROMPT)
        assert code_of(refused) == (rid(2), ErrorCode.OVERLOADED)
    assert driver.stats().streams == 1


def test_a_stream_carries_one_generation(driver: Driver) -> None:
    stream_id = driver.open_stream()
    driver.client(b"c1", generate(stream_id, 1), PROMPT)
    assert code_of(driver.client(b"c1", generate(stream_id, 2), PROMPT)) == (rid(2), ErrorCode.BAD_ARG)
    assert driver.core.allows(topic_of(stream_id))


def test_a_stream_of_another_client_cannot_be_used(driver: Driver) -> None:
    driver.join_client(b"c2", b"x" * 16)
    stream_id = driver.open_stream(b"c2")
    assert code_of(driver.client(b"c1", generate(stream_id), PROMPT)) == (rid(1), ErrorCode.BAD_ARG)
    assert driver.core.allows(topic_of(stream_id))


def test_one_client_cannot_have_every_stream(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_PER_CLIENT", 2)
    driver.open_stream()
    driver.open_stream()
    assert code_of(driver.client(b"c1", m.OpenStream(req_id=rid(1)))) == (rid(1), ErrorCode.OVERLOADED)


# --- questions -----------------------------------------------------------------------------------


def explanation_in(frames: list[bytes]) -> Explanation:
    return unpack(wire.decode(frames).payload[0], Explanation)


def test_an_explained_generation_says_first_why_it_goes_where_it_goes(driver: Driver) -> None:
    message = generate(driver.open_stream(), explain=True, seq_id="chat")
    sends = driver.core.on_client(b"c1", frames_of(message, PROMPT), driver.now, USER)
    assert [send.port for send in sends] == [Port.CLIENT, Port.WORKER]
    explanation = explanation_in([bytes(frame) for frame in sends[0].frames])
    assert (explanation.worker_id, explanation.policy, explanation.key) == ("w", "consistent_hash", "sequence 'chat'")
    assert [(candidate.worker_id, candidate.load) for candidate in explanation.candidates] == [("w", 0)]


def test_a_route_is_explained_and_not_taken(driver: Driver) -> None:
    route = m.Route(req_id=rid(1), seq_id="chat")
    (send,) = driver.core.on_client(b"c1", frames_of(route), driver.now, USER)
    assert wire.decode(send.frames).message.worker_id == "w"
    assert explanation_in([bytes(frame) for frame in send.frames]).reason == "consistent_hash: owner of sequence 'chat'"
    assert (driver.core.inflight, driver.stats().requests, driver.stats().routed) == (0, 0, {})


def test_a_route_that_cannot_be_is_refused_like_the_request(driver: Driver) -> None:
    assert code_of(driver.client(b"c1", m.Route(req_id=rid(1), policy="random"))) == (rid(1), ErrorCode.BAD_ARG)


@pytest.mark.parametrize(
    ("kind", "names", "has_stats"),
    [(m.QueryKind.STATS, ["v", "w"], True), (m.QueryKind.WORKERS, ["v", "w"], False), (m.QueryKind.HEALTH, [], False)],
)
def test_a_query_is_answered_with_as_much_as_was_asked(
    driver: Driver, kind: m.QueryKind, names: list[str], has_stats: bool
) -> None:
    driver.join_worker(b"w2", "v")
    reported = WorkerStats(worker_id="w", incarnation=1, state="ready", malformed=3)
    for link in (b"w1", b"w2"):
        payload = pack(msgspec.structs.replace(reported, worker_id=link.decode()))
        driver.worker(link, m.WorkerStatus(payload=wire.describe([payload])), payload)
    (send,) = driver.core.on_client(b"c1", frames_of(m.Query(req_id=rid(5), kind=kind)), driver.now, USER)

    decoded = wire.decode(send.frames)
    stats = unpack(decoded.payload[0], ClusterStats)

    assert decoded.message.req_id == rid(5)
    assert stats.healthy
    assert [view.worker_id for view in stats.workers] == names
    assert all((view.stats is not None) == has_stats for view in stats.workers)
    assert stats.broker.incarnation == 42


def test_figures_count_what_happened(driver: Driver) -> None:
    driver.client(b"c1", length(1))
    driver.reply(b"w1", 1, done())
    driver.client(b"c1", length(2, deadline_ms=0))
    driver.client(b"c1", length(3))
    stats = driver.stats()
    assert (stats.requests, stats.inflight, stats.clients) == (3, 1, 1)
    assert stats.failed == {"DEADLINE": 1}
    assert stats.routed == {"consistent_hash": 2}
    (view,) = driver.core.cluster_stats(driver.now, m.QueryKind.WORKERS).workers
    assert (view.dispatched, view.inflight, view.share) == (2, 1, 1.0)


def test_figures_that_cannot_be_read_are_the_workers_garbage(driver: Driver) -> None:
    driver.worker(b"w1", m.WorkerStatus(payload=wire.describe([b"\xc1"])), b"\xc1")
    assert driver.stats().malformed == 1
    (view,) = driver.core.cluster_stats(driver.now, m.QueryKind.STATS).workers
    assert view.stats is None
