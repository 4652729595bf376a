"""The table of calls: one final answer each, and nothing after it."""

from __future__ import annotations

from bus.errors import InternalError
from bus.messages import Assign, KvDone, Length
from tests.unit.workers.core_bench import answers
from workers.calls import CallId, Calls

REQUEST = Length(req_id=b"r" * 16, attempt=0, deadline_ms=1000, seq_id="s", layer=0)
DONE = KvDone(req_id=b"r" * 16)


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
