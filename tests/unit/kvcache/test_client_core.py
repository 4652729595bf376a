"""The client's decisions, without sockets or clocks: what is sent, when again, and how everything ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus import messages as m
from bus import wire
from bus.errors import (
    BadArgument,
    Cancelled,
    Conflict,
    ConnectionLost,
    Corrupt,
    DeadlineExceeded,
    KVCacheError,
    MalformedMessage,
    NotFound,
    NoWorkers,
    Overloaded,
    TooLarge,
    UnsupportedVersion,
    WorkerLost,
)
from bus.limits import UPLOAD_WINDOW
from bus.sockets import BULK
from bus.stats import PromptPart, pack
from bus.streams import Deliver, stream_digest, token_bytes
from bus.tensors import DType, TensorMeta
from kvcache.client import requests
from kvcache.client.calls import Action, Emit, Fail, Settle, ToBulk, ToControl, Unwatch, Watch
from kvcache.client.config import client_config
from kvcache.client.core import FIRST_CONTACT_S, GRACE_S, MAX_OUT, MAX_PENDING, MAX_READS, MAX_UPLOADED, ClientCore
from kvcache.client.prompts import check_index, check_name, check_seconds, make_prompt, optional_name
from kvcache.client.results import Alternative, Done, PromptTokens, Start, Token
from kvcache.client.retries import RetryBudget, retry_delay
from kvcache.client.session import Session
from kvcache.client.streams import GenerateCall, Wanted
from kvcache.client.tokens import as_tokens
from kvcache.client.transfers import GET_CREDIT, WriteCall

A = TypeVar("A")
_ids = count(1)


def new_id() -> bytes:
    return next(_ids).to_bytes(16, "little")


def welcome(session: bytes = b"s" * 16, incarnation: int = 1, **limits: int) -> m.Welcome:
    values = {
        "heartbeat_ms": 250,
        "lease_ms": 2000,
        "max_inline_bytes": 64,
        "max_prompt_bytes": 1000,
        "max_tensor_bytes": 10_000,
        "chunk_bytes": 100,
        "window_tokens": 1024,
    }
    return m.Welcome(session=session, incarnation=incarnation, major=wire.MAJOR, minor=0, **(values | limits))


def core(*, joined: bool = True, max_retries: int = 2) -> ClientCore:
    made = ClientCore(b"i" * 16, url="tcp://x:1", software="test", max_retries=max_retries, jitter=lambda: 0.5, now=0.0)
    if joined:
        made.on_message(welcome(), (), 0.0)
        made.on_attached(0.0)
    return made


def length_call(deadline: float = 60.0) -> Any:
    return requests.length(new_id(), deadline, "s", 0)


def generate_call(deadline: float = 60.0, **wanted: Any) -> GenerateCall:
    prompt = make_prompt("hello", None, None, model="", cache_salt="")
    return GenerateCall(new_id(), deadline, Wanted(prompt=prompt, sampling=m.Sampling(seed=9), **wanted), 0.0)


def sent(actions: Sequence[Action], kind: type[A]) -> list[A]:
    messages = [action.message for action in actions if isinstance(action, ToControl | ToBulk)]
    return [message for message in messages if isinstance(message, kind)]


def of(actions: Sequence[Action], kind: type[A]) -> list[A]:
    return [action for action in actions if isinstance(action, kind)]


def failed(req_id: bytes, error: KVCacheError) -> m.Failed:
    return wire.failed(req_id, error)


def is_joined(session: Session) -> bool:
    return session.is_joined


# --- joining -------------------------------------------------------------------------------------


def test_hello_is_said_until_a_broker_welcomes_and_beats_follow() -> None:
    session = Session(b"i" * 16, "test", 0.0)
    first, second = session.tick(0.0), session.tick(0.25)
    assert session.tick(0.3) is None
    assert isinstance(first, m.Hello)
    assert second == msgspec.structs.replace(first, number=first.number + 1)
    assert session.goodbye() is None
    assert session.welcome(welcome(), 0.3)
    assert session.tick(0.4) is None
    assert session.tick(0.55) == m.Beat(beat=1)
    session.heard(0.6)
    assert session.tick(0.8) == m.Beat(beat=2)
    assert isinstance(session.goodbye(), m.Goodbye)


def test_three_missed_beats_mean_hello_again_and_the_same_session_loses_nothing() -> None:
    session = Session(b"i" * 16, "test", 0.0)
    session.welcome(welcome(), 0.0)
    session.heard(0.0)
    assert isinstance(session.tick(0.75), m.Beat)
    assert is_joined(session)
    session.tick(0.76)
    assert not is_joined(session)
    assert isinstance(session.tick(1.0), m.Hello)
    assert not session.welcome(welcome(), 1.1)
    assert session.renewed_at == -math.inf
    assert session.welcome(welcome(b"t" * 16), 1.2)
    assert session.renewed_at == 1.2


def test_what_is_submitted_waits_for_the_welcome() -> None:
    client = core(joined=False)
    call = length_call()
    assert client.submit(call, 0.0) == []
    assert not client.is_joined
    hello = m.Hello(instance=b"i" * 16, major=wire.MAJOR, minor=wire.MINOR, software="test", number=1)
    assert client.tick(0.0) == [ToControl(hello)]
    actions = client.on_message(welcome(), (), 0.1)
    assert actions == [ToBulk(m.AttachBulk(session=b"s" * 16))]
    assert sent(client.tick(0.1), m.Length) == []  # answers on the bulk lane would find nobody
    assert sent(client.on_attached(0.2), m.Length)[0].req_id == call.key
    assert client.on_message(welcome(), (), 0.2) == []


def test_a_bulk_lane_that_does_not_connect_keeps_small_requests_only_a_moment() -> None:
    client = core(joined=False)
    client.submit(length_call(), 0.0)
    client.on_message(welcome(), (), 0.0)
    client.on_message(m.BrokerBeat(beat=1, lease_ms=1), (), 0.9)
    assert sent(client.tick(0.9), m.Length) == []
    assert sent(client.tick(1.0), m.Length)


def test_a_broker_that_never_answers_is_given_a_few_seconds() -> None:
    client = core(joined=False)
    call = length_call()
    client.submit(call, 0.0)
    assert of(client.tick(FIRST_CONTACT_S - 0.1), Fail) == []
    [fail] = of(client.tick(FIRST_CONTACT_S), Fail)
    assert isinstance(fail.error, ConnectionLost)
    assert fail.error.request_id == call.key.hex()


def test_a_broker_that_went_away_may_come_back_until_the_deadline() -> None:
    client = core()
    client.on_message(m.Goodbye(reason="restart"), (), 0.0)
    assert not client.is_joined
    client.submit(length_call(20.0), 0.0)
    assert of(client.tick(19.9), Fail) == []
    [fail] = of(client.tick(20.0), Fail)
    assert isinstance(fail.error, ConnectionLost)


def test_a_broker_of_another_version_ends_everything_at_once() -> None:
    client = core(joined=False)
    client.submit(length_call(), 0.0)
    refusal = failed(wire.NO_REQUEST, UnsupportedVersion("speaks 2.0"))
    [fail] = client.on_message(refusal, (), 0.1)
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, UnsupportedVersion)
    [fail] = client.submit(length_call(), 0.2)
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, UnsupportedVersion)
    assert client.on_message(failed(wire.NO_REQUEST, MalformedMessage("?")), (), 0.3) == []


# --- retries -------------------------------------------------------------------------------------


def test_only_what_may_pass_is_tried_again_with_the_same_id() -> None:
    client = core()
    call = length_call()
    client.submit(call, 0.0)
    [fail] = client.on_message(failed(call.key, Conflict("no", detail=5)), (), 0.1)
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, Conflict)
    assert fail.error.current_len == 5
    call = length_call()
    client.submit(call, 0.2)
    assert client.on_message(failed(call.key, WorkerLost("gone")), (), 0.2) == []
    assert sent(client.tick(0.21), m.Length) == []  # full jitter: half of 50 ms here
    [again] = sent(client.tick(0.23), m.Length)
    assert (again.req_id, again.attempt) == (call.key, 1)
    assert again.deadline_ms == 59_770


def test_retries_end_after_max_retries() -> None:
    client = core(max_retries=1)
    call = length_call()
    client.submit(call, 0.0)
    assert client.on_message(failed(call.key, WorkerLost("1")), (), 0.0) == []
    client.tick(0.1)
    [fail] = client.on_message(failed(call.key, WorkerLost("2")), (), 0.1)
    assert isinstance(fail, Fail)
    assert fail.error.message == "2"


def test_the_peers_retry_after_is_respected_and_never_past_the_deadline() -> None:
    client = core()
    call = length_call(3.0)
    client.submit(call, 0.0)
    client.on_message(failed(call.key, Overloaded("full", retry_after_ms=1000)), (), 0.0)
    client.on_message(m.BrokerBeat(beat=1, lease_ms=1), (), 0.9)
    assert sent(client.tick(1.02), m.Length) == []
    assert sent(client.tick(1.03), m.Length)
    [fail] = client.on_message(failed(call.key, Overloaded("full", retry_after_ms=2000)), (), 1.03)
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, Overloaded)


@pytest.mark.parametrize("incarnation", [1, 2], ids=["the same, after a pause", "another"])
def test_a_broker_that_forgot_us_and_its_workers_is_waited_for_beyond_max_retries(incarnation: int) -> None:
    client = core(max_retries=0)
    call = length_call()
    client.submit(call, 0.0)
    client.on_message(welcome(b"t" * 16, incarnation=incarnation), (), 0.1)
    client.on_attached(0.1)
    now = 0.2
    for _ in range(6):
        now += 0.7
        client.on_message(m.BrokerBeat(beat=1, lease_ms=1), (), now)
        assert sent(client.tick(now), m.Length)
        assert client.on_message(failed(call.key, NoWorkers("none yet")), (), now) == []
    now = 11.0
    client.on_message(m.BrokerBeat(beat=1, lease_ms=1), (), now)
    client.tick(now)
    [fail] = client.on_message(failed(call.key, NoWorkers("none at all")), (), now)
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, NoWorkers)


def test_what_is_on_its_way_to_a_worker_is_waited_for_beyond_max_retries() -> None:
    client = core(max_retries=0)
    call = length_call()
    client.submit(call, 0.0)
    now = 0.0
    for _ in range(4):
        coming = failed(call.key, NoWorkers("another copy is being made", detail=1, retry_after_ms=50))
        assert client.on_message(coming, (), now) == []
        now += 0.7
        client.on_message(m.BrokerBeat(beat=1, lease_ms=1), (), now)
        assert sent(client.tick(now), m.Length)
    assert isinstance(client.on_message(failed(call.key, NoWorkers("none")), (), now)[0], Fail)


def test_the_budget_stops_a_storm_of_retries() -> None:
    client = core(max_retries=100)
    retried = 0
    for _ in range(40):
        call = length_call()
        client.submit(call, 0.0)
        retried += client.on_message(failed(call.key, Overloaded("full")), (), 0.0) == []
    assert 13 <= retried <= 14  # a floor of ten, and a tenth of forty requests


def test_all_that_a_lost_worker_had_is_tried_again_each_a_few_times() -> None:
    client = core(max_retries=2)
    calls = [length_call() for _ in range(200)]
    for call in calls:
        client.submit(call, 0.0)
    now = 0.0
    for _ in range(2):
        assert all(client.on_message(failed(call.key, WorkerLost("gone")), (), now) == [] for call in calls)
        now += 5.0
        client.on_message(m.BrokerBeat(beat=1, lease_ms=1), (), now)
        assert len(sent(client.tick(now), m.Length)) == 200
    assert all(isinstance(client.on_message(failed(call.key, WorkerLost("gone")), (), now)[0], Fail) for call in calls)


def test_the_budget_refills_slowly_to_its_floor() -> None:
    budget = RetryBudget(0.0)
    assert [budget.spend(0.0) for _ in range(11)] == [True] * 10 + [False]
    assert budget.spend(1.0)
    assert not budget.spend(1.5)
    for _ in range(2000):
        budget.earn()
    assert sum(budget.spend(1.5) for _ in range(200)) == 100


@given(st.integers(0, 100), st.integers(0, 10_000), st.floats(0, 1))
def test_a_delay_is_jittered_bounded_and_at_least_what_was_asked(failures: int, after_ms: int, draw: float) -> None:
    delay = retry_delay(failures, after_ms, lambda: draw)
    assert after_ms / 1000 <= delay <= after_ms / 1000 + 2.0 * draw
    assert retry_delay(0, 0, lambda: 1.0) == 0.05
    assert len({retry_delay(failures, after_ms, lambda draw=draw: draw / 9) for draw in range(10)}) == 10  # type: ignore[misc]


def test_a_new_session_sends_everything_again_spread_out() -> None:
    client = core()
    call = length_call()
    client.submit(call, 0.0)
    assert sent(client.on_message(welcome(b"t" * 16, 2), (), 0.1), m.Message) == [m.AttachBulk(session=b"t" * 16)]
    assert client.on_attached(0.12) == []
    [again] = sent(client.tick(0.16), m.Length)
    assert (again.req_id, again.attempt) == (call.key, 1)


def test_a_damaged_or_unreadable_answer_counts_against_its_request_only() -> None:
    client = core()
    call = length_call()
    client.submit(call, 0.0)
    assert client.on_broken(wire.NO_REQUEST, MalformedMessage("?"), 0.0) == []
    assert client.on_broken(call.key, Corrupt("damaged"), 0.0) == []  # tried again
    client.tick(0.1)
    [fail] = client.on_broken(call.key, MalformedMessage("?"), 0.1)
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, MalformedMessage)


def test_answers_to_nothing_are_ignored() -> None:
    client = core()
    assert client.on_message(m.KvDone(req_id=b"?" * 16), (), 0.0) == []
    assert client.on_message(failed(b"?" * 16, WorkerLost("x")), (), 0.0) == []
    assert client.on_stream(b"?" * 16, m.SubAck(), 0.0) == []
    assert client.abandon(b"?" * 16) == []
    assert client.consume(b"?" * 16, 4, 0.0) == []
    assert client.on_unsent(b"?" * 16, 0.0) == []


def test_a_full_queue_and_too_many_requests_are_overload() -> None:
    client = core()
    call = length_call()
    client.submit(call, 0.0)
    assert client.on_unsent(call.key, 0.0) == []
    for _ in range(MAX_PENDING - 1):
        client.submit(length_call(), 0.0)
    [fail] = client.submit(length_call(), 0.0)
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, Overloaded)


def test_a_thousand_calls_are_sent_a_few_hundred_at_a_time_in_their_order() -> None:
    client = core()
    calls = [length_call() for _ in range(1000)]
    asked = [message.req_id for call in calls for message in sent(client.submit(call, 0.0), m.Length)]
    assert len(asked) == MAX_OUT
    assert sent(client.submit(generate_call(), 0.0), m.OpenStream)  # streams wait for nobody
    client.abandon(calls[-1].key)
    for number in range(999):
        actions = client.on_message(m.KvDone(req_id=asked[number], length=1), (), 0.1)
        asked += [message.req_id for message in sent(actions, m.Length)]
    assert asked == [call.key for call in calls[:-1]]


def large(req_id: bytes) -> m.KvValue:
    meta = TensorMeta(DType.UINT8, (300, 1, 1))
    return m.KvValue(req_id=req_id, k=meta, v=meta, length=300)


def test_no_more_chunks_are_asked_for_at_a_time_than_a_lane_keeps() -> None:
    """All reads are out at once, as small values need nothing else; those beyond a few have their value announced."""
    client = core()
    gets = [requests.get(new_id(), 60.0, new_id, f"s{number}", 0, 0, None) for number in range(20)]
    asked = [message for call in gets for message in sent(client.submit(call, 0.0), m.Get)]
    assert [message.credit for message in asked] == [GET_CREDIT] * MAX_READS + [0] * (20 - MAX_READS)
    assert BULK.queue_limit >= MAX_READS * (GET_CREDIT + 1)
    for call in gets:
        assert client.on_message(large(call.key), (), 0.0) == []
    ends = [wire.failed(call.key, NotFound("x")) for call in gets[:3]]
    granted = [message for end in ends for message in sent(client.on_message(end, (), 0.1), m.Credit)]
    assert granted == [m.Credit(req_id=call.key, chunks=GET_CREDIT) for call in gets[MAX_READS : MAX_READS + 3]]
    client.abandon(gets[10].key)
    client.abandon(gets[3].key)
    assert sent(client.tick(0.2), m.Credit) == [m.Credit(req_id=gets[11].key, chunks=GET_CREDIT)]


def put_call(num_bytes: int, deadline: float = 60.0) -> WriteCall:
    """K and V of so many bytes each; the welcome lets 64 go on the control lane, and 100 within their message."""
    k = np.zeros((num_bytes, 1, 1), np.uint8)
    return requests.put(new_id(), deadline, "s", 0, k, k, 1)


def begun(actions: Sequence[Action]) -> list[bytes]:
    return [message.req_id for message in sent(actions, m.Put)]


def done(call: WriteCall) -> m.KvDone:
    return m.KvDone(req_id=call.key, length=1, durability="mem1")


def test_writes_have_no_more_under_way_than_a_lane_keeps_and_begin_in_their_order() -> None:
    client = core()
    large = [put_call(300) for _ in range(8)]
    out = [key for call in large for key in begun(client.submit(call, 0.0))]
    assert out == [call.key for call in large[:4]]
    assert BULK.queue_limit >= len(out) * (1 + UPLOAD_WINDOW)
    whole, small = put_call(50), put_call(10)
    assert begun(client.submit(whole, 0.0)) == [], "others have waited for longer"
    assert begun(client.submit(small, 0.0)) == [small.key], "it goes on the other lane"
    assert begun(client.on_message(done(large[0]), (), 0.1)) == [large[4].key]
    client.abandon(large[5].key)
    assert begun(client.on_message(failed(large[1].key, Conflict("x")), (), 0.1)) == [large[6].key]
    assert begun(client.on_message(done(large[2]), (), 0.1)) == [large[7].key]
    assert begun(client.on_message(done(large[3]), (), 0.1)) == [whole.key]


def test_a_write_that_finds_no_room_tries_again_until_its_deadline_and_leaves_room_to_others() -> None:
    client = core(max_retries=0)
    first, second, third = writes = [put_call(300, 9.0) for _ in range(3)]
    full = Overloaded("full", retry_after_ms=200)
    assert [key for call in writes for key in begun(client.submit(call, 0.0))] == [call.key for call in writes]
    for call in writes:
        assert client.on_message(failed(call.key, full), (), 0.0) == []

    client.on_message(m.BrokerBeat(beat=1, lease_ms=1), (), 0.5)
    assert begun(client.tick(0.5)) == [first.key], "one at a time from now on"
    assert begun(client.on_message(failed(first.key, full), (), 0.5)) == [second.key]
    assert begun(client.on_message(failed(second.key, full), (), 0.5)) == [third.key]
    assert begun(client.on_message(done(third), (), 0.6)) == []
    assert begun(client.tick(1.0)) == [first.key]
    assert begun(client.on_message(done(first), (), 1.1)) == [second.key]
    client.on_message(m.BrokerBeat(beat=2, lease_ms=1), (), 8.9)
    [fail] = of(client.on_message(failed(second.key, full), (), 8.9), Fail)
    assert isinstance(fail.error, Overloaded)

    for _ in range(MAX_UPLOADED):  # what has been refused so often is taken again bit by bit
        call = put_call(50)
        assert begun(client.submit(call, 9.0))
        client.on_message(done(call), (), 9.0)
    later = [put_call(300) for _ in range(5)]
    assert [bool(begun(client.submit(call, 9.0))) for call in later] == [True] * 4 + [False]


def test_a_read_that_waited_for_its_turn_and_begins_again_is_not_asked_to_go_on_twice() -> None:
    client = core()
    gets = [requests.get(new_id(), 60.0, new_id, f"s{number}", 0, 0, None) for number in range(MAX_READS + 1)]
    for call in gets:
        client.submit(call, 0.0)
    waiting = gets[-1]
    assert client.on_message(large(waiting.key), (), 0.0) == []
    client.on_message(failed(waiting.key, WorkerLost("x")), (), 0.0)
    client.on_message(wire.failed(gets[0].key, NotFound("x")), (), 0.0)
    actions = client.tick(0.3)
    assert [message.credit for message in sent(actions, m.Get)] == [GET_CREDIT]
    assert sent(actions, m.Credit) == []


def test_calls_that_wait_to_be_tried_again_take_nobodys_turn() -> None:
    client = core()
    for _ in range(10):
        call = length_call()
        client.submit(call, 0.0)
        client.on_message(failed(call.key, Overloaded("x", retry_after_ms=500)), (), 0.0)
    began = [call for call in (length_call() for _ in range(MAX_OUT)) if sent(client.submit(call, 0.1), m.Length)]
    assert len(began) == MAX_OUT


def test_what_waits_for_its_turn_ends_at_its_deadline_too() -> None:
    client = core()
    for _ in range(MAX_OUT):
        client.submit(length_call(), 0.0)
    late = length_call(0.5)
    assert client.submit(late, 0.0) == []
    [fail] = of(client.tick(0.5), Fail)
    assert fail.key == late.key
    assert isinstance(fail.error, DeadlineExceeded)


# --- deadlines -----------------------------------------------------------------------------------


def test_no_answer_ends_within_a_second_of_the_deadline() -> None:
    client = core()
    client.submit(length_call(2.0), 0.0)
    client.on_message(m.BrokerBeat(beat=1, lease_ms=1), (), 2.5)
    assert of(client.tick(2.0 + GRACE_S - 0.01), Fail) == []
    [fail] = of(client.tick(2.0 + GRACE_S), Fail)
    assert isinstance(fail.error, DeadlineExceeded)


def test_what_waits_for_its_next_attempt_ends_at_the_deadline() -> None:
    client = core()
    call = length_call(1.0)
    client.submit(call, 0.0)
    client.on_message(failed(call.key, Overloaded("x", retry_after_ms=900)), (), 0.0)
    client.on_message(m.BrokerBeat(beat=1, lease_ms=1), (), 1.0)
    [fail] = of(client.tick(1.0), Fail)
    assert isinstance(fail.error, DeadlineExceeded)


EVENTS = ["tick", "welcome", "new welcome", "lost", "broken", "goodbye", "answer", "unsent", "stream"]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 3), st.floats(0.01, 1.5)), max_size=60))
def test_every_call_ends_exactly_once_and_in_time(events: list[tuple[str, int, float]]) -> None:
    client, now = core(joined=False), 0.0
    calls = [
        length_call(5.0),
        generate_call(6.0),
        requests.get(new_id(), 7.0, new_id, "s", 0, 0, None),
        length_call(0.5),
    ]
    ends: dict[bytes, float] = {}

    def note(actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Settle | Fail):
                assert action.key not in ends
                ends[action.key] = now

    for call in calls:
        note(client.submit(call, now))
    for number, (event, which, passed) in enumerate(events):
        now += passed
        note(client.tick(now))
        req_id = calls[which].req_id
        match event:
            case "welcome":
                note(client.on_message(welcome(), (), now))
                note(client.on_attached(now))
            case "new welcome":
                note(client.on_message(welcome(number.to_bytes(16, "big"), number), (), now))
            case "lost":
                note(client.on_message(failed(req_id, WorkerLost("x")), (), now))
            case "broken":
                note(client.on_broken(req_id, Corrupt("x"), now))
            case "goodbye":
                note(client.on_message(m.Goodbye(reason="x"), (), now))
            case "answer":
                note(client.on_message(m.KvDone(req_id=req_id, length=1), (), now))
            case "unsent":
                note(client.on_unsent(req_id, now))
            case "stream":
                note(client.on_message(m.StreamOpened(req_id=req_id, stream_id=b"t" * 16), (), now))
                note(client.on_stream(b"t" * 16, m.SubAck(), now))
    while now < 9.0:
        now += 0.05
        note(client.tick(now))
    assert set(ends) == {call.key for call in calls}
    latest = max([1.5, *(passed for *_, passed in events)])
    assert all(ends[call.key] <= call.deadline + 1.0 + latest for call in calls)
    assert client.close()[:-1] == []  # nothing is left but to say goodbye, if to anybody


# --- generations ---------------------------------------------------------------------------------


def run_up(client: ClientCore, call: GenerateCall, now: float = 0.0, stream_id: bytes = b"t" * 16) -> m.Generate:
    """From the stream's opening to the request on its way."""
    opened = client.on_message(m.StreamOpened(req_id=call.req_id, stream_id=stream_id), (), now)
    assert of(opened, Watch) == [Watch(stream_id)]
    [request] = sent(client.on_stream(stream_id, m.SubAck(), now), m.Generate)
    assert client.on_stream(stream_id, m.SubAck(), now) == []
    return request


