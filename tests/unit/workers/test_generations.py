"""Generations as clients see them: what is told, published, replayed, superseded, orphaned and ended."""

from __future__ import annotations

from itertools import accumulate

import pytest

from bus.errors import ErrorCode, ModelUnavailable
from bus.limits import MAX_INLINE_BYTES, MAX_PROMPT_BYTES, WINDOW_TOKENS
from bus.messages import (
    Ack,
    Cancel,
    Credit,
    Failed,
    FinishReason,
    PromptKind,
    Replay,
    Resume,
    Sampling,
    Started,
    StreamBeat,
    StreamEnd,
    StreamTokens,
    TokenLogprobs,
)
from bus.stats import PromptPart, unpack
from bus.streams import stream_digest, token_bytes
from bus.topics import topic_of
from tests.unit.workers.core_bench import STREAM, CoreBench, answers, commands, published
from workers.calls import Channel, Publish
from workers.engine_api import Admitted, Broke, Ended, Hold, Proceed, Produced, PromptScored, RunId, Start, Stop
from workers.generations import ORPHAN_S
from workers.replies import KEEP_S


@pytest.fixture
def bench() -> CoreBench:
    bench = CoreBench()
    bench.join()
    return bench


def produced(run: RunId, *tokens: int) -> Produced:
    return Produced(run, tokens, tuple(f"<{token}>" for token in tokens))


def ended(run: RunId) -> Ended:
    return Ended(
        run=run,
        finish_reason=FinishReason.LENGTH,
        prompt_tokens=3,
        cached_tokens=1,
        queue_ms=1.0,
        prefill_ms=2.0,
        decode_ms=3.0,
    )


def test_the_engine_is_told_all_it_needs(bench: CoreBench) -> None:
    message = bench.generate(
        priority=-2, model="m", seq_id="s", cache_salt="salt", sampling=Sampling(max_tokens=9, seed=4)
    )
    _, start = bench.start(message, resume=[7, 8], tenant="acme", deadline_ms=5000)
    assert start == Start(
        run=start.run,
        tenant="acme",
        model="m",
        kind=PromptKind.TOKENS,
        prompt=token_bytes([1, 2, 3]),
        resume=(7, 8),
        sampling=Sampling(max_tokens=9, seed=4),
        seq_id="s",
        cache_salt="salt",
        deadline=bench.now + 5.0,
        priority=-2,
    )


def test_a_stream_is_started_published_and_ended_with_a_digest_of_all_tokens(bench: CoreBench) -> None:
    call, start = bench.start(resume=[7])
    (said,) = answers(bench.engine(Admitted(start.run, "m", 3, 1)))
    assert (said.call, said.final) == (call, False)
    assert isinstance(said.message, Started)
    assert (said.message.worker_id, said.message.reason, said.message.cached_tokens) == ("w", "because", 1)

    actions = bench.engine(produced(start.run, 10, 11))
    assert published(actions) == [StreamTokens(epoch=0, seq=1, tokens=(10, 11), texts=("<10>", "<11>"))]
    assert [action.topic for action in actions if isinstance(action, Publish)] == [topic_of(STREAM)]

    said_last = answers(bench.engine(ended(start.run)))[-1]
    assert said_last.final
    assert isinstance(said_last.message, StreamEnd)
    assert (said_last.message.num_tokens, said_last.message.digest) == (3, stream_digest(token_bytes([7, 10, 11])))


def test_what_was_not_acknowledged_is_sent_once_more_on_the_reliable_lane_before_the_end(bench: CoreBench) -> None:
    call, start = bench.start()
    bench.engine(produced(start.run, *range(300)))
    bench.forward(call, Ack(req_id=bytes(16), epoch=0, upto=10))
    said = answers(bench.engine(ended(start.run)))
    replays = [one.message for one in said if isinstance(one.message, Replay)]
    assert [token for replay in replays for token in replay.tokens] == list(range(10, 300))
    assert [one.final for one in said] == [False] * len(replays) + [True]


