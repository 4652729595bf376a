"""A token stream's two ends against each other, and each against rows 43 and 44 of the fault catalogue."""

from __future__ import annotations

from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus import stream_log, streams, wire
from bus.errors import MalformedMessage, ReplayExpired, StreamGap, TokenizerError
from bus.messages import Ack, FinishReason, Message, Replay, Resume, StreamBeat, StreamEnd, StreamTokens, TokenLogprobs
from bus.stream_log import StreamLog
from bus.streams import Action, Broken, Deliver, Finished, StreamReceiver

REQ = b"r" * 16


def tokens_at(seq: int, tokens: list[int], epoch: int = 0) -> StreamTokens:
    return StreamTokens(epoch=epoch, seq=seq, tokens=tuple(tokens), texts=tuple(f"<{token}>" for token in tokens))


def replay_at(seq: int, tokens: list[int], *, epoch: int = 0, pull: bool = False) -> Replay:
    texts = tuple(f"<{token}>" for token in tokens)
    return Replay(req_id=REQ, epoch=epoch, seq=seq, tokens=tuple(tokens), texts=texts, pull=pull)


def end_of(tokens: list[int], epoch: int = 0) -> StreamEnd:
    data = b"".join(token.to_bytes(4, "little") for token in tokens)
    return StreamEnd(
        req_id=REQ,
        epoch=epoch,
        num_tokens=len(tokens),
        digest=blake2b(data, digest_size=32).digest(),
        finish_reason=FinishReason.STOP,
        prompt_tokens=1,
        cached_tokens=0,
        queue_ms=0.0,
        prefill_ms=0.0,
        decode_ms=0.0,
    )


def delivered(actions: list[Action]) -> list[int]:
    return [token for action in actions if isinstance(action, Deliver) for token in action.tokens]


def is_paused(log: StreamLog) -> bool:
    return log.is_paused


def is_pulled(log: StreamLog) -> bool:
    return log.is_pulled


def of_kind(actions: list[Action], kind: type[Message]) -> list[Action]:
    return [action for action in actions if isinstance(action, kind)]


# --- the receiver --------------------------------------------------------------------------------


def test_tokens_in_order_are_delivered_with_their_texts_and_the_end_is_acknowledged() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    assert receiver.handle(tokens_at(0, [7, 8]), 0.0) == [Deliver(0, (7, 8), ("<7>", "<8>"))]
    end = end_of([7, 8])
    assert receiver.handle(end, 0.1) == [Ack(req_id=REQ, epoch=0, upto=2), Finished(end)]
    assert receiver.is_over
    assert receiver.handle(tokens_at(2, [9]), 0.2) == []
    assert receiver.tick(9.0) == []


def test_duplicates_and_overlaps_are_trimmed() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    assert delivered(receiver.handle(tokens_at(0, [1, 2]), 0.0)) == [1, 2]
    assert receiver.handle(tokens_at(0, [1, 2]), 0.0) == []
    assert receiver.handle(tokens_at(1, [2, 3, 4]), 0.0) == [Deliver(2, (3, 4), ("<3>", "<4>"))]
    assert receiver.received == b"".join(token.to_bytes(4, "little") for token in (1, 2, 3, 4))


def test_a_hole_is_asked_for_at_once_and_only_once_and_what_was_held_follows() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    receiver.handle(tokens_at(0, [0]), 0.0)
    assert receiver.handle(tokens_at(2, [2]), 0.0) == [Resume(req_id=REQ, epoch=0, from_seq=1)]
    assert receiver.handle(tokens_at(3, [3]), 0.0) == []
    assert delivered(receiver.handle(replay_at(1, [1]), 0.1)) == [1, 2, 3]
    assert receiver.handle(tokens_at(5, [5]), 0.1) == [Resume(req_id=REQ, epoch=0, from_seq=4)]


def test_an_unanswered_resume_is_repeated_after_a_pause() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    assert of_kind(receiver.handle(StreamBeat(epoch=0, next_seq=2), 0.0), Resume)
    assert receiver.tick(streams.RESUME_RETRY_S - 0.01) == []
    assert receiver.tick(streams.RESUME_RETRY_S) == [Resume(req_id=REQ, epoch=0, from_seq=0)]


def test_the_parts_of_one_answer_are_awaited_before_asking_again() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    assert of_kind(receiver.handle(StreamBeat(epoch=0, next_seq=3), 0.0), Resume)
    assert receiver.handle(replay_at(0, [0]), 0.1) == [Deliver(0, (0,), ("<0>",))]
    assert receiver.tick(0.2) == []
    assert delivered(receiver.handle(replay_at(1, [1, 2]), 0.2)) == [1, 2]
    assert receiver.tick(0.3) == []