def started_at(epoch: int, call: GenerateCall) -> m.Started:
    return m.Started(
        req_id=call.req_id,
        epoch=epoch,
        worker_id=f"w{epoch}",
        reason="r",
        model="x",
        prompt_tokens=3,
        cached_tokens=2,
    )


def end_at(epoch: int, call: GenerateCall, tokens: list[int]) -> m.StreamEnd:
    return m.StreamEnd(
        req_id=call.req_id,
        epoch=epoch,
        num_tokens=len(tokens),
        digest=stream_digest(token_bytes(tokens)),
        finish_reason=m.FinishReason.STOP,
        prompt_tokens=3,
        cached_tokens=2,
        queue_ms=0.0,
        prefill_ms=0.0,
        decode_ms=0.0,
    )


def test_a_request_says_its_class() -> None:
    client = core()
    call = generate_call(priority=-5)
    client.submit(call, 0.0)
    assert run_up(client, call).priority == -5


def test_a_request_says_what_its_prompt_begins_with_also_under_a_name() -> None:
    """Its name chooses the worker, and the chain tells that worker's broker what is there from then on."""
    prompt = make_prompt(None, list(range(100)), None, model="", cache_salt="")
    wanted = Wanted(prompt=prompt, sampling=m.Sampling(), seq_id="chat")
    assert prompt.chain
    client, call = core(), GenerateCall(new_id(), 60.0, wanted, 0.0)
    client.submit(call, 0.0)
    assert run_up(client, call).chain == prompt.chain


