"""The table of calls: one final answer each, and nothing after it."""

from __future__ import annotations

import logging

import msgspec
import pytest

from bus.errors import BadArgument, InternalError
from bus.messages import Assign, FinishReason, Generate, KvDone, Length, PromptKind, Sampling, StreamEnd
from bus.traces import TraceContext
from tests.unit.workers.core_bench import answers
from workers.calls import CallId, Calls, Record

REQUEST = Length(req_id=b"r" * 16, attempt=0, deadline_ms=1000, seq_id="s", layer=0)
DONE = KvDone(req_id=b"r" * 16)


GENERATE = Generate(
    req_id=b"g" * 16,
    attempt=0,
    deadline_ms=1000,
    stream_id=b"s" * 16,
    epoch=0,
    kind=PromptKind.TEXT,
    sampling=Sampling(),
)
END = StreamEnd(
    req_id=b"g" * 16,
    epoch=0,
    num_tokens=3,
    digest=bytes(32),
    finish_reason=FinishReason.STOP,
    prompt_tokens=5,
    cached_tokens=4,
    queue_ms=1.0,
    prefill_ms=2.0,
    decode_ms=3.0,
)


def opened() -> Calls:
    calls = Calls()
    calls.open(0, Assign(call=5, tenant="t", client=b"c" * 16, deadline_ms=1500, reason="why"), REQUEST, 10.0)
    return calls


def test_a_call_knows_who_asked_for_what_until_when_and_why() -> None:
    call = opened().find(CallId(0, 5))
    assert call is not None
    assert (call.request, call.message, call.deadline, call.reason) == (
        ("t", b"c" * 16, b"r" * 16),
        REQUEST,
        11.5,
        "why",
    )


def test_a_call_is_told_in_detail_under_its_label(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="workers.calls")
    calls, assign = Calls(), Assign(call=5, tenant="t", client=b"c" * 16, deadline_ms=1500, reason="why")
    calls.finish(calls.open(0, assign, msgspec.structs.replace(GENERATE, label="chat 7"), 10.0), END)
    assert [(record.getMessage(), record.__dict__["request_id"]) for record in caplog.records] == [
        ("Generate begins, why", "chat 7"),
        (
            "Generate ends: stop, 3 tokens, 4 of 5 prompt tokens cached, queue 1.0 ms, prefill 2.0 ms, decode 3.0 ms",
            "chat 7",
        ),
    ]
    caplog.clear()
    call = calls.open(0, assign, REQUEST, 10.0)
    calls.fail(call, BadArgument("never seen"))
    calls.forget(calls.open(0, assign, REQUEST, 10.0))
    assert [record.getMessage() for record in caplog.records] == [
        "Length begins, why",
        "Length ends: BAD_ARG",
        "Length begins, why",
        "Length ends: nobody waits for it",
    ]
    assert {record.__dict__["request_id"] for record in caplog.records} == {REQUEST.req_id.hex()}


def test_a_recorded_generation_ends_with_a_span_of_what_took_its_time() -> None:
    calls = Calls()
    told = msgspec.structs.replace(GENERATE, model="m", label="chat 7", trace=f"00-{'a' * 32}-{'b' * 16}-01")
    assign = Assign(call=5, tenant="t", client=b"c" * 16, deadline_ms=1500, reason="why")
    of_broker = msgspec.structs.replace(assign, trace=f"00-{'a' * 32}-{'c' * 16}-01")
    for envelope, parent in ((assign, "b" * 16), (of_broker, "c" * 16)):
        _, record = calls.finish(calls.open(0, envelope, told, 10.0), END)
        assert isinstance(record, Record)
        assert record.span.parent == TraceContext("a" * 32, parent, True)
        assert (record.span.started_at, record.span.error) == (10.0, "")
        assert record.span.parts == (("queue", 0.001), ("prefill", 0.002), ("decode", 0.003))
        assert record.span.attributes == {
            "kvcache.request.id": "chat 7",
            "gen_ai.request.model": "m",
            "gen_ai.usage.input_tokens": 5,
            "gen_ai.usage.output_tokens": 3,
            "gen_ai.response.finish_reasons": "stop",
            "kvcache.cached_tokens": 4,
        }


def test_a_recorded_generation_that_fails_or_is_given_up_says_so() -> None:
    calls, assign = Calls(), Assign(call=5, tenant="t", client=b"c" * 16, deadline_ms=1500, reason="why")
    told = msgspec.structs.replace(GENERATE, trace=f"00-{'a' * 32}-{'b' * 16}-01")
    _, failed = calls.fail(calls.open(0, assign, told, 10.0), BadArgument("a secret"))
    (given_up,) = calls.forget(calls.open(0, assign, told, 10.0))
    assert isinstance(failed, Record)
    assert isinstance(given_up, Record)
    assert (failed.span.error, given_up.span.error) == ("BAD_ARG", "nobody waits for it")


def test_what_nobody_records_has_no_span() -> None:
    assign = Assign(call=5, tenant="t", client=b"c" * 16, deadline_ms=1500, reason="why")
    for trace in ("", f"00-{'a' * 32}-{'b' * 16}-00"):
        calls = Calls()
        call = calls.open(0, assign, msgspec.structs.replace(GENERATE, trace=trace), 10.0)
        assert len(calls.finish(call, END)) == 1
        assert calls.forget(call) == []


def test_without_detail_only_faults_of_ours_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="workers.calls")
    calls = opened()
    calls.fail(next(calls.everything()), BadArgument("theirs"))
    assert caplog.records == []
    calls = opened()
    calls.fail(next(calls.everything()), InternalError("ours"))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "Length ends: INTERNAL")
    ]


def test_nothing_is_said_after_the_final_answer() -> None:
    calls = opened()
    call = calls.find(CallId(0, 5))
    assert call is not None
    assert [said.final for said in answers(calls.say(call, DONE))] == [False]
    assert [said.final for said in answers(calls.finish(call, DONE))] == [True]
    assert calls.say(call, DONE) == []
    assert calls.finish(call, DONE) == []
    assert calls.fail(call, InternalError("late")) == []
    assert len(calls) == 0


def test_calls_are_found_by_link_and_by_what_is_overdue() -> None:
    calls = opened()
    assert [call.id for call in calls.of_link(0)] == [CallId(0, 5)]
    assert calls.of_link(1) == []
    assert calls.overdue(11.4) == []
    assert [call.id for call in calls.overdue(11.5)] == [CallId(0, 5)]
    assert calls.find(CallId(1, 5)) is None