def test_a_beat_reveals_the_loss_of_the_last_message() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    receiver.handle(tokens_at(0, [1]), 0.0)
    assert receiver.handle(StreamBeat(epoch=0, next_seq=1), 0.5) == []
    assert receiver.handle(StreamBeat(epoch=0, next_seq=2), 1.0) == [Resume(req_id=REQ, epoch=0, from_seq=1)]


def test_an_end_gives_the_tail_a_moment_then_asks_for_it() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    receiver.handle(tokens_at(0, [1]), 0.0)
    assert receiver.handle(end_of([1, 2]), 0.0) == []
    assert receiver.tick(streams.TAIL_GRACE_S / 2) == []
    assert receiver.tick(streams.TAIL_GRACE_S) == [Resume(req_id=REQ, epoch=0, from_seq=1)]
    actions = receiver.handle(replay_at(1, [2]), 0.2)
    assert [type(action) for action in actions] == [Deliver, Ack, Finished]


def test_a_dead_publish_lane_is_noticed_by_its_silence() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    assert receiver.tick(streams.SILENCE_S - 0.01) == []
    assert receiver.tick(streams.SILENCE_S) == [Resume(req_id=REQ, epoch=0, from_seq=0)]
    assert receiver.tick(streams.SILENCE_S + 0.1) == []  # no storm of questions
    assert receiver.handle(replay_at(0, []), streams.SILENCE_S + 0.1) == []
    assert receiver.tick(2 * streams.SILENCE_S) == []  # an answer without tokens: nothing was missed
    actions = receiver.tick(2 * streams.SILENCE_S + 0.1)
    assert of_kind(actions, Resume)
    actions = receiver.handle(replay_at(0, [1, 2]), 2 * streams.SILENCE_S + 0.2)
    assert delivered(actions) == [1, 2]
    assert of_kind(actions, Resume)  # the lane is dead: go on by asking, until the worker lets us pull


def test_a_pulled_stream_asks_on_until_its_end() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    actions = receiver.handle(replay_at(0, [1], pull=True), 0.0)
    assert actions == [Deliver(0, (1,), ("<1>",)), Resume(req_id=REQ, epoch=0, from_seq=1)]
    assert receiver.handle(replay_at(1, [], pull=True), 0.01) == []
    assert receiver.tick(0.01 + streams.PULL_PAUSE_S) == [Resume(req_id=REQ, epoch=0, from_seq=1)]
    assert receiver.handle(end_of([1, 2]), 0.1) == []
    assert of_kind(receiver.handle(replay_at(1, [2], pull=True), 0.2), Ack)
    assert receiver.is_over


def test_only_consumed_tokens_are_acknowledged() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    receiver.handle(tokens_at(0, list(range(64))), 0.0)
    receiver.handle(tokens_at(64, list(range(64))), 0.0)
    assert receiver.tick(1.0) == []
    assert receiver.consume(63, 1.0) == []
    assert receiver.consume(64, 1.0) == [Ack(req_id=REQ, epoch=0, upto=64)]
    assert receiver.consume(65, 1.0) == []
    receiver.handle(StreamBeat(epoch=0, next_seq=128), 1.0)
    due = 1.0 + streams.ACK_S
    assert receiver.tick(due - 0.01) == []
    assert receiver.tick(due) == [Ack(req_id=REQ, epoch=0, upto=65)]
    assert receiver.consume(1000, due) == []  # more than was delivered counts as all of it
    receiver.handle(StreamBeat(epoch=0, next_seq=128), due)
    assert receiver.tick(due + streams.ACK_S) == [Ack(req_id=REQ, epoch=0, upto=128)]


def test_an_older_or_newer_epoch_changes_nothing() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    receiver.handle(tokens_at(0, [1]), 0.0)
    receiver.restart(3, 0.0)
    for epoch in (0, 2, 4):
        for message in (
            tokens_at(1, [9], epoch),
            replay_at(1, [9], epoch=epoch, pull=True),
            StreamBeat(epoch=epoch, next_seq=50),
            end_of([1], epoch),
        ):
            assert receiver.handle(message, 0.1) == []
    assert delivered(receiver.handle(tokens_at(1, [2], 3), 0.2)) == [2]
    with pytest.raises(ValueError, match="epoch 3 does not follow 3"):
        receiver.restart(3, 0.3)