def test_a_stream_without_confirmation_goes_ahead_in_the_end() -> None:
    client = core()
    call = generate_call()
    assert sent(client.submit(call, 0.0), m.OpenStream)
    client.on_message(m.StreamOpened(req_id=call.req_id, stream_id=b"t" * 16), (), 0.0)
    for now in (0.5, 1.0):
        client.on_message(m.BrokerBeat(beat=1, lease_ms=1), (), now)
        actions = client.tick(now)
        assert (of(actions, Unwatch), of(actions, Watch)) == ([Unwatch(b"t" * 16)], [Watch(b"t" * 16)])
    client.on_message(m.BrokerBeat(beat=1, lease_ms=1), (), 1.5)
    assert sent(client.tick(1.5), m.Generate)


def test_progress_makes_the_next_loss_a_first_one() -> None:
    client, call, now = core(max_retries=1), generate_call(), 0.0
    client.submit(call, now)
    for epoch in range(5):
        request = run_up(client, call, now, bytes([epoch]) * 16)
        assert (request.epoch, request.sampling.seed) == (epoch, 9)
        client.on_message(started_at(epoch, call), (), now)
        tokens = m.StreamTokens(epoch=epoch, seq=epoch, tokens=(epoch,), texts=(str(epoch),))
        emits = of(client.on_stream(request.stream_id, tokens, now), Emit)
        assert emits == [Emit(call.key, Token(epoch, epoch, str(epoch)))]
        assert of(client.on_message(failed(call.key, WorkerLost("x")), (), now), Unwatch)
        now += 0.1
        client.on_message(m.BrokerBeat(beat=1, lease_ms=1), (), now)
        assert sent(client.tick(now), m.OpenStream)
    request = run_up(client, call, now, b"l" * 16)
    client.on_message(started_at(5, call), (), now)
    actions = client.on_message(end_at(5, call, [0, 1, 2, 3, 4]), (), now)
    [settled] = of(actions, Settle)
    assert isinstance(settled.value, Done)
    assert (settled.value.text, settled.value.timings.resumes, settled.value.worker_id) == ("01234", 5, "w5")
    assert sent(actions, m.Ack) == [m.Ack(req_id=call.key, epoch=5, upto=5)]


