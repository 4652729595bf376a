"""The worker's core: joining, lease, states, calls and their one answer, whatever a broker sends."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import messages as messages_of
from bus import wire
from bus.errors import ErrorCode
from bus.messages import (
    MAX_BEAT_MODELS,
    AskNodes,
    Assign,
    AttachBulk,
    BrokerBeat,
    Cancel,
    Chunk,
    Credit,
    Delete,
    Failed,
    Forward,
    Goodbye,
    HandedOver,
    Hello,
    KvDone,
    Length,
    NodesChanged,
    NodesHeld,
    OpenStream,
    Pin,
    Put,
    Release,
    Reply,
    Resume,
    WorkerBeat,
    WorkerHello,
    WorkerState,
    WorkerStatus,
)
from bus.stats import EngineStats, ModelStats, WorkerStats, unpack
from bus.tensors import DType, TensorMeta
from kvcache.models import MAX_NAME_BYTES
from tests.unit.workers.core_bench import (
    STREAM,
    CoreBench,
    answers,
    commands,
    loaded,
    messages,
    published,
    sends,
    welcome,
)
from workers.calls import Action, CallId, Channel, Forget, Send
from workers.engine_api import EngineFigures, Hold, NodesMoved, Prefilled, Produced, Start, Stop
from workers.nodes import NodeChange

META = TensorMeta(dtype=DType.FLOAT32, shape=(2, 1, 4))
DATA = np.arange(8, dtype=np.float32).tobytes()


@pytest.fixture
def bench() -> CoreBench:
    bench = CoreBench()
    bench.join()
    return bench


def put(bench: CoreBench, seq_id: str = "s", **changes: object) -> Put:
    fields: dict[str, object] = {
        "req_id": bench.req_id(),
        "attempt": 0,
        "deadline_ms": 1000,
        "seq_id": seq_id,
        "layer": 0,
        "k": META,
        "v": META,
    }
    return Put(**(fields | changes))  # type: ignore[arg-type]  # fields by their names


def length(bench: CoreBench, seq_id: str = "s") -> Length:
    return Length(req_id=bench.req_id(), attempt=0, deadline_ms=1000, seq_id=seq_id, layer=0)


def malformed(bench: CoreBench) -> int:
    return bench.core.stats(bench.now, rss_bytes=0, lag_s=0.0).malformed


# --- what this worker holds ---


def moved(*numbers: int, is_stored: bool = True) -> NodesMoved:
    return NodesMoved(tuple(NodeChange("t", number.to_bytes(8, "big"), is_stored) for number in numbers))


def test_nodes_are_told_to_each_broker_when_they_change_and_again_when_one_asks() -> None:
    bench = CoreBench(num_links=2)
    for link in range(2):
        bench.join(link)
    bench.pass_time(0.25)
    actions = bench.engine(moved(1, 2))
    assert [send.link for send in sends(actions)] == [0, 1]
    assert [told.first for told in messages(actions, NodesChanged)] == [1, 1]
    assert bench.engine(moved(3)) == []
    assert [told.first for told in messages(bench.pass_time(0.125), NodesChanged)] == [3, 3]
    assert bench.control(AskNodes(after=1), link=1) != []
    (again,) = bench.control(AskNodes(after=2), link=1) or bench.pass_time(1 / 16)
    assert isinstance(again, Send)
    assert (again.link, wire.decode(again.frames).message.first) == (1, 3)
    assert [told.is_last for told in messages(bench.pass_time(0.0) + ask_all(bench), NodesHeld)] == [True]


def ask_all(bench: CoreBench) -> list[Action]:
    bench.now += 1 / 16
    return bench.control(AskNodes(after=0))


def test_a_beat_says_up_to_which_change_its_broker_was_told_and_what_waits(bench: CoreBench) -> None:
    bench.pass_time(0.25)
    bench.engine(moved(1, 2))
    bench.figures = EngineFigures(engine=EngineStats(backlog_tokens=77))
    assert [(beat.changes, beat.backlog_tokens) for beat in messages(bench.pass_time(0.25), WorkerBeat)] == [(2, 77)]


def test_a_new_session_is_told_everything(bench: CoreBench) -> None:
    bench.pass_time(0.25)
    bench.engine(moved(1, 2), moved(1, is_stored=False))
    bench.pass_time(0.25)
    (held,) = messages(bench.join(session=b"T" * 16), NodesHeld)
    assert (held.after, held.part, held.is_last, [run.count for run in held.runs]) == (3, 0, True, [1])


def test_the_first_token_of_a_call_is_reported_with_what_it_took(bench: CoreBench) -> None:
    call, start = bench.start()
    (report,) = messages(bench.engine(Prefilled(start.run, 40, 32, 12.5)), messages_of.Prefilled)
    assert report == messages_of.Prefilled(call=call, num_tokens=40, num_cached=32, compute_ms=12.5)
    bench.join(session=b"T" * 16)
    assert bench.engine(Prefilled(start.run, 40, 32, 12.5)) == []  # nobody waits for it any more


# --- joining and staying ---


def test_hello_goes_out_until_the_broker_welcomes_us_and_what_queued_up_before_is_dropped() -> None:
    bench = CoreBench()
    actions = bench.pass_time(0.625, answering=False)
    assert len(messages(actions, WorkerHello)) == 3
    assert sum(isinstance(action, Forget) for action in actions) == 3
    joined = bench.join()
    assert messages(joined, AttachBulk) == [AttachBulk(session=b"S" * 16)]
    assert [send.channel for send in sends(joined)] == [Channel.BULK, Channel.CONTROL, Channel.CONTROL]
    assert [held.is_last for held in messages(joined, NodesHeld)] == [True]
    assert messages(bench.pass_time(0.5), WorkerHello) == []


def test_hellos_are_numbered() -> None:
    bench = CoreBench()
    said = messages(bench.pass_time(1.0), WorkerHello)
    assert [hello.number for hello in said] == list(range(1, len(said) + 1))
    assert len(said) > 2


def test_a_beat_goes_out_each_heartbeat_with_the_state(bench: CoreBench) -> None:
    beats = messages(bench.pass_time(1.0), WorkerBeat)
    assert len(beats) == 4
    assert [beat.beat for beat in beats] == [2, 3, 4, 5]
    assert {beat.state for beat in beats} == {WorkerState.READY}


def test_silence_brings_hello_again_and_a_whole_lease_of_it_ends_the_session(bench: CoreBench) -> None:
    call, _ = bench.start()
    assert messages(bench.pass_time(0.75, answering=False), WorkerHello) == []
    assert messages(bench.pass_time(0.25, answering=False), WorkerHello) != []
    assert bench.core.inflight == 1
    bench.pass_time(1.25, answering=False)
    assert bench.core.inflight == 0
    assert not bench.core.has_joined
    assert answers(bench.forward(call, Cancel(req_id=bytes(16)))) == []


def test_an_echo_of_our_own_session_changes_nothing(bench: CoreBench) -> None:
    call, _ = bench.start()
    assert bench.control(welcome(b"S" * 16)) == []
    assert answers(bench.forward(call, Cancel(req_id=bytes(16)))) != []


def test_another_session_voids_the_calls_of_the_old_one(bench: CoreBench) -> None:
    call, _ = bench.start()
    bench.join(session=b"T" * 16)
    assert answers(bench.forward(call, Cancel(req_id=bytes(16)))) == []
    assert bench.core.inflight == 0


def given_up(bench: CoreBench) -> None:
    """Let the broker be silent until the worker has given its session up."""
    bench.pass_time(2.5, answering=False)
    assert not bench.core.has_joined


def test_a_session_that_the_broker_kept_ends_what_was_given_up_and_keeps_what_came_since(bench: CoreBench) -> None:
    message = bench.generate()
    old, _ = bench.start(message)
    upload, _ = bench.assign(put(bench), deadline_ms=60_000)
    given_up(bench)
    new, start = bench.start()
    actions = bench.join(session=b"S" * 16)
    said = answers(actions)
    assert [(one.call, one.final, one.message.code) for one in said] == [
        (old, True, ErrorCode.WORKER_LOST),
        (upload, True, ErrorCode.WORKER_LOST),
    ]
    assert said[0].message.req_id == message.req_id
    assert said[0].message.retryable
    assert commands(actions, Hold) == []
    assert messages(actions, AttachBulk) == [AttachBulk(session=b"S" * 16)]
    assert [held.is_last for held in messages(actions, NodesHeld)] == [True]
    assert messages(bench.tick(), WorkerBeat) == []  # one went out at once; the next is not due
    (tokens,) = published(bench.engine(Produced(start.run, (10,), ("x",))))
    assert tokens.tokens == (10,)
    assert answers(bench.forward(new, Cancel(req_id=bytes(16))))[0].message.code == ErrorCode.CANCELLED


def test_what_was_given_up_is_answered_once(bench: CoreBench) -> None:
    bench.start()
    given_up(bench)
    assert len(answers(bench.join(session=b"S" * 16))) == 1
    given_up(bench)
    assert answers(bench.join(session=b"S" * 16)) == []


def test_a_session_that_the_broker_kept_brings_no_lease_by_itself(bench: CoreBench) -> None:
    given_up(bench)
    bench.control(welcome(b"S" * 16))
    _, actions = bench.assign(put(bench), DATA, DATA)
    assert bench.has_failed(actions).code == ErrorCode.WORKER_LOST


def test_what_was_given_up_is_not_answered_in_another_session(bench: CoreBench) -> None:
    bench.start()
    given_up(bench)
    since, _ = bench.start()
    assert answers(bench.join(session=b"T" * 16)) == []
    assert answers(bench.forward(since, Cancel(req_id=bytes(16)))) == []
    given_up(bench)
    assert answers(bench.join(session=b"T" * 16)) == []


def test_what_was_given_up_and_released_meanwhile_is_not_answered(bench: CoreBench) -> None:
    call, _ = bench.start()
    given_up(bench)
    bench.control(Release(call=call))
    assert answers(bench.join(session=b"S" * 16)) == []


def test_sessions_of_two_brokers_are_given_up_and_regained_apart() -> None:
    bench = CoreBench(num_links=2)
    bench.join(0)
    bench.join(1, session=b"T" * 16)
    calls = [bench.start(link=link)[0] for link in (0, 1)]
    given_up(bench)
    assert [said.call for said in answers(bench.join(1, session=b"T" * 16))] == calls[1:]
    assert [said.call for said in answers(bench.join(0))] == calls[:1]


def test_who_asks_for_tokens_of_an_unknown_call_is_not_left_to_wait(bench: CoreBench) -> None:
    (said,) = answers(bench.forward(77, Resume(req_id=STREAM, epoch=0, from_seq=0)))
    assert (said.call, said.final, said.message.code) == (77, True, ErrorCode.WORKER_LOST)
    assert said.message.req_id == STREAM
    for message in (Credit(req_id=STREAM, chunks=1), Cancel(req_id=STREAM)):
        assert bench.forward(77, message) == []
    assert bench.core.on_control(0, [wire.encode(Forward(call=77))], bench.now) == []
    assert bench.core.on_control(0, [wire.encode(Forward(call=77)), b"junk"], bench.now) == []


def test_who_asks_for_tokens_of_a_call_that_was_given_up_is_answered_once(bench: CoreBench) -> None:
    call, _ = bench.start()
    given_up(bench)
    (said,) = answers(bench.forward(call, Resume(req_id=STREAM, epoch=0, from_seq=0)))
    assert (said.call, said.message.code) == (call, ErrorCode.WORKER_LOST)
    assert answers(bench.join(session=b"S" * 16)) == []


def test_goodbye_of_the_broker_ends_the_session(bench: CoreBench) -> None:
    bench.control(Goodbye(reason="restart"))
    assert not bench.core.has_joined
    assert len(messages(bench.pass_time(0.5, answering=False), WorkerHello)) == 2


def test_status_goes_out_each_second_with_the_figures(bench: CoreBench) -> None:
    bench.pass_time(1.0)
    said = [wire.decode(list(send.frames)) for send in sends(bench.pass_time(1.0))]
    (payload,) = [payload for message, payload in said if isinstance(message, WorkerStatus)]
    stats = unpack(bytes(payload[0]), WorkerStats)
    assert (stats.worker_id, stats.incarnation, stats.state) == ("w", 7, "ready")


def test_a_worker_is_loading_until_each_model_named_is_loaded_or_has_failed() -> None:
    bench = CoreBench(preloading=["a"])
    bench.join()
    bench.figures = loaded("a", "loading")
    assert {beat.state for beat in messages(bench.pass_time(0.25), WorkerBeat)} == {WorkerState.LOADING}
    bench.figures = loaded("a", "failed")
    bench.now += 0.05
    assert [beat.state for beat in messages(bench.tick(), WorkerBeat)] == [WorkerState.READY]


def test_a_worker_is_ready_without_the_models_that_there_was_no_room_for() -> None:
    bench = CoreBench(preloading=["a"])
    bench.join()
    bench.figures = loaded("a", "absent")
    assert {beat.state for beat in messages(bench.pass_time(0.25), WorkerBeat)} == {WorkerState.LOADING}
    bench.figures = EngineFigures(models=(ModelStats(name="a", state="absent", reason="no room"),))
    bench.now += 0.05
    assert [beat.state for beat in messages(bench.tick(), WorkerBeat)] == [WorkerState.READY]


def test_a_beat_tells_of_no_more_models_than_it_may_and_of_those_in_use_first(bench: CoreBench) -> None:
    absent = tuple(ModelStats(name=f"{number:02}".rjust(MAX_NAME_BYTES, "m"), state="absent") for number in range(40))
    bench.figures = EngineFigures(models=(*absent, ModelStats(name="used", state="ready")))
    beats = [message for message in messages(bench.pass_time(0.5), WorkerBeat) if message.models]
    assert beats
    for beat in beats:
        assert len(beat.models) == MAX_BEAT_MODELS
        assert beat.models[0] == ("used", "ready")


# --- the lease ---


def test_without_a_lease_writes_are_refused_and_change_nothing(bench: CoreBench) -> None:
    bench.pass_time(2.0, answering=False)
    for message, payload in (
        (put(bench), (DATA, DATA)),
        (Delete(req_id=bench.req_id(), attempt=0, deadline_ms=1000, seq_id="s"), ()),
        (Pin(req_id=bench.req_id(), attempt=0, deadline_ms=1000, seq_id="s"), ()),
    ):
        _, actions = bench.assign(message, *payload)
        assert bench.has_failed(actions).code == ErrorCode.WORKER_LOST
    assert bench.store.stats(bench.now).sequences == 0


def test_a_new_session_brings_no_lease_until_a_beat_of_its_own_is_answered(bench: CoreBench) -> None:
    bench.control(welcome(b"T" * 16))
    _, actions = bench.assign(put(bench), DATA, DATA)
    assert bench.has_failed(actions).code == ErrorCode.WORKER_LOST


def test_reads_need_no_lease(bench: CoreBench) -> None:
    bench.assign(put(bench), DATA, DATA)
    bench.pass_time(2.0, answering=False)
    _, actions = bench.assign(length(bench))
    assert answers(actions)[0].message.length == 2


def test_a_pause_of_the_loop_voids_the_lease_before_anything_else_happens(bench: CoreBench) -> None:
    bench.now += 0.6
    _, actions = bench.assign(put(bench), DATA, DATA)
    assert bench.has_failed(actions).code == ErrorCode.WORKER_LOST
    bench.tick()
    bench.control(BrokerBeat(beat=1, lease_ms=60_000))  # of before the pause
    _, actions = bench.assign(put(bench), DATA, DATA)
    assert bench.has_failed(actions).code == ErrorCode.WORKER_LOST
    bench.pass_time(0.3)
    _, actions = bench.assign(put(bench), DATA, DATA)
    assert isinstance(answers(actions)[0].message, KvDone)


# --- calls ---


def test_each_request_gets_exactly_one_final_answer(bench: CoreBench) -> None:
    call, actions = bench.assign(put(bench), DATA, DATA)
    assert [(said.call, said.final) for said in answers(actions)] == [(call, True)]
    assert bench.pass_time(2.0, answering=True) != []
    assert answers(bench.forward(call, Cancel(req_id=bytes(16)))) == []


def test_a_deadline_ends_the_call_and_its_work(bench: CoreBench) -> None:
    call, actions = bench.assign(bench.generate(), b"\x01\x00\x00\x00", deadline_ms=300)
    run = commands(actions, Start)[0].run
    late = bench.pass_time(0.4)
    assert [(said.call, said.message.code) for said in answers(late)] == [(call, ErrorCode.DEADLINE)]
    assert commands(late, Stop) == [Stop(run)]


def test_a_request_whose_time_is_up_on_arrival_is_not_begun(bench: CoreBench) -> None:
    _, actions = bench.assign(put(bench), DATA, DATA, deadline_ms=0)
    assert bench.has_failed(actions).code == ErrorCode.DEADLINE
    assert bench.store.stats(bench.now).sequences == 0


def test_release_stops_the_work_and_is_not_answered(bench: CoreBench) -> None:
    call, start = bench.start()
    actions = bench.control(Release(call=call))
    assert commands(actions, Stop) == [Stop(start.run)]
    assert answers(actions) == []
    assert bench.control(Release(call=call)) == []


def test_a_retry_gets_the_answer_that_was_lost_and_changes_nothing(bench: CoreBench) -> None:
    message = put(bench)
    bench.assign(message, DATA, DATA)
    bench.assign(Delete(req_id=bench.req_id(), attempt=0, deadline_ms=1000, seq_id="s"))
    _, actions = bench.assign(put(bench, req_id=message.req_id, attempt=1, deadline_ms=500), DATA, DATA)
    (said,) = answers(actions)
    assert (said.message.length, said.message.duplicate) == (2, True)
    assert bench.store.stats(bench.now).sequences == 0


def test_a_request_id_used_for_something_else_is_refused(bench: CoreBench) -> None:
    message = put(bench)
    bench.assign(message, DATA, DATA)
    _, actions = bench.assign(put(bench, req_id=message.req_id), DATA, bytes(len(DATA)))
    assert bench.has_failed(actions).code == ErrorCode.CONFLICT


def test_request_ids_mean_nothing_between_clients_or_tenants(bench: CoreBench) -> None:
    message = put(bench)
    bench.assign(message, DATA, DATA)
    for options in ({"client": b"d" * 16}, {"tenant": "u"}):
        _, actions = bench.assign(put(bench, req_id=message.req_id, seq_id="other"), DATA, DATA, **options)
        assert isinstance(answers(actions)[0].message, KvDone)


def test_a_failed_request_may_be_tried_again(bench: CoreBench) -> None:
    message = Delete(req_id=bench.req_id(), attempt=0, deadline_ms=1000, seq_id="s")
    _, actions = bench.assign(message)
    assert bench.has_failed(actions).code == ErrorCode.NOT_FOUND
    bench.assign(put(bench), DATA, DATA)
    _, actions = bench.assign(message)
    assert answers(actions)[0].message.count == 1


# --- what cannot be read or sent ---


def test_a_request_that_cannot_be_read_is_still_answered(bench: CoreBench) -> None:
    message = put(bench)
    head = wire.encode(Assign(call=9, tenant="t", client=b"c" * 16, deadline_ms=1000, reason=""))
    unreadable: tuple[list[bytes], ...] = ([], [b"junk"], [wire.encode(OpenStream(req_id=message.req_id))])
    said = [answers(bench.core.on_control(0, [head, *frames], bench.now))[0] for frames in unreadable]
    assert {(one.call, one.final, one.message.code) for one in said} == {(9, True, ErrorCode.BAD_FRAME)}
    assert said[-1].message.req_id == message.req_id
    assert malformed(bench) == 3


def test_bytes_that_changed_on_the_way_are_corrupt_and_worth_a_retry(bench: CoreBench) -> None:
    message = put(bench, payload=wire.describe([DATA, DATA]))
    head = wire.encode(Assign(call=9, tenant="t", client=b"c" * 16, deadline_ms=1000, reason=""))
    flipped = bytes([DATA[0] ^ 1]) + DATA[1:]
    actions = bench.core.on_control(0, [head, wire.encode(message), DATA, flipped], bench.now)
    failed = bench.has_failed(actions)
    assert (failed.code, failed.retryable) == (ErrorCode.CORRUPT, True)


@given(st.lists(st.binary(max_size=64), max_size=4), st.booleans())
def test_no_bytes_at_all_upset_the_core(frames: list[bytes], bulk: bool) -> None:
    bench = CoreBench()
    handle = bench.core.on_bulk if bulk else bench.core.on_control
    assert handle(0, frames, bench.now) == []
    assert malformed(bench) == 1


def test_messages_that_belong_elsewhere_are_counted_and_dropped(bench: CoreBench) -> None:
    assert bench.control(Hello(instance=bytes(16), major=wire.MAJOR, minor=0, software="")) == []
    assert bench.core.on_bulk(0, [wire.encode(BrokerBeat(beat=1, lease_ms=1))], bench.now) == []
    assert malformed(bench) == 2


def test_a_refusal_is_logged_once_however_often_the_broker_repeats_it(caplog: pytest.LogCaptureFixture) -> None:
    bench = CoreBench()
    taken = Failed(req_id=bytes(16), code=4, message="worker id 'w' is taken", retryable=False)
    other = Failed(req_id=bytes(16), code=2, message="version 2 is not supported", retryable=False)
    for refusal in (taken, taken, taken, other, other):
        assert bench.control(refusal) == []
    assert caplog.text.count("is taken") == 1
    assert caplog.text.count("not supported") == 1
    bench.join()
    bench.control(other)
    assert caplog.text.count("not supported") == 2


def test_a_follow_up_that_does_not_belong_within_a_request_ends_it(bench: CoreBench) -> None:
    call, start = bench.start()
    actions = bench.forward(call, OpenStream(req_id=bytes(16)))
    assert bench.has_failed(actions).code == ErrorCode.BAD_FRAME
    assert commands(actions, Stop) == [Stop(start.run)]


def test_a_chunk_for_a_generation_ends_it_typed(bench: CoreBench) -> None:
    call, _ = bench.start()
    actions = bench.forward(call, Chunk(req_id=bytes(16), offset=0, payload=()), b"x", bulk=True)
    assert bench.has_failed(actions).code == ErrorCode.BAD_ARG


def test_our_own_fault_in_one_request_is_answered_and_harms_no_other(
    bench: CoreBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(bench.store, "length", explode)
    _, actions = bench.assign(length(bench))
    assert bench.has_failed(actions).code == ErrorCode.INTERNAL
    assert "ZeroDivisionError" in caplog.text
    _, actions = bench.assign(put(bench), DATA, DATA)
    assert isinstance(answers(actions)[0].message, KvDone)


def test_our_own_fault_while_a_request_goes_on_ends_that_request(
    bench: CoreBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    call, actions = bench.assign(put(bench))
    assert answers(actions) == []
    monkeypatch.setattr(bench.store, "write", explode)
    actions = bench.forward(call, Chunk(req_id=bytes(16), offset=0, payload=()), b"x", bulk=True)
    assert bench.has_failed(actions).code == ErrorCode.INTERNAL
    assert "ZeroDivisionError" in caplog.text
    assert bench.store.stats(bench.now).used_bytes == 0


def test_a_bulk_lane_that_is_full_ends_its_call_as_overload(bench: CoreBench) -> None:
    call, _ = bench.start()
    send = Send(0, Channel.BULK, [wire.encode(Reply(call=call, final=False)), b""], CallId(0, call))
    actions = bench.core.on_unsent(send, bench.now)
    assert bench.has_failed(actions).code == ErrorCode.OVERLOADED
    assert bench.core.on_unsent(send, bench.now) == []


def test_a_broker_that_takes_no_control_messages_counts_as_gone(bench: CoreBench) -> None:
    bench.start()
    bench.core.on_unsent(Send(0, Channel.CONTROL, [b""]), bench.now)
    assert not bench.core.has_joined
    assert bench.core.inflight == 0


def test_the_calls_of_two_brokers_are_told_apart() -> None:
    bench = CoreBench(num_links=2)
    bench.join(0)
    bench.join(1, session=b"T" * 16)
    one = Assign(call=5, tenant="t", client=b"c" * 16, deadline_ms=60_000, reason="")
    for link in (0, 1):
        frames = [wire.encode(one), wire.encode(bench.generate(payload=wire.describe([b"\x01\0\0\0"]))), b"\x01\0\0\0"]
        bench.core.on_control(link, frames, bench.now)
    assert bench.core.inflight == 2
    (said,) = answers(
        bench.core.on_control(1, [wire.encode(Forward(call=5)), wire.encode(Cancel(req_id=bytes(16)))], 0.0)
    )
    assert said.message.code == ErrorCode.CANCELLED
    assert bench.core.inflight == 1


# --- leaving ---


def test_draining_is_told_at_once_refuses_what_is_new_and_waits_for_what_runs(bench: CoreBench) -> None:
    call, _ = bench.start()
    assert [beat.state for beat in messages(bench.core.drain(bench.now), WorkerBeat)] == [WorkerState.DRAINING]
    assert bench.core.drain(bench.now) == []
    _, actions = bench.assign(put(bench), DATA, DATA)
    assert bench.has_failed(actions).code == ErrorCode.DRAINING
    assert bench.core.inflight == 1
    bench.forward(call, Cancel(req_id=bytes(16)))
    assert bench.core.is_drained
    assert messages(bench.core.farewell(), Goodbye) == [Goodbye(reason="drained")]


def test_a_broker_that_is_back_while_a_worker_drains_may_have_its_sequences_copied(bench: CoreBench) -> None:
    bench.assign(put(bench), DATA, DATA, version=5)
    was_drained = []
    happens: list[Callable[[], object]] = [
        lambda: bench.core.drain(bench.now),
        lambda: bench.control(Goodbye(reason="restarting")),  # nobody is left to wait for, unless it is back in time
        lambda: bench.join(session=b"T" * 16),
        lambda: bench.control(HandedOver(num_left=0)),
    ]
    for happen in happens:
        happen()
        was_drained.append(bench.core.is_drained)
    assert was_drained == [False, True, False, True]


@pytest.mark.parametrize("how", ["it says so", "it is gone"])
def test_a_worker_that_holds_prompts_stays_until_its_broker_has_had_them_fetched(bench: CoreBench, how: str) -> None:
    bench.core.on_engine(moved(1), bench.now)
    bench.core.drain(bench.now)
    bench.pass_time(5.0)
    assert not bench.core.is_drained
    if how == "it says so":
        bench.control(HandedOver(num_left=0))
    else:
        bench.pass_time(2.5, answering=False)
    assert bench.core.is_drained


def test_after_ten_seconds_of_draining_what_still_runs_fails_as_lost(bench: CoreBench) -> None:
    call, start = bench.start()
    bench.core.drain(bench.now)
    assert answers(bench.pass_time(9.9375)) == []
    actions = bench.pass_time(0.125)
    (said,) = answers(actions)
    assert (said.call, said.message.code, said.message.retryable) == (call, ErrorCode.WORKER_LOST, True)
    assert "drain" in said.message.message
    assert commands(actions, Stop) == [Stop(start.run)]
    assert bench.core.is_drained


def test_a_worker_that_is_loading_can_drain_too() -> None:
    bench = CoreBench(preloading=["a"])
    bench.core.drain(bench.now)
    bench.figures = loaded("a", "ready")
    bench.tick()
    assert bench.core.state is WorkerState.DRAINING
    assert bench.core.is_drained