def test_a_restart_forgets_what_the_lost_worker_said() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    receiver.handle(tokens_at(0, [1]), 0.0)
    receiver.handle(tokens_at(2, [77]), 0.0)
    receiver.handle(end_of([1, 2, 3]), 0.0)
    receiver.restart(1, 0.1)
    assert receiver.received == (1).to_bytes(4, "little")
    assert receiver.next_seq == 1
    assert delivered(receiver.handle(tokens_at(1, [5], 1), 0.2)) == [5]  # and not the held 77
    assert receiver.handle(end_of([1, 5], 1), 0.3)[-1] == Finished(end_of([1, 5], 1))


def test_a_wrong_digest_breaks_the_stream() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    receiver.handle(tokens_at(0, [1, 2]), 0.0)
    [action] = receiver.handle(end_of([1, 3]), 0.0)
    assert isinstance(action, Broken)
    assert isinstance(action.error, StreamGap)
    assert receiver.is_over


def test_more_tokens_than_the_end_admits_break_the_stream() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    receiver.handle(tokens_at(0, [1, 2]), 0.0)
    [action] = receiver.handle(end_of([1]), 0.0)
    assert isinstance(action, Broken)
    assert isinstance(action.error, StreamGap)
    assert action.error.message == "the stream ended at token 1, after 2 had arrived"


def test_tokens_without_their_texts_break_the_stream() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    [action] = receiver.handle(StreamTokens(epoch=0, seq=0, tokens=(1, 2), texts=("a",)), 0.0)
    assert isinstance(action, Broken)
    assert isinstance(action.error, MalformedMessage)


def test_what_is_held_is_bounded_and_the_rest_is_replayed() -> None:
    receiver = StreamReceiver(REQ, 0.0)
    for seq in range(1, 2 + 2 * streams.MAX_HELD):
        receiver.handle(tokens_at(seq, [seq]), 0.0)
    assert receiver.handle(tokens_at(1, [1, 2]), 0.0) == []  # a longer one replaces what is held
    assert delivered(receiver.handle(replay_at(0, [0]), 0.1)) == list(range(streams.MAX_HELD + 1))
    assert receiver.tick(1.0) == [Resume(req_id=REQ, epoch=0, from_seq=streams.MAX_HELD + 1)]


# --- the log -------------------------------------------------------------------------------------


def test_a_log_numbers_tokens_after_those_the_client_had() -> None:
    log = StreamLog(REQ, 2, 0.0, resume_tokens=[5, 6])
    assert log.append([7], ["x"], 0.0) == [StreamTokens(epoch=2, seq=2, tokens=(7,), texts=("x",))]
    assert log.next_seq == 3
    assert log.digest == end_of([5, 6, 7]).digest
    with pytest.raises(ReplayExpired):
        log.resume(Resume(req_id=REQ, epoch=2, from_seq=1), 0.0)


def test_what_a_log_publishes_fits_into_messages() -> None:
    log = StreamLog(REQ, 0, 0.0)
    messages = log.append(list(range(200)), ["é" * 50] * 199 + ["x" * stream_log.MAX_PIECE_BYTES], 0.0)
    assert [token for message in messages for token in message.tokens] == list(range(200))
    assert max(len(message.tokens) for message in messages) <= stream_log.MAX_PUBLISHED_TOKENS
    for message in messages:
        assert wire.decode([wire.encode(message)]).message == message
    for replay in log.resume(Resume(req_id=REQ, epoch=0, from_seq=0), 0.0):
        assert wire.decode([wire.encode(replay)]).message == replay


def test_a_text_too_long_to_send_is_refused_and_adds_nothing() -> None:
    log = StreamLog(REQ, 0, 0.0)
    with pytest.raises(TokenizerError, match="limit 4096"):
        log.append([1], ["x" * (stream_log.MAX_PIECE_BYTES + 1)], 0.0)
    assert log.next_seq == 0


def test_the_log_pauses_its_sequence_beyond_the_window_until_it_is_acknowledged() -> None:
    log = StreamLog(REQ, 0, 0.0, window=4)
    log.append([1, 2, 3, 4], ["a"] * 4, 0.0)
    assert not is_paused(log)
    log.append([5], ["a"], 0.0)
    assert is_paused(log)
    log.ack(Ack(req_id=REQ, epoch=1, upto=5))
    assert is_paused(log)  # not its epoch
    log.ack(Ack(req_id=REQ, epoch=0, upto=1))
    assert not is_paused(log)
    log.ack(Ack(req_id=REQ, epoch=0, upto=99))
    assert log.next_seq == 5
    with pytest.raises(ReplayExpired):
        log.resume(Resume(req_id=REQ, epoch=0, from_seq=4), 0.0)