def test_a_tail_whose_worker_is_gone_is_generated_again() -> None:
    client, call = core(), generate_call()
    client.submit(call, 0.0)
    run_up(client, call)
    client.on_message(started_at(0, call), (), 0.0)
    client.on_message(end_at(0, call, [1, 2]), (), 0.0)
    now, opened = 0.0, 0
    while not opened:
        now += 0.05
        client.on_message(m.BrokerBeat(beat=1, lease_ms=1), (), now)
        opened = len(sent(client.tick(now), m.OpenStream))
    assert 5.0 < now < 6.0
    assert run_up(client, call, now).epoch == 1


def test_a_stream_too_long_to_move_ends_with_its_workers_loss() -> None:
    client, call = core(), generate_call()
    client.submit(call, 0.0)
    request = run_up(client, call)
    client.on_message(started_at(0, call), (), 0.0)
    for seq in range(0, 320, 64):
        tokens = m.StreamTokens(epoch=0, seq=seq, tokens=(1,) * 64, texts=("",) * 64)
        client.on_stream(request.stream_id, tokens, 0.0)
    actions = client.on_message(failed(call.key, WorkerLost("x")), (), 0.0)
    assert isinstance(of(actions, Fail)[0].error, WorkerLost)


def test_tokens_far_beyond_what_was_read_are_refused() -> None:
    client, call = core(), generate_call()
    client.submit(call, 0.0)
    request = run_up(client, call)
    client.on_message(started_at(0, call), (), 0.0)
    fails: list[Fail] = []
    for seq in range(0, 9000, 64):
        tokens = m.StreamTokens(epoch=0, seq=seq, tokens=(1,) * 64, texts=("",) * 64)
        fails += of(client.on_stream(request.stream_id, tokens, 0.0), Fail)
    [fail] = fails
    assert isinstance(fail.error, MalformedMessage)