def test_what_is_told_of_a_prompt_goes_in_parts_of_bounded_size_on_the_reliable_lane(bench: CoreBench) -> None:
    call, start = bench.start(bench.generate(epoch=2, sampling=Sampling(prompt_logprobs=20)))
    entry = TokenLogprobs(-1.5, ((2**32 - 1, -0.25),) * 20)
    said = answers(bench.engine(PromptScored(start.run, 1200, 100, tuple(range(1000)), (None, *[entry] * 999))))
    assert {(one.call, one.final, one.channel) for one in said} == {(call, False, Channel.CONTROL)}
    assert all(len(one.payload[0]) <= MAX_INLINE_BYTES + 64 for one in said)
    assert len(said) < 10
    parts = [unpack(one.payload[0], PromptPart) for one in said]
    assert [token for part in parts for token in part.token_ids] == list(range(1000))
    assert [logprobs for part in parts for logprobs in part.logprobs] == [None, *[entry] * 999]
    starts = list(accumulate((len(part.token_ids) for part in parts[:-1]), initial=100))
    assert [(one.message.epoch, one.message.num_tokens, one.message.start) for one in said] == [
        (2, 1200, at) for at in starts
    ]


def test_a_stream_that_goes_on_cannot_ask_for_its_prompt_again(bench: CoreBench) -> None:
    message = bench.generate(sampling=Sampling(prompt_logprobs=0))
    _, actions = bench.assign(message, token_bytes([1, 2, 3]), token_bytes([7]))
    failure = bench.has_failed(actions)
    assert (failure.code, "prompt_logprobs" in failure.message) == (ErrorCode.BAD_ARG, True)
    assert commands(actions, Start) == []


def test_what_is_told_of_a_prompt_that_nobody_waits_for_is_dropped(bench: CoreBench) -> None:
    _, start = bench.start(bench.generate(sampling=Sampling(prompt_logprobs=0)))
    bench.join(session=b"T" * 16)
    assert answers(bench.engine(PromptScored(start.run, 3, 0, (1,), (None,)))) == []


def test_a_fully_acknowledged_stream_ends_without_a_replay(bench: CoreBench) -> None:
    call, start = bench.start()
    bench.engine(produced(start.run, 1, 2))
    bench.forward(call, Ack(req_id=bytes(16), epoch=0, upto=2))
    assert [type(said.message) for said in answers(bench.engine(ended(start.run)))] == [StreamEnd]


def test_a_gap_is_replayed_on_the_reliable_lane(bench: CoreBench) -> None:
    call, start = bench.start()
    bench.engine(produced(start.run, 1, 2, 3))
    (said,) = answers(bench.forward(call, Resume(req_id=bytes(16), epoch=0, from_seq=1)))
    assert not said.final
    assert (said.message.seq, said.message.tokens) == (1, (2, 3))


def test_three_gaps_within_a_second_stop_the_publishing(bench: CoreBench) -> None:
    call, start = bench.start()
    bench.engine(produced(start.run, 1))
    said = [answers(bench.forward(call, Resume(req_id=bytes(16), epoch=0, from_seq=0)))[0] for _ in range(3)]
    assert [one.message.pull for one in said] == [False, False, True]
    assert published(bench.engine(produced(start.run, 2))) == []
    (last,) = answers(bench.forward(call, Resume(req_id=bytes(16), epoch=0, from_seq=1)))
    assert last.message.tokens == (2,)
    stats = bench.core.stats(bench.now, rss_bytes=0, lag_s=0.0).engine
    assert (stats.gaps_replayed, stats.pulled_streams) == (4, 1)


def test_tokens_that_were_acknowledged_cannot_be_had_again(bench: CoreBench) -> None:
    call, start = bench.start()
    bench.engine(produced(start.run, 1, 2, 3))
    bench.forward(call, Ack(req_id=bytes(16), epoch=0, upto=2))
    actions = bench.forward(call, Resume(req_id=bytes(16), epoch=0, from_seq=0))
    assert bench.has_failed(actions).code == ErrorCode.REPLAY_EXPIRED
    assert commands(actions, Stop) == [Stop(start.run)]


def test_what_is_said_under_another_epoch_means_nothing(bench: CoreBench) -> None:
    call, start = bench.start(bench.generate(epoch=2))
    bench.engine(produced(start.run, 1, 2))
    assert bench.forward(call, Resume(req_id=bytes(16), epoch=1, from_seq=0)) == []
    bench.forward(call, Ack(req_id=bytes(16), epoch=3, upto=2))
    (said,) = answers(bench.forward(call, Resume(req_id=bytes(16), epoch=2, from_seq=0)))
    assert said.message.tokens == (1, 2)


def test_a_client_a_window_behind_pauses_its_sequence_until_it_catches_up(bench: CoreBench) -> None:
    call, start = bench.start()
    assert commands(bench.engine(produced(start.run, *range(WINDOW_TOKENS))), Hold) == []
    assert commands(bench.engine(produced(start.run, 1)), Hold) == [Hold(start.run)]
    assert commands(bench.engine(produced(start.run, 2)), Hold) == [Hold(start.run)]
    assert commands(bench.forward(call, Ack(req_id=bytes(16), epoch=0, upto=1)), Proceed) == []
    assert commands(bench.forward(call, Ack(req_id=bytes(16), epoch=0, upto=2)), Proceed) == [Proceed(start.run)]