def test_the_log_beats_when_it_has_been_quiet() -> None:
    log = StreamLog(REQ, 0, 0.0)
    assert log.beat(streams.BEAT_S / 2) is None
    log.append([1], ["a"], 0.4)
    assert log.beat(streams.BEAT_S) is None
    assert log.beat(0.4 + streams.BEAT_S) == StreamBeat(epoch=0, next_seq=1)
    assert log.beat(0.5 + streams.BEAT_S) is None


def test_the_third_resume_within_a_second_makes_the_stream_pulled() -> None:
    log = StreamLog(REQ, 0, 0.0)
    log.append(list(range(600)), ["a"] * 600, 0.0)
    ask = Resume(req_id=REQ, epoch=0, from_seq=0)
    assert log.resume(Resume(req_id=REQ, epoch=1, from_seq=0), 0.0) == []
    assert sum(len(replay.tokens) for replay in log.resume(ask, 0.0)) == 600
    log.resume(ask, 0.1)
    log.resume(ask, 1.2)
    assert not is_pulled(log)
    log.resume(ask, 1.3)
    assert not is_pulled(log)
    [replay] = log.resume(ask, 1.4)
    assert is_pulled(log)
    assert replay.pull
    assert len(replay.tokens) == stream_log.MAX_REPLAYED_TOKENS
    assert log.append([600], ["a"], 1.5) == []
    assert log.beat(9.0) is None
    assert log.resume(Resume(req_id=REQ, epoch=0, from_seq=601), 9.0) == [replay_at(601, [], pull=True)]


def test_the_tail_is_all_that_was_not_acknowledged() -> None:
    log = StreamLog(REQ, 0, 0.0)
    log.append(list(range(600)), ["a"] * 600, 0.0)
    log.ack(Ack(req_id=REQ, epoch=0, upto=10))
    assert [token for replay in log.tail() for token in replay.tokens] == list(range(10, 600))
    assert max(len(replay.tokens) for replay in log.tail()) <= stream_log.MAX_REPLAYED_TOKENS
    for replay in log.tail():
        assert wire.decode([wire.encode(replay)]).message == replay
    assert not is_pulled(log)  # it is no answer to a question
    log.ack(Ack(req_id=REQ, epoch=0, upto=600))
    assert log.tail() == []


# --- both ends, over a lane that loses, repeats and reorders -------------------------------------


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[list[int], list[StreamTokens | StreamBeat | Replay]]:
    """A stream, and any mess of true messages of it and false ones of stale epochs."""
    tokens = draw(st.lists(st.integers(0, 2**32 - 1), max_size=30))
    messages: list[StreamTokens | StreamBeat | Replay] = []
    for _ in range(draw(st.integers(0, 40))):
        start = draw(st.integers(0, len(tokens)))
        part = tokens[start : start + draw(st.integers(0, 8))]
        kind = draw(st.sampled_from(["tokens", "replay", "beat", "stale"]))
        if kind == "tokens":
            messages.append(tokens_at(start, part, 1))
        elif kind == "replay":
            messages.append(replay_at(start, part, epoch=1, pull=draw(st.booleans())))
        elif kind == "beat":
            messages.append(StreamBeat(epoch=1, next_seq=start))
        else:
            messages.append(tokens_at(start, [token ^ 1 for token in part], 0))
    return tokens, messages