def test_an_end_without_a_start_is_refused_and_a_stale_start_ignored() -> None:
    client, call = core(), generate_call()
    client.submit(call, 0.0)
    run_up(client, call)
    assert client.on_message(started_at(3, call), (), 0.0) == []
    [fail] = of(client.on_message(end_at(0, call, []), (), 0.0), Fail)
    assert isinstance(fail.error, MalformedMessage)


def test_an_empty_generation_has_its_start_and_its_end() -> None:
    client, call = core(), generate_call()
    client.submit(call, 0.0)
    run_up(client, call)
    [emit] = client.on_message(started_at(0, call), (), 0.0)
    assert isinstance(emit, Emit)
    assert isinstance(emit.event, Start)
    [settled] = of(client.on_message(end_at(0, call, []), (), 1.0), Settle)
    assert isinstance(settled.value, Done)
    assert (settled.value.text, settled.value.timings.ttft_s, settled.value.timings.tokens_per_s) == ("", 1.0, 0.0)


# --- prompts that are scored ---------------------------------------------------------------------

PROMPT = (Token(0, 4, ""), Token(1, 5, "", 0, -1.0, (Alternative(9, -0.5),)), Token(2, 6, "", 0, -2.0, ()))
SCORES = (None, m.TokenLogprobs(-1.0, ((9, -0.5),)), m.TokenLogprobs(-2.0))