def test_a_quiet_stream_beats_so_that_the_loss_of_its_last_message_shows(bench: CoreBench) -> None:
    _, start = bench.start()
    bench.engine(produced(start.run, 1))
    beats = published(bench.pass_time(1.0))
    assert beats == [StreamBeat(epoch=0, next_seq=1)] * 2


def test_nothing_is_published_without_a_lease_and_all_of_it_can_be_had_later(bench: CoreBench) -> None:
    call, start = bench.start()
    bench.pass_time(1.0)
    bench.core.on_control(0, [], bench.now)  # a sign of life, but no lease
    bench.pass_time(1.25, answering=False)
    bench.core.on_control(0, [], bench.now)
    bench.pass_time(1.0, answering=False)
    assert published(bench.engine(produced(start.run, 1))) == []
    assert published(bench.pass_time(0.75, answering=False)) == []
    (said,) = answers(bench.forward(call, Resume(req_id=bytes(16), epoch=0, from_seq=0)))
    assert said.message.tokens == (1,)


def test_a_thawed_worker_publishes_nothing_of_before(bench: CoreBench) -> None:
    _, start = bench.start()
    bench.now += 5.0
    assert published(bench.engine(produced(start.run, 1))) == []


def test_cancel_ends_the_call_and_the_work_and_a_second_one_nothing(bench: CoreBench) -> None:
    call, start = bench.start()
    actions = bench.forward(call, Cancel(req_id=bytes(16)))
    assert bench.has_failed(actions).code == ErrorCode.CANCELLED
    assert commands(actions, Stop) == [Stop(start.run)]
    assert bench.forward(call, Cancel(req_id=bytes(16))) == []
    assert bench.engine(produced(start.run, 1), ended(start.run)) == []


def test_an_engine_that_cannot_go_on_fails_the_call(bench: CoreBench) -> None:
    call, start = bench.start()
    (said,) = answers(bench.engine(Broke(start.run, ModelUnavailable("broken weights"))))
    assert (said.call, said.final, said.message.code) == (call, True, ErrorCode.MODEL_UNAVAILABLE)
    assert isinstance(said.message, Failed)


def test_a_text_too_long_to_send_fails_its_own_stream(bench: CoreBench) -> None:
    _, start = bench.start()
    actions = bench.engine(Produced(start.run, (1,), ("x" * 5000,)))
    assert bench.has_failed(actions).code == ErrorCode.TOKENIZER
    assert commands(actions, Stop) == [Stop(start.run)]


def test_one_that_may_not_have_its_name_replaces_nothing(bench: CoreBench) -> None:
    """After a minute the worker no longer knows that the same id meant another request."""
    message = bench.generate(seq_id="mine")
    call, start = bench.start(message, deadline_ms=300_000)
    bench.start(bench.generate(seq_id="theirs"), deadline_ms=300_000)
    bench.pass_time(KEEP_S + 1)
    again = bench.generate(req_id=message.req_id, epoch=1, attempt=1, seq_id="theirs")
    _, actions = bench.assign(again, token_bytes([1, 2, 3]))
    assert bench.has_failed(actions).code == ErrorCode.CONFLICT
    (end,) = [said for said in answers(bench.engine(ended(start.run))) if said.final]
    assert (end.call, end.message.num_tokens) == (call, 0)


def test_the_same_request_under_a_higher_epoch_replaces_the_one_that_runs(bench: CoreBench) -> None:
    message = bench.generate()
    call, old = bench.start(message)
    again = bench.generate(req_id=message.req_id, epoch=1, attempt=1, stream_id=b"n" * 16)
    new_call, actions = bench.assign(again, token_bytes([1, 2, 3]), token_bytes([10]))
    assert commands(actions, Stop) == [Stop(old.run)]
    new = commands(actions, Start)[0]
    assert [(said.call, said.message.code) for said in answers(actions)] == [(call, ErrorCode.STALE_EPOCH)]
    assert bench.engine(produced(old.run, 11)) == []
    assert published(bench.engine(produced(new.run, 11))) == [
        StreamTokens(epoch=1, seq=1, tokens=(11,), texts=("<11>",))
    ]
    assert answers(bench.engine(ended(new.run)))[-1].call == new_call