@given(arrivals())
def test_whatever_arrives_an_exact_prefix_is_delivered(
    case: tuple[list[int], list[StreamTokens | StreamBeat | Replay]],
) -> None:
    tokens, messages = case
    receiver = StreamReceiver(REQ, 0.0)
    receiver.restart(1, 0.0)
    seen: list[int] = []
    now = 0.0
    for message in messages:
        now += 0.01
        for action in receiver.handle(message, now):
            if isinstance(action, Deliver):
                assert action.seq == len(seen)
                assert action.texts == tuple(f"<{token}>" for token in action.tokens)
                seen += action.tokens
            assert not isinstance(action, Broken)
    assert seen == tokens[: len(seen)]
    actions = receiver.handle(replay_at(0, tokens, epoch=1), now) + receiver.handle(end_of(tokens, 1), now)
    assert seen + delivered(actions) == tokens
    assert isinstance(actions[-1], Finished)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    batches=st.lists(st.integers(1, 70), min_size=1, max_size=30),
    loss=st.sampled_from([0, 1, 5, 9, 10]),
    resumed=st.integers(0, 3),
)
def test_both_ends_agree_over_a_lane_that_drops_repeats_and_reorders(
    data: st.DataObject, batches: list[int], loss: int, resumed: int
) -> None:
    """loss: tenths of the published messages that are lost; at 10 the stream must end by pulling."""
    all_tokens = list(range(1000, 1000 + resumed + sum(batches)))
    receiver, epoch, now = StreamReceiver(REQ, 0.0), 0, 0.0
    seen = delivered(receiver.handle(tokens_at(0, all_tokens[:resumed]), now)) if resumed else []
    if resumed:
        epoch = 1
        receiver.restart(epoch, now)
    log = StreamLog(REQ, epoch, now, resume_tokens=all_tokens[:resumed], window=128)
    to_publish = list(batches)
    published: list[StreamTokens | StreamBeat] = []
    reliable: list[Replay | StreamEnd] = []
    ended: StreamEnd | None = None
    for _ in range(3000):
        now += 0.02
        actions = receiver.tick(now)
        if to_publish and not log.is_paused:
            at = log.next_seq
            part = all_tokens[at : at + to_publish.pop(0)]
            published += [m for m in log.append(part, [f"<{t}>" for t in part], now) if _survives(data, loss)]
        beat = log.beat(now)
        if beat is not None and _survives(data, loss):
            published.append(beat)
        if not to_publish and ended is None:
            ended = end_of(all_tokens, epoch)
            assert ended.digest == log.digest
            reliable += [*log.tail(), ended]
        while published and _coin(data):
            message = published.pop(data.draw(st.integers(0, len(published) - 1)))
            actions += receiver.handle(message, now)
            if data.draw(st.integers(0, 4)) == 0:
                actions += receiver.handle(message, now)
        for answer in reliable:
            actions += receiver.handle(answer, now)
        reliable = []
        seen += delivered(actions)
        actions += receiver.consume(len(seen), now)
        for action in actions:
            if isinstance(action, Resume):
                reliable += log.resume(action, now)
            elif isinstance(action, Ack):
                log.ack(action)
        if receiver.is_over:
            break
    assert seen == all_tokens
    assert receiver.is_over
    assert log.tail() == []


def _survives(data: st.DataObject, loss: int) -> bool:
    return loss == 0 or (loss < 10 and data.draw(st.integers(0, 9)) >= loss)


def _coin(data: st.DataObject) -> bool:
    return data.draw(st.booleans())


def test_logprobs_travel_with_their_tokens_whichever_way_these_come() -> None:
    entries = [TokenLogprobs(-float(n), ((n, -0.5),)) for n in range(1, 6)]
    log, receiver = StreamLog(REQ, 0, 0.0), StreamReceiver(REQ, 0.0)
    messages = [part for n in range(5) for part in log.append([n], [""], 0.0, [entries[n]])]
    [first] = receiver.handle(messages[0], 0.0)
    assert first == Deliver(0, (0,), ("",), (entries[0],))
    receiver.handle(messages[3], 0.0)
    [replay] = log.resume(Resume(req_id=REQ, epoch=0, from_seq=1), 0.0)
    delivered = [action for action in receiver.handle(replay, 0.0) if isinstance(action, Deliver)]
    assert [entry for action in delivered for entry in action.logprobs] == entries[1:]


def test_tokens_with_many_logprobs_are_cut_into_messages_that_can_be_sent() -> None:
    top = tuple((2**32 - 1 - n, -1.0) for n in range(20))
    log = StreamLog(REQ, 0, 0.0)
    for _ in range(200):
        log.append([2**32 - 1], ["\u20ac" * 40], 0.0, [TokenLogprobs(-1.0, top)])
    parts = log.tail()
    assert sum(len(part.tokens) for part in parts) == 200
    assert 1 < len(parts[0].tokens) < 256
    for part in parts:
        assert len(part.logprobs) == len(part.tokens)
        assert len(wire.encode(part)) <= wire.MAX_FRAME_BYTES


@pytest.mark.parametrize("is_replay", [False, True])
def test_logprobs_for_some_of_the_tokens_break_the_stream(is_replay: bool) -> None:
    some = (TokenLogprobs(-1.0),)
    wrong: StreamTokens | Replay = StreamTokens(epoch=0, seq=0, tokens=(1, 2), texts=("", ""), logprobs=some)
    if is_replay:
        wrong = Replay(req_id=REQ, epoch=0, seq=0, tokens=(1, 2), texts=("", ""), logprobs=some)
    [action] = StreamReceiver(REQ, 0.0).handle(wrong, 0.0)
    assert isinstance(action, Broken)
    assert isinstance(action.error, MalformedMessage)