def part_at(call: GenerateCall, start: int, stop: int, epoch: int = 0) -> tuple[m.PromptLogprobs, list[bytes]]:
    payload = [pack(PromptPart(token_ids=(4, 5, 6)[start:stop], logprobs=SCORES[start:stop]))]
    described = wire.describe(payload)
    return m.PromptLogprobs(req_id=call.key, epoch=epoch, num_tokens=3, start=start, payload=described), payload


def told(actions: Sequence[Action]) -> list[object]:
    return [emit.event for emit in of(actions, Emit)]


def scored_call() -> GenerateCall:
    prompt = make_prompt("hello", None, None, model="", cache_salt="")
    return GenerateCall(new_id(), 60.0, Wanted(prompt=prompt, sampling=m.Sampling(seed=9, prompt_logprobs=1)), 0.0)


def test_a_prompts_tokens_come_all_at_a_time_and_before_any_other() -> None:
    client, call = core(), scored_call()
    client.submit(call, 0.0)
    request = run_up(client, call)
    token = m.StreamTokens(epoch=0, seq=0, tokens=(7,), texts=("x",))
    assert told(client.on_message(*part_at(call, 0, 2), 0.0)) == []
    assert told(client.on_stream(request.stream_id, token, 0.0)) == [], "it overtook the rest of the prompt"
    assert told(client.on_message(*part_at(call, 1, 3), 0.0)) == [], "a part may repeat what is there; nor has it begun"
    start, prompt = told(client.on_message(started_at(0, call), (), 0.0))
    assert (type(start), prompt) == (Start, PromptTokens(PROMPT))
    assert client.on_message(*part_at(call, 0, 3), 0.0) == []
    later = m.StreamTokens(epoch=0, seq=1, tokens=(8,), texts=("y",))
    assert sent(client.on_stream(request.stream_id, later, 0.0), m.Resume)[0].from_seq == 0
    replay = m.Replay(req_id=call.key, epoch=0, seq=0, tokens=(7,), texts=("x",))
    assert told(client.on_message(replay, (), 0.0)) == [Token(0, 7, "x"), Token(1, 8, "y")]
    [settled] = of(client.on_message(end_at(0, call, [7, 8]), (), 0.0), Settle)
    assert settled.value.prompt == PROMPT


@pytest.mark.parametrize("num_had", [0, 2, 3])
def test_a_prompt_is_asked_for_again_elsewhere_unless_all_of_it_came(num_had: int) -> None:
    client, call = core(), scored_call()
    client.submit(call, 0.0)
    run_up(client, call)
    said = [client.on_message(started_at(0, call), (), 0.0), client.on_message(*part_at(call, 0, num_had), 0.0)]
    client.on_message(failed(call.key, WorkerLost("x")), (), 0.0)
    client.on_message(m.BrokerBeat(beat=1, lease_ms=1), (), 0.1)
    client.tick(0.1)
    request = run_up(client, call, 0.1, b"u" * 16)
    assert request.sampling.prompt_logprobs == (None if num_had == 3 else 1)
    said.append(client.on_message(started_at(1, call), (), 0.1))
    if num_had < 3:
        said.append(client.on_message(*part_at(call, 2, 3, epoch=0), 0.1))  # of the attempt that is over
        said += [client.on_message(*part_at(call, at, at + 1, epoch=1), 0.1) for at in range(3)]
    token = m.StreamTokens(epoch=1, seq=0, tokens=(7,), texts=("x",))
    said.append(client.on_stream(request.stream_id, token, 0.1))
    assert [event for actions in said for event in told(actions)][1:] == [PromptTokens(PROMPT), Token(0, 7, "x")]


@pytest.mark.parametrize(
    ("part", "num_tokens", "start"),
    [
        (PromptPart(token_ids=(5,), logprobs=SCORES[1:2]), 3, 1),
        (PromptPart(token_ids=(4, 5), logprobs=SCORES[:1]), 3, 0),
        (PromptPart(token_ids=(4, 5), logprobs=SCORES[:2]), 1, 0),
        (PromptPart(token_ids=(4,), logprobs=SCORES[1:2]), 3, 0),
        (PromptPart(token_ids=(4, 5), logprobs=(None, None)), 3, 0),
        (PromptPart(token_ids=(4, 5), logprobs=(None, m.TokenLogprobs(0.5))), 3, 0),
        (PromptPart(token_ids=(4, 5), logprobs=(None, m.TokenLogprobs(-1.0, ((1, -1.0), (2, -1.0))))), 3, 0),
    ],
    ids=["hole", "too few", "too many", "first with one", "without one", "above one", "too many alternatives"],
)
def test_a_part_of_a_prompt_that_cannot_be_right_is_refused(part: PromptPart, num_tokens: int, start: int) -> None:
    client, call = core(), scored_call()
    client.submit(call, 0.0)
    run_up(client, call)
    message = m.PromptLogprobs(req_id=call.key, epoch=0, num_tokens=num_tokens, start=start, payload=())
    [fail] = of(client.on_message(message, [pack(part)], 0.0), Fail)
    assert isinstance(fail.error, MalformedMessage)