@pytest.mark.parametrize("epoch", [1, 2])
def test_the_same_request_under_no_higher_epoch_is_refused(bench: CoreBench, epoch: int) -> None:
    message = bench.generate(epoch=2)
    bench.start(message)
    _, actions = bench.assign(bench.generate(req_id=message.req_id, epoch=epoch), token_bytes([1, 2, 3]))
    failed = bench.has_failed(actions)
    assert (failed.code, failed.detail) == (ErrorCode.STALE_EPOCH, 2)
    assert commands(actions, Stop) == []


def test_the_same_request_id_for_another_prompt_is_refused(bench: CoreBench) -> None:
    message = bench.generate()
    bench.start(message)
    _, actions = bench.assign(bench.generate(req_id=message.req_id, epoch=1), token_bytes([9]))
    assert bench.has_failed(actions).code == ErrorCode.CONFLICT
    assert commands(actions, Stop) == []


def test_an_orphan_is_held_for_the_client_that_asks_again(bench: CoreBench) -> None:
    message = bench.generate(seq_id="s")
    _, old = bench.start(message)
    bench.engine(produced(old.run, 10))
    actions = bench.join(session=b"T" * 16)
    assert commands(actions, Hold) == [Hold(old.run)]
    late = bench.engine(produced(old.run, 11))  # its prompt was still being computed
    assert (published(late), commands(late, Hold)) == ([], [Hold(old.run)])
    bench.pass_time(ORPHAN_S - 1)
    again = bench.generate(req_id=message.req_id, epoch=1, seq_id="s")
    _, actions = bench.assign(again, token_bytes([1, 2, 3]), token_bytes([10]))
    assert commands(actions, Stop) == [Stop(old.run)]
    assert len(commands(actions, Start)) == 1
    assert answers(actions) == []


def test_an_orphan_that_nobody_comes_back_for_is_stopped(bench: CoreBench) -> None:
    _, old = bench.start(bench.generate(seq_id="s"))
    bench.join(session=b"T" * 16)
    assert commands(bench.pass_time(ORPHAN_S - 0.25), Stop) == []
    assert commands(bench.pass_time(0.5), Stop) == [Stop(old.run)]
    bench.start(bench.generate(seq_id="s"))


def test_an_orphan_that_ends_is_told_to_nobody(bench: CoreBench) -> None:
    _, one = bench.start()
    _, two = bench.start()
    bench.join(session=b"T" * 16)
    admitted = Admitted(one.run, "m", 3, 0)
    assert bench.engine(admitted, ended(one.run), Broke(two.run, ModelUnavailable("x"))) == []


def test_one_name_has_one_writer_at_a_time(bench: CoreBench) -> None:
    _, start = bench.start(bench.generate(seq_id="s"))
    _, actions = bench.assign(bench.generate(seq_id="s"), token_bytes([1]))
    assert bench.has_failed(actions).code == ErrorCode.CONFLICT
    bench.start(bench.generate(seq_id="s"), tenant="other")
    bench.engine(ended(start.run))
    bench.start(bench.generate(seq_id="s"))


@pytest.mark.parametrize(
    ("sampling", "prompt", "resume", "code"),
    [
        (Sampling(temperature=float("nan")), b"\x01\0\0\0", None, ErrorCode.BAD_ARG),
        (Sampling(max_tokens=0), b"\x01\0\0\0", None, ErrorCode.BAD_ARG),
        (Sampling(), b"\x01\0\0\0", b"\x01\0", ErrorCode.BAD_ARG),
        (Sampling(max_tokens=1), b"\x01\0\0\0", token_bytes([1, 2]), ErrorCode.BAD_ARG),
        (Sampling(), bytes(MAX_PROMPT_BYTES + 4), None, ErrorCode.TOO_LARGE),
    ],
)
def test_a_request_that_is_wrong_never_reaches_the_engine(
    bench: CoreBench, sampling: Sampling, prompt: bytes, resume: bytes | None, code: ErrorCode
) -> None:
    payload = [prompt] if resume is None else [prompt, resume]
    _, actions = bench.assign(bench.generate(sampling=sampling), *payload)
    assert bench.has_failed(actions).code == code
    assert commands(actions, Start) == []


def test_credit_has_no_place_in_a_generation(bench: CoreBench) -> None:
    call, start = bench.start()
    actions = bench.forward(call, Credit(req_id=bytes(16), chunks=1))
    assert bench.has_failed(actions).code == ErrorCode.BAD_ARG
    assert commands(actions, Stop) == [Stop(start.run)]