def test_an_end_without_all_of_the_prompt_is_refused() -> None:
    client, call = core(), scored_call()
    client.submit(call, 0.0)
    run_up(client, call)
    client.on_message(started_at(0, call), (), 0.0)
    client.on_message(*part_at(call, 0, 2), 0.0)
    [fail] = of(client.on_message(end_at(0, call, []), (), 0.0), Fail)
    assert isinstance(fail.error, MalformedMessage)


# --- ends ----------------------------------------------------------------------------------------


def test_abandoning_tells_the_worker_only_if_it_knows() -> None:
    client, call = core(), generate_call()
    client.submit(call, 0.0)
    assert client.abandon(call.key) == []
    call = generate_call()
    client.submit(call, 0.0)
    run_up(client, call)
    assert client.abandon(call.key) == [ToControl(m.Cancel(req_id=call.key)), Unwatch(b"t" * 16)]
    assert client.abandon(call.key) == []


def test_closing_cancels_what_runs_and_says_goodbye() -> None:
    client, call = core(), generate_call()
    client.submit(call, 0.0)
    run_up(client, call)
    assert [type(message) for message in sent(client.close(), m.Message)] == [m.Cancel, m.Goodbye]


def test_a_prompt_beyond_the_brokers_limit_is_refused_before_it_is_sent() -> None:
    client = core(joined=False)
    client.on_message(welcome(max_prompt_bytes=3), (), 0.0)
    client.on_attached(0.0)
    [fail] = client.submit(generate_call(), 0.0)
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, TooLarge)


# --- reads ---------------------------------------------------------------------------------------


def test_each_attempt_of_a_get_has_an_id_of_its_own() -> None:
    client = core()
    call = requests.get(new_id(), 60.0, new_id, "s", 0, 0, None)
    [first] = sent(client.submit(call, 0.0), m.Get)
    client.on_message(failed(first.req_id, WorkerLost("x")), (), 0.0)
    [second] = sent(client.tick(0.1), m.Get)
    assert second.req_id != first.req_id
    meta = TensorMeta(DType.UINT8, (2, 1, 1))
    stale = m.Chunk(req_id=first.req_id, offset=0, payload=wire.describe([b"xx"]))
    assert client.on_message(stale, [b"xx"], 0.1) == []
    value = m.KvValue(req_id=second.req_id, k=meta, v=meta, length=2, payload=wire.describe([b"ab", b"cd"]))
    [settled] = client.on_message(value, [b"ab", b"cd"], 0.1)
    assert isinstance(settled, Settle)
    assert settled.key == call.key
    assert np.array_equal(settled.value.v.ravel(), list(b"cd"))


@pytest.mark.parametrize("shape", [(2**31 - 1, 2**31 - 1, 2**31 - 1), (10_001, 1, 1)])
def test_a_size_that_was_only_claimed_is_never_allocated(shape: tuple[int, ...]) -> None:
    client = core()
    call = requests.get(new_id(), 60.0, new_id, "s", 0, 0, None)
    client.submit(call, 0.0)
    meta = TensorMeta(DType.UINT8, shape)
    [fail] = client.on_message(m.KvValue(req_id=call.key, k=meta, v=meta, length=1), (), 0.0)
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, TooLarge)


def test_more_chunks_than_credit_before_the_value_are_refused() -> None:
    client = core()
    call = requests.get(new_id(), 60.0, new_id, "s", 0, 0, None)
    client.submit(call, 0.0)
    chunk = m.Chunk(req_id=call.key, offset=0, payload=wire.describe([b"x"]))
    for _ in range(8):
        assert client.on_message(chunk, [b"x"], 0.0) == []
    [fail] = client.on_message(chunk, [b"x"], 0.0)
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, MalformedMessage)


def test_a_value_of_no_tokens_needs_no_chunks() -> None:
    client = core()
    call = requests.get(new_id(), 60.0, new_id, "s", 0, 4, 4)
    client.submit(call, 0.0)
    meta = TensorMeta(DType.FLOAT32, (0, 1, 1))
    [settled] = client.on_message(m.KvValue(req_id=call.key, k=meta, v=meta, length=4), (), 0.0)
    assert isinstance(settled, Settle)
    assert settled.value.length == 0


def test_a_write_beyond_the_brokers_limit_is_refused() -> None:
    client = core()
    k = np.zeros((6000, 1, 1), np.uint8)
    [fail] = client.submit(requests.put(new_id(), 60.0, "s", 0, k, k, 1), 0.0)
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, TooLarge)


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((None, None, None), "exactly one"),
        (("a", [1], None), "prompt and token_ids"),
        (("", None, None), "prompt is empty"),
        ((b"a", None, None), "must be text"),
        (("\ud800", None, None), "not valid Unicode"),
        ((None, [], None), "token_ids is empty"),
        ((None, "12", None), "sequence of integers"),
        ((None, 5, None), "sequence of integers"),
        ((None, [-1], None), "token id -1 at position 0"),
        ((None, [1, 2**32], None), "position 1"),
        ((None, [1.5], None), "1.5"),
        ((None, [True], None), "True and False"),
        ((None, np.zeros((2, 2), np.int64), None), "one dimension"),
        ((None, None, []), "at least one"),
        ((None, None, "hi"), "must be a list"),
        ((None, None, [{"role": "user"}]), r"messages\[0\]"),
        ((None, None, [{"role": "user", "content": "a"}, {"role": "user", "content": None}]), r"messages\[1\]"),
        ((None, None, [{"role": "", "content": "a"}]), "role not empty"),
        ((None, None, [{"role": "user", "content": "a", "voice": "x"}]), "besides only"),
        ((None, None, [{"role": "user", "content": "a", "name": 7}]), "name must be text"),
        ((None, None, [{"role": "user", "content": "a", "tool_calls": [7]}]), "list of objects"),
        ((None, None, [{"role": "user", "content": "a", "tool_calls": [{"a": float("nan")}]}]), "plain JSON"),
    ],
)
def test_a_bad_prompt_is_refused_with_what_would_be_right(given: tuple[Any, Any, Any], words: str) -> None:
    with pytest.raises(BadArgument, match=words):
        make_prompt(*given, model="", cache_salt="")


@pytest.mark.parametrize("given", [("x" * (1 << 20) + "x", None, None), ("é" * 600_000, None, None)])
def test_a_prompt_of_more_than_a_mebibyte_is_too_large(given: tuple[Any, Any, Any]) -> None:
    with pytest.raises(TooLarge):
        make_prompt(*given, model="", cache_salt="")
    with pytest.raises(TooLarge):
        make_prompt(None, range(300_000), None, model="", cache_salt="")


def test_prompts_travel_as_text_ids_or_json() -> None:
    assert make_prompt("é", None, None, model="", cache_salt="").payload == "é".encode()
    assert make_prompt(None, np.array([1, 2], np.int32), None, model="", cache_salt="").payload == token_bytes([1, 2])
    chat = make_prompt(None, None, [{"role": "user", "content": "hé"}], model="", cache_salt="")
    assert chat.payload.decode() == '[{"role": "user", "content": "hé"}]'
    assert chat.chain


@pytest.mark.parametrize("name", ["", "a\nb", "\x00", "x" * 257, "é" * 129, 5, None, b"x"])
def test_a_bad_name_is_refused(name: object) -> None:
    with pytest.raises(BadArgument, match="seq_id"):
        check_name("seq_id", name)
    assert optional_name("seq_id", None) == ""


def test_numbers_out_of_range_are_refused() -> None:
    for value in (True, -1, 2**32, 1.0, "1", None):
        with pytest.raises(BadArgument, match="layer must be an integer from 0"):
            check_index("layer", value, 2**32 - 1)
    assert check_index("layer", np.int64(3), 9) == 3
    for value in (True, 0, -1.0, math.nan, math.inf, "5", 7 * 24 * 3600 + 1):
        with pytest.raises(BadArgument, match="deadline must be"):
            check_seconds("deadline", value)
    with pytest.raises(BadArgument, match="before start"):
        requests.get(new_id(), 1.0, new_id, "s", 0, 5, 4)


def test_the_url_comes_from_the_caller_then_the_environment_then_the_default() -> None:
    env = {"KVCACHE_URL": "kvc://a:1", "KVCACHE_BROKER": "tcp://b:2"}
    assert client_config("ipc:///x", 1.0, 2, env).url == "ipc:///x"
    assert client_config(None, 1.0, 2, env).endpoints.control == "tcp://a:1"
    assert client_config(None, 1.0, 2, {"KVCACHE_BROKER": "tcp://b:2"}).url == "tcp://b:2"
    assert client_config(None, 1.0, 2, {"KVCACHE_URL": ""}).url == "tcp://127.0.0.1:5555"
    for url in ("", "localhost", "http://x:1", "tcp://x", "tcp://x:99999", 5):
        with pytest.raises(BadArgument):
            client_config(url, 1.0, 2, {})  # type: ignore[arg-type]  # wrong on purpose
    for timeout, retries in ((0.0, 2), (math.nan, 2), (1.0, -1), (1.0, True)):
        with pytest.raises(BadArgument):
            client_config("tcp://x:1", timeout, retries, {})


def test_an_error_of_the_users_making_is_its_own() -> None:
    """Two requests that fail for one reason do not share an exception, whose traceback and id are per request."""
    client = core(joined=False)
    calls = [length_call(1.0), length_call(1.0)]
    for call in calls:
        client.submit(call, 0.0)
    fails = of(client.on_message(failed(wire.NO_REQUEST, UnsupportedVersion("x")), (), 0.0), Fail)
    assert [fail.error.request_id for fail in fails] == [call.key.hex() for call in calls]
    assert not any(isinstance(fail.error, Cancelled) for fail in fails)


# --- what tokens carry ---------------------------------------------------------------------------


def delivered(asked: int | None, *entries: m.TokenLogprobs) -> list[Token]:
    return as_tokens(Deliver(4, (7, 8), ("x", "y"), entries), asked, 2)


def test_tokens_have_the_logprobs_that_were_asked_for() -> None:
    assert delivered(None) == [Token(4, 7, "x", 2), Token(5, 8, "y", 2)]
    first, second = delivered(1, m.TokenLogprobs(-2.0, ((9, -0.5),)), m.TokenLogprobs(-0.25))
    assert (first.logprob, first.top_logprobs) == (-2.0, (Alternative(9, -0.5),))
    assert (second.logprob, second.top_logprobs) == (-0.25, ())


@pytest.mark.parametrize(
    ("asked", "entries"),
    [
        (None, (m.TokenLogprobs(-1.0),) * 2),
        (0, ()),
        (1, (m.TokenLogprobs(-1.0),)),
        (1, (m.TokenLogprobs(-1.0), m.TokenLogprobs(-1.0, ((1, -1.0), (2, -1.0))))),
        (0, (m.TokenLogprobs(math.nan), m.TokenLogprobs(-1.0))),
        (0, (m.TokenLogprobs(-1.0), m.TokenLogprobs(0.5))),
        (1, (m.TokenLogprobs(-1.0, ((3, math.inf),)), m.TokenLogprobs(-1.0))),
    ],
    ids=["unasked", "missing", "too-few", "too-many-alternatives", "nan", "above-one", "infinite"],
)
def test_logprobs_that_cannot_be_right_are_refused(asked: int | None, entries: tuple[m.TokenLogprobs, ...]) -> None:
    with pytest.raises(MalformedMessage):
        delivered(asked, *entries)
